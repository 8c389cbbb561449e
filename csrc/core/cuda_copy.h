// Copies from global to shared memory that a thread starts and waits for later, cp.async. Included after core/cuda.h.
//
// Under emulation the bytes arrive with the wait that covers them and are NaN from the start on: a missing wait, and a
// copy to where others still read, show.
#pragma once

#include <cstdint>

namespace pykd::PYKD_ISA {

// Starts to copy 8 or 16 bytes, aligned to themselves on both sides. 16 that are read but `once` are the first that L2
// drops.
template <int kBytes = 16>
__device__ void copy_async(void* shared, const void* global, [[maybe_unused]] bool once = false) {
  static_assert(kBytes == 8 || kBytes == 16);
#if defined(PYKD_EMULATE_CUDA)
  emulation::copy_async(shared, global, kBytes);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
  } else if (once) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  }
#endif
}

// Makes a group of the copies that this thread has started since the last one.
__device__ inline void commit_copies() {
#if defined(PYKD_EMULATE_CUDA)
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but this thread's last kGroups groups have arrived. Other threads see them after a barrier.
template <int kGroups>
__device__ void wait_copies() {
#if defined(PYKD_EMULATE_CUDA)
  emulation::wait_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace pykd::PYKD_ISA
