// Power over time: sampled by a thread of its own, integrated over windows.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace pykd::runtime {

struct Samples {
  size_t columns = 0;
  std::vector<double> times;   // of seconds_now, ascending
  std::vector<double> values;  // [times, columns]; NaN where a value could not be read

  std::vector<double> column(size_t number) const;
};

// Reads columns again and again until it ends.
class Sampler {
 public:
  // read fills the columns; false: there is nothing new. period: seconds from one reading to the next, or 0 where read
  // itself waits, some milliseconds at a time.
  Sampler(size_t columns, double period, std::function<bool(double*)> read);

  // From begin to end, with the sample before and the one behind where there are some.
  Samples between(double begin, double end) const;

 private:
  mutable std::mutex mutex_;
  Samples samples_;
  std::jthread thread_;
};

struct Energy {
  double joules, watts, seconds;
  int64_t samples;  // within the window
};

// Why there is no figure, in a sentence.
struct PowerError : std::runtime_error {
  using runtime_error::runtime_error;
};

constexpr int64_t kLeastSamples = 50;

// By the trapezoid rule over a window, its ends interpolated; NaN among the watts is no sample. Throws PowerError where
// fewer than kLeastSamples lie in the window, or none in a tenth of it.
Energy integrate(const std::vector<double>& times, const std::vector<double>& watts, double begin, double end);

// Where power can be read: INA3221 rails below root, else, on "/", the program tegrastats.
struct PowerSource {
  std::string name;  // "ina3221", or "tegrastats"
  std::vector<std::string> rails;
  double period;  // seconds, for Sampler
  std::function<bool(double*)> read;
  double expected_period;  // seconds between samples
};
std::optional<PowerSource> power_source(const std::string& root, std::vector<std::string>& missing);

// "time_s,VDD_IN\n..." with seconds since `origin`.
std::string csv(const Samples& samples, const std::vector<std::string>& rails, double origin);

}  // namespace pykd::runtime
