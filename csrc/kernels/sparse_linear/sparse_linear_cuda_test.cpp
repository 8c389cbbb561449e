// The CUDA forms of sparse_linear that sparse_linear_test.cpp is too small for, under emulation: many places and rows a
// thread, blocks that take more than one tile, tiles of every height and width, values of two bytes; what lies beyond
// the batch is neither read into a result nor needed.
#include <limits>

#include "core/sparse_test.h"
#include "kernels/sparse_linear/sparse_linear.h"

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::SparseTiles;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
constexpr DType kHalves[] = {DType::kFloat16, DType::kBFloat16};

struct Case {
  int64_t rows, columns, block_rows, block_columns;
  double density;
  int64_t batch, lanes;
  int64_t groups = 1;
  DType halves = DType::kFloat32;
  bool rowwise_in_panels = false;  // tiles of one row, which pack_sparse makes for rowwise alone
};

SparseTiles tiles_for(const SparseMatrix& w, int64_t lanes, DType halves) {
  return halves != DType::kFloat32 ? w.halves() : lanes == 1 ? w.rowwise() : w.panels();
}

void test(const Case& c, std::mt19937& random) {
  const SparseMatrix w(c.rows, c.columns, c.block_rows, c.block_columns, c.density, random, c.groups, c.halves);
  const SparseTiles tiles = c.rowwise_in_panels ? w.rowwise() : tiles_for(w, c.lanes, c.halves);
  const bool halves = c.halves != DType::kFloat32;
  const int64_t in = c.columns * c.groups, padded = (c.batch + c.lanes - 1) / c.lanes * c.lanes;
  const Vector<float> bias = filled(c.rows, random);
  const auto place = [&](int64_t b, int64_t i, int64_t features) {
    return (b / c.lanes * features + i) * c.lanes + b % c.lanes;
  };
  Vector<float> input(static_cast<size_t>(padded * in), kNan);  // exactly: a read beyond it is the sanitizer's
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
        const float read = input[static_cast<size_t>(place(b, column, in))];
        const double term = value * (halves ? pykd::rounded(read, c.halves) : read);
        sum += term;
        size += std::abs(term);
      }
      // A rounding for each of the terms, the sums of up to 8 parts and the bias; tensor cores may cut off instead.
      const double wanted = relu && sum < 0 ? 0 : sum;
      const double bound = static_cast<double>(c.columns + 8) * (halves ? 0x1p-23 : 0x1p-24) * size;
      right = right && std::abs(output.get(place(b, o, c.rows)) - wanted) <= bound;
    }
  const std::string name = w.name() + described({{"density", c.density},
                                                 {"batch", c.batch},
                                                 {"lanes", c.lanes},
                                                 {"relu", relu},
                                                 {"halves", static_cast<int>(c.halves)}});
  check(!halves || (tiles.halves && tiles.dtype == c.halves && tiles.tiles > 0), name + ": halves");
  check(right, name);
  check(output.intact(), name + ": beyond the output");
}

// A NaN or an infinity of one row of the batch is in that row alone, and in the outputs that read it; and so is what
// float16 cannot hold.
void test_extreme(int64_t lanes, int64_t block, DType halves, float bad, std::mt19937& random) {
  constexpr int64_t kRows = 40, kColumns = 40, kBatch = 20, kBad = 7, kColumn = 11;
  const SparseMatrix w(kRows, kColumns, block, block, 0.4, random, 1, halves);
  const int64_t padded = (kBatch + lanes - 1) / lanes * lanes;
  Vector<float> input(static_cast<size_t>(padded * kColumns), 1);
  input[static_cast<size_t>((kBad / lanes * kColumns + kColumn) * lanes + kBad % lanes)] = bad;
  Buffer output(DType::kFloat32, padded * kRows);
  pykd::sparse_linear_cuda({tiles_for(w, lanes, halves), input.data(), reinterpret_cast<float*>(output.data()), nullptr,
                            kBatch, kColumns, kRows, lanes, pykd::Activation::kNone},
                           nullptr);
  bool right = true;
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t o = 0; o < kRows; ++o) {
      const bool is_bad = !std::isfinite(output.get((b / lanes * kRows + o) * lanes + b % lanes));
      // Of a block, zeros are multiplied, too.
      const bool reads = w.dense[static_cast<size_t>(o * kColumns + kColumn)] != 0;
      right = right && (b != kBad ? !is_bad : block > 1 || !reads || is_bad) && (!reads || b != kBad || is_bad);
    }
  check(right, described({{"bad", bad}, {"block", block}, {"lanes", lanes}, {"halves", static_cast<int>(halves)}}) +
                   " stays in its row");
}

// Weights of two bytes: 1, 2 and 4 places a lane, warps that share tiles, runs of all widths.
void test_halves(DType halves, std::mt19937& random) {
  const auto one = [&](int64_t rows, int64_t columns, int64_t height, int64_t width, double density, int64_t batch,
                       int64_t lanes, int64_t groups = 1) {
    test({rows, columns, height, width, density, batch, lanes, groups, halves}, random);
  };
  // Runs that steps break, heights that tiles break, blocks over the edge.
  for (const int64_t width : {2, 4, 6, 16, 34, 62})
    for (const int64_t height : {9, 16, 24, 40}) {
      one(37, 62, height, width, 0.6, 1 + static_cast<int64_t>(random() % 9), 1);
      one(37, 63, height, width, 0.6, 1 + static_cast<int64_t>(random() % 40), width % 4 ? 16 : 48);
    }
  // Columns that fill what is staged, a few more, and all warps that share a tile.
  for (const int64_t columns : {14, 16, 18, 62, 64, 66, 500, 1030})
    for (const int64_t lanes : {1, 16}) one(20, columns, 16, 2, 1, 3, lanes);
  for (const int64_t lanes : {1, 16, 48}) {
    for (const int64_t batch : {1, 8, 9, 50}) one(34, 150, 16, 150, 1, batch, lanes);  // dense
    for (const int64_t width : {2, 10}) one(96, 10, 16, width, 0.5, 50, lanes, 3);
    one(36, 10, 16, 10, 0, 50, lanes);
    one(36, 10, 16, 10, 1, 0, lanes);
    test_extreme(lanes, 16, halves, kNan, random);
    test_extreme(lanes, 16, halves, -kInfinity, random);
    if (halves == DType::kFloat16) test_extreme(lanes, 16, halves, 65520, random);
  }
  one(16960, 66, 16, 66, 1, 1, 1);  // two warps a tile, and blocks that take a second round
  if (kSlow) return;
  // Work enough for 2 and 4 places a lane, apart and in one access; and for a second round of tiles.
  for (const int64_t lanes : {1, 16}) {
    one(1060, 9, 16, 2, 0.3, 300, lanes);
    one(1060, 14, 16, 14, 0.3, 510, lanes);
  }
  one(1060, 70, 16, 70, 0.2, 520, 48);
  one(67600, 2, 16, 2, 0.1, 15, 16);
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
  for (const int64_t batch : {20, 70, 140}) test({530, 20, 1, 5, 0.3, batch, 32, 1, DType::kFloat32, true}, random);
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
    for (const int64_t block : {1, 16})
      for (const float bad : {kNan, kInfinity}) test_extreme(lanes, block, DType::kFloat32, bad, random);
  }
  for (const DType halves : kHalves) test_halves(halves, random);
  // Blocks that take a second round of tiles.
  test({8480, 5, 1, 1, 0.5, 17, 16}, random);
  test({8480, 5, 1, 1, 0.5, 1, 1}, random);
  return report();
}
