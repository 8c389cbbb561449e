#include "runtime/power.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <system_error>
#include <utility>

#include "runtime/latencies.h"
#include "runtime/sensors.h"
#include "runtime/tegrastats.h"

namespace pykd::runtime {
namespace {

// A reading of the three rails of an INA3221 takes a millisecond or two on its bus.
constexpr double kPeriod = 0.002;
constexpr int kTegrastatsMilliseconds = 100;

// Of any locale, which a program that has loaded this may have set.
std::string number(double value, std::chars_format format, int digits) {
  char text[64];
  return {text, std::to_chars(text, text + sizeof text, value, format, digits).ptr};
}
std::string seconds_of(double value) { return number(value, std::chars_format::general, 3) + " s"; }

}  // namespace

std::vector<double> Samples::column(size_t number) const {
  std::vector<double> found;
  for (size_t i = 0; i < times.size(); ++i) found.push_back(values[i * columns + number]);
  return found;
}

Sampler::Sampler(size_t columns, double period, std::function<bool(double*)> read) {
  samples_.columns = columns;
  thread_ = std::jthread([this, columns, period, read = std::move(read)](const std::stop_token& stop) {
    std::vector<double> row(columns);
    std::mutex mutex;
    std::condition_variable_any sleeper;
    for (double next = seconds_now(); !stop.stop_requested();) {
      const double before = seconds_now();
      if (read(row.data())) {
        const double after = seconds_now();
        const std::lock_guard one(mutex_);
        samples_.times.push_back(period > 0 ? (before + after) / 2 : after);
        samples_.values.insert(samples_.values.end(), row.begin(), row.end());
      }
      if (period <= 0) continue;
      next = std::max(next + period, seconds_now());
      std::unique_lock lock(mutex);
      sleeper.wait_for(lock, stop, std::chrono::duration<double>(next - seconds_now()), [] { return false; });
    }
  });
}

Samples Sampler::between(double begin, double end) const {
  const std::lock_guard one(mutex_);
  const auto& times = samples_.times;
  auto first = std::ranges::lower_bound(times, begin), last = std::ranges::upper_bound(times, end);
  if (first != times.begin()) --first;
  if (last != times.end()) ++last;
  const auto columns = static_cast<std::ptrdiff_t>(samples_.columns);
  const auto row = [&](auto at) { return samples_.values.begin() + (at - times.begin()) * columns; };
  return {samples_.columns, {first, last}, {row(first), row(last)}};
}

Energy integrate(const std::vector<double>& times, const std::vector<double>& watts, double begin, double end) {
  constexpr double kLargestGap = 0.1;  // of the window
  const double seconds = end - begin;
  Energy energy{0, 0, seconds, 0};
  double gap = 0, last_time = 0, last_watts = 0;
  bool any = false;
  // A straight line between two samples, as far as it lies in the window.
  const auto add = [&](double from, double from_watts, double to, double to_watts) {
    const double left = std::max(from, begin), right = std::min(to, end);
    if (right <= left) return;
    gap = std::max(gap, right - left);
    const auto at = [&](double time) { return from_watts + (to_watts - from_watts) * (time - from) / (to - from); };
    energy.joules += (right - left) * (at(left) + at(right)) / 2;
  };
  for (size_t i = 0; i < times.size(); ++i) {
    if (std::isnan(watts[i])) continue;
    if (times[i] >= begin && times[i] <= end) ++energy.samples;
    if (any)
      add(last_time, last_watts, times[i], watts[i]);
    else
      add(begin, watts[i], times[i], watts[i]);  // as it was at first
    any = true;
    last_time = times[i];
    last_watts = watts[i];
  }
  if (any) add(last_time, last_watts, end, last_watts);
  if (!(seconds > 0) || energy.samples < kLeastSamples)
    throw PowerError("only " + std::to_string(energy.samples) + " power samples fell into the window of " +
                     seconds_of(seconds) + ", fewer than " + std::to_string(kLeastSamples) +
                     ": measure for longer, --seconds");
  if (gap > kLargestGap * seconds)
    throw PowerError("power could not be read for " + seconds_of(gap) + " of the window of " + seconds_of(seconds));
  energy.watts = energy.joules / seconds;
  return energy;
}

std::optional<PowerSource> power_source(const std::string& root, std::vector<std::string>& missing) {
  auto rails = std::make_shared<const PowerRails>(root, missing);
  if (!rails->names().empty())
    return PowerSource{"ina3221", rails->names(), kPeriod, [rails](double* watts) { return rails->read(watts), true; },
                       kPeriod};
  if (root != "/") {
    missing.push_back("power: there is no INA3221 below " + root);
    return std::nullopt;
  }
  try {
    auto program = std::make_shared<TegrastatsReader>(kTegrastatsMilliseconds);
    if (!program->rails().empty())
      return PowerSource{"tegrastats", program->rails(), 0, [program](double* watts) { return program->read(watts); },
                         kTegrastatsMilliseconds * 1e-3};
    missing.push_back("power: there is no INA3221, and tegrastats names no power rails");
  } catch (const std::system_error&) {
    missing.push_back("power: there is no INA3221, and no program tegrastats");
  }
  return std::nullopt;
}

std::string csv(const Samples& samples, const std::vector<std::string>& rails, double origin) {
  std::string text = "time_s";
  for (const std::string& rail : rails) text += ',' + rail;
  for (size_t i = 0; i < samples.times.size(); ++i) {
    text += '\n' + number(samples.times[i] - origin, std::chars_format::fixed, 6);
    for (size_t rail = 0; rail < rails.size(); ++rail) {
      const double watts = samples.values[i * samples.columns + rail];
      text += std::isnan(watts) ? "," : ',' + number(watts, std::chars_format::general, 6);
    }
  }
  return text + '\n';
}

}  // namespace pykd::runtime
