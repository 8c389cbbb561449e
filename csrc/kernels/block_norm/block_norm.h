// The sum of group norms (Yuan & Lin 2006), of a network's weights alone or concatenated with a teacher's (Hegde et al.
// 2019): group g of the two together has
//
//   l1_l2     norm[g] = sqrt(|student[g]|^2 + |teacher[g]|^2)         grad = student / norm, 0 where norm is 0
//   l1_linf   norm[g] = max(max |student[g]|, max |teacher[g]|)       grad = sign(student) / ties at the student's
//                                                                     `ties` largest entries where they exceed the
//                                                                     teacher's, else 0
//   value   = scale * sum of size[g] * norm[g],    size[g] = 1, or the root of the group's number of entries
//   grad    = scale * grad_value * size[g] * grad
//
// Groups are matched by their place in the grid (core/blocks.h); one that the other side lacks stands alone. What is
// concatenated is never copied. One pass gives the value, the gradient, or both: outputs that are null are not
// computed.

#pragma once

#include "core/blocks.h"
#include "core/dtype.h"

struct CUstream_st;

namespace pykd {

struct BlockNormWeight {
  const void* student;  // [rows, columns], row-major, dtype
  const void* teacher;  // the same of teacher_blocks, teacher_dtype; or null
  void* grad;           // out, like student; null in all weights or in none. May be student itself
  void* norms;          // out [grid rows, grid columns] of the student, in value's dtype; or null
  Blocks blocks;
  Blocks teacher_blocks;  // all 0 without a teacher
};

// Accumulation is in float, in double for float64 weights; partial sums are added in double. value is float64 for
// float64 weights, else float32.
struct BlockNorm {
  const BlockNormWeight* weights;  // [count], on the host
  int64_t count;                   // >= 0
  const void* grad_value;          // null (one), or one value of value's dtype: a factor of the gradient
  double* unit_value;              // out [block_norm_units], without scale; or null. CPU alone
  void* value;                     // out [1]; or null. CUDA alone: on the CPU the caller adds unit_value
  double scale;
  DType dtype;
  DType teacher_dtype;
  bool linf;
  bool by_size;
  bool accumulate;  // add to grad instead of overwriting it
};

// The CPU's unit of work: some groups side by side in one row of the grid of one weight. Units are counted weight by
// weight, row by row; their number follows from the shapes alone.
int64_t block_norm_units(const BlockNorm& args);

// Single-threaded over the units [unit_begin, unit_end): the caller owns the threads.
void block_norm_cpu(const BlockNorm& args, int64_t unit_begin, int64_t unit_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates. `workspace` is device memory for
// partial sums and the norms of teachers, aligned to 8 bytes; it may be null where block_norm_workspace_bytes says 0.
CudaStatus block_norm_cuda(const BlockNorm& args, void* workspace, CUstream_st* stream);
int64_t block_norm_workspace_bytes(const BlockNorm& args);

}  // namespace pykd
