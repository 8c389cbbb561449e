#include "core/cuda.h"
#include "core/cuda_copy.h"
#include "core/cuda_mma.h"
#include "core/cuda_places.h"
#include "kernels/sparse_linear/sparse_linear.h"

// Halves as torch has them, by tensor cores, in one launch.
//
// Many rows of the batch (`staged`): a block has M = 128 T rows of the output in registers, T tiles for each of its 8
// warps, for N = 64 rows of the batch. It walks through the inputs in steps of 64 columns, which come to shared memory
// 16 columns at a time, where one of its tiles has values; the values go straight to registers. A step's columns are
// asked for four steps ahead, a tile's next 16 columns of values when the ones before them are multiplied.
//
// Counted, at 4096 x 4096 with a share d of the values in blocks of 16 x 16, on an H200 (132 SMs at 1.75 GHz, 128 bytes
// a clock each from shared memory; from L2 some 5.5 TB/s in all, an assumption). A block reads s N + d M halves of each
// column from L2, s = 1 - (1 - d)^(M / 16) being the share of the columns that it needs:
//
//   batch   d      M = 128         M = 256        M = 512
//    4096   0.20   1323 MB         951 MB         698 MB
//    4096   0.10    826 MB         652 MB         474 MB
//    4096   0.05    469 MB         408 MB         324 MB
//     256   0.10     52 MB (128)    41 MB (64)     30 MB (32 blocks)
//
// So 86 us at batch 4096 and d = 0.1, 59 at 0.05, 9 us at batch 256, where fewer blocks than SMs have too few bytes
// under way (37 KB each, and 4 KB of values for each T). The halves themselves, 70 MB at least, take 16 us of 4.3 TB/s.
// A product of 2048 multiplications reads 256 bytes from shared memory and 64 of values: with the copies, d = 0.1 and
// M = 512 a step has 320 clocks, all of a SM's four blocks one after another 47 us. Registers set M and N: 128 of a
// thread are sums, and N = 96, with 402 MB, would leave none to read ahead with. What goes on from here are clusters of
// blocks that read L2 once for all of them: of 2 x 2 blocks with M = 512, 240 MB at d = 0.1.
//
// Few rows (`direct`): a tile for 8 V rows of the batch is shared by the warps of a block, which read values and inputs
// from the caches, d (1 / 16 + 1 / (8 V)) of a half for each of the dense multiplications: 20 MB at batch 64, d = 0.1.
namespace pykd::cuda {
namespace {

constexpr int kPiece = 16;    // columns of a product
constexpr int kRows = 64;     // of the batch, of a block
constexpr int kColumns = 64;  // of a step
constexpr int kStages = 5;    // steps in shared memory
constexpr int kStagedWarps = 8, kStagedThreads = 32 * kStagedWarps;
constexpr int kTeamWarps = 8;                       // at most, that share a tile
constexpr int kTogether = 4;                        // pieces under way
constexpr int kWordSteps = 32 * kPiece / kColumns;  // whose pieces are bits of a word

// A weight's pieces, counted through all tiles: those of a tile, and their values, lie one after another. A product's
// rows g and g + 8 are a tile's 2 g and 2 g + 1. Stored values are fewer than 2^31.
struct Pieces {
  const int32_t* columns;  // of the runs
  const uint2* values;     // two rows of a pair of columns each
  uint32_t of_run;

  __device__ explicit Pieces(const SparseTiles& w)
      : columns(w.columns),
        values(reinterpret_cast<const uint2*>(w.halves)),
        of_run(static_cast<uint32_t>(w.width) / kPiece) {}

  __device__ int32_t column(uint32_t piece) const {
    if (of_run == 1) return columns[piece];
    return columns[piece / of_run] + static_cast<int32_t>(piece % of_run * kPiece);
  }
  // Pairs `first` and `second` of a piece.
  __device__ uint4 read(uint32_t piece, int first, int second, int group) const {
    const uint2* const from = values + int64_t{piece} * (kPiece / 2 * kTileRows / 2) + group;
    const uint2 a = from[first * (kTileRows / 2)], b = from[second * (kTileRows / 2)];
    return {a.x, a.y, b.x, b.y};
  }
  // The first piece of a tile.
  __device__ uint32_t begin(const SparseTiles& w, int64_t tile) const {
    return static_cast<uint32_t>(w.starts[tile]) * of_run;
  }
};

// Two rows of the output, which a lane has sums of.
template <DType kHalves>
struct Pair {
  int32_t rows[2];
  float bias[2] = {};

