// The element types every room speaks. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYKD_HD __host__ __device__ __forceinline__
#else
#define PYKD_HD inline
#endif

namespace pykd {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

#if !defined(__CUDACC__)
// IEEE half precision, by the host compiler's name for it.
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif
#endif

// A cudaError_t, kept as int so that this header needs no CUDA header.
using CudaStatus = int;

}  // namespace pykd
