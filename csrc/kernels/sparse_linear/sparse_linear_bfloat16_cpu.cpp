// bfloat16 weights and inputs with float32 sums, for tiles of 16 rows: the rows are the lanes, as they lie.
//
// With AVX-512-BF16 or BFDOT a vector of pairs of values meets a broadcast pair of inputs. With AMX a square of 16 rows
// of the batch and 32 columns meets one of 32 columns and 16 rows of the weight: for four squares of the batch at a
// time five loads of 8 cycles stand against four products of 16.
#include "core/bfloat16.h"
#include "core/cpu_isa.h"
#include "core/half.h"
#include "kernels/sparse_linear/sparse_linear.h"

namespace pykd::PYKD_ISA {
namespace {

constexpr int kVectors = kTileRows / kLanes;  // of a tile's rows

// 16 sums of row b of the batch to where they belong.
void put(const SparseLinearBFloat16& a, int64_t b, int64_t tile, const float* sums) {
  const int32_t* const rows = a.weight.outputs + tile * kTileRows;
  float results[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    const float result = sums[r] + (a.bias && rows[r] >= 0 ? a.bias[rows[r]] : 0);
    results[r] = a.activation == Activation::kRelu && result < 0 ? 0 : result;
  }
  int64_t count = 0;  // the rows of a shared tile follow one another
  while (count < kTileRows && rows[count] >= 0) ++count;
  if (count == 0) return;
  const int64_t at = b * a.out + rows[0];
  if (a.output_dtype == DType::kFloat32)
    __builtin_memcpy(static_cast<float*>(a.output) + at, results, static_cast<size_t>(count) * sizeof(float));
  else
    narrow(results, DType::kBFloat16, static_cast<uint16_t*>(a.output) + at, count);
}

// B rows of the batch.
template <int B>
void dot(const SparseLinearBFloat16& a, int64_t tile, int64_t b) {
  const SparseTiles& w = a.weight;
  const int64_t pairs = w.width / 2;
  Floats sums[B][kVectors] = {};
  for (int64_t run = w.starts[tile]; run < w.starts[tile + 1]; ++run) {
    const uint16_t* const inputs = a.input + b * a.in + w.columns[run];
    const uint16_t* values = w.halves + run * pairs * kTileRows * 2;
    for (int64_t pair = 0; pair < pairs; ++pair, values += kTileRows * 2) {
      Words columns[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) columns[v] = load<Words>(values + v * kLanes * 2);
#pragma GCC unroll 8
      for (int i = 0; i < B; ++i) {
        const Words input = broadcast_pair(inputs + i * a.in + 2 * pair);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[i][v] = add_products(sums[i][v], columns[v], input);
      }
    }
  }
  for (int i = 0; i < B; ++i) {
    alignas(64) float all[kTileRows];
    for (int v = 0; v < kVectors; ++v) store(all + v * kLanes, sums[i][v]);
    put(a, b + i, tile, all);
  }
}

// 16 rows of the batch a square, S squares, 1 to 4; the width is 16 or a multiple of 32.
template <int S>
void squares(const SparseLinearBFloat16& a, int64_t tile, int64_t b) {
  const SparseTiles& w = a.weight;
  const int64_t pairs = w.width < 32 ? 8 : 16, row_bytes = a.in * 2;
  PYKD_TILES(static_cast<int>(pairs));
  PYKD_TILE_ZERO(0);
  if constexpr (S > 1) PYKD_TILE_ZERO(1);
  if constexpr (S > 2) PYKD_TILE_ZERO(2);
  if constexpr (S > 3) PYKD_TILE_ZERO(3);
  for (int64_t run = w.starts[tile]; run < w.starts[tile + 1]; ++run) {
    const uint16_t* inputs = a.input + b * a.in + w.columns[run];
    const uint16_t* values = w.halves + run * w.width * kTileRows;
    for (int64_t c = 0; c < w.width; c += 2 * pairs, inputs += 2 * pairs, values += 2 * pairs * kTileRows) {
      PYKD_TILE_LOAD(7, values, 64);
      PYKD_TILE_LOAD(4, inputs, row_bytes);
      PYKD_TILE_PRODUCT(0, 4, 7);
      if constexpr (S > 1) {
        PYKD_TILE_LOAD(5, inputs + 16 * a.in, row_bytes);
        PYKD_TILE_PRODUCT(1, 5, 7);
      }
      if constexpr (S > 2) {
        PYKD_TILE_LOAD(6, inputs + 32 * a.in, row_bytes);
        PYKD_TILE_PRODUCT(2, 6, 7);
      }
      if constexpr (S > 3) {
        PYKD_TILE_LOAD(4, inputs + 48 * a.in, row_bytes);
        PYKD_TILE_PRODUCT(3, 4, 7);
      }
    }
  }
  alignas(64) float sums[S][16][kTileRows];
  PYKD_TILE_STORE(0, sums[0]);
  if constexpr (S > 1) PYKD_TILE_STORE(1, sums[1]);
  if constexpr (S > 2) PYKD_TILE_STORE(2, sums[2]);
  if constexpr (S > 3) PYKD_TILE_STORE(3, sums[3]);
  for (int64_t i = 0; i < S * 16; ++i) put(a, b + i, tile, sums[i / 16][i % 16]);
}

void rest(const SparseLinearBFloat16& a, int64_t tile, int64_t b, int64_t end) {
  for (; b + 4 <= end; b += 4) dot<4>(a, tile, b);
  for (; b < end; ++b) dot<1>(a, tile, b);
}

}  // namespace

void sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& a, int64_t begin, int64_t end, int64_t tile_begin,
                                int64_t tile_end) {
  const bool by_squares = a.squares && (a.weight.width == 16 || a.weight.width % 32 == 0);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int64_t b = begin;
    if (by_squares) {
      for (; b + 64 <= end; b += 64) squares<4>(a, tile, b);
      for (; b + 16 <= end; b += 16) squares<1>(a, tile, b);
    }
    rest(a, tile, b, end);
  }
}

}  // namespace pykd::PYKD_ISA

#if defined(PYKD_ISA_BASELINE)
#if defined(__x86_64__)
namespace pykd::avx512bf16 {
void sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& a, int64_t, int64_t, int64_t, int64_t);
}
namespace pykd::amx {
void sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& a, int64_t, int64_t, int64_t, int64_t);
}
#else
namespace pykd::bf16 {
void sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& a, int64_t, int64_t, int64_t, int64_t);
}
#endif

void pykd::sparse_linear_bfloat16_cpu(const SparseLinearBFloat16& a, int64_t begin, int64_t end, int64_t tile_begin,
                                      int64_t tile_end) {
  switch (cpu_bfloat16()) {
#if defined(__x86_64__)
    case CpuBFloat16::kAmx: {
      SparseLinearBFloat16 with_squares = a;
      with_squares.squares = true;
      return amx::sparse_linear_bfloat16_cpu(with_squares, begin, end, tile_begin, tile_end);
    }
    case CpuBFloat16::kDot: return avx512bf16::sparse_linear_bfloat16_cpu(a, begin, end, tile_begin, tile_end);
#else
    case CpuBFloat16::kAmx:
    case CpuBFloat16::kDot: return bf16::sparse_linear_bfloat16_cpu(a, begin, end, tile_begin, tile_end);
#endif
    case CpuBFloat16::kNone: return baseline::sparse_linear_bfloat16_cpu(a, begin, end, tile_begin, tile_end);
  }
}
#endif
