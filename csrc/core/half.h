// float16 and bfloat16 rows, widened to float and rounded back (to nearest, ties to even).
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

inline void widen(const void* from, DType dtype, float* to, int64_t n) {
  if (dtype == DType::kFloat16) {
    const Half* half = static_cast<const Half*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(half[i]);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = bits_float(static_cast<uint32_t>(half[i]) << 16);
  }
}

inline void narrow(const float* from, DType dtype, void* to, int64_t n) {
  if (dtype == DType::kFloat16) {
    Half* half = static_cast<Half*>(to);
    for (int64_t i = 0; i < n; ++i) half[i] = static_cast<Half>(from[i]);
  } else {
    uint16_t* half = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = float_bits(from[i]);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      half[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // NaN stays NaN
    }
  }
}

}  // namespace pykd::PYKD_ISA
