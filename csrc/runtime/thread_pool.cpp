#include "runtime/thread_pool.h"

namespace pykd::runtime {
namespace {

constexpr int kSpins = 2048;  // some 50 microseconds, about what waking a sleeping thread takes

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The value once it is no longer `old`.
int changed(const std::atomic<int>& value, int old) noexcept {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (const int now = value.load(std::memory_order_acquire); now != old) return now;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    workers_.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() noexcept {
  start(nullptr, nullptr);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Call call, const void* job) noexcept {
  call_ = call;
  job_ = job;
  left_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
}

void ThreadPool::finish() noexcept {
  for (int left = left_.load(std::memory_order_acquire); left; left = changed(left_, left)) {
  }
}

void ThreadPool::work(int i) noexcept {
  for (int turn = 0;;) {
    turn = changed(turn_, turn);
    if (!call_) return;
    call_(job_, i);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
  }
}

}  // namespace pykd::runtime
