// Which instruction set this processor runs, and the doors that choose a kernel by it.
//
// A CPU kernel `<op>_cpu.cpp` is compiled once a level, with PYKD_ISA naming the level: its body lives in
// pykd::<level>, and everything it includes sits there too, because a shared inline function compiled for AVX-512 and
// picked by the linker would crash an older processor. The baseline object also holds the door pykd::<op>_cpu.
#pragma once

namespace pykd {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// The best level of this processor, asked once. The environment variable PYKD_CPU_ISA (baseline, avx2, avx512) lowers
// it.
CpuIsa cpu_isa();
const char* cpu_isa_name();
int vector_lanes();  // floats in a vector of this level: 4, 8 or 16

// What it has for bfloat16: products of pairs (AVX-512-BF16, BFDOT), or of squares (AMX). Where PYKD_CPU_ISA lowers the
// level: nothing.
enum class CpuBFloat16 { kNone, kDot, kAmx };

CpuBFloat16 cpu_bfloat16();

}  // namespace pykd

// PYKD_CPU_DOOR(op_cpu, (const Op& args, int64_t begin, int64_t end), (args, begin, end)) in the global namespace.
#if !defined(PYKD_ISA_BASELINE)
#define PYKD_CPU_DOOR(function, parameters, arguments)
#elif defined(__x86_64__)
#define PYKD_CPU_DOOR(function, parameters, arguments)             \
  namespace pykd::avx2 {                                           \
  void function parameters;                                        \
  }                                                                \
  namespace pykd::avx512 {                                         \
  void function parameters;                                        \
  }                                                                \
  void pykd::function parameters {                                 \
    switch (cpu_isa()) {                                           \
      case CpuIsa::kAvx512: return avx512::function arguments;     \
      case CpuIsa::kAvx2: return avx2::function arguments;         \
      case CpuIsa::kBaseline: return baseline::function arguments; \
    }                                                              \
  }
#else
#define PYKD_CPU_DOOR(function, parameters, arguments) \
  void pykd::function parameters { return baseline::function arguments; }
#endif
