#include "core/cuda.h"
#include "core/cuda_panels.h"
#include "kernels/sparse_linear/sparse_linear.h"

// Panels have their floor in core/cuda_panels.h. Of a row of the batch it is memory, 8 bytes a value of a pair and 4 to
// 8 of another, which at 1024 x 1024 with 5 % of the values is 0.1 us: what counts is the chain of reads that wait for
// each other, from where a tile starts to its values and columns to their inputs, and that enough of each are under
// way.
namespace pykd::cuda {
namespace {

// A team of warps takes a tile for B rows of the batch. Entry i of its values is row i % height of its column i /
// height, so a thread, which takes every so many entries, sums for a single row, and nothing is transposed.
template <int B, int kTeam>
__global__ void __launch_bounds__(32 * kWarps, 8) rowwise(SparseLinear a) {
  static_assert(kTeam == 1 || kTeam == kWarps);  // a barrier for either
  constexpr int kThreads = 32 * kTeam, kTogether = 4;
  __shared__ float shared[kWarps][B][kTileRows];
  const SparseTiles& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x) % kThreads, warp = static_cast<int>(threadIdx.x) / 32,
            team = warp / kTeam, lane = static_cast<int>(threadIdx.x) % 32;
  const int height = w.height, width = w.width, row = thread % height;
  const int stride = kThreads / height, runs = stride / width, rest = stride % width;  // columns to a thread's next

  const int64_t first = static_cast<int64_t>(blockIdx.x) * B;
  const float* from[B];
  PYKD_UNROLL for (int b = 0; b < B; ++b) from[b] = a.input + (first + b < a.batch ? first + b : first) * a.in;

  constexpr int kTeams = kWarps / kTeam;
  for (int64_t tile = static_cast<int64_t>(blockIdx.y) * kTeams + team; tile < w.tiles;
       tile += static_cast<int64_t>(gridDim.y) * kTeams) {
    const int64_t start = w.starts[tile], entries = (w.starts[tile + 1] - start) * width * height;
    const float* const values = w.values + start * width * height;
    int64_t run = start + thread / height / width;
    int column = thread / height % width;
    const int32_t out = w.outputs[tile * height + row];  // early, for the end
    const float bias = a.bias && out >= 0 ? a.bias[out] : 0;
    float sums[B] = {};
    for (int64_t begin = thread; begin < entries; begin += kTogether * kThreads) {
      float value[kTogether] = {};
      int32_t at[kTogether] = {};
      PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
        if (begin + i * kThreads < entries) {
          value[i] = values[begin + i * kThreads];
          at[i] = w.pairs ? w.columns[2 * run + row] : w.columns[run] + column;
        }
        run += runs;
        column += rest;
        if (column >= width) {
          column -= width;
          ++run;
        }
      }
      PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
        if (begin + i * kThreads < entries)
          PYKD_UNROLL for (int b = 0; b < B; ++b) sums[b] += value[i] * from[b][at[i]];
      }
    }
    for (int offset = 16; offset >= height; offset /= 2)
      PYKD_UNROLL for (int b = 0; b < B; ++b) sums[b] += __shfl_xor_sync(~0u, sums[b], offset);
    const auto wait = [] {
      if constexpr (kTeam == 1)
        __syncwarp();
      else
        __syncthreads();
    };
    if (lane < height) PYKD_UNROLL for (int b = 0; b < B; ++b) shared[warp][b][lane] = sums[b];
    wait();
    for (int b = thread / height; b < B; b += stride) {
      if (out < 0 || first + b >= a.batch) continue;
      float sum = 0;
      PYKD_UNROLL for (int i = 0; i < kTeam; ++i) sum += shared[team * kTeam + i][b][row];
      a.output[(first + b) * a.out + out] = activated(sum + bias, a.activation);
    }
    wait();
  }
}

// As many rows of the batch a warp, and as few warps a tile, as leave work for all schedulers.
void launch_rowwise(const SparseLinear& a, CUstream_st* stream) {
  const int64_t tiles = a.weight.tiles, quarters = ceil_div(a.batch, 4);
  if (a.batch >= 4 && quarters * tiles >= busy())
    PYKD_LAUNCH(grid_of(quarters, ceil_div(tiles, kWarps)), 32 * kWarps, 0, stream, rowwise<4, 1>)(a);
  else if (a.batch * tiles >= busy())
    PYKD_LAUNCH(grid_of(a.batch, ceil_div(tiles, kWarps)), 32 * kWarps, 0, stream, rowwise<1, 1>)(a);
  else
    PYKD_LAUNCH(grid_of(a.batch, tiles), 32 * kWarps, 0, stream, rowwise<1, kWarps>)(a);
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::sparse_linear_cuda(const SparseLinear& args, CUstream_st* stream) {
  if (args.lanes != 1 || args.weight.halves)
    return cuda::launch_panels(args.weight,
                               {.count = args.batch,
                                .row = args.lanes,
                                .rows = 1,
                                .lanes = args.lanes,
                                .input = args.input,
                                .row_stride = 0,
                                .group_stride = args.in * args.lanes,
                                .offsets = nullptr,
                                .output = args.output,
                                .out_row_stride = 0,
                                .out_group_stride = args.out * args.lanes,
                                .out_channel_stride = args.lanes,
                                .bias = args.bias,
                                .activation = args.activation},
                               stream);
  if (args.batch == 0) return cudaSuccess;
  cuda::launch_rowwise(args, stream);
  return cudaGetLastError();
}
