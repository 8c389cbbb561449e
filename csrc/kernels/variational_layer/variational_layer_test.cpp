// variational_layer without torch: the CPU kernels of every level this processor runs and the CUDA kernel, under
// emulation, against the definition in scalar double; ragged sizes, every buffer between sentinels.
#include "kernels/variational_layer/variational_layer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(variational_layer_cpu, (const VariationalLayer& args, int64_t row_begin, int64_t row_end))
PYKD_DECLARE_LEVELS(variance_weights_cpu, (const VarianceWeights& args, int64_t begin, int64_t end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::VarianceWeights;
using pykd::VariationalLayer;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Case {
  int64_t rows = 3, classes = 10;
  DType dtype = DType::kFloat32;
  bool backward = false;
  int64_t row_offset = 0;
  int64_t offset = 0;  // elements from a well aligned address to the values'

  std::string name() const {
    return described({{"rows", rows},
                      {"classes", classes},
                      {"dtype", static_cast<int>(dtype)},
                      {"backward", backward},
                      {"row_offset", row_offset},
                      {"offset", offset}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const VariationalLayer& args);
};

template <void (*kCpu)(const VariationalLayer&, int64_t, int64_t)>
void run_cpu(const VariationalLayer& args) {
  kCpu(args, 0, args.rows);
}

void run_rows_apart(const VariationalLayer& args) {
  for (int64_t begin = 0; begin < args.rows;) {
    const int64_t end = std::min(args.rows, begin + 1 + begin % 7);
    pykd::variational_layer_cpu(args, begin, end);
    begin = end;
  }
}

void run_cuda(const VariationalLayer& args) { check(pykd::variational_layer_cuda(args, nullptr) == 0, "the launch"); }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::variational_layer_cpu>}, {"cpu, rows apart", run_rows_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, variational_layer_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        sample(c.dtype, c.rows * c.classes, c.offset),
        deviation(loss_dtype_of(c.dtype), c.rows * c.classes, c.offset),
        grad_variance(loss_dtype_of(c.dtype), c.backward ? c.rows * c.classes : 0, c.offset) {
    std::mt19937_64 random(static_cast<uint64_t>(c.rows * 7919 + c.classes));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < c.rows * c.classes; ++i) {
      sample.set(i, 3 * normal(random));
      deviation.set(i, random() % 8 == 0 && !c.backward ? 0 : std::exp(2 * normal(random)));
    }
  }

  VariationalLayer args() {
    VariationalLayer a{};
    a.grad_sample = c.backward ? sample.data() : nullptr;
    a.sample = c.backward ? nullptr : sample.data();
    a.deviation = deviation.data();
    a.grad_variance = c.backward ? grad_variance.data() : nullptr;
    a.rows = c.rows;
    a.classes = c.classes;
    a.dtype = c.dtype;
    a.noise = {1, uint64_t{1} << 32, seed(), c.row_offset, 1, false, true};
    return a;
  }

  bool intact() const { return sample.intact() && deviation.intact() && grad_variance.intact(); }

  Case c;
  Buffer sample, deviation, grad_variance;  // sample: or its gradient
};

// Every kernel on one problem, against the definition.
void run(const Case& c) {
  Problem before(c);
  const VariationalLayer args = before.args();
  const size_t count = static_cast<size_t>(c.rows * c.classes);
  // 16 roundings, the noise's own among them; a sample of two bytes is rounded once more.
  const double unit = 16 * roundoff(loss_dtype_of(c.dtype));
  std::vector<double> expected(count), slack(count), root(count);
  for (int64_t r = 0; r < c.rows; ++r) {
    const RowNoise noise = noise_of(args.noise, r, c.classes);
    for (int64_t j = 0; j < c.classes; ++j) {
      const int64_t i = r * c.classes + j;
      const size_t at = static_cast<size_t>(i);
      const double eps = noise.noise[static_cast<size_t>(j)], given = before.sample.get(i);
      if (c.backward) {
        const double factor = given / (2 * before.deviation.get(i));
        expected[at] = factor * eps;
        slack[at] = unit * std::fabs(factor) * (1 + std::fabs(eps));
      } else {
        root[at] = std::sqrt(before.deviation.get(i) + 1e-8);
        expected[at] = given + root[at] * eps;
        slack[at] = unit * (std::fabs(given) + root[at] * (1 + std::fabs(eps))) +
                    2 * roundoff(c.dtype) * std::fabs(expected[at]) + (c.dtype == DType::kFloat16 ? 0x1p-24 : 0);
      }
    }
  }
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    kernel.run(p.args());
    bool ok = p.intact() && (!c.backward || (p.sample == before.sample && p.deviation == before.deviation));
    for (size_t at = 0; at < count; ++at) {
      const int64_t i = static_cast<int64_t>(at);
      ok = ok && std::fabs((c.backward ? p.grad_variance : p.sample).get(i) - expected[at]) <= slack[at];
      if (!c.backward) ok = ok && std::fabs(p.deviation.get(i) - root[at]) <= unit * root[at];
    }
    check(ok, std::string(kernel.name) + ":" + c.name());
  }
}

// ---- what is tested ------------------------------------------------------------------------------------------------

constexpr std::array kAll = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

void test_sizes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](int64_t rows, int64_t classes) {
    for (bool backward : {false, true}) {
      Case c{.rows = rows, .classes = classes, .dtype = kAll[random() % 2 == 0 ? 0 : random() % kAll.size()]};
      c.backward = backward;
      c.row_offset = one_of(int64_t{0}, (int64_t{1} << 32) - 2, int64_t{5} << 33);
      c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{3});
      run(c);
    }
  };
  for (int64_t classes : {1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 100, 300, 1023, 1024, 1025, 2049})
    for (int64_t rows : {0, 1, 3, 65})
      for (int i = 0; i < (rows * classes < 5000 ? 2 : 1); ++i) with(rows, classes);
  for (int64_t classes : {4095, 4096, 4097, 8200, 12292}) with(3, classes);
  for (DType dtype : kAll)
    for (bool backward : {false, true}) run({.rows = 5, .classes = 40, .dtype = dtype, .backward = backward});
}

