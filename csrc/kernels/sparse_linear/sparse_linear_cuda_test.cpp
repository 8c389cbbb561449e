// The CUDA forms of sparse_linear that sparse_linear_test.cpp is too small for, under emulation: many places and rows a
// thread, blocks that take more than one tile, tiles of every height and width; what lies beyond the batch is neither
// read into a result nor needed.
#include <limits>

#include "core/sparse_test.h"
#include "kernels/sparse_linear/sparse_linear.h"

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::SparseTiles;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int64_t rows, columns, block_rows, block_columns;
  double density;
  int64_t batch, lanes;
  int64_t groups = 1;
  bool rowwise_in_panels = false;  // tiles of one row, which pack_sparse makes for rowwise alone
};

void test(const Case& c, std::mt19937& random) {
  const SparseMatrix w(c.rows, c.columns, c.block_rows, c.block_columns, c.density, random, c.groups);
  const SparseTiles tiles = c.lanes == 1 || c.rowwise_in_panels ? w.rowwise() : w.panels();
  const int64_t in = c.columns * c.groups, padded = (c.batch + c.lanes - 1) / c.lanes * c.lanes;
  const std::vector<float> bias = filled(c.rows, random);
  const auto place = [&](int64_t b, int64_t i, int64_t features) {
    return (b / c.lanes * features + i) * c.lanes + b % c.lanes;
  };
  std::vector<float> input(static_cast<size_t>(padded * in), kNan);  // exactly: a read beyond it is the sanitizer's
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t i = 0; i < in; ++i)
      input[static_cast<size_t>(place(b, i, in))] = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
  const bool relu = random() % 2, has_bias = random() % 2;
  Buffer output(DType::kFloat32, padded * c.rows);
  const int status = pykd::sparse_linear_cuda(
      {tiles, input.data(), reinterpret_cast<float*>(output.data()), has_bias ? bias.data() : nullptr, c.batch, in,
       c.rows, c.lanes, relu ? pykd::Activation::kRelu : pykd::Activation::kNone},
      nullptr);
  bool right = status == 0;
  for (int64_t o = 0; o < c.rows; ++o)
    for (int64_t b = 0; b < c.batch; ++b) {
      double sum = has_bias ? bias[static_cast<size_t>(o)] : 0, size = std::abs(sum);
      for (int64_t i = 0; i < c.columns; ++i) {
        const double value = w.dense[static_cast<size_t>(o * c.columns + i)];
        if (value == 0) continue;
        const int64_t column = o / (c.rows / c.groups) * c.columns + i;
        const double term = value * input[static_cast<size_t>(place(b, column, in))];
        sum += term;
        size += std::abs(term);
      }
      const double wanted = relu && sum < 0 ? 0 : sum, bound = static_cast<double>(c.columns + 8) * 0x1p-24 * size;
      right = right && std::abs(output.get(place(b, o, c.rows)) - wanted) <= bound;
    }
  const std::string name =
      w.name() + described({{"density", c.density}, {"batch", c.batch}, {"lanes", c.lanes}, {"relu", relu}});
  check(right, name);
  check(output.intact(), name + ": beyond the output");
}

// A NaN or an infinity of one row of the batch is in that row alone, and in the outputs that read it.
void test_extreme(int64_t lanes, std::mt19937& random) {
  constexpr int64_t kRows = 40, kColumns = 40, kBatch = 20, kBad = 7, kColumn = 11;
  for (const int64_t block : {1, 16}) {
    const SparseMatrix w(kRows, kColumns, block, block, 0.4, random);
    const int64_t padded = (kBatch + lanes - 1) / lanes * lanes;
    std::vector<float> input(static_cast<size_t>(padded * kColumns), 1);
    input[static_cast<size_t>((kBad / lanes * kColumns + kColumn) * lanes + kBad % lanes)] = kNan;
    Buffer output(DType::kFloat32, padded * kRows);
    pykd::sparse_linear_cuda(
        {lanes == 1 ? w.rowwise() : w.panels(), input.data(), reinterpret_cast<float*>(output.data()), nullptr, kBatch,
         kColumns, kRows, lanes, pykd::Activation::kRelu},
        nullptr);
    bool right = true;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t o = 0; o < kRows; ++o) {
        const bool is_nan = std::isnan(output.get((b / lanes * kRows + o) * lanes + b % lanes));
        // Of a block, zeros are multiplied, too.
        const bool reads = w.dense[static_cast<size_t>(o * kColumns + kColumn)] != 0;
        right = right && (b != kBad ? !is_nan : block > 1 || !reads || is_nan) && (!reads || b != kBad || is_nan);
      }
    check(right, "NaN stays in its row" + described({{"block", block}, {"lanes", lanes}}));
  }
}

}  // namespace

int main() {
  std::mt19937 random(20263);
  // Work enough for 2 and for 4 places and as many more rows a thread.
  for (const int64_t height : {1, 2, 4, 8, 16}) {
    const int64_t rows = height == 16 ? 4224 : height == 1 ? 1060 : 530 * height;
    test({rows, 9, height, 2, 0.3, 100, 16}, random);
    test({rows, 9, height, 2, 0.3, height == 16 ? 400 : 200, 48}, random);
  }
  for (const int64_t batch : {20, 70, 140}) test({530, 20, 1, 5, 0.3, batch, 32, 1, true}, random);
  // And for a warp a tile, of one and of four rows of the batch.
  for (const int64_t height : {1, 8})
    for (const int64_t batch : {3, 9}) test({height == 1 ? 1060 : 4240, 9, height, 2, 0.3, batch, 1}, random);
  // Columns that fill what is staged, and a few more; widths of runs.
  for (const int64_t columns : {31, 32, 33, 64, 95, 130})
    for (const int64_t height : {1, 2, 4, 8, 16}) {
      test({2 * height + 1, columns, height, 1, 1, 18, 16}, random);
      test({2 * height + 1, columns, height, 7, 0.9, 2, 1}, random);
    }
  for (int64_t width = 1; width <= 20; ++width)
    for (const int64_t height : {1, 2, 4, 8, 16, 24}) {
      test({37, 61, height, width, 0.4, 2, 1}, random);
      test({37, 61, height, width, 0.4, 5, 32}, random);
    }
  for (const int64_t lanes : {1, 16, 48}) {
    test({36, 10, 4, 4, 0.5, 50, lanes, 3}, random);
    test({36, 10, 5, 2, 0.5, 50, lanes, 3}, random);  // blocks that straddle groups
    test({36, 10, 1, 1, 0.0, 50, lanes}, random);
    test({36, 10, 16, 16, 0.0, 50, lanes}, random);
    test({36, 10, 16, 16, 0.5, 0, lanes}, random);
    test_extreme(lanes, random);
  }
  // Blocks that take a second round of tiles.
  test({8480, 5, 1, 1, 0.5, 17, 16}, random);
  test({8480, 5, 1, 1, 0.5, 1, 1}, random);
  return report();
}
