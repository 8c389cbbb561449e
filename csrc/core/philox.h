// Philox4x32-10 (Salmon et al. 2011) and Box-Muller, written once for vectors, scalars and CUDA.
//
// The counter of a draw is (index, stream, row low, row high), the key is the seed:
//   noise of class c in row r for teacher k:  index = c / 8, stream = k
//     word (c % 8) / 2 gives the pair of an even class (cosine) and the odd one after it (sine)
//   draws of the whole row r for teacher k:   index = 0, stream = k | kRowDraw
//     word 0 selects, word 1 gives xi (cosine)
// A word lives in the low half of a 64-bit slot; the high half is noise until masked.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

constexpr uint32_t kRowDraw = 1u << 31;

template <typename Slot>
struct Philox {
  Slot word[4];
};

// Ten rounds, in place, of kTogether independent counters: interleaved, they hide the multiplier's latency.
// Slot is uint64_t or a vector of them.
template <int kTogether, typename Slot>
PYKD_HD void philox(Philox<Slot> (&x)[kTogether], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kTogether; ++i) {
      Slot(&word)[4] = x[i].word;
      const Slot p0 = multiply_low(word[0], 0xD2511F53u), p1 = multiply_low(word[2], 0xCD9E8D57u);
      word[0] = (p1 >> 32) ^ word[1] ^ k0;
      word[1] = p1;
      word[2] = (p0 >> 32) ^ word[3] ^ k1;
      word[3] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// One word to two independent N(0, 1) values, in two steps: 20 bits for the radius, 11 for an angle in (-pi/2, pi/2),
// one for the half of the plane. 4096 equally spaced angles integrate every moment below the 4096th exactly, and 2^20
// radii reach 5.4. The uniforms are exact in float; the polynomials are within 7e-8 of -2 log(1 + f) / f, 7e-9 of
// sin(pi t / 2) / t and 5e-8 of cos(pi t / 2).

// radius^2 = -2 log u,  u = (2 (word >> 12) + 1) / 2^21
template <typename Word>
PYKD_HD auto squared_radius(Word word) {
  constexpr uint32_t kRootHalf = 0x3F3504F3;  // bits of sqrt(1/2): mantissas are centred on 1
  const Word bits = float_bits(to_float((word >> 11) | 1)) - (kRootHalf + (21u << 23));
  const auto f = bits_float((bits & 0x7FFFFF) + kRootHalf) - 1.0f;
  auto p = -0.17066626f * f + 0.28538516f;
  p = p * f - 0.29954803f;
  p = p * f + 0.33155987f;
  p = p * f - 0.39911866f;
  p = p * f + 0.50002706f;
  p = p * f - 0.66668385f;
  p = p * f + 0.99999994f;
  p = p * f - 2.0f;
  return p * f - to_float(arithmetic_shift(bits, 23)) * 1.38629436f;
}

// The two values, times scale.
template <typename Word, typename Float>
PYKD_HD void rotate(Word word, Float squared, float scale, Float& cosine, Float& sine) {
  const Float radius = bits_float(float_bits(square_root(squared) * scale) ^ ((word << 20) & 0x80000000u));
  const Float t = bits_float(((word & 0x7FF) << 12) | 0x3F800800) * 2.0f - 3.0f;  // odd multiples of 2^-11 in (-1, 1)
  const Float t2 = t * t;
  Float s = 0.0001516717f * t2 - 0.0046741436f;
  s = s * t2 + 0.07968992f;
  s = s * t2 - 0.6459638f;
  s = s * t2 + 1.5707964f;
  Float c = 0.0008581345f * t2 - 0.020810515f;
  c = c * t2 + 0.25365067f;
  c = c * t2 - 1.2336982f;
  c = c * t2 + 1.0f;
  cosine = radius * c;
  sine = radius * (s * t);
}

PYKD_HD void normal_pair(uint32_t word, float scale, float& cosine, float& sine) {
  rotate(word, squared_radius(word), scale, cosine, sine);
}

// The same in double, by the library's functions.
PYKD_HD void normal_pair(uint32_t word, double scale, double& cosine, double& sine) {
  const double radius = sqrt(-2.0 * log(((word >> 11) | 1) * 0x1p-21));
  const double angle = ((word & 0x7FF) * 2.0 - 2047.0) * (1.57079632679489661923 * 0x1p-11);
  const double signed_radius = word & 0x800 ? -scale * radius : scale * radius;
  cosine = signed_radius * cos(angle);
  sine = signed_radius * sin(angle);
}

// The draws that belong to a whole row: its Bernoulli(threshold / 2^32) selection and the word of its own normal value.
struct RowDraw {
  bool selected;
  uint32_t word;
};

PYKD_HD RowDraw row_draw(uint64_t seed, uint64_t row, uint32_t teacher, uint64_t threshold) {
  Philox<uint64_t> x[1] = {{{0, teacher | kRowDraw, row, row >> 32}}};
  philox(x, seed);
  const uint64_t (&word)[4] = x[0].word;
  return {(word[0] & 0xFFFFFFFFu) < threshold, static_cast<uint32_t>(word[1])};
}

}  // namespace pykd::PYKD_ISA
