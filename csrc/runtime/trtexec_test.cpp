// The reader of trtexec's logs: figure by figure of every format, what it refuses, and mutants of good logs.
#include "runtime/trtexec.h"

#include <cmath>
#include <random>
#include <string>

#include "core/kernel_test.h"
#include "runtime/model_file.h"

namespace {

using namespace pykd::testing;
using pykd::runtime::FormatError;
using pykd::runtime::parse_trtexec;
using pykd::runtime::TrtexecResult;
using Line = TrtexecResult::Line;

// Lines of real logs. TensorRT 7 says no throughput ("0 qps") of a network with an explicit batch.
const std::string k7 =
    "&&&& RUNNING TensorRT.trtexec # trtexec --onnx=a.onnx\n"
    "[06/12/2022-22:34:00] [I] Average on 10 runs - GPU latency: 1.55903 ms - Host latency: 1.65396 ms (end to end "
    "3.01013 ms, enqueue 0.93772 ms)\n"
    "[06/12/2022-22:34:00] [I] Host Latency\n"
    "[06/12/2022-22:34:00] [I] min: 1.64058 ms (end to end 1.66368 ms)\n"
    "[06/12/2022-22:34:00] [I] max: 6.2915 ms (end to end 7.65552 ms)\n"
    "[06/12/2022-22:34:00] [I] mean: 1.66069 ms (end to end 3.00909 ms)\n"
    "[06/12/2022-22:34:00] [I] median: 1.65601 ms (end to end 3.01636 ms)\n"
    "[06/12/2022-22:34:00] [I] percentile: 1.67065 ms at 99% (end to end 3.03931 ms at 99%)\n"
    "[06/12/2022-22:34:00] [I] throughput: 0 qps\n"
    "[06/12/2022-22:34:00] [I] walltime: 3.00461 s\n"
    "[06/12/2022-22:34:00] [I] Enqueue Time\n"
    "[06/12/2022-22:34:00] [I] min: 0.776001 ms\n"
    "[06/12/2022-22:34:00] [I] max: 1.37109 ms\n"
    "[06/12/2022-22:34:00] [I] median: 0.811768 ms\n"
    "[06/12/2022-22:34:00] [I] GPU Compute\n"
    "[06/12/2022-22:34:00] [I] min: 1.92773 ms\n"
    "[06/12/2022-22:34:00] [I] max: 2.14062 ms\n"
    "[06/12/2022-22:34:00] [I] mean: 1.96148 ms\n"
    "[06/12/2022-22:34:00] [I] median: 1.96094 ms\n"
    "[06/12/2022-22:34:00] [I] percentile: 1.98242 ms at 99%\n"
    "[06/12/2022-22:34:00] [I] total compute time: 19.6148 s\n";
const std::string k8 =
    "[12/19/2022-11:20:20] [I] === Performance summary ===\n"
    "[12/19/2022-11:20:20] [I] Throughput: 197.878 qps\n"
    "[12/19/2022-11:20:20] [I] Latency: min = 5.10516 ms, max = 6.27979 ms, mean = 5.28241 ms, median = 5.19092 ms, "
    "percentile(99%) = 5.90356 ms\n"
    "[12/19/2022-11:20:20] [I] End-to-End Host Latency: min = 5.2265 ms, max = 6.39758 ms, mean = 5.40171 ms, median = "
    "5.30881 ms, percentile(99%) = 6.026 ms\n"
    "[12/19/2022-11:20:20] [I] H2D Latency: min = 0.129028 ms, max = 0.165039 ms, mean = 0.1389 ms, median = 0.136719 "
    "ms, percentile(99%) = 0.157227 ms\n"
    "[12/19/2022-11:20:20] [I] GPU Compute Time: min = 4.86914 ms, max = 6.0304 ms, mean = 5.0506 ms, median = 4.95825 "
    "ms, percentile(99%) = 5.66577 ms\n"
    "[12/19/2022-11:20:20] [I] Total GPU Compute Time: 3.01016 s\n"
    "&&&& PASSED TensorRT.trtexec [TensorRT v8001] # trtexec --onnx=a.onnx --explicitBatch\n";
const std::string k10 =
    "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --loadEngine=a.engine\n"
    "[10/03/2024-10:47:59] [I] TensorRT version: 10.3.0\n"
    "[10/03/2024-10:47:59] [I] Throughput: 130.298 qps\n"
    "[10/03/2024-10:47:59] [I] Latency: min = 5.38672 ms, max = 13.3664 ms, mean = 7.60628 ms, median = 7.16092 ms, "
    "percentile(90%) = 10.2996 ms, percentile(95%) = 10.8698 ms, percentile(99%) = 12.9675 ms\n"
    "[10/03/2024-10:47:59] [I] Enqueue Time: min = 2.72876 ms, max = 15.0201 ms, mean = 7.63062 ms, median = 7.86694 "
    "ms, percentile(90%) = 10.1792 ms, percentile(95%) = 11.7217 ms, percentile(99%) = 14.1848 ms\n"
    "[10/03/2024-10:47:59] [I] GPU Compute Time: min = 5.34595 ms, max = 13.3388 ms, mean = 7.58404 ms, median = "
    "7.14139 ms, percentile(90%) = 10.2881 ms, percentile(95%) = 10.8175 ms, percentile(99%) = 12.9485 ms\n"
    "[10/03/2024-10:47:59] [I] D2H Latency: min = 0.00390625 ms, max = 0.110596 ms, mean = 0.0100141 ms, median = "
    "0.00439453 ms, percentile(90%) = 0.0254517 ms, percentile(95%) = 0.0319824 ms, percentile(99%) = 0.0994873 ms\n"
    "[10/03/2024-10:47:59] [V] GPU Compute Time: the GPU latency to execute the kernels for a query.\n"
    "[10/03/2024-10:47:59] [V] Throughput: the observed throughput computed by dividing the number of queries by the "
    "Total Host Walltime.\n"
    "[10/03/2024-10:47:59] [V] Latency: the summation of H2D Latency, GPU Compute Time, and D2H Latency.\n";

constexpr double kUnsaid = Line::kUnsaid;

void equal(const Line& line, const Line& expected, const std::string& what) {
  const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  check(same(line.min, expected.min) && same(line.max, expected.max) && same(line.mean, expected.mean), what);
  check(same(line.median, expected.median) && same(line.p90, expected.p90), what + ": median, 90 %");
  check(same(line.p95, expected.p95) && same(line.p99, expected.p99), what + ": 95 %, 99 %");
}

void test_formats() {
  const TrtexecResult seven = parse_trtexec(k7), eight = parse_trtexec(k8), ten = parse_trtexec(k10);
  check(seven.throughput == 0 && eight.throughput == 197.878 && ten.throughput == 130.298, "throughput");
  check(seven.version.empty() && eight.version == "8.0.1" && ten.version == "10.3.0", "version");
  equal(seven.latency, {1.64058, 6.2915, 1.66069, 1.65601, kUnsaid, kUnsaid, 1.67065}, "latency of 7");
  equal(seven.gpu_compute, {1.92773, 2.14062, 1.96148, 1.96094, kUnsaid, kUnsaid, 1.98242}, "kernels of 7");
  equal(eight.latency, {5.10516, 6.27979, 5.28241, 5.19092, kUnsaid, kUnsaid, 5.90356}, "latency of 8.0");
  equal(eight.gpu_compute, {4.86914, 6.0304, 5.0506, 4.95825, kUnsaid, kUnsaid, 5.66577}, "kernels of 8.0");
  equal(ten.latency, {5.38672, 13.3664, 7.60628, 7.16092, 10.2996, 10.8698, 12.9675}, "latency of 10");
  equal(ten.gpu_compute, {5.34595, 13.3388, 7.58404, 7.14139, 10.2881, 10.8175, 12.9485}, "kernels of 10");

  std::string windows;
  for (const char letter : k10) windows += letter == '\n' ? "\r\n" : std::string(1, letter);
  equal(parse_trtexec(windows).latency, ten.latency, "lines that end as on Windows");
  check(parse_trtexec(k8 + k10).throughput == 130.298, "the last summary");
  check(std::isnan(parse_trtexec(k10 + k7).latency.p90), "nothing is left of the summary before");
  check(std::isnan(parse_trtexec(k10 + k8).latency.p90), "nor by the newer format");
  const Line fast = parse_trtexec("Latency: min = 0 ms, median = 1e-3 ms").latency;
  check(fast.min == 0 && fast.median == 1e-3 && std::isnan(fast.max), "without time and level, and 0 ms");
}

void test_versions() {
  const auto version = [](const std::string& word) {
    return parse_trtexec("&&&& RUNNING TensorRT.trtexec [TensorRT v" + word + "\nThroughput: 1 qps\n").version;
  };
  for (const auto& [word, expected] :
       {std::pair("7103] # trtexec", "7.1.3"), std::pair("8601] # trtexec", "8.6.1"), std::pair("8.5.2]", "8.5.2"),
        std::pair("8400]", "8.4.0"), std::pair("101602] [b10] # trtexec", "10.16.2"),
        std::pair("110100] [b106]", "11.1.0"), std::pair("11.1.0.106] [b48]", "11.1.0.106"), std::pair("]", ""),
        std::pair("999]", ""), std::pair(".5]", ""), std::pair("5.]", ""), std::pair("99999999999999999]", ""),
        std::pair("-8601]", ""), std::pair("1.1.1.1.1.1.1.1.1.1.1.1]", "")})
    check(version(word) == expected, std::string(word) + ": " + version(word));
  check(parse_trtexec("[I] TensorRT version: 8.5.2\nThroughput: 1 qps\n").version == "8.5.2", "a line of its own");
}

void refused(const std::string& log, const std::string& word) {
  std::string said = "nothing";
  try {
    parse_trtexec(log);
  } catch (const FormatError& error) {
    said = error.what();
  }
  check(said.find(word) != std::string::npos, "'" + word + "', said: " + said);
}

void test_refused() {
  refused("", "no figures");
  refused("Throughput: 0 qps\n", "no figures");
  refused(std::string("\0\1\2[[[]]]\n\xFF\xFE", 12), "no figures");
  refused(k10.substr(0, k10.find("Throughput") + 20), "no figures");  // cut off before its unit
  refused("Latency: min = nan ms, max = inf ms, mean = -1 ms, median = 1e999 ms, percentile(99%) = 5,3 ms",
          "no figures");
  refused("Throughput: 0x10 qps\nLatency: min=1 ms, max = 2 s\nH2D Latency: min = 1 ms\n", "no figures");
  refused(k10 + "&&&& FAILED TensorRT.trtexec [TensorRT v100300] # trtexec\n", "failed");
  refused(std::string(10 << 20, '['), "no figures");
  refused(std::string(10 << 20, ','), "no figures");
  refused("Latency: " + std::string(10 << 20, ','), "no figures");

  const Line cut = parse_trtexec(k10.substr(0, k10.find("10.2996") + 9)).latency;
  check(cut.median == 7.16092 && std::isnan(cut.p90) && std::isnan(cut.p99), "a log that ends in a figure");
}

// Changes bytes, cuts, repeats.
void test_mutants() {
  const std::string seeds[] = {k7, k8, k10, k10 + k7};
  const std::string words[] = {"nan", "inf", "-", "1e308", "e", ".", " ms", "\n", "["};
  std::mt19937 random(20265);
  int read = 0;
  const int mutants = kSlow ? 2'000 : 20'000;
  for (int i = 0; i < mutants; ++i) {
    std::string log = seeds[i % 4];
    for (size_t change = 0; change <= random() % 20; ++change) {
      const size_t at = random() % log.size();
      switch (random() % 4) {
        case 0: log[at] = static_cast<char>(random()); break;
        case 1: log.erase(at, random() % 8); break;
        case 2: log.insert(at, words[random() % 9]); break;
        case 3: log.resize(at / 2 + log.size() / 2); break;
      }
      if (log.empty()) log = " ";
    }
    try {
      const TrtexecResult result = parse_trtexec(log);
      bool good = result.throughput >= 0 && std::isfinite(result.throughput);
      good &= result.version.find_first_not_of("0123456789.") == std::string::npos;
      for (const Line& line : {result.latency, result.gpu_compute})
        for (const double value : {line.min, line.max, line.mean, line.median, line.p90, line.p95, line.p99})
          good &= std::isnan(value) || (value >= 0 && std::isfinite(value));
      if (!good) check(false, "a figure that is none");
      ++read;
    } catch (const FormatError&) {
    }
  }
  std::printf("%d mutants, of which %d were read\n", mutants, read);
  check(read > mutants / 4 && read < mutants, "some mutants are good, not all are");
}

}  // namespace

int main() {
  test_formats();
  test_versions();
  test_refused();
  test_mutants();
  return report();
}