// A row's noise is that of its global index: half a batch, with an offset, is the second half of the whole to the bit.
void test_rows_stand_alone() {
  for (const Kernel& kernel : kernels())
    for (int64_t classes : {10, 129, 4100}) {
      const Case c{.rows = 6, .classes = classes};
      Problem whole(c), half(c);
      kernel.run(whole.args());
      VariationalLayer args = half.args();
      const int64_t skipped = 3 * classes * 4;
      args.sample = half.sample.data() + skipped;
      args.deviation = half.deviation.data() + skipped;
      args.rows = 3;
      args.noise.row_offset = 3;
      const Problem untouched(c);
      kernel.run(args);
      bool same = half.intact();
      for (int64_t i = 0; i < 6 * classes; ++i)
        same = same && half.sample.get(i) == (i < 3 * classes ? untouched : whole).sample.get(i);
      check(same, std::string(kernel.name) + ": rows stand alone:" + c.name());
    }
}

// No variance leaves the root of its floor; NaN and infinity stay where they are.
void test_extreme_values() {
  for (const Kernel& kernel : kernels())
    for (bool backward : {false, true}) {
      const Case c{.rows = 3, .classes = 1030, .backward = backward};
      Problem clean(c), p(c);
      const int64_t places[] = {3, 1030, 2059};
      p.deviation.set(places[0], kNan);
      p.sample.set(places[1], kNan);
      p.deviation.set(places[2], kInfinity);
      kernel.run(clean.args());
      kernel.run(p.args());
      const Buffer &found = backward ? p.grad_variance : p.sample,
                   &other = backward ? clean.grad_variance : clean.sample;
      bool ok = p.intact() && std::isnan(found.get(places[0])) && std::isnan(found.get(places[1])) &&
                (backward ? found.get(places[2]) == 0 : std::isinf(found.get(places[2])));
      for (int64_t i = 0; i < 3 * 1030; ++i)
        ok = ok && (std::count(std::begin(places), std::end(places), i) || found.get(i) == other.get(i));
      check(ok, std::string(kernel.name) + ": NaN and infinity stay where they are");
    }
}

struct Exponential {
  const char* name;
  void (*run)(const VarianceWeights& args, int64_t begin, int64_t end);
};

template <void (*kCpu)(const VarianceWeights&, int64_t, int64_t)>
void run_exponential(const VarianceWeights& args, int64_t begin, int64_t end) {
  kCpu(args, begin, end);
}

void test_variance_weights() {
  std::vector<Exponential> all = {{"cpu", run_exponential<pykd::variance_weights_cpu>}};
  PYKD_ADD_LEVELS(all, run_exponential, variance_weights_cpu);
  for (const Exponential& exponential : all)
    for (DType dtype : kAll)
      for (int64_t size : {0, 1, 3, 8, 17, 1023, 1025, 2100}) {
        const DType wide = loss_dtype_of(dtype);
        Buffer from(dtype, size, 1), to(wide, size, 1);
        std::mt19937_64 random(static_cast<uint64_t>(size));
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < size; ++i) from.set(i, 4 * normal(random) - 6);
        const double special[] = {-kInfinity, kInfinity, kNan, -200, 88, -80, 0};
        for (int64_t i = 0; i < 7 && size > 100; ++i) from.set(3 * i, special[i]);
        const VarianceWeights args{from.data(), to.data(), dtype};
        exponential.run(args, 0, size / 3);
        exponential.run(args, size / 3, size);
        bool ok = from.intact() && to.intact();
        for (int64_t i = 0; i < size; ++i) {
          const double x = from.get(i), expected = std::exp(x), found = to.get(i);
          const double allowed = 16 * roundoff(wide) * (1 + std::fabs(x)) * expected + 1.2e-38;
          ok = ok && (std::isnan(x) ? std::isnan(found) : found == expected || std::fabs(found - expected) <= allowed);
        }
        check(ok, std::string(exponential.name) + ": sigma2," +
                      described({{"size", size}, {"dtype", static_cast<int>(dtype)}}));
      }
}

}  // namespace

int main() {
  test_sizes();
  test_rows_stand_alone();
  test_extreme_values();
  test_variance_weights();
  return report();
}
