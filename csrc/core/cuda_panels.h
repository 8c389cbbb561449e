// Tiles of a sparse matrix times places on CUDA, as core/sparse_panels.h is on the CPU: every input is a row of places,
// which are batch or image. Included after core/cuda.h.
//
// A warp takes a tile, or some rows of it, for 32 * V places, the results of which stay in its registers: V places of R
// rows a thread. The warps of a block take different tiles for the same places, so that inputs which tiles share are
// still in the caches. A tile's columns and values come through shared memory; a thread reads a value of it once for
// V places, an input once for R rows. Every result is summed in the order of the columns, whatever V and R are.
//
// The floor, on an H200 (4.8 TB/s; 132 SMs of 128 lanes at 1.75 GHz, 30 T multiplications/s): 4 bytes an input and an
// output, one multiplication a stored value and place. At 1024 x 1024 with 5 % of the values they meet, at 28 us for
// 16384 places; below a thousand places the launch is longer than either. In sm_90's code 128 of 154 instructions of
// 16 rows and 4 places multiply, 128 of 165 of 8 rows. A pair's row shares no input: it reads one a multiplication, and
// a SM reads 32 floats a clock from its cache, a quarter of what it multiplies; 32 of its 86 instructions do.
#pragma once

#include "core/dtype.h"
#include "core/sparse_tiles.h"

struct CUstream_st;

