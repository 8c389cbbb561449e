// block_prox without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against the definition in scalar double; blocks that do not divide, every buffer between sentinels.
#include "kernels/block_prox/block_prox.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(block_prox_cpu, (const BlockProx& args, int64_t unit_begin, int64_t unit_end))

namespace {

using namespace pykd::testing;
using pykd::BlockProx;
using pykd::BlockProxWeight;
using pykd::Blocks;
using pykd::DType;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// ---- one problem ---------------------------------------------------------------------------------------------------

// As the glue packs them: no rows where there are no entries.
Blocks blocks(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns) {
  if (rows * columns == 0) return {};
  return {rows, columns, std::min(rows, block_rows), std::min(columns, block_columns)};
}

struct Case {
  std::vector<Blocks> weights;
  DType dtype = DType::kFloat32;
  bool linf = false;
  double threshold = 1, size = 1;  // size: of the weights
  int64_t offset = 0;              // entries from a well aligned address

  std::string name() const {
    std::string name = described({{"dtype", static_cast<int>(dtype)},
                                  {"linf", linf},
                                  {"threshold", threshold},
                                  {"size", size},
                                  {"offset", offset}});
    for (const Blocks& b : weights)
      name += described({{"|", b.rows}, {"x", b.columns}, {"by", b.block_rows}, {"x", b.block_columns}});
    return name;
  }
};

struct Kernel {
  const char* name;
  void (*run)(const BlockProx& args);
};

template <void (*kCpu)(const BlockProx&, int64_t, int64_t)>
void run_cpu(const BlockProx& args) {
  kCpu(args, 0, pykd::block_prox_units(args));
}

void run_units_apart(const BlockProx& args) {
  const int64_t units = pykd::block_prox_units(args);
  for (int64_t begin = 0; begin < units;) {
    const int64_t end = std::min(units, begin + 1 + begin % 3);
    pykd::block_prox_cpu(args, begin, end);
    begin = end;
  }
}

void run_cuda(const BlockProx& args) { check(pykd::block_prox_cuda(args, nullptr) == 0, "the launch"); }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::block_prox_cpu>}, {"cpu, units apart", run_units_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, block_prox_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c) : c(c) {
    std::mt19937_64 random(7919);
    std::normal_distribution<double> normal(0, 1);
    for (const Blocks& b : c.weights) {
      weights.emplace_back(c.dtype, b.rows * b.columns, c.offset);
      // Pruned weights among the others, and many of the same magnitude.
      for (int64_t i = 0; i < b.rows * b.columns; ++i) {
        const double w = normal(random);
        weights.back().set(i, c.size * (random() % 4 == 0 ? 0 : random() % 3 == 0 ? std::copysign(1, w) : w));
      }
    }
  }

  // Valid while this lives and does not move.
  BlockProx args() {
    packed.clear();
    for (size_t i = 0; i < weights.size(); ++i) packed.push_back({weights[i].data(), c.weights[i]});
    return {packed.data(), static_cast<int64_t>(packed.size()), c.threshold, c.dtype, c.linf};
  }

  bool intact() const {
    return std::all_of(weights.begin(), weights.end(), [](const Buffer& b) { return b.intact(); });
  }

  Case c;
  std::vector<Buffer> weights;
  std::vector<BlockProxWeight> packed;
};

// use(indices) for each group of a weight.
template <typename Use>
void each_group(const Blocks& b, const Use& use) {
  for (int64_t i = 0; i < b.grid_rows(); ++i)
    for (int64_t j = 0; j < b.grid_columns(); ++j) {
      std::vector<int64_t> indices;
      for (int64_t r = i * b.block_rows; r < std::min(b.rows, (i + 1) * b.block_rows); ++r)
        for (int64_t c = j * b.block_columns; c < std::min(b.columns, (j + 1) * b.block_columns); ++c)
          indices.push_back(r * b.columns + c);
      use(indices);
    }
}

// Where clipping takes `threshold` off the sum of the magnitudes, found by sorting them.
double level_of(std::vector<double> magnitudes, double threshold) {
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<>());
  double sum = 0, level = 0;
  for (size_t i = 0; i < magnitudes.size(); ++i) {
    sum += magnitudes[i];
    const double next = (sum - threshold) / static_cast<double>(i + 1);
    if (magnitudes[i] > next) level = next;
  }
  return std::max(level, 0.0);
}

// Every kernel on one problem, against the definition.
void run(const Case& c) {
  Problem before(c);
  const double unit = 64 * roundoff(loss_dtype_of(c.dtype));
  std::vector<std::vector<double>> expected, slack;
  for (size_t k = 0; k < c.weights.size(); ++k) {
    const Buffer& weight = before.weights[k];
    expected.emplace_back(static_cast<size_t>(c.weights[k].rows * c.weights[k].columns));
    slack.push_back(expected.back());
    each_group(c.weights[k], [&](const std::vector<int64_t>& indices) {
      std::vector<double> magnitudes;
      double most = 0;
      long double squares = 0;
      for (int64_t i : indices) {
        magnitudes.push_back(std::fabs(weight.get(i)));
        most = std::max(most, magnitudes.back());
        squares += static_cast<long double>(magnitudes.back()) * magnitudes.back();
      }
      const double norm = static_cast<double>(sqrtl(squares)), level = c.linf ? level_of(magnitudes, c.threshold) : 0;
      for (int64_t i : indices) {
        const double w = weight.get(i);
        const double near = c.linf               ? std::clamp(w, -level, level)
                            : norm > c.threshold ? w * (1 - c.threshold / norm)
                                                 : 0;
        const size_t at = static_cast<size_t>(i);
        expected[k][at] = near;
        slack[k][at] = unit * (c.linf ? most : std::fabs(w)) + 2 * roundoff(c.dtype) * std::fabs(near) +
                       (c.dtype == DType::kFloat16 ? 0x1p-24 : 0);
      }
    });
  }
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    kernel.run(p.args());
    bool ok = true;
    for (size_t k = 0; k < c.weights.size(); ++k)
      for (size_t i = 0; i < expected[k].size(); ++i)
        ok &= std::fabs(p.weights[k].get(static_cast<int64_t>(i)) - expected[k][i]) <= slack[k][i];
    check(ok, std::string(kernel.name) + ":" + c.name());
    check(p.intact(), std::string(kernel.name) + ":" + c.name() + ": sentinels");
  }
}

// ---- tests ---------------------------------------------------------------------------------------------------------

constexpr std::array kOneDType = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

void test_shapes() {
  std::mt19937 random(1);
  const auto alone = [&](int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns) {
    const double entries = static_cast<double>(std::min(rows, block_rows) * std::min(columns, block_columns));
    for (bool linf : {false, true}) {
      Case c{.weights = {blocks(rows, columns, block_rows, block_columns)}, .linf = linf};
      // Around the size of the norms, so that some groups vanish.
      const std::array shares = {1e-3, 0.3, 0.8, 1.1};
      c.threshold = shares[random() % shares.size()] * (linf ? 0.6 * entries : std::sqrt(0.8 * entries));
      c.dtype = kOneDType[random() % 2 == 0 ? 0 : random() % kOneDType.size()];
      c.offset = random() % 3 == 0;
      run(c);
    }
  };
  for (int64_t side : {1, 2, 3, 4, 5, 8, 16, 17}) {
    alone(20, 36, side, side);
    alone(33, 27, side, side);
  }
  for (int64_t kernel : {1, 9, 25}) {
    alone(30, 8 * kernel, 30, kernel);     // "in"
    alone(30, 7 * kernel, 1, 7 * kernel);  // "out"
    alone(30, 7 * kernel, 1, kernel);      // "kernel"
    alone(30, 8 * kernel, 2, kernel);
  }
  alone(3, 1500, 3, 1500);  // wider than a panel
  alone(2, 2300, 1, 1100);
  alone(5, 1028, 1, 1028);
  if (kSlow) return;
  alone(64, 72, 4, 4);
  alone(9, 200, 4, 64);
  alone(9, 200, 4, 70);
  alone(12, 128, 8, 32);
  alone(12, 1024, 8, 8);  // rows that fall into the same sets of a cache
  alone(3, 1031, 1, 1031);
  alone(100, 1032, 4, 4);
  alone(40, 1100, 16, 16);
  alone(1200, 20, 1200, 1);  // more rows than the registers of a block hold
  alone(700, 18, 700, 9);
  alone(130, 260, 128, 128);
  alone(90, 800, 90, 100);
  alone(3000, 1, 3000, 1);
  alone(1, 9000, 1, 9000);
  alone(1, 20000, 1, 4);
  alone(2, 20000, 1, 9);
}

