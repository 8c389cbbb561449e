// What a measurement says: the device result, as JSON for programs and as a table for people.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/board.h"
#include "runtime/engine.h"
#include "runtime/rows.h"
#include "runtime/sensors.h"

namespace pykd::runtime {

// Everywhere: NaN, or nothing, is a value that could not be had, null in JSON; `missing` says why, a sentence each.

struct Machine {
  Board board;
  std::string isa;  // "neon", "avx2": instructions of the kernels for the processor
  std::optional<CudaDevice> cuda;
  std::optional<bool> emulated;
};
Machine machine(const std::string& root);  // root: of read_board

struct RunPower {
  std::string source{};  // "ina3221" or "tegrastats"
  PowerTotal total{};
  std::optional<int64_t> samples{};
  double samples_per_second = NAN, window_begin = NAN, window_seconds = NAN;  // begin: as time_s of the raw samples
  double idle_watts = NAN, watts = NAN, total_millijoules = NAN, above_idle_millijoules = NAN;  // of a row
};

struct RunClock {
  ClockRange range;
  double seen;  // MHz, the mean over the run
};

// One engine at one batch size. Latencies are microseconds of a run, that is of a whole batch.
struct RunResult {
  std::string engine = "pykd", version{};
  bool dense = false;
  Device device = Device::kCpu;
  std::string precision = "float32";
  std::optional<int64_t> threads{}, batch{};
  double mean = NAN, min = NAN, p50 = NAN, p90 = NAN, p95 = NAN, p99 = NAN, max = NAN;
  std::optional<int64_t> runs{};  // that were timed
  std::vector<double> repeats_p50{};
  double rows_per_second = NAN;
  std::optional<int64_t> peak_memory_bytes{}, weight_bytes{}, workspace_bytes{}, lanes{};
  std::optional<RunPower> power{};
  std::vector<RunClock> clocks{};
  std::map<std::string, double> celsius_start{}, celsius_end{};
  std::optional<bool> throttled{};
  std::vector<Choice> layers{};
  std::vector<std::string> missing{};
};

struct ModelFacts {
  std::string file, sha256;
  int64_t bytes, dense_bytes;      // of the file; of all its numbers as float32
  int64_t weights, nonzeros;       // without biases
  std::vector<std::string> kinds;  // of its steps
};

struct DeviceResult {
  std::string time;  // "2026-11-22T10:00:00Z"
  Machine machine;
  ModelFacts model;
  std::optional<Check> check;
  std::vector<RunResult> runs;
};

const char* name(Device device);
const char* name(Precision precision);

std::string quoted(std::string_view text);  // as JSON; what is no UTF-8 becomes U+FFFD
std::string json(const Machine& machine);
std::string json(const DeviceResult& result);
std::string lines(const Machine& machine);      // what it is, and what is missing
std::string lines(const DeviceResult& result);  // the same, and its runs

}  // namespace pykd::runtime
