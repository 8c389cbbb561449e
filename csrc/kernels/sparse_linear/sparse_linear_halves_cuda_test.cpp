// sparse_linear of halves on CUDA, under emulation: blocks of few and of many rows, ragged batches and outputs, tiles
// without values, runs of all widths that it takes. What lies beyond the batch is neither read into a result nor
// needed.
#include <limits>

#include "core/sparse_test.h"
#include "kernels/sparse_linear/sparse_linear.h"

namespace {

using namespace pykd::testing;
using pykd::DType;

struct Case {
  int64_t rows, columns, height, width;
  double density;
  int64_t batch, processors;
  float bad = 0;  // if it is not 0, input 5 of row 1 of the batch
};

float value_of(uint16_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return static_cast<float>(__builtin_bit_cast(pykd::Half, bits));
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

void test(const Case& c, DType dtype, std::mt19937& random) {
  const SparseMatrix w(c.rows, c.columns, c.height, c.width, c.density, random, 1, dtype);
  Vector<float> numbers = filled(c.batch * c.columns, random);
  const Vector<float> bias = filled(c.rows, random);
  if (c.bad != 0) numbers[static_cast<size_t>(c.columns + 5)] = c.bad;
  struct alignas(16) Aligned {
    uint16_t halves[8];
  };
  Vector<Aligned> memory(numbers.size() / 8);  // exactly: a read beyond it is the sanitizer's
  uint16_t* const input = reinterpret_cast<uint16_t*>(memory.data());
  for (size_t i = 0; i < numbers.size(); ++i) {
    input[i] = pykd::half_bits(numbers[i], dtype);
    numbers[i] = value_of(input[i], dtype);
  }
  const bool relu = random() % 2, has_bias = random() % 2;
  const std::string name = w.name() + described({{"density", c.density},
                                                 {"batch", c.batch},
                                                 {"processors", c.processors},
                                                 {"relu", relu},
                                                 {"bias", has_bias},
                                                 {"dtype", static_cast<int>(dtype)}});
  check(w.halves().tiles > 0 && pykd::takes_halves(w.halves(), input, c.columns), name + ": is taken");
  Buffer output(dtype, c.batch * c.rows);
  const auto run = [&](Buffer& to) {
    return pykd::sparse_linear_halves_cuda(
        {w.halves(), input, reinterpret_cast<uint16_t*>(to.data()), has_bias ? bias.data() : nullptr, c.batch,
         c.columns, c.rows, relu ? pykd::Activation::kRelu : pykd::Activation::kNone, c.processors},
        nullptr);
  };
  bool right = run(output) == 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t o = 0; o < c.rows; ++o) {
      double sum = has_bias ? bias[static_cast<size_t>(o)] : 0, size = std::abs(sum);
      bool bad = false;
      for (int64_t i = 0; i < c.columns; ++i) {
        const double value = w.dense[static_cast<size_t>(o * c.columns + i)];
        if (value == 0) continue;
        const double term = value * static_cast<double>(numbers[static_cast<size_t>(b * c.columns + i)]);
        bad = bad || !std::isfinite(term);
        sum += term;
        size += std::abs(term);
      }
      const double got = output.get(b * c.rows + o);
      if (c.bad != 0 && b == 1) {  // of a block, zeros are multiplied, too
        right = right && (!bad || !std::isfinite(got) || (relu && got == 0));
        continue;
      }
      // A rounding for each of the terms, the sums of up to 8 warps and the bias, which tensor cores may cut off
      // instead, and one of the result.
      const double wanted = relu && sum < 0 ? 0 : sum;
      const double bound = static_cast<double>(c.columns + 8) * 0x1p-23 * size +
                           std::abs(wanted) * (dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8) + 0x1p-25;
      right = right && std::abs(got - wanted) <= bound;
    }
  check(right, name);
  check(output.intact(), name + ": beyond the output");
}

void test_takes() {
  std::mt19937 random(20281);
  alignas(16) const uint16_t input[16] = {};
  const auto takes = [&](int64_t columns, int64_t width, int64_t offset = 0) {
    const SparseMatrix w(20, columns, 16, width, 0.5, random, 1, DType::kFloat16);
    return w.halves().tiles > 0 && pykd::takes_halves(w.halves(), input + offset, columns);
  };
  check(takes(32, 16) && takes(48, 32) && takes(96, 48) && takes(64, 64), "taken");
  check(!takes(40, 16) && !takes(32, 8) && !takes(32, 2), "products of 16 columns alone");
  check(!takes(64, 48) && !takes(144, 128), "columns that do not ascend");
  check(!takes(32, 16, 4), "rows that are not aligned");
  check(takes(pykd::kMostHalvesColumns, 16) && !takes(pykd::kMostHalvesColumns + 16, 16), "columns at most");
}

}  // namespace

int main() {
  std::mt19937 random(20280);
  test_takes();
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const auto one = [&](const Case& c) { test(c, dtype, random); };
    // Few rows: 8, 16 and 32 of the batch a block, one warp a tile and eight.
    for (const int64_t batch : {1, 7, 8, 9, 17, 40}) {
      one({37, 64, 16, 16, 0.5, batch, 132});
      one({20, 640, 16, 32, 0.9, batch, 132});
    }
    one({36, 80, 9, 80, 1, 5, 132});
    one({36, 80, 24, 16, 0, 5, 132});
    one({36, 80, 24, 16, 0.5, 0, 132});
    // Many rows: 1, 2 and 4 tiles a warp, of one block and of several; steps without values.
    one({100, 144, 16, 16, 0.3, 70, 1});
    one({200, 80, 32, 32, 0.4, 64, 1});
    one({515, 48, 32, 32, 0.5, 33, 1});
    one({101, 1040, 16, 16, 0.04, 65, 1});
    one({21, 192, 16, 96, 0.5, 40, 1});
    one({21, 64, 16, 16, 0, 40, 1});
    for (const int64_t processors : {1, 132})
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
        one({37, 64, 16, 16, 0.5, 40, processors, bad});
    if (kSlow) continue;
    one({700, 96, 24, 48, 0.3, 130, 1});
    one({260, 400, 16, 16, 0.2, 255, 1});
  }
  return report();
}
