// CUDA, or its emulation on the CPU where tests ask for it: the only way in for a .cu file, included first.
//
// CUDA is one more level beside the CPU's (core/cpu_isa.h): what a kernel includes sits in pykd::cuda, so that the
// emulated kernel and the CPU's levels can share a program.
#pragma once

#define PYKD_ISA cuda
#define PYKD_ISA_CUDA

#if defined(PYKD_EMULATE_CUDA)
#include "emulation/cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYKD_UNROLL _Pragma("unroll")

// A launch: PYKD_LAUNCH(grid, threads, shared_bytes, stream, kernel<float>)(arguments...)
#define PYKD_LAUNCH(grid, threads, shared_bytes, stream, ...) __VA_ARGS__<<<grid, threads, shared_bytes, stream>>>

// A kernel's array in the dynamic shared memory its launch asked for.
#define PYKD_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif
