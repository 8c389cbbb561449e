// Products of halves with float32 sums by a warp's tensor cores, mma.sync m16n8k16, or under emulation by the same
// layout and scalars. Included after core/cuda.h.
//
// Halves lie in pairs that follow each other along the sum: 32 bits, the first one in the lower half.
#pragma once

#include "core/dtype.h"

namespace pykd::PYKD_ISA {

// Two floats as halves, to nearest, ties to even. float16 makes an infinity of 65520 and more.
template <DType kHalves>
__device__ uint32_t pair_of(float first, float second) {
  static_assert(kHalves == DType::kFloat16 || kHalves == DType::kBFloat16);
  uint32_t pair;
  if constexpr (kHalves == DType::kFloat16) {
    const __half2 halves = __floats2half2_rn(first, second);
    memcpy(&pair, &halves, sizeof pair);
  } else {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(first, second);
    memcpy(&pair, &halves, sizeof pair);
  }
  return pair;
}

#if defined(PYKD_EMULATE_CUDA)
// Number i of a pair.
template <DType kHalves>
float number_of(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * i);
  if constexpr (kHalves == DType::kFloat16)
    return __half2float(__builtin_bit_cast(__half, bits));
  else
    return __bfloat162float(__builtin_bit_cast(__nv_bfloat16, bits));
}
#endif

// sums [16 rows, 8 columns] += a [16 rows, 8 pairs] * b [8 pairs, 8 columns], by all lanes of a warp. Lane 4 g + m
// gives of a the pairs m of rows g and g + 8, then m + 4 of both; of b the pairs m and m + 4 of column g; and has of
// the sums columns 2 m and 2 m + 1 of row g, then of row g + 8.
template <DType kHalves>
__device__ void mma(float (&sums)[4], uint4 a, uint2 b) {
#if defined(PYKD_EMULATE_CUDA)
  const unsigned group = emulation::lane() / 4, member = emulation::lane() % 4;
  uint32_t rows[2][8], columns[2][8];
  emulation::exchange(~0u, a, [&](auto shown) {
    for (unsigned m = 0; m < 4; ++m) {
      const uint4 of = shown(4 * group + m);
      rows[0][m] = of.x, rows[1][m] = of.y, rows[0][m + 4] = of.z, rows[1][m + 4] = of.w;
    }
    return 0;
  });
  emulation::exchange(~0u, b, [&](auto shown) {
    for (unsigned column = 0; column < 2; ++column)
      for (unsigned m = 0; m < 4; ++m) {
        const uint2 of = shown(4 * (2 * member + column) + m);
        columns[column][m] = of.x, columns[column][m + 4] = of.y;
      }
    return 0;
  });
  for (int i = 0; i < 4; ++i)
    for (int pair = 0; pair < 8; ++pair)
      for (int k = 0; k < 2; ++k)
        sums[i] += number_of<kHalves>(rows[i / 2][pair], k) * number_of<kHalves>(columns[i % 2][pair], k);
#else
#define PYKD_MMA(halves)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." halves "." halves             \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y))
  if constexpr (kHalves == DType::kFloat16)
    PYKD_MMA("f16");
  else
    PYKD_MMA("bf16");
#undef PYKD_MMA
#endif
}

// Four matrices of 8 rows of 8 halves from shared memory, by all lanes of a warp: lane 8 i + j names row j of matrix i,
// 16 bytes that are aligned to 16, and lane 4 g + m has the pair m of row g of each. Of rows of the batch they are what
// mma takes as b: row g is its column g.
__device__ inline uint4 read_matrices(const void* row) {
#if defined(PYKD_EMULATE_CUDA)
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("a row of a matrix is aligned to its 16 bytes.");
  const unsigned group = emulation::lane() / 4, member = emulation::lane() % 4;
  uint32_t pairs[4];
  emulation::exchange(~0u, row, [&](auto shown) {
    for (unsigned i = 0; i < 4; ++i)
      memcpy(&pairs[i], static_cast<const char*>(shown(8 * i + group)) + 4 * member, sizeof pairs[i]);
    return 0;
  });
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
#else
  uint4 pairs;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs.x), "=r"(pairs.y), "=r"(pairs.z), "=r"(pairs.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
  return pairs;
#endif
}

}  // namespace pykd::PYKD_ISA
