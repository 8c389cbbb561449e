// noisy_logits without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against the definition in scalar double; ragged sizes, in place and not, every buffer between sentinels.
#include "kernels/noisy_logits/noisy_logits.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(noisy_logits_cpu, (const NoisyLogits& args, int64_t row_begin, int64_t row_end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::NoisyLogits;

struct Case {
  int64_t rows = 3, classes = 10;
  DType dtype = DType::kFloat32;
  bool per_sample = false, additive = false;
  double sigma = 0.5, alpha = 0.5;
  int64_t row_offset = 0;
  bool in_place = false;
  bool masked = false;  // a third of the classes are -inf
  int64_t offset = 0;   // elements from a well aligned address to the logits'

  std::string name() const {
    return described({{"rows", rows},
                      {"classes", classes},
                      {"dtype", static_cast<int>(dtype)},
                      {"per_sample", per_sample},
                      {"additive", additive},
                      {"sigma", sigma},
                      {"alpha", alpha},
                      {"row_offset", row_offset},
                      {"in_place", in_place},
                      {"masked", masked},
                      {"offset", offset}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const NoisyLogits& args);
};

template <void (*kCpu)(const NoisyLogits&, int64_t, int64_t)>
void run_cpu(const NoisyLogits& args) {
  kCpu(args, 0, args.rows);
}

void run_rows_apart(const NoisyLogits& args) {
  for (int64_t begin = 0; begin < args.rows;) {
    const int64_t end = std::min(args.rows, begin + 1 + begin % 7);
    pykd::noisy_logits_cpu(args, begin, end);
    begin = end;
  }
}

void run_cuda(const NoisyLogits& args) { check(pykd::noisy_logits_cuda(args, nullptr) == 0, "the launch"); }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::noisy_logits_cpu>}, {"cpu, rows apart", run_rows_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, noisy_logits_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        logits(c.dtype, c.rows * c.classes, c.offset),
        noisy(c.dtype, c.in_place ? 0 : c.rows * c.classes, c.offset) {
    std::mt19937_64 random(static_cast<uint64_t>(c.rows * 7919 + c.classes));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t i = 0; i < c.rows * c.classes; ++i)
      logits.set(i, c.masked && random() % 3 == 0 ? -kInfinity : normal(random));
  }

  NoisyLogits args() {
    return {logits.data(),
            c.in_place ? logits.data() : noisy.data(),
            c.rows,
            c.classes,
            c.dtype,
            {c.sigma, static_cast<uint64_t>(std::llround(c.alpha * 4294967296.0)), c.sigma > 0 ? seed() : nullptr,
             c.row_offset, 1, c.per_sample, c.additive}};
  }

  bool intact() const { return logits.intact() && noisy.intact(); }
  const Buffer& result() const { return c.in_place ? logits : noisy; }

  Case c;
  Buffer logits, noisy;
};

// Every kernel on one problem, against the definition: a row that is not selected keeps its bits, a class of -inf
// stays.
void run(const Case& c) {
  Problem before(c);
  const NoisyLogits args = before.args();
  std::vector<double> expected(static_cast<size_t>(c.rows * c.classes)), slack(expected);
  for (int64_t r = 0; r < c.rows; ++r) {
    const RowNoise noise = noise_of(args.noise, r, c.classes);
    for (int64_t j = 0; j < c.classes; ++j) {
      const size_t at = static_cast<size_t>(r * c.classes + j);
      const double z = before.logits.get(r * c.classes + j), n = noise.noise[static_cast<size_t>(j)];
      expected[at] = z == -kInfinity || !noise.selected ? z : c.additive ? z + n : z + z * n;
      if (!noise.selected || z == -kInfinity) continue;
      const double size = std::fabs(z) + (c.additive ? 1 + std::fabs(n) : std::fabs(z * n));
      slack[at] = 16 * roundoff(loss_dtype_of(c.dtype)) * size + 2 * roundoff(c.dtype) * std::fabs(expected[at]) +
                  (c.dtype == DType::kFloat16 ? 0x1p-24 : 0);
    }
  }
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    kernel.run(p.args());
    bool ok = p.intact() && (c.in_place || p.logits == before.logits);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double actual = p.result().get(static_cast<int64_t>(i));
      ok = ok && (actual == expected[i] || std::fabs(actual - expected[i]) <= slack[i]);
    }
    check(ok, std::string(kernel.name) + ":" + c.name());
  }
}

constexpr std::array kOneDType = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

void test_sizes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](int64_t rows, int64_t classes) {
    Case c{.rows = rows, .classes = classes, .dtype = kOneDType[random() % 2 == 0 ? 0 : random() % kOneDType.size()]};
    c.per_sample = one_of(false, false, true);
    c.additive = one_of(false, true);
    c.sigma = one_of(0.5, 0.5, 0.5, 2.0, 0.0);
    c.alpha = one_of(0.5, 0.5, 1.0, 0.0);
    c.row_offset = one_of(int64_t{0}, (int64_t{1} << 32) - 2, int64_t{5} << 33);
    c.in_place = one_of(false, true);
    c.masked = one_of(false, true);
    c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{3});
    run(c);
  };
  for (int64_t classes : {1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 100, 1000, 1023, 1024, 1025, 2049})
    for (int64_t rows : {0, 1, 3, 65})
      for (int i = 0; i < (rows * classes < 5000 ? 4 : 1); ++i) with(rows, classes);
  for (int64_t classes : {8191, 8192, 8193, 16388, 20008}) with(3, classes);
  for (DType dtype : kOneDType)
    for (int kind = 0; kind < 4; ++kind)
      run({.rows = 5, .classes = 40, .dtype = dtype, .per_sample = kind / 2 == 1, .additive = kind % 2 == 1});
}

// NaN and +inf show, in their own place alone; the noise of a whole row has no part in it.
void test_extreme_values() {
  for (const Kernel& kernel : kernels())
    for (bool additive : {false, true}) {
      const Case c{.rows = 3, .classes = 1030, .additive = additive, .alpha = 1};
      Problem clean(c), p(c);
      p.logits.set(1030 + 3, std::numeric_limits<double>::quiet_NaN());
      p.logits.set(1030 + 1029, kInfinity);
      kernel.run(clean.args());
      kernel.run(p.args());
      bool ok = std::isnan(p.noisy.get(1030 + 3)) && !std::isfinite(p.noisy.get(1030 + 1029));
      for (int64_t i = 0; i < 3 * 1030; ++i)
        ok = ok && (i == 1030 + 3 || i == 1030 + 1029 || p.noisy.get(i) == clean.noisy.get(i));
      check(ok, std::string(kernel.name) + ": NaN and infinity stay where they are");
    }
}

// A launch alone, at the shapes of small images' classes.
void test_launches() {
  for (int64_t classes : {10, 100})
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Problem p({.rows = 128, .classes = classes, .dtype = dtype});
      check(launches_once([&] { run_cuda(p.args()); }) && p.intact(), "cuda: one launch:" + p.c.name());
    }
}

}  // namespace

int main() {
  test_sizes();
  test_extreme_values();
  test_launches();
  return report();
}
