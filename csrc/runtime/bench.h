// The measurement of a model file on this machine: latency, throughput, memory, power, clocks and temperatures.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/engine.h"
#include "runtime/record.h"

namespace pykd::runtime {

// Each batch is measured with each number of threads, form, precision and device. On CUDA threads are left out, and on
// the processor every precision but float32 where that is asked for, too.
struct BenchOptions {
  std::string file;  // a model file
  std::vector<int64_t> batches = {1};
  std::vector<int> threads = {1};
  std::vector<Device> devices = {Device::kCpu};
  std::vector<Precision> precisions = {Precision::kFloat32};
  bool dense = false;                  // also with every weight dense
  bool power = false;                  // idle power first, then that of each run
  double seconds = 2;                  // of each of three repeats
  std::string input{}, check{};        // files of rows, or random numbers; and of recorded answers to those rows
  std::vector<std::string> trtexec{};  // logs of TensorRT's trtexec, named <anything>-<precision>-<batch>.log
  std::string root = "/";              // where sensors and versions are read
  std::string cache{};                 // of PlanOptions
  std::string samples{};               // a file for the raw samples of power, CSV
};

// What stops a measurement from within `say`.
struct Interrupted {};

// Reads and never sets anything on the device. What fails of it is told in the result, and the rest goes on; throws
// where the files named cannot be read or written, and std::invalid_argument where an option is out of range.
//
// say: is told what is going on, a sentence at a time.
DeviceResult measure(const BenchOptions& options, const std::function<void(const std::string&)>& say);

}  // namespace pykd::runtime
