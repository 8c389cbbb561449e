// The words arithmetic is written in, for scalars and for the vectors of one level.
//
// Vectors are GCC's vector types: arithmetic, shifts and comparisons are the language's own operators, and only the few
// instructions those do not reach stand here. The width follows the level: 4, 8 or 16 lanes. CUDA has scalars alone.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(PYKD_ISA_CUDA)
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"

namespace pykd::PYKD_ISA {

PYKD_HD float to_float(uint32_t x) { return static_cast<float>(x); }
PYKD_HD float to_float(int32_t x) { return static_cast<float>(x); }
PYKD_HD int32_t arithmetic_shift(uint32_t x, int bits) { return static_cast<int32_t>(x) >> bits; }
PYKD_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;  // within 2^-23, in one instruction instead of ten
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

// a / b.
template <typename Float>
PYKD_HD Float quotient(Float a, Float b) {
  return a / b;
}
PYKD_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);  // within 2^-22, and 0 for |b| > 2^126, in a third of the instructions
#else
  return a / b;
#endif
}

PYKD_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

PYKD_HD float bits_float(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(x);
#else
  return __builtin_bit_cast(float, x);
#endif
}

// The full 64-bit product of the low halves.
PYKD_HD uint64_t multiply_low(uint64_t a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }

#if !defined(PYKD_ISA_CUDA)

#if defined(PYKD_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(PYKD_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Slots __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 slots of 64 bits

inline Floats to_float(Words x) { return __builtin_convertvector((Ints)x, Floats); }  // x < 2^31
inline Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
inline Words float_bits(Floats x) { return (Words)x; }
inline Floats bits_float(Words x) { return (Floats)x; }
inline Ints arithmetic_shift(Words x, int bits) { return (Ints)x >> bits; }

template <typename V>
inline V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
inline void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// One number in all lanes.
inline Floats broadcast(const float* from) {
#if defined(PYKD_ISA_AVX512)
  return (Floats)_mm512_set1_ps(*from);
#elif defined(PYKD_ISA_AVX2)
  return (Floats)_mm256_broadcast_ss(from);
#elif defined(__x86_64__)
  return (Floats)_mm_set1_ps(*from);
#else
  return (Floats)vld1q_dup_f32(from);
#endif
}

// kLanes / H numbers, each in H lanes.
template <int H>
inline Floats spread(const float* from) {
  [[maybe_unused]] constexpr int kCount = kLanes / H;
  if constexpr (H == 1) return load<Floats>(from);
#if defined(PYKD_ISA_AVX512) || defined(PYKD_ISA_AVX2)
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i / H;
#if defined(PYKD_ISA_AVX512)
  __m512 some;
  if constexpr (kCount == 8) some = _mm512_castps256_ps512(_mm256_loadu_ps(from));
  if constexpr (kCount == 4) some = _mm512_castps128_ps512(_mm_loadu_ps(from));
  if constexpr (kCount == 2) some = _mm512_castps128_ps512(_mm_castpd_ps(_mm_set_sd(load<double>(from))));
  return (Floats)_mm512_permutexvar_ps((__m512i)lanes, some);
#else
  __m256 some;
  if constexpr (kCount == 4) some = _mm256_castps128_ps256(_mm_loadu_ps(from));
  if constexpr (kCount == 2) some = _mm256_castps128_ps256(_mm_castpd_ps(_mm_set_sd(load<double>(from))));
  return (Floats)_mm256_permutevar8x32_ps(some, (__m256i)lanes);
#endif
#else
  if constexpr (H == 2) return Floats{from[0], from[0], from[1], from[1]};
#endif
}

// Past the caches, for what is not soon read again: a line is written without being read, and evicts none. `to` is
// aligned to the vector; an order with later stores is made by fence_past().
inline void store_past(float* to, Floats v) {
#if defined(PYKD_ISA_AVX512)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(PYKD_ISA_AVX2)
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(to, (__m128)v);
#else
  store(to, v);
#endif
}
inline void fence_past() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Whether any lane of a comparison holds.
inline bool any(Ints mask) {
#if defined(PYKD_ISA_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(PYKD_ISA_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#endif
}

// Over all lanes: halves are folded onto each other.
template <int kWidth>
inline Floats folded(Floats v) {
  Ints from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ kWidth;
  return __builtin_shuffle(v, from);
}
template <int kWidth = kLanes / 2>
inline float reduce_max(Floats v) {
  const Floats other = folded<kWidth>(v), most = v > other ? v : other;
  if constexpr (kWidth > 1) return reduce_max<kWidth / 2>(most);
  return most[0];
}
template <int kWidth = kLanes / 2>
inline float reduce_sum(Floats v) {
  const Floats sum = v + folded<kWidth>(v);
  if constexpr (kWidth > 1) return reduce_sum<kWidth / 2>(sum);
  return sum[0];
}
// The sums of every H-th lane, in the first H lanes.
template <int H, int kWidth = kLanes / 2>
inline Floats reduce_sum_to(Floats v) {
  if constexpr (kWidth >= H) return reduce_sum_to<H, kWidth / 2>(v + folded<kWidth>(v));
  return v;
}
inline double reduce_max(double v) { return v; }
inline double reduce_sum(double v) { return v; }

#if defined(PYKD_ISA_AVX512)

