#include "core/cpu_isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>

namespace pykd {
namespace {

CpuIsa detect() {
  CpuIsa isa = CpuIsa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    isa = CpuIsa::kAvx2;
  if (isa == CpuIsa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    isa = CpuIsa::kAvx512;
#endif
  if (const char* wanted = std::getenv("PYKD_CPU_ISA")) {
    if (!std::strcmp(wanted, "baseline")) return CpuIsa::kBaseline;
    if (!std::strcmp(wanted, "avx2") && isa == CpuIsa::kAvx512) return CpuIsa::kAvx2;
  }
  return isa;
}

CpuBFloat16 detect_bfloat16() {
#if defined(__x86_64__)
  if (cpu_isa() != CpuIsa::kAvx512) return CpuBFloat16::kNone;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return CpuBFloat16::kNone;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  constexpr unsigned kAmx = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  // Linux gives the tiles' memory to processes that ask for it.
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return (d & kAmx) == kAmx && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0 ? CpuBFloat16::kAmx
                                                                                     : CpuBFloat16::kDot;
#elif defined(__aarch64__)
  constexpr unsigned long kHasBFloat16 = 1ul << 14;  // of AT_HWCAP2
  return !std::getenv("PYKD_CPU_ISA") && getauxval(AT_HWCAP2) & kHasBFloat16 ? CpuBFloat16::kDot : CpuBFloat16::kNone;
#endif
}

}  // namespace

CpuBFloat16 cpu_bfloat16() {
  static const CpuBFloat16 has = detect_bfloat16();
  return has;
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    case CpuIsa::kBaseline: break;
  }
  return "baseline";
}

int vector_lanes() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return 16;
    case CpuIsa::kAvx2: return 8;
    case CpuIsa::kBaseline: break;
  }
  return 4;
}

}  // namespace pykd
