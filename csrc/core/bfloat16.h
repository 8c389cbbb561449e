// Products of pairs of bfloat16, and squares of them: AVX-512-BF16, AMX and Arm's BFDOT where a level has them, and the
// same sums in float otherwise, so that one body is tested everywhere.
//
// A pair is 32 bits, its first number in the lower half.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

// The pair at `from` in all lanes.
inline Words broadcast_pair(const uint16_t* from) { return Words{} + load<uint32_t>(from); }

// sums + a.first * b.first + a.second * b.second, lane by lane.
inline Floats add_products(Floats sums, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Floats)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  sums += bits_float(a << 16) * bits_float(b << 16);
  return sums + bits_float(a & 0xFFFF0000u) * bits_float(b & 0xFFFF0000u);
#endif
}

// AMX: eight tiles of 16 rows of 64 bytes. A, of 16 rows of pairs, times B, of as many rows of 16 pairs, is added to
// the 16 x 16 floats of C.
#if defined(__AMX_BF16__)
#define PYKD_TILES(pairs) const TileShapes tile_shapes(pairs)
#define PYKD_TILE_ZERO(c) _tile_zero(c)
#define PYKD_TILE_LOAD(t, from, stride_bytes) _tile_loadd(t, from, stride_bytes)
#define PYKD_TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)
#define PYKD_TILE_STORE(c, to) _tile_stored(c, to, 64)
// Tiles 0 to 3 are C, 4 to 6 A, 7 is B; they are given back at the end.
struct TileShapes {
  explicit TileShapes(int pairs) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; ++t) {
      shapes.row_bytes[t] = static_cast<uint16_t>(t >= 4 && t < 7 ? 4 * pairs : 64);
      shapes.rows[t] = static_cast<uint8_t>(t == 7 ? pairs : 16);
    }
    _tile_loadconfig(&shapes);
  }
  ~TileShapes() { _tile_release(); }
};
#else
struct Tiles {
  uint32_t numbers[8][16][16];
  int pairs;

  void zero(int c) { __builtin_memset(numbers[c], 0, sizeof numbers[c]); }
  void read(int t, const void* from, int64_t stride_bytes) {
    for (int row = 0; row < (t == 7 ? pairs : 16); ++row)
      __builtin_memcpy(numbers[t][row], static_cast<const char*>(from) + row * stride_bytes,
                       t < 7 ? 4 * static_cast<size_t>(pairs) : 64);
  }
  void add_product(int c, int a, int b) {
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < pairs; ++k)
        for (int column = 0; column < 16; ++column) {
          const uint32_t x = numbers[a][row][k], y = numbers[b][k][column];
          float sum = bits_float(numbers[c][row][column]);
          sum += bits_float(x << 16) * bits_float(y << 16);
          sum += bits_float(x & 0xFFFF0000u) * bits_float(y & 0xFFFF0000u);
          numbers[c][row][column] = float_bits(sum);
        }
  }
  void write(int c, void* to) const { __builtin_memcpy(to, numbers[c], sizeof numbers[c]); }
};
#define PYKD_TILES(pairs_of_a_row) \
  Tiles tiles;                     \
  tiles.pairs = pairs_of_a_row
#define PYKD_TILE_ZERO(c) tiles.zero(c)
#define PYKD_TILE_LOAD(t, from, stride_bytes) tiles.read(t, from, stride_bytes)
#define PYKD_TILE_PRODUCT(c, a, b) tiles.add_product(c, a, b)
#define PYKD_TILE_STORE(c, to) tiles.write(c, to)
#endif

}  // namespace pykd::PYKD_ISA
