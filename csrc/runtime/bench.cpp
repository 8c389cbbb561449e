#include "runtime/bench.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "runtime/file.h"
#include "runtime/latencies.h"
#include "runtime/power.h"
#include "runtime/pykd.h"
#include "runtime/sha256.h"
#include "runtime/text_file.h"
#include "runtime/trtexec.h"

namespace pykd::runtime {
namespace {

constexpr int kRepeats = 3;
constexpr int64_t kLeastRuns = 20, kWarmUpRuns = 100;
constexpr double kWarmUp = 2, kIdle = 3, kLook = 0.1;  // seconds; kLook between looks at clocks
constexpr int64_t kLargestFile = int64_t{4} << 30;

using Say = std::function<void(const std::string&)>;

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

ModelFacts facts(const std::string& path, const Model& model) {
  ModelFacts found{path.substr(path.rfind('/') + 1), "", model.file_bytes, 0, 0, 0, {}};
  const Bytes bytes = read_file(path, kLargestFile, "model file");
  found.sha256 = sha256(bytes.data.get(), bytes.size);
  int64_t numbers = 0;
  for (const Op& op : model.ops) {
    found.kinds.push_back(name(op.kind));
    numbers += static_cast<int64_t>(op.bias.size() + op.scale.size());
    if (op.weight.shape.empty()) continue;
    found.weights += product(op.weight.shape);
    found.nonzeros += std::ranges::count_if(op.weight.values, [](float value) { return value != 0; });
  }
  found.dense_bytes = (found.weights + numbers) * static_cast<int64_t>(sizeof(float));
  return found;
}

// A figure of /proc/meminfo or /proc/self/status, which are in KiB.
std::optional<int64_t> bytes_of(const char* file, const std::string& key) {
  const std::string text = read_text(file).value_or("");
  const size_t at = text.find(key + ':');
  if (at == text.npos) return std::nullopt;
  const std::string value = printable(std::string_view(text).substr(at + key.size() + 1));
  int64_t kib = 0;
  std::from_chars(value.data(), value.data() + value.size(), kib);
  return kib << 10;
}

// So that VmHWM, the peak of the resident memory, begins anew.
void forget_peak() {
  const int descriptor = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
  if (descriptor < 0) return;
  if (write(descriptor, "5", 1) != 1) {  // the peak goes on from what was before
  }
  close(descriptor);
}

struct Window {
  double begin, end;
};

// Power and clocks over the whole measurement.
class Probe {
 public:
  Probe(const BenchOptions& options, const Say& say) : root_(options.root), watch_(options.root) {
    looks_ = std::make_unique<Sampler>(watch_.columns(), kLook, [this](double* row) { return watch_.read(row), true; });
    if (!options.power) return;
    source_ = power_source(root_, missing_);
    if (!source_) return;
    total_ = power_total(source_->rails);
    if (!total_) {
      std::string names;
      for (const std::string& rail : source_->rails) names += (names.empty() ? "" : ", ") + rail;
      missing_.push_back("power: of the rails " + names + " it is not known which make up the module");
    }
    origin_ = seconds_now();
    sampler_ = std::make_unique<Sampler>(source_->rails.size(), source_->period, source_->read);
    const double seconds = std::max(std::min(kIdle, kRepeats * options.seconds),
                                    1.2 * static_cast<double>(kLeastSamples) * source_->expected_period);
    say("idle power for " + std::to_string(static_cast<int>(std::ceil(seconds))) + " s");
    idle_ = {seconds_now(), 0};
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    idle_.end = seconds_now();
  }

