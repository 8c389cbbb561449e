#include "core/cpu_isa.h"

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

}  // namespace

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

}  // namespace pykd
