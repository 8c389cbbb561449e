// A weight as a grid of blocks, the groups of a group norm.
//
// A weight [out, in, kernel height, kernel width] is the matrix [out, in * kernel]; a group is one block of it: one
// input channel (out x kernel), one output channel (1 x in * kernel), one kernel (1 x kernel), or any rows x columns.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pykd {

// All >= 1 in a weight that has elements; blocks at the right and lower edges may be smaller.
struct Blocks {
  int64_t rows, columns;              // of the matrix
  int64_t block_rows, block_columns;  // of a block, at most those of the matrix

  PYKD_HD int64_t grid_rows() const { return rows ? (rows + block_rows - 1) / block_rows : 0; }
  PYKD_HD int64_t grid_columns() const { return columns ? (columns + block_columns - 1) / block_columns : 0; }
};

}  // namespace pykd
