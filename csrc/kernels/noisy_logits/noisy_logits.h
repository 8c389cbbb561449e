// A teacher's, or a student's, logits with noise (Sau & Balasubramanian 2016).
//
//   noisy[r,c] = logits[r,c] * (1 + noise[r,c])    or  logits[r,c] + noise[r,c]        (core/noise.h)
//
// A logit of -inf stays -inf. The gradient is the same operation on the incoming gradient (multiplicative), or that
// gradient itself (additive).

#pragma once

#include "core/dtype.h"
#include "core/noise.h"

struct CUstream_st;

namespace pykd {

// Computed in float, in double for float64 logits.
struct NoisyLogits {
  const void* logits;  // [rows, classes], row-major, dtype
  void* noisy;         // out, like logits; may be logits itself
  int64_t rows;        // >= 0
  int64_t classes;     // >= 1
  DType dtype;
  Noise noise;  // n_teachers is 1
};

// Single-threaded over [row_begin, row_end): the caller owns the threads.
void noisy_logits_cpu(const NoisyLogits& args, int64_t row_begin, int64_t row_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates.
CudaStatus noisy_logits_cuda(const NoisyLogits& args, CUstream_st* stream);

}  // namespace pykd