  // What was seen in a window in which so many rows went through the network.
  void tell(RunResult& run, const Window& window, double rows) const {
    run.missing.insert(run.missing.end(), missing_.begin(), missing_.end());
    const Samples looks = looks_->between(window.begin, window.end);
    for (size_t i = 0; i < watch_.clocks().size(); ++i) {
      const std::vector<double> seen = read_values(looks, i);
      double sum = 0;
      for (const double mhz : seen) sum += mhz;
      if (!seen.empty()) run.clocks.push_back({watch_.clocks()[i], sum / static_cast<double>(seen.size())});
    }
    const std::vector<double> throttled = read_values(looks, watch_.columns() - 1);
    if (throttled.empty())
      run.missing.push_back("throttling: no cooling device, current alarm or event counter can be read");
    else
      run.throttled = std::ranges::any_of(throttled, [](double value) { return value > 0; });
    if (!total_) return;
    RunPower power{source_->name, *total_};
    power.window_begin = window.begin - origin_;
    power.window_seconds = window.end - window.begin;
    const auto had = [&](const Window& some, const char* what) -> std::optional<Energy> {
      try {
        return energy(some);
      } catch (const PowerError& error) {
        run.missing.push_back(what + std::string(error.what()));
        return std::nullopt;
      }
    };
    if (const auto idle = had(idle_, "idle power: ")) power.idle_watts = idle->watts;
    if (const auto taken = had(window, "power: ")) {
      power.samples = taken->samples;
      power.samples_per_second = static_cast<double>(taken->samples) / taken->seconds;
      power.watts = taken->watts;
      power.total_millijoules = 1e3 * taken->joules / rows;
      power.above_idle_millijoules = 1e3 * (taken->watts - power.idle_watts) * taken->seconds / rows;
    }
    run.power = std::move(power);
  }

  std::string raw() const {
    return sampler_ ? csv(sampler_->between(0, seconds_now()), source_->rails, origin_) : "time_s\n";
  }

 private:
  static std::vector<double> read_values(const Samples& samples, size_t column) {
    std::vector<double> values = samples.column(column);
    std::erase_if(values, [](double value) { return std::isnan(value); });
    return values;
  }

  Energy energy(const Window& window) const {
    const Samples samples = sampler_->between(window.begin, window.end);
    std::vector<double> watts(samples.times.size());
    for (const std::string& rail : total_->rails) {
      const std::vector<double> some =
          samples.column(static_cast<size_t>(std::ranges::find(source_->rails, rail) - source_->rails.begin()));
      for (size_t i = 0; i < some.size(); ++i) watts[i] += some[i];
    }
    return integrate(samples.times, watts, window.begin, window.end);
  }

  std::string root_;
  Watch watch_;
  std::vector<std::string> missing_;
  std::optional<PowerSource> source_;
  std::optional<PowerTotal> total_;
  double origin_ = 0;
  Window idle_{};
  std::unique_ptr<Sampler> looks_, sampler_;
};

// One plan, measured.
void measure_run(RunResult& run, const std::shared_ptr<const Network>& network, const Rows& rows,
                 const PlanOptions& plan_options, const BenchOptions& options, Probe& probe, const Say& say) {
  const int64_t in = product(model(*network).input_shape), out = product(output_shape(*network));
  const auto values = static_cast<size_t>(plan_options.batch * in);
  const int64_t needed = plan_options.batch * (in + out) * static_cast<int64_t>(sizeof(float));
  const auto free = bytes_of("/proc/meminfo", "MemAvailable");
  if (free && needed > *free)  // it would be promised, and the system would end some program once it is used
    throw std::runtime_error("the inputs and answers need " + std::to_string(needed >> 20) + " MiB, " +
                             std::to_string(*free >> 20) + " MiB are free: give a smaller batch");
  forget_peak();
  run.celsius_start = temperatures(options.root);
  Plan plan(network, plan_options);
  run.weight_bytes = plan.weight_bytes();
  run.workspace_bytes = plan.workspace_bytes();
  run.lanes = plan.lanes();
  run.layers = plan.choices();
  std::vector<float> output(static_cast<size_t>(plan_options.batch * out));
  std::vector<float> input(rows.pixels.empty() ? values : 0);
  std::vector<uint8_t> pixels(rows.pixels.empty() ? 0 : values);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = rows.pixels[i % rows.pixels.size()];
  uint32_t word = 1;
  for (size_t i = 0; i < input.size(); ++i) {
    word = word * 1664525 + 1013904223;
    input[i] = rows.floats.empty() ? static_cast<float>(word >> 8) * 0x1p-23f - 1 : rows.floats[i % rows.floats.size()];
  }
  const auto once = [&] {
    pixels.empty() ? plan.run(input.data(), output.data()) : plan.run(pixels.data(), output.data());
  };

  const double warm_up = std::min(kWarmUp, options.seconds);
  int64_t warm_runs = 0;
  timed(once, warm_up, kWarmUpRuns, 5 * warm_up, [&](double) { ++warm_runs; });
  if (warm_runs < kWarmUpRuns)
    run.missing.push_back("only " + std::to_string(warm_runs) + " runs warmed up before the first one was timed");
  // The program with its libraries, the file's network, this plan, what its planning held for a while, inputs and
  // answers. On CUDA what lies on the device is not among it, unless it shares the processor's memory.
  run.peak_memory_bytes = bytes_of("/proc/self/status", "VmHWM");
  if (!run.peak_memory_bytes) run.missing.push_back("/proc/self/status does not say the peak of the memory");

  say("measuring");
  std::array<Latencies, kRepeats> repeats;
  Window window{seconds_now(), 0};
  for (Latencies& repeat : repeats)
    timed(once, options.seconds, kLeastRuns, HUGE_VAL, [&](double us) { repeat.add(us); });
  window.end = seconds_now();
  run.celsius_end = temperatures(options.root);
  Latencies all;
  for (const Latencies& repeat : repeats) {
    run.repeats_p50.push_back(quantile(repeat.ascending(), 0.5));
    all.add(repeat);
  }
  const std::vector<double> us = all.ascending();
  run.mean = all.mean();
  run.min = all.min();
  run.p50 = quantile(us, 0.5);
  run.p90 = quantile(us, 0.9);
  run.p95 = quantile(us, 0.95);
  run.p99 = quantile(us, 0.99);
  run.max = all.max();
  run.runs = all.runs();
  const double done = static_cast<double>(all.runs()) * static_cast<double>(plan_options.batch);
  run.rows_per_second = done / (window.end - window.begin);
  if (run.celsius_start.empty()) run.missing.push_back("temperatures: no thermal zone can be read");
  probe.tell(run, window, done);
}

std::string described(const RunResult& run) {
  std::string text = std::string(name(run.device)) + ' ' + run.precision + (run.dense ? " dense" : "");
  if (run.threads && run.device == Device::kCpu) text += ", threads " + std::to_string(*run.threads);
  return text + ", batch " + std::to_string(run.batch.value_or(1));
}

// Why a part of the measurement failed; what is no such failure goes on.
std::string why_failed() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return "out of memory: give a smaller batch";
  } catch (const std::exception& error) {
    return error.what();
  }
}

