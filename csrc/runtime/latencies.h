// How long runs take.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pykd::runtime {

// Of a clock that never jumps.
inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs for so many seconds, and on until there were `least` runs, but no longer than `longest` seconds; tells the
// microseconds of each. Returns how many seconds went by.
template <typename Run, typename Tell>
double timed(const Run& run, double seconds, int64_t least, double longest, const Tell& tell) {
  const double start = seconds_now();
  double after = start;
  for (int64_t runs = 0; runs == 0 || after < start + seconds || (runs < least && after < start + longest); ++runs) {
    const double before = seconds_now();
    run();
    after = seconds_now();
    tell(1e6 * (after - before));
  }
  return after - start;
}

// Microseconds of any number of runs. Of very many each second one is kept, or each fourth, and so on.
class Latencies {
 public:
  static constexpr size_t kMost = 200'000;  // that are kept

  void add(double us) {
    if (kept_.capacity() < kMost) kept_.reserve(kMost);
    if (runs_++ % stride_ == 0) kept_.push_back(us);
    sum_ += us;
    min_ = std::min(min_, us);
    max_ = std::max(max_, us);
    if (kept_.size() == kMost) thin();
  }
  void add(Latencies more) {
    while (stride_ < more.stride_) thin();
    while (more.stride_ < stride_) more.thin();
    kept_.insert(kept_.end(), more.kept_.begin(), more.kept_.end());
    runs_ += more.runs_;
    sum_ += more.sum_;
    min_ = std::min(min_, more.min_);
    max_ = std::max(max_, more.max_);
  }

  int64_t runs() const { return runs_; }
  double mean() const { return sum_ / static_cast<double>(runs_); }
  double min() const { return min_; }
  double max() const { return max_; }
  std::vector<double> ascending() const {
    std::vector<double> us = kept_;
    std::ranges::sort(us);
    return us;
  }

 private:
  void thin() {
    for (size_t i = 0; 2 * i < kept_.size(); ++i) kept_[i] = kept_[2 * i];
    kept_.resize((kept_.size() + 1) / 2);
    stride_ *= 2;
  }

  int64_t runs_ = 0, stride_ = 1;
  double sum_ = 0, min_ = HUGE_VAL, max_ = 0;
  std::vector<double> kept_;
};

// The one below which lies a share of them.
inline double quantile(const std::vector<double>& ascending, double share) {
  return ascending[static_cast<size_t>(share * static_cast<double>(ascending.size() - 1))];
}

// Microseconds, ascending, of each run() of about `limit` seconds of them, at least 20, after a quarter of that to warm
// up.
template <typename Run>
std::vector<double> latencies(const Run& run, double limit) {
  constexpr int64_t kLeast = 20;
  timed(run, limit / 4, 0, 0, [](double) {});
  Latencies all;
  timed(run, limit, kLeast, HUGE_VAL, [&](double us) { all.add(us); });
  return all.ascending();
}

}  // namespace pykd::runtime
