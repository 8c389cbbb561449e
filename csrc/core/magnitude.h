// Magnitudes whose order NaN does not break, and sums of squares that are not to be trusted; for scalars and CUDA.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

// Bits of |x|: as integers they are ordered like |x|, with NaN above infinity, so that a maximum keeps it.
PYKD_HD int32_t magnitude_bits(float x) { return __builtin_bit_cast(int32_t, x) & 0x7FFFFFFF; }
PYKD_HD int64_t magnitude_bits(double x) { return __builtin_bit_cast(int64_t, x) & 0x7FFFFFFFFFFFFFFF; }
PYKD_HD float from_bits(int32_t x) { return __builtin_bit_cast(float, x); }
PYKD_HD double from_bits(int64_t x) { return __builtin_bit_cast(double, x); }

#if !defined(PYKD_ISA_CUDA)
inline Ints magnitude_bits(Floats x) { return (Ints)x & 0x7FFFFFFF; }
inline Floats from_bits(Ints x) { return (Floats)x; }
#endif

template <typename T>
PYKD_HD T magnitude(T x) {
  return from_bits(magnitude_bits(x));
}

template <typename T>
PYKD_HD T larger_magnitude(T a, T b) {
  const auto i = magnitude_bits(a), j = magnitude_bits(b);
  return from_bits(i > j ? i : j);
}

// Whether a sum of squares has neither overflowed nor lost anything; no for 0 and NaN.
PYKD_HD bool is_regular(float squares) { return squares > 1e-30f && squares < 1e37f; }
#if !defined(PYKD_ISA_CUDA)
inline Ints is_regular(Floats squares) { return (squares > 1e-30f) & (squares < 1e37f); }
#endif
PYKD_HD bool is_regular(double squares) { return squares > 1e-290 && squares < 1e300; }

}  // namespace pykd::PYKD_ISA