RunResult read_trtexec(const std::string& path) {
  RunResult run{.engine = "tensorrt", .dense = true, .device = Device::kCuda};
  run.batch = 1;
  std::string stem = path.substr(path.rfind('/') + 1);
  stem.erase(std::min(stem.rfind('.'), stem.size()));
  const size_t last = stem.rfind('-'), before = last == stem.npos ? last : stem.rfind('-', last - 1);
  int64_t batch = 0;
  bool named = false;
  if (before != stem.npos && last > before)
    if (const auto [end, error] = std::from_chars(stem.data() + last + 1, stem.data() + stem.size(), batch);
        error == std::errc() && end == stem.data() + stem.size() && batch >= 1) {
      run.precision = printable(stem.substr(before + 1, last - before - 1));
      run.batch = batch;
      named = true;
    }
  if (!named)
    run.missing.push_back("tensorrt: the name " + printable(path.substr(path.rfind('/') + 1)) +
                          " says no precision and batch, as <anything>-float16-8.log does: float32 and 1 are taken");
  try {
    const Bytes bytes = read_file(path, 64 << 20, "log of trtexec");
    const TrtexecResult said = parse_trtexec({reinterpret_cast<const char*>(bytes.data.get()), bytes.size});
    run.version = said.version;
    const auto& us = said.latency;
    for (const auto& [to, milliseconds] : {std::pair(&run.mean, us.mean),
                                           {&run.min, us.min},
                                           {&run.p50, us.median},
                                           {&run.p90, us.p90},
                                           {&run.p95, us.p95},
                                           {&run.p99, us.p99},
                                           {&run.max, us.max}})
      *to = 1e3 * milliseconds;
    if (said.throughput > 0) run.rows_per_second = said.throughput * static_cast<double>(*run.batch);
  } catch (...) {
    run.missing.push_back("tensorrt: " + why_failed());
  }
  return run;
}

// What is checked once.
bool same_but_for_batch_and_threads(const PlanOptions& a, const PlanOptions& b) {
  return a.device == b.device && a.precision == b.precision && a.dense == b.dense;
}

