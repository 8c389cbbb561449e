// The noise of a variational layer by local reparameterisation (Kingma, Salimans & Welling 2015, section 2.3).
//
//   deviation[r,c]     = sqrt(variance[r,c] + 1e-8)
//   sample[r,c]        = mean[r,c] + deviation[r,c] * eps[r,c]
//   grad_variance[r,c] = grad_sample[r,c] * eps[r,c] / (2 deviation[r,c])
//
// A row is a sample of the batch, its classes the values of the sample one after the other. eps is the noise of a logit
// (core/noise.h) of sigma = 1 in every row: drawn again in the backward pass, never stored.

#pragma once

#include "core/dtype.h"
#include "core/noise.h"

struct CUstream_st;

namespace pykd {

// Computed in float, in double for float64: the type of variance, deviation and grad_variance.
struct VariationalLayer {
  const void* grad_sample;  // null: the forward pass. [rows, classes], row-major, dtype
  void* sample;             // forward: in mean, out sample. [rows, classes], dtype
  void* deviation;          // forward: in variance, out deviation; backward: in. [rows, classes]
  void* grad_variance;      // backward: out [rows, classes]
  int64_t rows;             // >= 0
  int64_t classes;          // >= 1
  DType dtype;
  Noise noise;  // sigma 1, every row selected, one xi a logit, one teacher
};

// Single-threaded over [row_begin, row_end): the caller owns the threads.
void variational_layer_cpu(const VariationalLayer& args, int64_t row_begin, int64_t row_end);

// sigma2 = exp(log_sigma2), CPU alone.
struct VarianceWeights {
  const void* log_sigma2;  // [size], dtype
  void* sigma2;            // out [size], float64 for float64, else float32
  DType dtype;
};

// Single-threaded over [begin, end).
void variance_weights_cpu(const VarianceWeights& args, int64_t begin, int64_t end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates.
CudaStatus variational_layer_cuda(const VariationalLayer& args, CUstream_st* stream);

}  // namespace pykd
