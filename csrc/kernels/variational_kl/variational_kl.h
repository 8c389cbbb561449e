// The Kullback-Leibler divergence of sparse variational dropout (Molchanov, Ashukha & Vetrov 2017, equation 14).
//
//   log_alpha = log_sigma2 - log(theta^2)
//   kl        = scale * sum of k1 - k1 s(k2 + k3 log_alpha) + 1/2 log(1 + exp(-log_alpha)),   s the logistic function
//
// over all weights of all layers. A weight of theta = 0 has log_alpha = inf: kl and both gradients are 0, their limits.
// One pass gives kl, the gradients, or both: outputs that are null are not computed.

#pragma once

#include "core/dtype.h"

struct CUstream_st;

namespace pykd {

struct VariationalWeights {
  const void* theta;       // [size], dtype
  const void* log_sigma2;  // [size], dtype
  void* grad_theta;        // out [size], dtype; null in all layers or in none. May be theta itself
  void* grad_log_sigma2;   // out [size], dtype; null where grad_theta is. May be log_sigma2 itself
  int64_t size;            // >= 0
};

// Computed in float, in double for float64 weights; sums of chunks are added in double. kl is float64 for float64
// weights, else float32.
struct VariationalKl {
  const VariationalWeights* layers;  // [count], on the host
  int64_t count;                     // >= 0
  const void* grad_kl;               // null (one), or one value of kl's dtype: a factor of the gradients
  void* chunk_kl;                    // out [variational_kl_chunks], float64, without scale; or null. CPU alone
  void* kl;                          // out [1]; or null. CUDA alone: on the CPU the caller adds chunk_kl
  double scale;                      // of kl and of the gradients
  DType dtype;
  bool accumulate;  // add to the gradients instead of overwriting them
};

// The unit of work: at most so many weights of one layer.
constexpr int64_t kVariationalChunk = 16384;

inline int64_t variational_kl_chunks(const VariationalKl& args) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < args.count; ++i) chunks += (args.layers[i].size + kVariationalChunk - 1) / kVariationalChunk;
  return chunks;
}

// Single-threaded over the chunks [chunk_begin, chunk_end), counted layer by layer: the caller owns the threads.
void variational_kl_cpu(const VariationalKl& args, int64_t chunk_begin, int64_t chunk_end);

// Enqueues all of it on `stream` and returns; never synchronises, never allocates. `workspace` is device memory for
// partial sums, aligned to 8 bytes; it may be null where variational_kl_workspace_bytes says 0.
CudaStatus variational_kl_cuda(const VariationalKl& args, void* workspace, CUstream_st* stream);
int64_t variational_kl_workspace_bytes(const VariationalKl& args);

}  // namespace pykd
