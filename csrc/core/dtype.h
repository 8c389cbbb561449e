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

// A cudaError_t, kept as int so that this header needs no CUDA header.
using CudaStatus = int;

}  // namespace pykd