namespace pykd::PYKD_ISA {

constexpr int kWarps = 4;  // of a block
// Warps that keep the schedulers of an H200 (132 SMs of 4) busy, and blocks: beyond so many each takes more tiles.
constexpr int64_t kBusy = 1056;

// The quotient of numbers >= 0, which mostly have 32 bits: that takes a fifth of the instructions.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// NaN stays NaN, as in torch.
__device__ inline float activated(float result, Activation activation) {
  const float least = activation == Activation::kRelu ? 0 : -__builtin_inff();
  return result < least ? least : result;
}

// A thread's V places of a row in one access, or 32 apart in V.
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

// Columns begin to end of those that are staged, N inputs a place under way. A pair's rows have columns of their own.
template <int N, bool kVector, int R, int V, int kStaged, int kInputs, int kPointers>
__device__ void add_columns(const float (&values)[kStaged][R], const int64_t (&columns)[kStaged][kInputs], int begin,
                            int end, const float* const (&from)[kPointers], float (&results)[R][V]) {
  for (; begin + N <= end; begin += N) {
    float inputs[N][kInputs][V];
    PYKD_UNROLL for (int n = 0; n < N; ++n) PYKD_UNROLL for (int i = 0; i < kInputs; ++i)
        read_places<V, kVector>(from, columns[begin + n][i], inputs[n][i]);
    PYKD_UNROLL for (int n = 0; n < N; ++n) PYKD_UNROLL for (int r = 0; r < R; ++r) {
      const float value = values[begin + n][r];
      PYKD_UNROLL for (int v = 0; v < V; ++v) results[r][v] += value * inputs[n][kInputs == 1 ? 0 : r][v];
    }
  }
  if constexpr (N > 1) add_columns<N / 2, kVector>(values, columns, begin, end, from, results);
}

// Block (x, y): the x-th 32 * V places, every gridDim.y-th kWarps tiles from the y-th on. Later tiles of pairs are
// longer, so they come first.
template <int R, int V, bool kPairs, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, R* V >= 32 || V == 1 ? 4 : 6) panels(SparseTiles w, Places p) {
  constexpr int kInputs = kPairs ? 2 : 1;
  constexpr int kStaged = 128 / V;  // columns at a time: the fewer places, the longer the way of each counts
  alignas(16) __shared__ float shared_values[kWarps][kStaged][R];
  __shared__ int64_t shared_columns[kWarps][kStaged][kInputs];
  __shared__ int32_t shared_rows[kWarps][R];
  __shared__ float shared_bias[kWarps][R];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  auto& values = shared_values[warp];
  auto& columns = shared_columns[warp];

  constexpr int kPointers = kVector ? 1 : V, kStep = kVector ? 1 : 32;
  const float* from[kPointers];
  float* to[kPointers];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (32 * V) + lane * (kVector ? V : 1), left = p.count - first;
  const int present = left <= 0 ? 0 : left < V * kStep ? static_cast<int>(left + kStep - 1) / kStep : V;
  PYKD_UNROLL for (int i = 0; i < kPointers; ++i) {
    const int64_t place = i < present ? first + kStep * i : 0;  // any: its results are not stored
    const int64_t group = quotient(place, p.row * p.rows), in_group = place - group * p.row * p.rows;
    const int64_t y = quotient(in_group, p.row), x = in_group - y * p.row;
    from[i] = p.input + group * p.group_stride + y * p.row_stride + x;
    to[i] = p.output + group * p.out_group_stride + y * p.out_row_stride + x;
  }

  const int height = kPairs ? R : w.height, parts = height / R;
  const auto width = static_cast<uint32_t>(w.width);
  const int64_t tasks = w.tiles * parts, step = static_cast<int64_t>(gridDim.y) * kWarps;
  for (int64_t task = static_cast<int64_t>(blockIdx.y) * kWarps + warp; task < tasks; task += step) {
    const int64_t tile = w.tiles - 1 - quotient(task, parts);
    const int top = static_cast<int>(task % parts) * R;
    const int64_t start = w.starts[tile], stored = (w.starts[tile + 1] - start) * width;
    const float* const tile_values = w.values + start * width * height + top;
    const int32_t own_row = w.outputs[tile * height + top + lane % R];  // early, for the end
    const float own_bias = p.bias && own_row >= 0 ? p.bias[own_row] : 0;
    float results[R][V] = {};
    for (int64_t begin = 0; begin < stored; begin += kStaged) {
      const int count = stored - begin < kStaged ? static_cast<int>(stored - begin) : kStaged;
      PYKD_UNROLL for (int i = 0; i < kStaged; i += 32) {
        const int at = i + lane;
        if (at >= count) continue;
        const auto column = static_cast<uint32_t>(begin) + static_cast<uint32_t>(at);
        if constexpr (kPairs) {
          PYKD_UNROLL for (int j = 0; j < kInputs; ++j) columns[at][j] =
              p.column(w.columns[(start + column) * kInputs + j]);
        } else {
          columns[at][0] = p.column(w.columns[start + column / width] + static_cast<int32_t>(column % width));
        }
      }
      const float* value = tile_values + (begin + lane / R) * height + lane % R;
      PYKD_UNROLL for (int i = 0; i < kStaged; i += 32 / R, value += 32 / R * height) {
        if (i + lane / R < count) values[i + lane / R][lane % R] = *value;
      }
      __syncwarp();
      add_columns<R == 16 ? 2 : 16 / V / kInputs, kVector>(values, columns, 0, count, from, results);
      __syncwarp();
    }
    if (lane < R) {
      shared_rows[warp][lane] = own_row;
      shared_bias[warp][lane] = own_bias;
    }
    __syncwarp();
    PYKD_UNROLL for (int r = 0; r < R; ++r) {
      const int32_t row = shared_rows[warp][r];
      if (row < 0) continue;
      const float bias = shared_bias[warp][r];
      PYKD_UNROLL for (int v = 0; v < V; ++v) results[r][v] = activated(results[r][v] + bias, p.activation);
      write_places<V, kVector>(to, row * p.out_channel_stride, results[r], present);
    }
    __syncwarp();
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------

// Blocks (x, y) for so many parts of the batch, each of which needs `most` blocks at the most. x has room for more than
// a card's memory.
inline dim3 grid_of(int64_t parts, int64_t most) {
  const int64_t wanted = ceil_div(kBusy, parts);
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

template <int R, int V, bool kPairs>
void launch_tiles(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  const dim3 grid = grid_of(ceil_div(p.count, 32 * V), ceil_div(w.tiles * (w.height / R), kWarps));
  if constexpr (V == 4)
    if (is_vector(p)) return PYKD_LAUNCH(grid, 32 * kWarps, 0, stream, panels<R, V, kPairs, true>)(w, p);
  PYKD_LAUNCH(grid, 32 * kWarps, 0, stream, panels<R, V, kPairs, false>)(w, p);
}

template <int R, int V>
void launch_rows(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  if constexpr (R > 1)
    if (w.height < R) return launch_rows<R / 2, V>(w, p, stream);
  launch_tiles<R, V, false>(w, p, stream);
}

// As many places and rows a thread as leave work for all schedulers.
template <int V>
void launch_places(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  constexpr int kRows = 4 * V;
  const int64_t stretches = ceil_div(p.count, 32 * V), parts = w.height > kRows ? w.height / kRows : 1;
  if constexpr (V > 1)
    if (p.count <= 16 * V || stretches * w.tiles * parts < kBusy) return launch_places<V / 2>(w, p, stream);
  w.pairs ? launch_tiles<2, V, true>(w, p, stream) : launch_rows<kRows, V>(w, p, stream);
}

inline CudaStatus launch_panels(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  if (p.count == 0) return cudaSuccess;
  launch_places<4>(w, p, stream);
  return cudaGetLastError();
}

}  // namespace pykd::PYKD_ISA