inline Slots multiply_low(Slots a, uint32_t b) { return (Slots)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
inline Floats square_root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Floats load_first(const float* from, int64_t n) { return (Floats)_mm512_maskz_loadu_ps(first(n), from); }
inline Floats load_first(const float* from, int64_t n, float others) {
  return (Floats)_mm512_mask_loadu_ps(_mm512_set1_ps(others), first(n), from);
}
inline void store_first(float* to, Floats v, int64_t n) { _mm512_mask_storeu_ps(to, first(n), (__m512)v); }

#elif defined(PYKD_ISA_AVX2)

inline Slots multiply_low(Slots a, uint32_t b) { return (Slots)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
inline Floats square_root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_first(const float* from, int64_t n) { return (Floats)_mm256_maskload_ps(from, first(n)); }
inline Floats load_first(const float* from, int64_t n, float others) {
  const __m256i mask = first(n);
  return (Floats)_mm256_blendv_ps(_mm256_set1_ps(others), _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
}
inline void store_first(float* to, Floats v, int64_t n) {  // in pieces: a masked store is microcode on Zen
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(to, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    to += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), part);
    part = _mm_movehl_ps(part, part);
    to += 2;
  }
  if (n & 1) _mm_store_ss(to, part);
}

#else

#if defined(__x86_64__)
inline Slots multiply_low(Slots a, uint32_t b) { return (Slots)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b)); }
inline Floats square_root(Floats x) { return (Floats)_mm_sqrt_ps((__m128)x); }
#else
inline Slots multiply_low(Slots a, uint32_t b) { return (Slots)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b)); }
inline Floats square_root(Floats x) { return (Floats)vsqrtq_f32((float32x4_t)x); }
#endif
inline Floats load_first(const float* from, int64_t n, float others = 0) {
  Floats v = Floats{} + others;
  for (int i = 0; i < n; ++i) v[i] = from[i];
  return v;
}
inline void store_first(float* to, Floats v, int64_t n) {
  for (int i = 0; i < n; ++i) to[i] = v[i];
}

#endif

// As many of n as a vector holds; none of n <= 0.
inline Floats load_some(const float* from, int64_t n, float others = 0) {
  return n >= kLanes ? load<Floats>(from) : load_first(from, n > 0 ? n : 0, others);
}
inline void store_some(float* to, Floats v, int64_t n) { n >= kLanes ? store(to, v) : store_first(to, v, n); }

// Pairs of the words of kLanes / 2 slots, (word 0, word 1) of each in the first vectors and (word 2, word 3) in the
// second, to [cosine, sine] x 4 a slot, slot after slot.
inline void store_pairs(float* to, Floats cosine01, Floats sine01, Floats cosine23, Floats sine23) {
#if defined(PYKD_ISA_AVX512)
#define PYKD_LANES(first, second)                                                                            \
  first, second, first + 1, second + 1, first + 4, second + 4, first + 5, second + 5, first + 8, second + 8, \
      first + 9, second + 9, first + 12, second + 12, first + 13, second + 13
  const __m512 even01 = (__m512)__builtin_shufflevector(cosine01, sine01, PYKD_LANES(0, 16));
  const __m512 odd01 = (__m512)__builtin_shufflevector(cosine01, sine01, PYKD_LANES(2, 18));
  const __m512 even23 = (__m512)__builtin_shufflevector(cosine23, sine23, PYKD_LANES(0, 16));
  const __m512 odd23 = (__m512)__builtin_shufflevector(cosine23, sine23, PYKD_LANES(2, 18));
#undef PYKD_LANES
  // A 4x4 transpose of quarters: slot 2k is even01[k], even23[k], slot 2k + 1 is odd01[k], odd23[k].
  const __m512 low01 = _mm512_shuffle_f32x4(even01, odd01, 0x44), high01 = _mm512_shuffle_f32x4(even01, odd01, 0xEE);
  const __m512 low23 = _mm512_shuffle_f32x4(even23, odd23, 0x44), high23 = _mm512_shuffle_f32x4(even23, odd23, 0xEE);
  const __m512 slots[4] = {_mm512_shuffle_f32x4(low01, low23, 0x88), _mm512_shuffle_f32x4(low01, low23, 0xDD),
                           _mm512_shuffle_f32x4(high01, high23, 0x88), _mm512_shuffle_f32x4(high01, high23, 0xDD)};
  for (int i = 0; i < 4; ++i) {
    const __m512 ordered = _mm512_shuffle_f32x4(slots[i], slots[i], 0xD8);
    _mm512_storeu_ps(to + 16 * i, ordered);
  }
#elif defined(PYKD_ISA_AVX2)
  const __m256 even01 = _mm256_unpacklo_ps((__m256)cosine01, (__m256)sine01);  // slots 0, 2
  const __m256 odd01 = _mm256_unpackhi_ps((__m256)cosine01, (__m256)sine01);   // slots 1, 3
  const __m256 even23 = _mm256_unpacklo_ps((__m256)cosine23, (__m256)sine23);
  const __m256 odd23 = _mm256_unpackhi_ps((__m256)cosine23, (__m256)sine23);
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(even01, even23, 0x20));
  _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(odd01, odd23, 0x20));
  _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(even01, even23, 0x31));
  _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(odd01, odd23, 0x31));
#else
  const Ints low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  store(to, __builtin_shuffle(cosine01, sine01, low));
  store(to + 4, __builtin_shuffle(cosine23, sine23, low));
  store(to + 8, __builtin_shuffle(cosine01, sine01, high));
  store(to + 12, __builtin_shuffle(cosine23, sine23, high));
#endif
}

// Rows to columns and back: kLanes vectors of as many lanes, in log2(kLanes) steps that swap off-diagonal halves.
template <int kWidth = kLanes / 2>
inline void transpose(Floats (&v)[kLanes]) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kWidth ? i - kWidth + kLanes : i;
    high[i] = i & kWidth ? i + kLanes : i + kWidth;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kWidth) continue;
    const Floats a = v[i], b = v[i + kWidth];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kWidth] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kWidth > 1) transpose<kWidth / 2>(v);
}

#endif  // !PYKD_ISA_CUDA

}  // namespace pykd::PYKD_ISA
