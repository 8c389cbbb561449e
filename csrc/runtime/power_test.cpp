// Power that is sampled and integrated: curves whose energy is known, windows with too few samples or a gap, and the
// thread that samples.
#include "runtime/power.h"

#include <atomic>
#include <clocale>
#include <cmath>
#include <numbers>
#include <thread>

#include "core/kernel_test.h"
#include "runtime/fake_device.h"
#include "runtime/latencies.h"
#include "runtime/sensors.h"

namespace {

using namespace pykd::runtime;
using namespace pykd::testing;

struct Curve {
  std::vector<double> times, watts;
};

// What a sampler with an unsteady hand would see.
template <typename Watts>
Curve sampled(double begin, double end, double period, const Watts& watts) {
  Curve curve;
  uint32_t word = 1;
  for (double time = begin; time <= end; time += period * (0.5 + static_cast<double>(word >> 8) * 0x1p-24)) {
    word = word * 1664525 + 1013904223;
    curve.times.push_back(time);
    curve.watts.push_back(watts(time));
  }
  return curve;
}

std::string refused(const Curve& curve, double begin, double end) {
  try {
    integrate(curve.times, curve.watts, begin, end);
  } catch (const PowerError& error) {
    return error.what();
  }
  return "nothing";
}

void test_curves() {
  const auto line = [](double t) { return 3 + 0.5 * t; };
  const Curve straight = sampled(0, 10, 0.01, line);
  for (const auto& [begin, end] : {std::pair(1.2345, 8.7654), {0.5, 2.0}, {0.1, 9.9}}) {
    const Energy energy = integrate(straight.times, straight.watts, begin, end);
    const double exact = 3 * (end - begin) + 0.25 * (end * end - begin * begin);
    check(std::abs(energy.joules - exact) < 1e-9 * exact, "a straight line, exactly");
    check(std::abs(energy.watts - exact / (end - begin)) < 1e-9 && energy.seconds == end - begin, "its mean");
    int64_t samples = 0;
    for (const double time : straight.times) samples += time >= begin && time <= end;
    check(energy.samples == samples, "its samples");
  }
  // A load that comes and goes, as a network's does, with a step; 2 ms apart.
  const double pi = std::numbers::pi;
  const auto load = [pi](double t) { return (t < 0.7 ? 4 : 9) + 2 * std::sin(2 * pi * 7 * t); };
  const Curve curve = sampled(0, 2, 0.002, load);
  const Energy energy = integrate(curve.times, curve.watts, 0.313, 1.777);
  const auto primitive = [pi](double t) { return -2 * std::cos(2 * pi * 7 * t) / (2 * pi * 7); };
  const double exact = 4 * (0.7 - 0.313) + 9 * (1.777 - 0.7) + primitive(1.777) - primitive(0.313);
  check(std::abs(energy.joules - exact) < 0.01 * exact, "a synthetic load, to 1 %");
}

void test_refusals() {
  const auto flat = [](double) { return 5.0; };
  const Curve few = sampled(0, 1, 0.025, flat);
  check(refused(few, 0, 1).find("fewer than 50") != std::string::npos, "too few samples: " + refused(few, 0, 1));
  check(refused({}, 0, 1).starts_with("only 0 power samples"), "no samples");
  Curve gap = sampled(0, 1, 0.002, flat);
  check(refused(gap, 0, 1) == "nothing", "samples without a gap");
  check(refused(gap, 0.2, 0.2) != "nothing" && refused(gap, 0.5, 0.2) != "nothing", "windows of nothing");
  check(refused(gap, 0.5, 1.5).find("could not be read for") != std::string::npos, "samples that end too early");
  check(refused(gap, -0.5, 0.5).find("could not be read for") != std::string::npos, "samples that begin too late");
  for (size_t i = 0; i < gap.times.size(); ++i)
    if (gap.times[i] > 0.4 && gap.times[i] < 0.45) gap.watts[i] = NAN;
  check(refused(gap, 0, 1) == "nothing", "a gap that is small");
  check(std::abs(integrate(gap.times, gap.watts, 0, 1).joules - 5) < 1e-9, "a gap is bridged");
  for (size_t i = 0; i < gap.times.size(); ++i)
    if (gap.times[i] > 0.3 && gap.times[i] < 0.6) gap.watts[i] = NAN;
  check(refused(gap, 0, 1).find("could not be read for 0.3") != std::string::npos, "a gap that is large");
}

void test_sampler() {
  // A clock's own reading as the value: what is stored must be what was read, in order.
  Sampler sampler(2, 0.001, [](double* row) {
    row[0] = seconds_now();
    row[1] = -row[0];
    return true;
  });
  const double begin = seconds_now();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double end = seconds_now();
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  const Samples samples = sampler.between(begin, end);
  check(samples.columns == 2 && samples.times.size() > 20 && samples.times.size() < 210, "some 200 samples");
  check(samples.times.front() <= begin + 0.02 && samples.times[1] >= begin, "one before the window");
  check(samples.times.back() > end && samples.times[samples.times.size() - 2] <= end, "one behind the window");
  const auto first = samples.column(0), second = samples.column(1);
  bool right = true;
  for (size_t i = 0; i < first.size(); ++i)
    right = right && second[i] == -first[i] && std::abs(first[i] - samples.times[i]) < 0.05 &&
            (i == 0 || samples.times[i] > samples.times[i - 1]);
  check(right, "rows and times as they were");
  const Samples none = sampler.between(begin - 9, begin - 8);
  check(none.times.size() <= 1, "a window before the first sample");
}

// Files that a thread rewrites as the kernel would: 5 V, and a current that rises and falls.
void test_device() {
  const FakeDevice device;
  device.ina3221("1-0040", {{"VDD_IN", 5000, 1000}, {"VDD_SOC", 5000, 200}, {"NC", 0, 0}});
  std::vector<std::string> missing;
  const auto source = power_source(device.root, missing);
  check(source && source->name == "ina3221" && source->rails == std::vector<std::string>{"VDD_IN", "VDD_SOC"} &&
            missing.empty(),
        "the device's rails");
  if (!source) return;
  const auto milliamperes = [](double t) { return 1000 + 800 * std::sin(2 * std::numbers::pi * 3 * t); };
  std::atomic<bool> stop = false;
  const double start = seconds_now();
  std::thread writer([&] {
    const std::string path = device.root + "/sys/devices/platform/c240000.i2c/1-0040/hwmon/hwmon0/curr1_input";
    std::FILE* const file = std::fopen(path.c_str(), "r+");
    std::setvbuf(file, nullptr, _IONBF, 0);
    while (!stop) {
      char text[8];
      std::snprintf(text, sizeof text, "%06d\n", static_cast<int>(std::lround(milliamperes(seconds_now() - start))));
      std::fseek(file, 0, SEEK_SET);
      std::fwrite(text, 1, 7, file);
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
    std::fclose(file);
  });
  const auto primitive = [](double t) {
    return 5 * t - 4 * std::cos(2 * std::numbers::pi * 3 * t) / (6 * std::numbers::pi);
  };
  double error = 1, steady = 0;
  for (int again = 0; again < 5 && error > 0.01; ++again) {  // on a busy machine the writer may be late
    const double begin = seconds_now() - start, end = begin + 0.6;
    Sampler sampler(2, source->period, source->read);
    std::this_thread::sleep_for(std::chrono::milliseconds(650));
    const Samples samples = sampler.between(start + begin, start + end);
    try {
      const Energy energy = integrate(samples.times, samples.column(0), start + begin, start + end);
      const double exact = primitive(end) - primitive(begin);
      error = std::abs(energy.joules - exact) / exact;
      steady = integrate(samples.times, samples.column(1), start + begin, start + end).watts;
    } catch (const PowerError&) {
    }
  }
  stop = true;
  writer.join();
  check(error <= 0.01, "the device's energy to 1 %, but for " + std::to_string(error));
  check(std::abs(steady - 1) < 1e-9, "a rail that stays as it is");
  std::setlocale(LC_NUMERIC, "de_DE.UTF-8");  // where there is one: it writes commas
  const std::string text = csv({2, {1.5, 1.502}, {5, 1, NAN, 1.25}}, {"VDD_IN", "VDD_SOC"}, 1);
  std::setlocale(LC_NUMERIC, "C");
  check(text == "time_s,VDD_IN,VDD_SOC\n0.500000,5,1\n0.502000,,1.25\n", "CSV: " + text);
  check(!power_source("/nowhere", missing) && missing.size() == 1, "a device without rails");
}

}  // namespace

int main() {
  test_curves();
  test_refusals();
  test_sampler();
  test_device();
  return report();
}
