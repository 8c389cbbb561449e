// CUDA's execution model on the CPU, for tests: a .cu file compiled with -x c++ -DPYKD_EMULATE_CUDA sees this instead
// of CUDA's headers. It proves logic on small sizes; it says nothing about speed.
//
// The threads of a block are fibers of the calling OS thread, which switch at barriers, shuffles and votes alone;
// blocks run one after another on the same fibers. A switch costs a microsecond where an OS thread's costs tens, and
// the schedule is the same every time. ThreadSanitizer is told of every fiber and that nothing but a barrier, shuffle
// or vote orders two of them, so it reports each missing one as a race, on every run.
//
// Launches come from one OS thread at a time. A barrier that some threads of the block never reach, and a shuffle or
// vote that names fewer than all lanes, end the program with a sentence.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "emulation/cuda_runtime.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another, so one copy a kernel is one copy a block
#define __launch_bounds__(...)
#define PYKD_UNROLL

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct [[gnu::may_alias]] alignas(8) uint2 {
  uint32_t x, y;
};
struct [[gnu::may_alias]] alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// ---- half types ----------------------------------------------------------------------------------------------------

struct __half {
  pykd::Half value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<pykd::Half>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even; every NaN becomes CUDA's
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (std::isnan(x)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

namespace pykd::emulation {

// State of the emulation itself is read and written between switches of one OS thread: no race, and none of TSan's
// business.
#define PYKD_UNSANITIZED __attribute__((noinline, no_sanitize("thread")))

[[noreturn]] inline void fail(const char* sentence) {
  std::fprintf(stderr, "CUDA emulation: %s\n", sentence);
  std::abort();
}

struct Barrier {
  unsigned expected = 0, arrived = 0, phase = 0;
  char order[2];           // what TSan takes for the synchronisation object of even and odd phases
  unsigned voted[2] = {};  // the last even and odd phase with a vote for yes, plus one
};

struct Warp {
  Barrier barrier;
  unsigned char shown[2][32][16];  // what each lane shows the others, in even and odd exchanges
};

// Where a fiber, or the scheduler, stands while others run.
#if defined(__x86_64__) && defined(__GNUC__)
// swapcontext asks the system twice for the signal mask; and ASan's forgets what is poisoned on the other stack.
struct Context {
  void* stack = nullptr;

  void start(char* bottom, size_t bytes, void (*function)()) {
    auto top = reinterpret_cast<void**>(bottom + bytes / 16 * 16);
    *--top = nullptr;  // where the function would return to
    *--top = reinterpret_cast<void*>(function);
    stack = top - 6;  // registers
  }

  static void swap(Context& from, const Context& to) { swap_stacks(&from.stack, to.stack); }

 private:
  __attribute__((naked, noinline)) static void swap_stacks(void**, void*) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
        "movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }
};
#else
struct Context {
  ucontext_t context;

  void start(char* bottom, size_t bytes, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = bytes;
    makecontext(&context, function, 0);
  }

  static void swap(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Block;

struct Thread {
  dim3 index;
  unsigned rank = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned exchanges = 0;
  bool running = false;
  const Barrier* awaited = nullptr;
  unsigned awaited_phase = 0;
  Context context;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    unsigned group;
  };
  std::vector<Copy> copies;  // that are under way
  unsigned groups = 0;       // of copies, so far
};

struct Block {
  dim3 index, threads, grid;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> dynamic_shared;
};

// The fibers of every launch so far; they are kept, and the next block runs on them again.
class Team {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  static Team& get() {
    static Team team;
    return team;
  }

  ~Team() {
#if defined(__SANITIZE_THREAD__)
    for (const auto& thread : threads) __tsan_destroy_fiber(thread->tsan);
#endif
  }

  void run(const std::function<void()>& thread, Block& block) {
    const dim3 size = block.threads;
    const unsigned count = size.x * size.y * size.z;
    if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads.");
    body = &thread;
    block.barrier.expected = count;
    block.warps.assign((count + 31) / 32, Warp());
    while (threads.size() < count) add();
    for (unsigned rank = 0; rank < count; ++rank) {
      Thread& t = *threads[rank];
      t.index = dim3(rank % size.x, rank / size.x % size.y, rank / (size.x * size.y));
      t.rank = rank;
      t.block = &block;
      t.warp = &block.warps[rank / 32];
      ++t.warp->barrier.expected;
      t.exchanges = 0;
      t.awaited = nullptr;
      t.copies.clear();
      t.groups = 0;
      t.running = true;
    }
    for (unsigned left = count; left > 0;) {
      bool progress = false;
      for (unsigned rank = 0; rank < count; ++rank) {
        Thread& t = *threads[rank];
        if (!t.running || (t.awaited && t.awaited->phase == t.awaited_phase)) continue;
        progress = true;
        resume(t);
        if (!t.running) --left;
      }
      if (!progress) fail("a barrier, shuffle or vote waits for threads that never reach it.");
    }
  }

  PYKD_UNSANITIZED static Thread& self() { return *get_current(); }

  PYKD_UNSANITIZED static void wait(Barrier& barrier) {
    Thread& t = *get_current();
    const unsigned phase = barrier.phase;
    order(barrier.order[phase & 1], true);
    arrive(barrier, 1);
    t.awaited = &barrier;
    t.awaited_phase = phase;
    if (barrier.phase == phase) pause(t, true);
    t.awaited = nullptr;
    order(barrier.order[phase & 1], false);
  }

  // Nobody is two phases ahead of one who still reads this one's vote.
  PYKD_UNSANITIZED static bool vote(Barrier& barrier, bool yes) {
    const unsigned phase = barrier.phase;
    if (yes) barrier.voted[phase & 1] = phase + 1;
    wait(barrier);
    return barrier.voted[phase & 1] == phase + 1;
  }

 private:
  void add() {
    auto thread = std::make_unique<Thread>();
    thread->stack = std::unique_ptr<char[]>(new char[kStackBytes]);
    thread->context.start(thread->stack.get(), kStackBytes, &Team::live);
#if defined(__SANITIZE_THREAD__)
    thread->tsan = __tsan_create_fiber(0);
#endif
    threads.push_back(std::move(thread));
  }

  // A fiber's life: one block's thread after another.
  PYKD_UNSANITIZED static void live() {
    for (;;) {
      Thread& t = *get_current();
      (*get().body)();
      t.running = false;  // a thread that returned no longer holds the others up
      arrive(t.warp->barrier, 0);
      arrive(t.block->barrier, 0);
      pause(t, false);
    }
  }

  PYKD_UNSANITIZED static void arrive(Barrier& barrier, unsigned threads) {
    if (threads == 0) --barrier.expected;
    barrier.arrived += threads;
    if (barrier.arrived < barrier.expected || barrier.arrived == 0) return;
    barrier.arrived = 0;
    ++barrier.phase;
  }

  PYKD_UNSANITIZED void resume(Thread& t) {
    current = &t;
#if defined(__SANITIZE_THREAD__)
    scheduler_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(t.tsan, 0);  // what the launch wrote is seen by every thread
#endif
    Context::swap(scheduler, t.context);
  }

  // Back to the scheduler: in mid-block without order, at its end with it, since the next block follows this one.
  PYKD_UNSANITIZED static void pause(Thread& t, [[maybe_unused]] bool mid_block) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(get().scheduler_tsan, mid_block ? __tsan_switch_to_fiber_no_sync : 0);
#endif
    Context::swap(t.context, get().scheduler);
  }

  PYKD_UNSANITIZED static void order([[maybe_unused]] char& token, [[maybe_unused]] bool release) {
#if defined(__SANITIZE_THREAD__)
    release ? __tsan_release(&token) : __tsan_acquire(&token);
#endif
  }

  PYKD_UNSANITIZED static Thread* get_current() { return get().current; }

  std::vector<std::unique_ptr<Thread>> threads;
  const std::function<void()>* body = nullptr;  // what each thread of the present block runs
  Thread* current = nullptr;
  Context scheduler;
  void* scheduler_tsan = nullptr;
};

inline unsigned lane() { return Team::self().rank % 32; }

// Every lane shows a value, then calls read(shown), shown(i) being the value of lane i. The next exchange uses the
// other slots, so one barrier is enough: nobody is two exchanges ahead.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= 16);
  if (mask != ~0u) fail("a shuffle or vote must name all lanes.");
  Thread& t = Team::self();
  auto& slots = t.warp->shown[t.exchanges++ & 1];
  std::memcpy(slots[t.rank % 32], &value, sizeof(T));
  Team::wait(t.warp->barrier);
  return read([&](unsigned from) {
    T shown;
    std::memcpy(&shown, slots[from], sizeof(T));
    return shown;
  });
}

inline unsigned lanes_of_warp() {
  const Thread& t = Team::self();
  const dim3 size = t.block->threads;
  return std::min(32u, size.x * size.y * size.z - t.rank / 32 * 32);
}

// The value of lane `source`; one's own where that is outside the warp, as in CUDA.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  const bool inside = source < lanes_of_warp();
  return exchange(mask, value, [&](auto shown) { return inside ? shown(source) : value; });
}

// Copies that arrive with the wait that covers them; until then all their bits are set.
inline void copy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    fail("an asynchronous copy is aligned to its bytes.");
  Thread& t = Team::self();
  std::memset(to, 0xFF, bytes);
  t.copies.push_back({to, from, bytes, t.groups});
}
inline void commit_copies() { ++Team::self().groups; }
inline void wait_copies(unsigned groups) {
  Thread& t = Team::self();
  std::erase_if(t.copies, [&](const Thread::Copy& copy) {
    const bool covered = copy.group + groups < t.groups;
    if (covered) std::memcpy(copy.to, copy.from, copy.bytes);
    return covered;
  });
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid, threads;
  size_t shared_bytes;
  cudaStream_t stream;

  template <typename... Args>
  void operator()(Args... args) const {
    if (shared_bytes > kSharedMemoryOptin) fail("a block asks for more shared memory than it may have.");
    ++Device::get().launches;
    enqueue(stream, [*this, args...] { run(args...); });
  }

  template <typename... Args>
  void run(Args... args) const {
    Block block;
    block.grid = grid;
    block.threads = threads;
    block.dynamic_shared.resize(shared_bytes);
    const std::function<void()> thread = [&] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block.index = dim3(x, y, z);
          Team::get().run(thread, block);
        }
  }
};

}  // namespace pykd::emulation

