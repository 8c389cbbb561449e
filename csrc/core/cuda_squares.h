// Tiles of 16 rows of halves times places on CUDA, by tensor cores. Included by core/cuda_panels.h.
//
// A warp takes a tile for 8 * V places in steps of 16 columns. The halves lie as the product wants them: a lane reads
// two rows of a pair of columns in one access, a warp 256 bytes that follow one another. Inputs are rounded to halves
// between memory and the product's registers: a lane reads V places of four columns. Where places are few, the warps of
// a block share a tile, each taking every so many of its columns, and their sums are added in the order of the warps.
//
// The floor, on an H200 (4.8 TB/s; 132 SMs, each of which reads 128 bytes a clock from its cache, at 1.75 GHz): 2 bytes
// a stored value, 4 an input and an output. Of a step a SM reads 512 bytes of values and 512 V of inputs for V products
// of 2048 multiplications: with 4 V that is 410 multiplications a clock, 3 times what floats allow. At 1024 x 1024 with
// 5 % of the values and 16384 places this takes 9 us and memory 28; dense, 180 us. For one place memory has 0.4 us for
// a dense such weight, and what counts is that enough reads are under way: of each 64 columns a warp has asked for all
// values before it waits. In sm_87's code 64 columns of 32 places side by side are 352 instructions, 16 of them
// products.
#pragma once

#include "core/cuda_mma.h"
#include "core/cuda_places.h"

