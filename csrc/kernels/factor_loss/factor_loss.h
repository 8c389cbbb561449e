// Factor transfer's distance (Kim, Park & Kwak 2018): that of two factors, each sample's divided by its L2 norm.
//
//   d[r,i]      = student[r,i] / |student[r]|_2 - teacher[r,i] / |teacher[r]|_2
//   row_loss[r] = sum_i |d[r,i]|^p,  or by_row  (sum_i |d[r,i]|^p)^(1/p)
//   loss        = scale * sum_r row_loss[r]
//   grad_student[r,i] = grad_loss * dloss/dstudent[r,i], and grad_teacher likewise
//
// A vector of zeros stays one and has the gradient 0; at d = 0 the gradient is 0. A factor's positive scale does not
// count, however large or small, but for a gradient that overflows its dtype. A row with NaN or infinity has the loss
// and the gradients NaN.
//
// Three passes over a row, the last two from the caches where it fits them: the norms; the loss and inner products; the
// gradients.

#pragma once

#include "core/dtype.h"

struct CUstream_st;

namespace pykd {

// Accumulation is in float, in double for float64 factors and, on the CPU, over the tiles of a row. Both factors are
// float64, or neither.
struct FactorLoss {
  const void* student;    // [rows, entries], row-major, student_dtype
  const void* teacher;    // [rows, entries], row-major, teacher_dtype
  const void* grad_loss;  // null (1), or one value, loss dtype
  void* row_loss;         // out [rows], loss dtype: float64 for float64 factors, else float32; or null
  void* loss;             // out [1], loss dtype; or null. On the CPU it asks for row_loss
  void* grad_student;     // out [rows, entries], student_dtype; or null
  void* grad_teacher;     // out [rows, entries], teacher_dtype; or null
  int64_t rows;           // >= 0
  int64_t entries;        // >= 1
  double scale;           // 1 / rows, or 1 / (rows * entries)
  DType student_dtype;
  DType teacher_dtype;
  int p;        // 1 or 2
  bool by_row;  // of no effect for p = 1
};

// Single-threaded over [row_begin, row_end): the caller owns the threads. Writes all but loss, which total_cpu makes
// of row_loss.
void factor_loss_cpu(const FactorLoss& args, int64_t row_begin, int64_t row_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates. `workspace` is device memory for
// partial sums, aligned to 8 bytes; it may be null where factor_loss_workspace_bytes says 0.
CudaStatus factor_loss_cuda(const FactorLoss& args, void* workspace, CUstream_st* stream);
int64_t factor_loss_workspace_bytes(const FactorLoss& args);

}  // namespace pykd
