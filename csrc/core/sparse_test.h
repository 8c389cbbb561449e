// What the C++ tests of the sparse kernels share: a random sparse matrix, dense and packed.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "core/kernel_test.h"
#include "core/sparse_tiles.h"

namespace pykd::testing {

struct SparseMatrix {
  int64_t rows, columns, block_rows, block_columns, groups;
  std::vector<float> dense;  // [rows, columns]
  Vector<char> packed;       // with its own alignment, see head()

  // Blocks are stored with probability `density`; one in eight of a stored block's entries is 0 all the same. For
  // halves there are values that they hold alone.
  SparseMatrix(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns, double density,
               std::mt19937& random, int64_t groups = 1, DType halves = DType::kFloat32)
      : rows(rows),
        columns(columns),
        block_rows(std::min(block_rows, rows)),
        block_columns(std::min(block_columns, columns)),
        groups(groups),
        dense(static_cast<size_t>(rows * columns)) {
    const int64_t r = this->block_rows, c = this->block_columns, across = (columns + c - 1) / c;
    std::uniform_real_distribution<float> uniform;
    std::normal_distribution<float> normal;
    std::vector<int64_t> positions;
    std::vector<float> values;
    for (int64_t at = 0; at < across * ((rows + r - 1) / r); ++at) {
      if (uniform(random) >= density) continue;
      positions.push_back(at);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < c; ++j) {
          const int64_t row = at / across * r + i, column = at % across * c + j;
          const bool inside = row < rows && column < columns;
          const float drawn = inside && uniform(random) >= 0.125f ? normal(random) : 0;
          const float value = halves == DType::kFloat32 ? drawn : rounded(drawn, halves);
          values.push_back(value);
          if (inside) dense[static_cast<size_t>(row * columns + column)] = value;
        }
    }
    const std::vector<char> bytes = pack_sparse(
        {positions.data(), values.data(), static_cast<int64_t>(positions.size()), rows, columns, r, c, groups, halves});
    packed.assign(bytes.begin(), bytes.end());
  }

  const PackedSparse& head() const { return *reinterpret_cast<const PackedSparse*>(packed.data()); }
  SparseTiles panels() const { return tiles_of(packed.data(), head().panels); }
  SparseTiles rowwise() const { return tiles_of(packed.data(), head().rowwise); }
  SparseTiles halves() const { return tiles_of(packed.data(), head().halves); }

  std::string name() const {
    return described({{"rows", rows},
                      {"columns", columns},
                      {"block rows", block_rows},
                      {"block columns", block_columns},
                      {"groups", groups}});
  }
};

// n normal values.
inline Vector<float> filled(int64_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace pykd::testing
