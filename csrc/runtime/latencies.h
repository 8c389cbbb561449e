// How long runs take.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace pykd::runtime {

// Microseconds of each run() of about `limit` seconds of them, at least 20 and at most 200,000, after up to a quarter
// of that to warm up; ascending.
template <typename Run>
std::vector<double> latencies(const Run& run, double limit) {
  constexpr size_t kLeast = 20, kMost = 200'000;
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const double start = now();
  for (size_t i = 0; i < kLeast && now() < start + limit / 4; ++i) run();
  std::vector<double> us;
  us.reserve(kMost);
  const double begin = now();
  for (double before = begin; us.size() < kMost && (us.size() < kLeast || before < begin + limit);) {
    run();
    const double after = now();
    us.push_back(1e6 * (after - before));
    before = after;
  }
  std::sort(us.begin(), us.end());
  return us;
}

}  // namespace pykd::runtime
