// A linear layer whose weight is sparse, with bias and ReLU:
//
//   output[b, o] = activation(bias[o] + sum_i weight[o, i] * input[b, i])
//
// The sum runs over the stored values alone, in float32: of panels in the order of the columns, of rows as they lie in
// a few partial sums. The bias comes last.
//
// On CUDA `halves` serve any lanes: tensor cores multiply them with the inputs, which are rounded to the same type on
// the way, and sum in float32. float16 makes an infinity of inputs of 65520 and more.
#pragma once

#include "core/dtype.h"
#include "core/sparse_tiles.h"

struct CUstream_st;

namespace pykd {

struct SparseLinear {
  SparseTiles weight;  // of [out, in]; `rowwise` for one lane, else `panels`; on CUDA `halves`, too
  const float* input;  // [batch, in], or panels [batch / lanes, rounded up][in][lanes]
  float* output;       // out [batch, out], or panels likewise
  const float* bias;   // [out], or null
  int64_t batch;       // >= 0
  int64_t in;          // >= 1
  int64_t out;         // >= 1
  int64_t lanes;       // 1, or a multiple of vector_lanes(), on CUDA of 16
  Activation activation;
};

// Single-threaded over the rows (one lane) or panels [begin, end), for the tiles [tile_begin, tile_end): the caller
// owns the threads. Rows of the output that no tile holds stay as they are: pack_sparse leaves none out.
void sparse_linear_cpu(const SparseLinear& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end);

// The same with bfloat16 weights and inputs and float32 sums, for tiles of 16 rows, row by row of the batch.
struct SparseLinearBFloat16 {
  SparseTiles weight;     // of [out, in]; the `halves` of the packed weight, bfloat16
  const uint16_t* input;  // [batch, in], bfloat16
  void* output;           // out [batch, out], output_dtype
  const float* bias;      // [out], or null
  int64_t in;
  int64_t out;
  Activation activation;
  DType output_dtype;  // bfloat16 or float32
  bool squares;        // of 16 rows of the batch by AMX, or by its emulation: the door chooses
};

// As sparse_linear_cpu. Fast where cpu_bfloat16() says so: elsewhere widen and take float32.
void sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& args, int64_t begin, int64_t end, int64_t tile_begin,
                                int64_t tile_end);

// The same on CUDA with weights, inputs and outputs of one type of two bytes.
struct SparseLinearHalves {
  SparseTiles weight;     // of [out, in]; the `halves` of the packed weight, of those that takes_halves() accepts
  const uint16_t* input;  // [batch, in], aligned to 16 bytes
  uint16_t* output;       // out [batch, out], aligned to 4 bytes
  const float* bias;      // [out], or null
  int64_t batch;          // >= 0
  int64_t in;
  int64_t out;
  Activation activation;
  int64_t processors = 0;  // to keep busy; 0: all that the device has
};

constexpr int64_t kMostHalvesColumns = 1 << 16;

// Products take 16 columns that begin at a multiple of 16, each beyond the one before. The last block of a row, where
// it would reach over the edge, lies further to the left and may break this.
inline bool takes_halves(const SparseTiles& weight, const void* input, int64_t in) {
  return in % 16 == 0 && in <= kMostHalvesColumns && weight.width % 16 == 0 &&
         (weight.width <= 32 || in % weight.width == 0) && reinterpret_cast<uintptr_t>(input) % 16 == 0;
}

// All of it, enqueued on `stream`; never synchronises, never allocates.
CudaStatus sparse_linear_cuda(const SparseLinear& args, CUstream_st* stream);
CudaStatus sparse_linear_halves_cuda(const SparseLinearHalves& args, CUstream_st* stream);

}  // namespace pykd
