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
// a SM reads 32 floats a clock from its cache, a quarter of what it multiplies; 32 of its 86 instructions do. At
// 4096 x 4096 with 10 % of the values in pairs that is 0.93 ms at batch 4096 and 58 us at 256, with 5 % half of that;
// even multiplications alone would be 0.23 ms, and tensor cores, at 0.78 PFLOP/s, multiply the dense weight in 0.18.
#pragma once

#include "core/cuda_places.h"
#include "core/cuda_squares.h"

namespace pykd::PYKD_ISA {

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

  const Stretch<V, kVector, 32> places(p, static_cast<int64_t>(blockIdx.x) * (32 * V) + lane * (kVector ? V : 1));
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
      add_columns<R == 16 ? 2 : 16 / V / kInputs, kVector>(values, columns, 0, count, places.from, results);
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
      write_places<V, kVector>(places.to, row * p.out_channel_stride, results[r], places.present);
    }
    __syncwarp();
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------

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
    if (p.count <= 16 * V || stretches * w.tiles * parts < busy()) return launch_places<V / 2>(w, p, stream);
  w.pairs ? launch_tiles<2, V, true>(w, p, stream) : launch_rows<kRows, V>(w, p, stream);
}

inline CudaStatus launch_panels(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  if (p.count == 0) return cudaSuccess;
  w.halves ? launch_squares(w, p, stream) : launch_places<4>(w, p, stream);
  return cudaGetLastError();
}

}  // namespace pykd::PYKD_ISA