  __device__ Pair(const SparseLinearHalves& a, int64_t tile, int group) {
    PYKD_UNROLL for (int r = 0; r < 2; ++r) {
      rows[r] = a.weight.outputs[tile * kTileRows + 2 * group + r];
      if (a.bias && rows[r] >= 0) bias[r] = a.bias[rows[r]];
    }
  }

  __device__ void write(const SparseLinearHalves& a, int64_t row, float first, float second) const {
    if (row >= a.batch || rows[0] < 0) return;
    const uint32_t pair =
        pair_of<kHalves>(activated(first + bias[0], a.activation), activated(second + bias[1], a.activation));
    uint16_t* const to = a.output + row * a.out + rows[0];
    if (rows[1] >= 0 && (rows[0] | a.out) % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      to[0] = static_cast<uint16_t>(pair);
      if (rows[1] >= 0) to[1] = static_cast<uint16_t>(pair >> 16);
    }
  }
};

template <DType kHalves, int T>
__global__ void __launch_bounds__(kStagedThreads, T == 4 ? 1 : 2) staged(SparseLinearHalves a) {
  constexpr int kChunk = 8, kChunks = kColumns / kChunk;  // halves of a copy
  constexpr int kPitch = kColumns + kChunk;               // 8 rows of a matrix lie in different banks
  constexpr int kEach = kStagedThreads / kChunks;         // rows that the threads copy at a time
  alignas(16) __shared__ uint16_t shared[kStages][kRows][kPitch];
  __shared__ uint32_t used[kMostHalvesColumns / kPiece / 32];  // which pieces of all columns have values
  const SparseTiles& w = a.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, member = lane % 4;
  const int64_t parts = ceil_div(w.tiles, T * kStagedWarps);
  const int64_t part = blockIdx.x % parts * (T * kStagedWarps), first = blockIdx.x / parts * kRows;
  const int64_t end = w.tiles < part + T * kStagedWarps ? w.tiles : part + T * kStagedWarps;

  const int steps = static_cast<int>(ceil_div(a.in, kColumns));
  for (int i = thread; i * kWordSteps < steps; i += kStagedThreads) used[i] = 0;
  __syncthreads();
  for (int64_t run = w.starts[part] + thread; run < w.starts[end]; run += kStagedThreads)
    for (int32_t c = 0; c < w.width; c += kPiece) {
      const int32_t piece = (w.columns[run] + c) / kPiece;
      atomicOr(&used[piece / 32], uint32_t{1} << piece % 32);
    }
  __syncthreads();
  const auto used_of = [&](int step) {
    return used[step / kWordSteps] >> step % kWordSteps * (32 / kWordSteps) & ((1u << 32 / kWordSteps) - 1);
  };
  const auto after = [&](int step) {
    do ++step;
    while (step < steps && !used_of(step));
    return step;
  };
  const auto copy = [&](int step, int stage) {
    const uint32_t wanted = step < steps ? used_of(step) : 0;
    const int chunk = thread % kChunks;
    if (wanted >> chunk * kChunk / kPiece & 1) PYKD_UNROLL for (int i = 0; i < kRows; i += kEach) {
        const int row = i + thread / kChunks;
        if (first + row < a.batch)  // beyond it are sums that are not stored
          copy_async(&shared[stage][row][chunk * kChunk],
                     a.input + (first + row) * a.in + step * kColumns + chunk * kChunk);
      }
    commit_copies();
  };
  int ahead = after(-1);
  for (int stage = 0; stage < kStages - 1; ++stage, ahead = after(ahead)) copy(ahead, stage);

  // What a tile goes on with: the column and the values of a piece, and which run the one after it is in, where.
  struct Next {
    int32_t column = INT32_MAX, later = INT32_MAX;  // none
    uint4 values = {};
    uint32_t piece = 0;
    int32_t run = 0, end = 0, within = 0;
  };
  Next next[T];
  const Pieces pieces(w);
  const auto begin = [&](Next& tile) { tile.later = tile.run < tile.end ? w.columns[tile.run] : INT32_MAX; };
  // Nothing of it is waited for before the piece is multiplied.
  const auto read = [&](Next& tile) {
    tile.column = tile.later;
    if (tile.run >= tile.end) return;
    tile.values = pieces.read(tile.piece, member, member + 4, group);
    ++tile.piece;
    if (++tile.within < w.width / kPiece) {
      tile.later += kPiece;
    } else {
      tile.within = 0;
      ++tile.run;
      begin(tile);
    }
  };
  const int64_t own = part + warp * T;  // the first tile of this warp
  float sums[T][kRows / 8][4] = {};
  PYKD_UNROLL for (int t = 0; t < T; ++t) {
    if (own + t >= end) continue;
    next[t].piece = pieces.begin(w, own + t);
    next[t].run = w.starts[own + t];
    next[t].end = w.starts[own + t + 1];
    begin(next[t]);
    read(next[t]);
  }
  int stage = 0;
  for (int step = after(-1); step < steps; step = after(step)) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step has arrived, and the last one is done with
    copy(ahead, stage == 0 ? kStages - 1 : stage - 1);
    ahead = after(ahead);
    // Matrices of a lane's row: columns 0 to 7 and 8 to 15 of 8 rows, then of 8 more.
    const uint16_t* const inputs = &shared[stage][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8];
    PYKD_UNROLL for (int t = 0; t < T; ++t) {
      while (next[t].column < (step + 1) * kColumns) {
        const uint16_t* const from = inputs + (next[t].column - step * kColumns);
        PYKD_UNROLL for (int n = 0; n < kRows / 8; n += 2) {
          const uint4 b = read_matrices(from + n * 8 * kPitch);
          mma<kHalves>(sums[t][n], next[t].values, {b.x, b.y});
          mma<kHalves>(sums[t][n + 1], next[t].values, {b.z, b.w});
        }
        read(next[t]);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  PYKD_UNROLL for (int t = 0; t < T; ++t) {
    if (own + t >= end) continue;
    const Pair<kHalves> pair(a, own + t, group);
    PYKD_UNROLL for (int n = 0; n < kRows / 8; ++n) PYKD_UNROLL for (int i = 0; i < 2; ++i)
        pair.write(a, first + 8 * n + 2 * member + i, sums[t][n][i], sums[t][n][2 + i]);
  }
}

template <DType kHalves, int V>
__global__ void __launch_bounds__(32 * kTeamWarps, 2) direct(SparseLinearHalves a) {
  __shared__ float shared[kTeamWarps][V][4][32];
  const SparseTiles& w = a.weight;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32, group = lane / 4, member = lane % 4;
  const int64_t tile = blockIdx.x % w.tiles, first = blockIdx.x / w.tiles * (8 * V);
  const Pieces pieces(w);
  const uint32_t end = pieces.begin(w, tile + 1);
  const Pair<kHalves> pair(a, tile, group);  // early, for the end
  const uint16_t* from[V];
  PYKD_UNROLL for (int v = 0; v < V; ++v) {
    const int64_t row = first + 8 * v + group;
    from[v] = a.input + (row < a.batch ? row : first) * a.in + 4 * member;
  }
  float sums[V][4] = {};
  for (uint32_t begin = pieces.begin(w, tile) + static_cast<uint32_t>(warp * kTogether); begin < end;
       begin += static_cast<uint32_t>(warps * kTogether)) {
    uint4 values[kTogether] = {};
    uint2 inputs[kTogether][V] = {};
    // Pairs m and m + 4 of the product are the piece's 2 m and 2 m + 1, so that a lane's inputs are one access.
    PYKD_UNROLL for (uint32_t i = 0; i < kTogether; ++i) {
      if (begin + i >= end) break;
      values[i] = pieces.read(begin + i, 2 * member, 2 * member + 1, group);
      const int32_t column = pieces.column(begin + i);
      PYKD_UNROLL for (int v = 0; v < V; ++v) inputs[i][v] = *reinterpret_cast<const uint2*>(from[v] + column);
    }
    PYKD_UNROLL for (uint32_t i = 0; i < kTogether; ++i) {
      if (begin + i >= end) break;
      PYKD_UNROLL for (int v = 0; v < V; ++v) mma<kHalves>(sums[v], values[i], inputs[i][v]);
    }
  }
  PYKD_UNROLL for (int v = 0; v < V; ++v) PYKD_UNROLL for (int i = 0; i < 4; ++i) shared[warp][v][i][lane] = sums[v][i];
  __syncthreads();
  if (warp > 0) return;
  PYKD_UNROLL for (int v = 0; v < V; ++v) {
    for (int other = 1; other < warps; ++other)
      PYKD_UNROLL for (int i = 0; i < 4; ++i) sums[v][i] += shared[other][v][i][lane];
    PYKD_UNROLL for (int i = 0; i < 2; ++i) pair.write(a, first + 8 * v + 2 * member + i, sums[v][i], sums[v][2 + i]);
  }
}

// ---- on the host: a grid has room for more blocks than results fit into a card's memory -----------------------------

template <DType kHalves, int T>
int64_t blocks_of(const SparseLinearHalves& a) {
  return ceil_div(a.batch, kRows) * ceil_div(a.weight.tiles, T * kStagedWarps);
}

// The M that reads least: blocks one after another on a SM, times what each reads of a column.
template <DType kHalves>
void launch_staged(const SparseLinearHalves& a, int64_t processors, CUstream_st* stream) {
  const double density =
      static_cast<double>(a.weight.runs * a.weight.width) / static_cast<double>(a.weight.tiles * a.in);
  const auto reads = [&](int64_t blocks, int tiles) {
    return static_cast<double>(ceil_div(blocks, processors)) * (kRows + density * kTileRows * kStagedWarps * tiles);
  };
  const auto launch = [&]<int T>() {
    PYKD_LAUNCH(static_cast<unsigned>(blocks_of<kHalves, T>(a)), kStagedThreads, 0, stream, staged<kHalves, T>)(a);
  };
  const double one = reads(blocks_of<kHalves, 1>(a), 1), two = reads(blocks_of<kHalves, 2>(a), 2),
               four = reads(blocks_of<kHalves, 4>(a), 4);
  if (one <= two && one <= four) return launch.template operator()<1>();
  two <= four ? launch.template operator()<2>() : launch.template operator()<4>();
}

template <DType kHalves, int V>
void launch_direct(const SparseLinearHalves& a, CUstream_st* stream) {
  const SparseTiles& w = a.weight;
  if constexpr (V > 1)
    if (a.batch <= 4 * V) return launch_direct<kHalves, V / 2>(a, stream);
  const int64_t shares = ceil_div(w.runs * w.width, kPiece * kTogether * w.tiles);
  const int64_t warps = shares < 1 ? 1 : shares < kTeamWarps ? shares : kTeamWarps;
  PYKD_LAUNCH(static_cast<unsigned>(ceil_div(a.batch, 8 * V) * w.tiles), static_cast<unsigned>(32 * warps), 0, stream,
              direct<kHalves, V>)(a);
}

template <DType kHalves>
void launch(const SparseLinearHalves& a, CUstream_st* stream) {
  const int64_t processors = a.processors ? a.processors : busy() / 8;
  if (a.batch <= kRows / 2 || 2 * blocks_of<kHalves, 1>(a) < processors) return launch_direct<kHalves, 4>(a, stream);
  launch_staged<kHalves>(a, processors, stream);
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::sparse_linear_halves_cuda(const SparseLinearHalves& args, CUstream_st* stream) {
  if (args.batch == 0) return cudaSuccess;
  args.weight.dtype == DType::kFloat16 ? cuda::launch<DType::kFloat16>(args, stream)
                                       : cuda::launch<DType::kBFloat16>(args, stream);
  return cudaGetLastError();
}