// ---- what a kernel says --------------------------------------------------------------------------------------------

#define threadIdx (pykd::emulation::Team::self().index)
#define blockIdx (pykd::emulation::Team::self().block->index)
#define blockDim (pykd::emulation::Team::self().block->threads)
#define gridDim (pykd::emulation::Team::self().block->grid)
inline constexpr int warpSize = 32;

inline void __syncthreads() { pykd::emulation::Team::wait(pykd::emulation::Team::self().block->barrier); }
inline int __syncthreads_or(int predicate) {
  return pykd::emulation::Team::vote(pykd::emulation::Team::self().block->barrier, predicate != 0);
}
inline void __syncwarp(unsigned mask = ~0u) {
  pykd::emulation::exchange(mask, 0, [](auto) { return 0; });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return pykd::emulation::shuffle(mask, value, static_cast<unsigned>(source) % 32);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return pykd::emulation::shuffle(mask, value, pykd::emulation::lane() + offset);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return pykd::emulation::shuffle(mask, value, pykd::emulation::lane() ^ static_cast<unsigned>(lanes));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned lanes = pykd::emulation::lanes_of_warp();
  return pykd::emulation::exchange(mask, predicate, [&](auto shown) {
    unsigned votes = 0;
    for (unsigned i = 0; i < lanes; ++i) votes |= static_cast<unsigned>(shown(i) != 0) << i;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

template <typename Integer>
Integer atomicAdd(Integer* address, Integer value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename Integer>
Integer atomicOr(Integer* address, Integer value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

#define PYKD_LAUNCH(grid, threads, shared_bytes, stream, ...)                          \
  pykd::emulation::Launch<decltype(&__VA_ARGS__)> {                                    \
    &__VA_ARGS__, dim3(grid), dim3(threads), static_cast<size_t>(shared_bytes), stream \
  }

#define PYKD_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(pykd::emulation::Team::self().block->dynamic_shared.data())