namespace pykd::PYKD_ISA {

constexpr int kTeamWarps = 8;  // at most, that share a tile

// Block (x, y): the x-th 8 * V places; of one place a lane the y-th tile and every gridDim.y-th from there on, of more
// every gridDim.y-th as many tiles as it has warps.
template <DType kHalves, int V, bool kVector>
__global__ void __launch_bounds__(32 * (V == 1 ? kTeamWarps : kWarps), V == 1 ? 2 : 4)
    squares(SparseTiles w, Places p) {
  constexpr bool kTeam = V == 1;
  constexpr int kMostWarps = kTeam ? kTeamWarps : kWarps, kPairs = 32, kSteps = kPairs / 8;  // staged at a time
  constexpr int kTogether = V == 4 ? 2 : kSteps;                                             // with inputs under way
  struct alignas(16) Columns {
    int64_t first, second;
  };
  __shared__ Columns shared_columns[kMostWarps][kPairs];
  __shared__ float shared_sums[kTeam ? kMostWarps : 1][4][32];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32, group = lane / 4, member = lane % 4;
  auto& columns = shared_columns[warp];

  // Column n of a product is place n / 2 + 4 (n % 2) of 8, so that a warp's stores touch places that follow one
  // another.
  const auto stretch = [&](int place) {
    return Stretch<V, kVector, 8>(p, static_cast<int64_t>(blockIdx.x) * (8 * V) + place * (kVector ? V : 1));
  };
  const auto inputs = stretch(group / 2 + 4 * (group % 2));

  const uint32_t pairs_of_run = static_cast<uint32_t>(w.width) / 2;
  const int64_t step = static_cast<int64_t>(gridDim.y) * (kTeam ? 1 : warps);
  for (int64_t tile = kTeam ? blockIdx.y : static_cast<int64_t>(blockIdx.y) * warps + warp; tile < w.tiles;
       tile += step) {
    const int64_t start = w.starts[tile], pairs = (w.starts[tile + 1] - start) * pairs_of_run;
    // Rows 2 group and 2 group + 1 of pairs, in the place of the product's rows group and group + 8.
    const uint2* const values = reinterpret_cast<const uint2*>(w.halves) + start * pairs_of_run * 8 + group;
    int32_t rows[2];
    float bias[2];
    PYKD_UNROLL for (int r = 0; r < 2; ++r) {  // early, for the end
      rows[r] = w.outputs[tile * kTileRows + 2 * group + r];
      bias[r] = p.bias && rows[r] >= 0 ? p.bias[rows[r]] : 0;
    }
    float sums[V][4] = {};
    for (int64_t begin = kTeam ? kPairs * warp : 0; begin < pairs; begin += kTeam ? kPairs * warps : kPairs) {
      const int count = pairs - begin < kPairs ? static_cast<int>(pairs - begin) : kPairs;
      uint2 a[kSteps][2];
      PYKD_UNROLL for (int s = 0; s < kSteps; ++s) PYKD_UNROLL for (int half = 0; half < 2; ++half) {
        const int pair = 8 * s + 4 * half + member;
        a[s][half] = pair < count ? values[(begin + pair) * 8] : uint2{};
      }
      if (lane < count) {
        const uint32_t pair = static_cast<uint32_t>(begin) + static_cast<uint32_t>(lane);
        const int32_t column = w.columns[start + pair / pairs_of_run] + static_cast<int32_t>(2 * (pair % pairs_of_run));
        columns[lane] = {p.column(column), p.column(column + 1)};
      }
      __syncwarp();
      PYKD_UNROLL for (int s = 0; s < kSteps; s += kTogether) {
        if (8 * s >= count) break;
        uint32_t b[kTogether][V][2];
        PYKD_UNROLL for (int t = 0; t < kTogether; ++t) PYKD_UNROLL for (int half = 0; half < 2; ++half) {
          const int pair = 8 * (s + t) + 4 * half + member;
          float first[V] = {}, second[V] = {};
          if (pair < count) {
            read_places<V, kVector>(inputs.from, columns[pair].first, first);
            read_places<V, kVector>(inputs.from, columns[pair].second, second);
          }
          PYKD_UNROLL for (int v = 0; v < V; ++v) b[t][v][half] = pair_of<kHalves>(first[v], second[v]);
        }
        PYKD_UNROLL for (int t = 0; t < kTogether; ++t) PYKD_UNROLL for (int v = 0; v < V; ++v) mma<kHalves>(
            sums[v], {a[s + t][0].x, a[s + t][0].y, a[s + t][1].x, a[s + t][1].y}, {b[t][v][0], b[t][v][1]});
      }
      __syncwarp();
    }
    if constexpr (kTeam) {
      PYKD_UNROLL for (int i = 0; i < 4; ++i) shared_sums[warp][i][lane] = sums[0][i];
      __syncthreads();
      for (int other = 1; warp == 0 && other < warps; ++other)
        PYKD_UNROLL for (int i = 0; i < 4; ++i) sums[0][i] += shared_sums[other][i][lane];
    }
    if (!kTeam || warp == 0) PYKD_UNROLL for (int i = 0; i < 2; ++i) {
        const auto outputs = stretch(member + 4 * i);
        PYKD_UNROLL for (int r = 0; r < 2; ++r) {
          if (rows[r] < 0) continue;
          float results[V];
          PYKD_UNROLL for (int v = 0; v < V; ++v) results[v] = activated(sums[v][2 * r + i] + bias[r], p.activation);
          write_places<V, kVector>(outputs.to, rows[r] * p.out_channel_stride, results, outputs.present);
        }
      }
    if constexpr (kTeam) __syncthreads();
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------

// As many places a warp as leave work for all schedulers; if even 8 do not, as many warps a tile as it has 64 columns.
template <DType kHalves, int V>
void launch_squares(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  const int64_t stretches = ceil_div(p.count, 8 * V);
  if constexpr (V > 1)
    if (p.count <= 4 * V || stretches * w.tiles < busy()) return launch_squares<kHalves, V / 2>(w, p, stream);
  const int64_t most = V == 1 ? kTeamWarps : kWarps,
                shares = V == 1 ? ceil_div(w.runs * w.width, 64 * w.tiles) : w.tiles;
  const int64_t warps = shares < 1 ? 1 : shares < most ? shares : most;
  const dim3 grid = grid_of(stretches, V == 1 ? w.tiles : ceil_div(w.tiles, warps));
  const auto threads = static_cast<unsigned>(32 * warps);
  if constexpr (V == 4)
    if (is_vector(p)) return PYKD_LAUNCH(grid, threads, 0, stream, squares<kHalves, V, true>)(w, p);
  PYKD_LAUNCH(grid, threads, 0, stream, squares<kHalves, V, false>)(w, p);
}

inline void launch_squares(const SparseTiles& w, const Places& p, CUstream_st* stream) {
  w.dtype == DType::kFloat16 ? launch_squares<DType::kFloat16, 4>(w, p, stream)
                             : launch_squares<DType::kBFloat16, 4>(w, p, stream);
}

}  // namespace pykd::PYKD_ISA
