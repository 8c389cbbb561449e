// Places, which sparse weights are multiplied with on CUDA: batch or image, and how threads reach them. Included after
// core/cuda.h.
#pragma once

#include "core/dtype.h"
#include "core/sparse_tiles.h"

struct CUstream_st;

namespace pykd::PYKD_ISA {

constexpr int kWarps = 4;  // of a block
// The quotient of numbers >= 0, which mostly have 32 bits: that takes a fifth of the instructions.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// NaN stays NaN, as in torch.
__device__ inline float activated(float result, Activation activation) {
  const float least = activation == Activation::kRelu ? 0 : -__builtin_inff();
  return result < least ? least : result;
}

// A thread's V places of a row in one access, or in V.
template <int V, bool kVector>
__device__ void read_places(const float* const (&from)[kVector ? 1 : V], int64_t at, float (&to)[V]) {
  if constexpr (kVector) {
    static_assert(sizeof to == sizeof(uint4));
    const uint4 whole = *reinterpret_cast<const uint4*>(from[0] + at);
    memcpy(to, &whole, sizeof to);
  } else {
    PYKD_UNROLL for (int v = 0; v < V; ++v) to[v] = from[v][at];
  }
}
template <int V, bool kVector>
__device__ void write_places(float* const (&to)[kVector ? 1 : V], int64_t at, const float (&from)[V], int present) {
  if constexpr (kVector) {
    uint4 whole;
    memcpy(&whole, from, sizeof from);
    if (present > 0) *reinterpret_cast<uint4*>(to[0] + at) = whole;
  } else {
    PYKD_UNROLL for (int v = 0; v < V; ++v) {
      if (v < present) to[v][at] = from[v];
    }
  }
}

// Places lie in groups of rows; all strides are in floats.
struct Places {
  int64_t count;
  int64_t row, rows;  // places of a row, rows of a group
  int64_t lanes;      // every column begins at a multiple of
  const float* input;
  int64_t row_stride, group_stride;
  const int32_t* offsets;  // [columns], where each begins in a group; null: lane after lane
  float* output;
  int64_t out_row_stride, out_group_stride, out_channel_stride;
  const float* bias;  // or null
  Activation activation;

  __device__ int64_t column(int32_t c) const { return offsets ? offsets[c] : c * lanes; }
};

// A thread's V places from `first` on, side by side or kStep apart: where they begin, and how many there are.
template <int V, bool kVector, int kStep>
struct Stretch {
  static constexpr int kPointers = kVector ? 1 : V;
  const float* from[kPointers];
  float* to[kPointers];
  int present;

  __device__ Stretch(const Places& p, int64_t first) {
    constexpr int kApart = kVector ? 1 : kStep;
    const int64_t left = p.count - first;
    present = left <= 0 ? 0 : left < V * kApart ? static_cast<int>(left + kApart - 1) / kApart : V;
    PYKD_UNROLL for (int i = 0; i < kPointers; ++i) {
      const int64_t place = i < present ? first + kApart * i : 0;  // any: its results are not stored
      const int64_t group = quotient(place, p.row * p.rows), in_group = place - group * p.row * p.rows;
      const int64_t y = quotient(in_group, p.row), x = in_group - y * p.row;
      from[i] = p.input + group * p.group_stride + y * p.row_stride + x;
      to[i] = p.output + group * p.out_group_stride + y * p.out_row_stride + x;
    }
  }
};

// ---- on the host ----------------------------------------------------------------------------------------------------

// Warps that keep the schedulers of the device busy, 2 for each of a SM's 4, and blocks: beyond so many each takes more
// tiles.
inline int64_t busy() {
  int device = 0, processors = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return 8 * (known ? processors : 1);  // where it is not, the launch fails, too
}

// Blocks (x, y) for so many parts of the batch, each of which needs `most` blocks at the most. x has room for more than
// a card's memory.
inline dim3 grid_of(int64_t parts, int64_t most) {
  const int64_t wanted = ceil_div(busy(), parts);
  return dim3(static_cast<unsigned>(parts), static_cast<unsigned>(wanted < most ? wanted : most));
}

// Whether 4 places from a multiple of 4 on are one access: of several lanes, 16 at the least.
inline bool is_vector(const Places& p) {
  int64_t all =
      p.row | p.row_stride | p.group_stride | p.out_row_stride | p.out_group_stride | p.out_channel_stride | p.lanes;
  for (const void* pointer : {static_cast<const void*>(p.input), static_cast<const void*>(p.output)})
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) / sizeof(float));
  return all % 4 == 0;
}

}  // namespace pykd::PYKD_ISA
