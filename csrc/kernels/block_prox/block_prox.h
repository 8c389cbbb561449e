// The proximal operator of t * a sum of group norms, in place, a group (core/blocks.h) at a time:
//
//   l1_l2     w = w * max(0, 1 - t / |w|)                                   (Yuan & Lin 2006)
//   l1_linf   w = sign(w) * min(|w|, level)
//
// with the level at which t is taken off: sum over the group of max(0, |w| - level) = t, or 0 where the sum of all |w|
// is at most t. That is w less its projection on the l1 ball of radius t (Duchi et al. 2008). The level is the fixed
// point of level = (sum of the |w| above level - t) / (number of them), reached from below in finitely many steps
// (Michelot 1986), without sorting. t = 0 leaves every bit as it is.

#pragma once

#include "core/blocks.h"
#include "core/dtype.h"

struct CUstream_st;

namespace pykd {

struct BlockProxWeight {
  void* weight;  // in and out [rows, columns], row-major, dtype
  Blocks blocks;
};

// Computed in float, in double for float64 weights. A group with a NaN becomes NaN.
struct BlockProx {
  const BlockProxWeight* weights;  // [count], on the host
  int64_t count;                   // >= 0
  double threshold;                // t >= 0, finite
  DType dtype;
  bool linf;
};

// The CPU's unit of work: some groups side by side in one row of the grid of one weight, counted weight by weight.
int64_t block_prox_units(const BlockProx& args);

// Single-threaded over the units [unit_begin, unit_end): the caller owns the threads.
void block_prox_cpu(const BlockProx& args, int64_t unit_begin, int64_t unit_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates.
CudaStatus block_prox_cuda(const BlockProx& args, CUstream_st* stream);

}  // namespace pykd
