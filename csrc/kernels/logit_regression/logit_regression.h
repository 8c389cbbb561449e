// Logit regression (Ba & Caruana 2014) on targets with noise (Sau & Balasubramanian 2016).
//
//   target[r,c] = teacher[r,c] * (1 + noise[r,c])       or  teacher[r,c] + noise[r,c]        (core/noise.h)
//   row_loss[r] = 1/2 sum_c (student[r,c] - target[r,c])^2
//   loss        = loss_scale * sum_r row_loss[r]
//   grad_student[r,c] = grad_scale * grad_loss[r] * (student[r,c] - target[r,c])
//
// One pass over the logits gives the loss, the gradient, or both: outputs that are null are not computed. Noise is
// drawn in the pass and never stored, so a backward pass draws it again.

#pragma once

#include "core/dtype.h"
#include "core/noise.h"

struct CUstream_st;

namespace pykd {

// Accumulation is in float, in double for float64 logits; sums over rows are in double. Both logits are float64, or
// neither.
struct LogitRegression {
  const void* student;       // [rows, classes], row-major, student_dtype
  const void* teacher;       // [rows, classes], row-major, teacher_dtype
  const void* grad_loss;     // null (all ones), or grad_loss_stride apart, loss dtype
  void* row_loss;            // out [rows], loss dtype: float64 for float64 logits, else float32; or null
  void* loss;                // out [1], loss dtype; or null. On the CPU it asks for row_loss
  void* grad_student;        // out [rows, classes], student_dtype; or null. May be student itself
  int64_t rows;              // >= 0
  int64_t classes;           // >= 1
  int64_t grad_loss_stride;  // 0: one value for all rows; 1: one a row
  double loss_scale;         // 1 / rows or 1
  double grad_scale;         // 1 / rows or 1
  DType student_dtype;
  DType teacher_dtype;
  bool accumulate;  // add to grad_student instead of overwriting it
  Noise noise;
};

// Single-threaded over [row_begin, row_end): the caller owns the threads. Writes all but loss, which total_cpu makes
// of row_loss.
void logit_regression_cpu(const LogitRegression& args, int64_t row_begin, int64_t row_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates. `workspace` is device memory for
// partial sums, aligned to 8 bytes; it may be null where logit_regression_workspace_bytes says 0.
CudaStatus logit_regression_cuda(const LogitRegression& args, void* workspace, CUstream_st* stream);
int64_t logit_regression_workspace_bytes(const LogitRegression& args);

}  // namespace pykd
