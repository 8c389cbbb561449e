// exp(x) and log(x), written once for vectors, scalars and CUDA. NaN stays NaN, what is below float's range is 0.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

// For x <= 88.37, and infinity up to 89. 2^n of the nearest n, times a polynomial within 3e-9 of exp(r) for
// |r| <= log(2) / 2; log(2) is taken off in two parts, the first of which times n is exact.
template <typename Float>
PYKD_HD Float exponential(Float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
  const Float shifted = x * 1.44269504f + kRound;
  const Float n = shifted - kRound;
  const Float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Float p = 1.38145348e-3f * r + 8.36874545e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + (r + 1.0f);
  const Float e = p * bits_float((float_bits(shifted) + 127) << 23);
  return x < -87.0f ? Float{} : e;
}
PYKD_HD double exponential(double x) { return exp(x); }

// 2^x for x < 127.5, and infinity up to 128, within 1e-7 of it (CUDA: 2.4e-7): what large loops take, with log2(e) in a
// factor that they have anyway.
template <typename Float>
PYKD_HD Float exponential2(Float x) {
#if defined(__CUDA_ARCH__)
  float power;  // within two units of the last place, in one instruction instead of ten
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  constexpr float kRound = 12582912.0f + 127.0f;  // the lowest bits are the exponent of 2^n, biased
  const Float shifted = x + kRound;
  const Float r = x - (shifted - kRound);
  Float p = 1.3264697e-3f * r + 9.67153441e-3f;
  p = p * r + 5.55073395e-2f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.0f;
  const Float e = p * bits_float(float_bits(shifted) << 23);
  return x < -126.0f ? Float{} : e;
#endif
}
PYKD_HD double exponential2(double x) { return exp2(x); }

// log(x) for x > 0, in float within 4e-8 of it and half a unit of its last place; NaN stays NaN.
template <typename Float>
PYKD_HD Float logarithm_of_positive(Float x) {
  constexpr uint32_t kRootHalf = 0x3F3504F3;  // bits of sqrt(1/2): mantissas are centred on 1
  const auto bits = float_bits(x) - kRootHalf;
  const Float f = bits_float((bits & 0x7FFFFF) + kRootHalf) - 1.0f;
  Float p = 0.0897943601f * f - 0.144268423f;
  p = p * f + 0.148837f;
  p = p * f - 0.165517941f;
  p = p * f + 0.199634761f;
  p = p * f - 0.250025839f;
  p = p * f + 0.333339334f;
  p = p * f - 0.499999821f;
  const Float y = to_float(arithmetic_shift(bits, 23)) * 0.693147181f + (p * (f * f) + f);
  return x < __builtin_inff() ? y : x;
}
PYKD_HD double logarithm_of_positive(double x) { return log(x); }

// The same for x >= 0: 0 gives -inf.
template <typename Float>
PYKD_HD Float logarithm(Float x) {
  return x == 0.0f ? Float{} - __builtin_inff() : logarithm_of_positive(x);
}
PYKD_HD double logarithm(double x) { return log(x); }

}  // namespace pykd::PYKD_ISA
