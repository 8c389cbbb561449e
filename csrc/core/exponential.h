// exp(x) for x <= 0, written once for vectors, scalars and CUDA. NaN stays NaN, what is below float's range is 0.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

// 2^n of the nearest n, times a polynomial within 3e-9 of exp(r) for |r| <= log(2) / 2; log(2) is taken off in two
// parts, the first of which times n is exact.
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

// 2^x for x <= 0, within 1e-7 of it: what large loops take, with log2(e) in a factor that they have anyway.
template <typename Float>
PYKD_HD Float exponential2(Float x) {
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
}
PYKD_HD double exponential2(double x) { return exp2(x); }

}  // namespace pykd::PYKD_ISA
