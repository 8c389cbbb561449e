// The groups of a weight that several ops share: their rules, and their packing for the kernels.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "core/blocks.h"
#include "torch/dtype.h"

namespace pykd::glue {

using Tensors = std::vector<at::Tensor>;

// How weights are grouped: an input channel, an output channel, a kernel, or rows x columns.
enum Groups : int64_t { kIn, kOut, kKernel, kBlocks };

#define PYKD_GROUPS_SCHEMA "int groups, int rows, int columns, bool linf"
#define PYKD_GROUPS int64_t groups, int64_t rows, int64_t columns, bool linf

struct Grouping {
  int64_t groups;
  int64_t rows, columns;  // of a block, for kBlocks
  bool linf;
};

inline void check_weights(const char* op, at::TensorList weights, const Grouping& grouping) {
  PYKD_CHECK(!weights.empty(), op, ": weights must hold at least one weight, got an empty list");
  PYKD_CHECK(grouping.groups >= kIn && grouping.groups <= kBlocks, op, ": groups must be 0, 1, 2 or 3, got ",
             grouping.groups);
  PYKD_CHECK(grouping.groups != kBlocks || (grouping.rows >= 1 && grouping.columns >= 1), op,
             ": groups must be rows and columns >= 1, got (", grouping.rows, ", ", grouping.columns, ")");
  for (const at::Tensor& weight : weights) {
    dtype_of(op, "weights", weight);
    PYKD_CHECK(weight.dim() == 2 || weight.dim() == 4, op,
               ": a weight must be [out, in] or [out, in, height, width], got ", weight.sym_sizes());
    PYKD_CHECK_TYPE(weight.scalar_type() == weights[0].scalar_type() && weight.device() == weights[0].device(), op,
                    ": all weights must have the dtype and device of the first, ", weights[0].scalar_type(), " on ",
                    weights[0].device(), ", got ", weight.scalar_type(), " on ", weight.device());
  }
}

inline Blocks blocks_of(const at::Tensor& weight, const Grouping& grouping) {
  const int64_t rows = weight.size(0), kernel = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
  const int64_t columns = weight.size(1) * kernel;
  if (rows * columns == 0) return {};
  switch (grouping.groups) {
    case kIn: return {rows, columns, rows, kernel};
    case kOut: return {rows, columns, 1, columns};
    case kKernel: return {rows, columns, 1, kernel};
    default: return {rows, columns, std::min(rows, grouping.rows), std::min(columns, grouping.columns)};
  }
}

// Rows and columns of the grid, also of weights without elements.
inline std::pair<c10::SymInt, c10::SymInt> grid_of(const at::Tensor& weight, const Grouping& grouping) {
  const c10::SymInt rows = weight.sym_size(0), channels = weight.sym_size(1);
  const c10::SymInt kernel = weight.dim() == 4 ? weight.sym_size(2) * weight.sym_size(3) : c10::SymInt(1);
  switch (grouping.groups) {
    case kIn: return {1, channels};
    case kOut: return {rows, 1};
    case kKernel: return {rows, channels};
    default:
      return {(rows + grouping.rows - 1) / grouping.rows,
              (channels * kernel + grouping.columns - 1) / grouping.columns};
  }
}

}  // namespace pykd::glue
