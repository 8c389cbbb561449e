// The record as JSON that a strict reader takes, whatever it holds; the comparison of answers; and latencies of many
// runs.
#include "runtime/record.h"

#include <cmath>
#include <limits>

#include "core/kernel_test.h"
#include "runtime/json.h"
#include "runtime/latencies.h"

namespace {

using namespace pykd::runtime;
using namespace pykd::testing;

Json at(Json json, std::initializer_list<const char*> path) {
  for (const char* const key : path) check(json.find(key, json), key);
  return json;
}
Json item(Json list, size_t number) {
  auto each = list.begin();
  while (number--) ++each;
  return *each;
}

DeviceResult full() {
  DeviceResult result;
  result.time = "2026-11-22T10:00:00Z";
  Board& board = result.machine.board;
  board.name = "a \"board\" \\ of\x01 \xC3\xA9 \xFF\xED\xA0\x80\xF4\x90\x80\x80\xC0\xAF\xE2\x82";
  board.power_mode = "MAXN_SUPER";
  board.power_mode_id = 2;
  board.memory_bytes = int64_t{8} << 30;
  board.missing = {"one", "two"};
  result.machine.isa = "neon";
  result.machine.cuda = CudaDevice{"Orin", 8, 7, 12060, 12060, 8, 1, true};
  result.machine.emulated = false;
  result.model = {"a.pykd.safetensors", "abc", 97696, 1066640, 266200, 4000, {"linear", "relu"}};
  result.check = Check{64, 1.25e-6, 1e-4};
  RunResult run{.version = "0.1.0"};
  run.threads = 2;
  run.batch = 8;
  run.mean = 1.5;
  run.p50 = std::numeric_limits<double>::infinity();
  run.runs = 1000;
  run.repeats_p50 = {1, 1.5, 1e-7};
  run.power = RunPower{.source = "ina3221", .total = {{"VDD_IN"}, "module"}};
  run.power->watts = 7.5;
  run.clocks = {{{"cpu", 115.2, {}}, 1728}};
  run.celsius_start = {{"cpu", 45.5}, {"tj", 46}};
  run.throttled = false;
  run.layers = {{0, "sparse 16x16", 2.5}};
  run.missing = {"something"};
  result.runs = {run, RunResult{.engine = "tensorrt", .dense = true, .device = Device::kCuda}};
  return result;
}

void test_json() {
  const std::string text = json(full());
  const Document document(text, "record");
  const Json root = document.root();
  check(at(root, {"pykd_device_result"}).whole() == 1 && at(root, {"time"}).text() == "2026-11-22T10:00:00Z",
        "the head");
  const std::string bad = "\xEF\xBF\xBD";
  check(at(root, {"machine", "name"}).text() ==
            "a \"board\" \\ of\x01 \xC3\xA9 " + bad + bad + bad + bad + bad + bad + bad + bad + bad + bad + bad + bad,
        "a name of any bytes");
  check(at(root, {"machine", "power_mode", "id"}).whole() == 2, "the power mode");
  check(at(root, {"machine", "soc"}).is(JsonType::kNull) && !at(root, {"machine", "emulated"}).boolean(),
        "null and false");
  check(at(root, {"machine", "cuda", "driver"}).text() == "12.6" &&
            at(root, {"machine", "cuda", "capability"}).text() == "8.7",
        "CUDA's versions");
  check(at(root, {"machine", "missing"}).size() == 2, "what is missing");
  check(at(root, {"check", "largest_difference"}).number() == 1.25e-6 && at(root, {"check", "equal"}).boolean(),
        "the check");
  const Json runs = at(root, {"runs"}), run = item(runs, 0);
  check(runs.size() == 2 && at(run, {"form"}).text() == "sparse" && at(run, {"device"}).text() == "cpu", "the run");
  check(at(run, {"latency_us", "mean"}).number() == 1.5 && at(run, {"latency_us", "p50"}).is(JsonType::kNull) &&
            at(run, {"latency_us", "runs"}).whole() == 1000,
        "latencies");
  check(item(at(run, {"repeats_p50_us"}), 2).number() == 1e-7, "a small number");
  check(at(run, {"power", "watts"}).number() == 7.5 && at(run, {"power", "scope"}).text() == "module" &&
            at(run, {"power", "millijoules_per_row", "total"}).is(JsonType::kNull),
        "power");
  check(at(run, {"clocks_mhz", "cpu", "min"}).number() == 115.2 &&
            at(run, {"clocks_mhz", "cpu", "max"}).is(JsonType::kNull) &&
            at(run, {"clocks_mhz", "cpu", "seen"}).number() == 1728,
        "clocks");
  check(at(run, {"celsius", "start"}).size() == 2 && at(run, {"celsius", "end"}).size() == 0, "temperatures");
  check(at(item(at(run, {"layers"}), 0), {"op"}).text() == "linear", "layers");
  const Json other = item(runs, 1);
  check(at(other, {"engine"}).text() == "tensorrt" && at(other, {"form"}).text() == "dense" &&
            at(other, {"threads"}).is(JsonType::kNull) && at(other, {"power"}).is(JsonType::kNull),
        "TensorRT's");
  const Document machine(json(full().machine), "machine");
  check(at(machine.root(), {"isa"}).text() == "neon", "a machine alone");
  const std::string shown = lines(full());
  for (const char* const word :
       {"MAXN_SUPER (id 2)", "Orin, capability 8.7", "EMULATED", "tensorrt", "something", "97696"})
    check((shown.find(word) != shown.npos) == (std::string(word) != "EMULATED"), std::string("the table says ") + word);
  DeviceResult timed = full(), emulated = full();
  timed.runs[0].p50 = emulated.runs[0].p50 = 777.25;
  emulated.machine.emulated = true;
  check(lines(timed).find("777.25") != std::string::npos, "a device's time");
  check(lines(emulated).find("777.25") == std::string::npos && lines(emulated).find("EMULATED") != std::string::npos,
        "an emulator's is not shown");
}

void test_compare() {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  const auto difference = [](std::vector<float> a, std::vector<float> b) {
    return compare(a, b, 1, Precision::kFloat32).largest_difference;
  };
  check(difference({1, -4}, {1, -4}) == 0 && difference({}, {}) == 0 && difference({0}, {0}) == 0, "the same");
  check(std::abs(difference({1, -4}, {1.5f, -4}) - 0.125) < 1e-12, "a share of the largest");
  check(difference({1, nan, inf}, {1, nan, inf}) == 0, "what is not finite, in the same places");
  for (const float other : {nan, inf, -inf})
    check(std::isnan(difference({1, other}, {1, 2})) && std::isnan(difference({1, 2, 9}, {1, other, 2})),
          "but not in others");
  check(std::isinf(difference({1e-9f}, {0})), "zeros have no scale");
  for (const Precision precision : {Precision::kFloat32, Precision::kFloat16, Precision::kBFloat16}) {
    const double tolerance = compare({1}, {1}, 1, precision).tolerance;
    const auto moved = [&](double by) {
      return compare({static_cast<float>(1 + by * tolerance)}, {1}, 1, precision).equal();
    };
    check(moved(0.9) && !moved(1.1), std::string("tolerance of ") + name(precision));
  }
  check(!compare({nan}, {1}, 1, Precision::kBFloat16).equal(), "NaN is not equal");
}

void test_latencies() {
  Latencies all, second;
  constexpr int64_t kMany = 1'000'000;
  for (int64_t i = 0; i < kMany; ++i) all.add(static_cast<double>(i * 7919 % kMany));
  for (int64_t i = 0; i < 1000; ++i) second.add(500'000 + 0.5 * static_cast<double>(i));
  check(all.runs() == kMany && all.min() == 0 && all.max() == kMany - 1, "counted, the least and the most");
  check(std::abs(all.mean() - (kMany - 1) / 2.0) < 1e-3, "the mean");
  const auto some = all.ascending();
  check(some.size() <= Latencies::kMost && some.size() >= Latencies::kMost / 2, "as many are kept as may be");
  for (const double share : {0.5, 0.9, 0.99})
    check(std::abs(quantile(some, share) - share * kMany) < 0.005 * kMany, "quantiles of those that are kept");
  const size_t before = some.size();
  all.add(second);
  const size_t more = all.ascending().size() - before;
  check(all.runs() == kMany + 1000 && more >= 1000 / 8 - 1 && more <= 1000 / 8 + 8, "others weigh as much as these");
  second.add(all);
  check(second.runs() == kMany + 2000 && second.ascending().size() < before + 300, "in either order");

  int64_t runs = 0;
  const auto run = [&] { ++runs; };
  check(timed(run, 0, 5, HUGE_VAL, [](double us) { check(us >= 0, "a latency"); }) >= 0 && runs == 5,
        "at least 5 runs");
  runs = 0;
  timed(run, 0, 1'000'000'000, 0.01, [](double) {});
  check(runs > 0 && runs < 1'000'000'000, "but no longer than so");
  const auto found = latencies(run, 0.01);
  check(found.size() >= 20 && std::ranges::is_sorted(found), "latencies ascend");
}

}  // namespace

int main() {
  test_json();
  test_compare();
  test_latencies();
  return report();
}