// The check that went worst, over everything but batches and threads. Returns what could not be checked, and why.
std::vector<std::pair<PlanOptions, std::string>> check(DeviceResult& result,
                                                       const std::shared_ptr<const Network>& network, const Rows& rows,
                                                       const BenchOptions& options,
                                                       const std::vector<PlanOptions>& plans, const Say& say) {
  const std::vector<float> recorded = read_answers(options.check, *network, rows.count);
  std::vector<PlanOptions> checked;
  std::vector<std::pair<PlanOptions, std::string>> failed;
  for (PlanOptions plan : plans) {
    plan.batch = std::clamp<int64_t>(rows.count, 1, 64);
    if (std::ranges::any_of(checked, [&](const auto& other) { return same_but_for_batch_and_threads(plan, other); }))
      continue;
    checked.push_back(plan);
    say(std::string("checking the answers: ") + name(plan.device) + ' ' + name(plan.precision));
    try {
      const Check found = compare(answers(network, rows, plan), recorded, rows.count, plan.precision);
      const auto share = [](const Check& c) { return c.largest_difference / c.tolerance; };
      if (!result.check || (result.check->equal() && !(share(found) <= share(*result.check)))) result.check = found;
    } catch (const Interrupted&) {
      throw;
    } catch (...) {
      failed.emplace_back(plan, "the answers could not be checked: " + why_failed());
    }
  }
  return failed;
}

std::vector<PlanOptions> plans_of(const BenchOptions& options) {
  std::vector<PlanOptions> plans;
  const bool float32 = std::ranges::count(options.precisions, Precision::kFloat32) > 0;
  for (const Device device : options.devices)
    for (const Precision precision : options.precisions)
      for (const bool dense : {false, true})
        for (const int threads : device == Device::kCuda ? std::vector{1} : options.threads)
          for (const int64_t batch : options.batches) {
            if (dense && !options.dense) continue;
            if (device == Device::kCpu && precision != Precision::kFloat32 && float32) continue;
            plans.push_back({.batch = batch,
                             .threads = threads,
                             .cache = options.cache,
                             .device = device,
                             .precision = precision,
                             .dense = dense});
          }
  return plans;
}

}  // namespace

DeviceResult measure(const BenchOptions& options, const std::function<void(const std::string&)>& say) {
  if (!(options.seconds >= 0.001 && options.seconds <= 86'400))
    throw std::invalid_argument("seconds should be 0.001 to 86400");
  if (!options.check.empty() && options.input.empty())
    throw std::invalid_argument("answers can be checked only to the rows of an input: give both");
  if (!options.samples.empty()) check_writable(options.samples);
  const auto network = load(options.file.c_str());
  DeviceResult result{utc_now(), machine(options.root), facts(options.file, model(*network)), {}, {}};
  const Rows rows = options.input.empty() ? Rows{} : read_rows(options.input, model(*network));
  if (!options.input.empty() && rows.count == 0)
    throw FormatError(options.input + " has no rows: give some, or no input for random numbers");
  const std::vector<PlanOptions> plans = plans_of(options);
  Probe probe(options, say);
  std::vector<std::pair<PlanOptions, std::string>> unchecked;
  if (!options.check.empty()) unchecked = check(result, network, rows, options, plans, say);
  for (const PlanOptions& plan : plans) {
    RunResult run{
        .version = PYKD_VERSION, .dense = plan.dense, .device = plan.device, .precision = name(plan.precision)};
    run.batch = plan.batch;
    run.threads = plan.threads;
    for (const auto& [other, why] : unchecked)
      if (same_but_for_batch_and_threads(plan, other)) run.missing.push_back(why);
    const std::string what = described(run);
    const auto say_so = [&](const std::string& doing) { say(what + ": " + doing); };
    say_so("planning, which times each layer's forms");
    try {
      measure_run(run, network, rows, plan, options, probe, say_so);
    } catch (const Interrupted&) {
      throw;
    } catch (...) {
      run.missing.push_back(what + ": " + why_failed());
    }
    result.runs.push_back(std::move(run));
  }
  for (const std::string& path : options.trtexec) result.runs.push_back(read_trtexec(path));
  if (!options.samples.empty()) write_whole(options.samples, probe.raw());
  return result;
}

}  // namespace pykd::runtime