// More weights than one launch takes.
void test_lists() {
  run({.weights = {}});
  run({.weights = {{}, {}}});
  std::vector<Blocks> many;
  for (int64_t i = 0; i < (kSlow ? 51 : 110); ++i) many.push_back(blocks(i % 7, 3 + i % 5, 2, 3));
  for (bool linf : {false, true}) run({.weights = many, .linf = linf});
}

void test_extreme_sizes() {
  const std::vector<Blocks> weights = {blocks(12, 40, 4, 4), blocks(40, 6, 40, 1)};
  for (bool linf : {false, true}) {
    for (double size : {1e30, 1e-30, 1e17, 1e-17})
      run({.weights = weights, .linf = linf, .threshold = 2 * size, .size = size});
    for (double size : {1e200, 1e-200})
      run({.weights = weights, .dtype = DType::kFloat64, .linf = linf, .threshold = 2 * size, .size = size});
  }
}

// A threshold of 0 leaves every bit as it is, those of NaN, too.
void test_no_threshold() {
  for (const Kernel& kernel : kernels())
    for (DType dtype : kOneDType)
      for (bool linf : {false, true}) {
        const Case c{.weights = {blocks(10, 40, 4, 4)}, .dtype = dtype, .linf = linf, .threshold = 0};
        Problem before(c), p(c);
        for (Problem* each : {&before, &p}) {
          each->weights[0].set(3, kNan);
          each->weights[0].set(50, -kInfinity);
          each->weights[0].set(70, -0.0);
        }
        kernel.run(p.args());
        check(p.weights[0] == before.weights[0], std::string(kernel.name) + ": threshold 0" + c.name());
      }
}

// A group with NaN becomes NaN, and no other group notices.
void test_extreme_groups() {
  for (const Kernel& kernel : kernels())
    for (bool linf : {false, true})
      for (double extreme : {kNan, kInfinity, 0.0}) {
        const Case c{.weights = {blocks(10, 40, 4, 4), blocks(20, 5, 20, 1)}, .linf = linf};
        Problem clean(c), p(c);
        const Blocks& b = c.weights[0];
        const auto in_group = [&](int64_t at) {
          return at / b.columns / b.block_rows == 1 && at % b.columns / b.block_columns == 2;
        };
        for (int64_t at = 0; at < b.rows * b.columns; ++at)
          if (at == 5 * 40 + 9 || (extreme == 0 && in_group(at))) p.weights[0].set(at, extreme);
        kernel.run(clean.args());
        kernel.run(p.args());
        bool others = p.weights[1] == clean.weights[1], own = true;
        for (int64_t at = 0; at < b.rows * b.columns; ++at) {
          const double w = p.weights[0].get(at);
          if (!in_group(at))
            others &= w == clean.weights[0].get(at);
          else if (std::isnan(extreme))
            own &= std::isnan(w);
          else if (extreme == 0)
            own &= w == 0;
        }
        const std::string name =
            std::string(kernel.name) + (linf ? ": l1_linf" : ": l1_l2") + described({{"with", extreme}});
        check(others, name + ": other groups");
        check(own, name + ": its group");
      }
}

}  // namespace

int main() {
  test_shapes();
  test_lists();
  test_extreme_sizes();
  test_no_threshold();
  test_extreme_groups();
  return report();
}
