// What is done to each pixel of a value alone, and softmax over its channels:
//
//   output = f(input):  x if x > 0 else 0,  x if x > 0 else slope x,  tanh(x),  x + other,  scale[c] x + shift[c],  x
//   output[b, c, y, x] = exp(input[b, c, y, x]) / sum_k exp(input[b, k, y, x])
//
// NaN stays NaN. Copies serve concatenation and other borders.
#pragma once

#include "core/planes.h"

struct CUstream_st;

namespace pykd {

enum class Function : int32_t { kRelu, kLeakyRelu, kTanh, kAdd, kAffine, kCopy };

// All planes are [groups][channels][height][width][lanes]; the output may be an input, place by place.
struct Elementwise {
  Plane input;
  Plane other;   // of kAdd
  Plane output;  // out
  int64_t channels, lanes, height, width;
  Function function;
  float slope;         // of kLeakyRelu
  const float* scale;  // [channels], of kAffine
  const float* shift;  // [channels], of kAffine
};

struct Softmax {
  Plane input;
  Plane output;  // out, may be the input
  int64_t channels, lanes, height, width;
};

// Single-threaded over the channels (softmax: rows of the image) [begin, end), counted through all groups: the caller
// owns the threads.
void elementwise_cpu(const Elementwise& args, int64_t begin, int64_t end);
void softmax_cpu(const Softmax& args, int64_t begin, int64_t end);

// All of it for `groups` groups, enqueued on `stream`; never synchronise, never allocate.
CudaStatus elementwise_cuda(const Elementwise& args, int64_t groups, CUstream_st* stream);
CudaStatus softmax_cuda(const Softmax& args, int64_t groups, CUstream_st* stream);

}  // namespace pykd
