// Distillation from softened outputs (Hinton, Vinyals & Dean 2015), the teacher's logits clean or with noise
// (Sau & Balasubramanian 2016).
//
//   z[r,c] = teacher[r,c] * (1 + noise[r,c])            or  teacher[r,c] + noise[r,c]        (core/noise.h)
//   p[r,.] = softmax(z[r,.] / T),  q[r,.] = softmax(student[r,.] / T)
//   KL[r]  = sum_c p log(p / q)                         reverse: sum_c q log(q / p)
//   CE[r]  = cross-entropy of softmax(student[r,.]) with (1 - label_smoothing) onehot(target[r]) + label_smoothing /
//            classes; 0 where target[r] is ignore_index
//   row_loss[r] = soft_scale (1 - hard_weight) T^2 KL[r] + hard_scale hard_weight CE[r]
//   loss        = sum_r row_loss[r]
//
// soft_scale and hard_scale are 1, or with `batchmean` 1 / rows and 1 / (targets that are not ignored), or 0 for none;
// these are the rows and targets of the whole batch, where only a part of its logits is at hand.
// Each grad_student[r,.] is grad_loss[r] times the derivative of row_loss[r]. Logits are read from memory once; outputs
// that are null are not computed. A class where p is 0 (a teacher's logit of -inf) adds 0 to the forward KL. Where
// hard_weight is 1 the teacher is not read, where it is 0 the target is not.

#pragma once

#include "core/dtype.h"
#include "core/noise.h"

struct CUstream_st;

namespace pykd {

// Accumulation as for logit regression: float, or double for float64 logits; sums over rows in double.
struct DistillationLoss {
  const void* student;       // [rows, classes], row-major, student_dtype
  const void* teacher;       // [rows, classes], row-major, teacher_dtype
  const int64_t* target;     // [rows], or null where hard_weight is 0
  const void* grad_loss;     // null (all ones), or grad_loss_stride apart, loss dtype
  void* row_loss;            // out [rows], loss dtype: float64 for float64 logits, else float32; or null
  void* loss;                // out [1], loss dtype; or null. On the CPU it asks for row_loss
  void* grad_student;        // out [rows, classes], student_dtype; or null. May be student or teacher itself
  int64_t rows;              // >= 0
  int64_t classes;           // >= 1
  int64_t grad_loss_stride;  // 0: one value for all rows; 1: one a row
  int64_t ignore_index;
  double temperature;      // > 0
  double hard_weight;      // [0, 1]
  double label_smoothing;  // [0, 1]
  DType student_dtype;
  DType teacher_dtype;
  bool reverse;
  bool batchmean;
  bool accumulate;  // add to grad_student instead of overwriting it
  Noise noise;

  // Rows of the same batch before and after these. Only their targets are read, which lie around these rows' own.
  int64_t rows_before = 0;
  int64_t rows_after = 0;
};

// The targets of these rows that are not ignored; `wrong` is the first row whose target is neither ignored nor in
// [0, classes), or -1. With hard_weight 0 none is read.
int64_t distillation_loss_targets_cpu(const DistillationLoss& args, int64_t& wrong);

// Single-threaded over [row_begin, row_end): the caller owns the threads, has counted the batch's targets, all of
// which are right, and lends each call a workspace aligned to 64 bytes, or null where workspace_bytes says 0. Writes
// all but loss, which total_cpu makes of row_loss.
void distillation_loss_cpu(const DistillationLoss& args, int64_t targets, void* workspace, int64_t row_begin,
                           int64_t row_end);
int64_t distillation_loss_workspace_bytes_cpu(const DistillationLoss& args);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates. `workspace` is device memory aligned
// to 16 bytes; it may be null where workspace_bytes says 0. A row whose target is wrong gets NaN.
CudaStatus distillation_loss_cuda(const DistillationLoss& args, void* workspace, CUstream_st* stream);
int64_t distillation_loss_workspace_bytes_cuda(const DistillationLoss& args);

}  // namespace pykd
