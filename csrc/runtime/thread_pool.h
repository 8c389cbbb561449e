// Threads that wait for the parts of one job at a time.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace pykd::runtime {

// After a job its workers look for the next one for some 50 microseconds, then they sleep.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // starts threads - 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // part(i) for 0 <= i < threads(), each on a thread of its own, the caller's among them. One call at a time.
  template <typename Part>
  void each(const Part& part) noexcept {
    start([](const void* job, int i) { (*static_cast<const Part*>(job))(i); }, &part);
    part(0);
    finish();
  }

 private:
  using Call = void (*)(const void* job, int i);
  void start(Call call, const void* job) noexcept;
  void finish() noexcept;
  void work(int i) noexcept;
  void stop() noexcept;

  Call call_ = nullptr;  // null: the workers are to end
  const void* job_ = nullptr;
  alignas(64) std::atomic<int> turn_{0};  // counts jobs
  alignas(64) std::atomic<int> left_{0};  // workers that are not done with this one
  std::vector<std::thread> workers_;
};

}  // namespace pykd::runtime
