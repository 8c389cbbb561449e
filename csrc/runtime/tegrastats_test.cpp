// Recorded lines of tegrastats, Nano to Thor, figure by figure; lines that are broken; and a program that prints them.
#include "runtime/tegrastats.h"

#include <sys/stat.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <random>
#include <system_error>

#include "core/kernel_test.h"
#include "runtime/fake_device.h"
#include "runtime/latencies.h"

namespace {

using namespace pykd::runtime;
using namespace pykd::testing;

const char* const kNano =
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] EMC_FREQ 0% GR3D_FREQ "
    "0% "
    "PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C thermal@41C POM_5V_IN 943/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123";
const char* const kTx2 =
    "RAM 1345/7829MB (lfb 1290x4MB) SWAP 0/512MB (cached 0MB) CPU [2%@345,off,off,off,off,off] EMC_FREQ 13%@40 "
    "GR3D_FREQ "
    "0%@114 APE 150 BCPU@35C MCPU@35C GPU@41C PLL@35C AO@35.5C Tboard@35C Tdiode@36C PMIC@100C thermal@35.5C VDD_IN "
    "2003/2658 VDD_CPU 320/518 VDD_GPU 400/735 VDD_SOC 400/415 VDD_WIFI 0/0 VDD_DDR 240/348";
const char* const kXavier =
    "RAM 1903/15692MB (lfb 3251x4MB) CPU [1%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@32.5C GPU@32C Tboard@32C "
    "Tdiode@34.75C AUX@31.5C CPU@33.5C thermal@32.9C PMIC@100C GPU 0/0 CPU 216/216 SOC 864/864 CV 0/0 VDDRQ 144/144 "
    "SYS5V 1889/1889";
const char* const kOrinNano =
    "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU "
    "[15%@729,11%@729,14%@729,13%@729,11%@729,8%@729] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off NVJPG off NVJPG1 "
    "off VIC off OFA off APE 200 cpu@53.968C soc2@52.437C soc0@50.75C gpu@53.343C tj@53.968C soc1@51.656C VDD_IN "
    "12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW";
const char* const kAgxOrin =
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,3%@2188] EMC_FREQ "
    "3%@2133 GR3D_FREQ 0%@[0,0] NVENC0 79%@166 NVDEC off PVA0_FREQ off APE 174 cpu@52.562C soc2@48.437C soc0@49.093C "
    "tj@52.562C soc1@49.656C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW";
const char* const kAgxOrin72 =
    "10-01-2026 11:05:58 RAM 8207/62878MB (lfb 80x4MB) SWAP 85/6144MB (cached 0MB) CPU [9%@729,1%@729] GR3D_FREQ 0% "
    "cpu@47.906C/48.343C soc2@45.375C/45.406C soc0@45.5C/45.593C tj@47.906C/48.343C soc1@47.093C/47.25C VDD_GPU_SOC "
    "3034mW/3049mW/3412mW VDD_CPU_CV 1137mW/1296mW/2273mW VIN_SYS_5V0 4939mW/4924mW/5040mW";
const char* const kThor =
    "05-17-2026 10:00:32 RAM 4208/125773MB (lfb 31x4MB) SWAP 0/2048MB (cached 0MB) CPU [1%@972,0%@972] EMC_FREQ 0%@665 "
    "GR3D_FREQ @[0,0,0] NVENC0_FREQ @0 VIC off OFA_FREQ @0 PVA0_FREQ off APE 300 cpu@34.468C tj@34.5C soc012@33.781C "
    "soc345@34.5C VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 4165mW/4165mW VIN_SYS_5V0 4126mW/4126mW";
const char* const kThor392 =
    "RAM 4208/125773MB (lfb 31x4MB) GR3D_FREQ @[314,315,316] cpu@34.312C/34.843C tj@35.906C/35.906C VDD_GPU "
    "4925mW/4925mW/4925mW VDD_CPU_SOC_MSS 7953mW/8332mW/8710mW VIN_SYS_5V0 6667mW/6717mW/6767mW VIN 16802mW/16802mW";

using Figures = std::vector<int64_t>;

Figures memory(const std::optional<Tegrastats::Memory>& found) {
  if (!found) return {};
  return {found->used, found->total, found->blocks.value_or(-1), found->block.value_or(-1), found->cached.value_or(-1)};
}
Figures cores(const Tegrastats& found) {
  Figures figures;
  for (const auto& core : found.cores) {
    figures.push_back(core.on ? core.percent.value_or(-1) : -2);
    figures.push_back(core.mhz.value_or(-1));
  }
  return figures;
}
// A load of -1 where it has none, of -2 where it is off; then the clocks.
Figures engine(const Tegrastats& found, const std::string& name) {
  for (const auto& engine : found.engines)
    if (engine.name == name) {
      Figures figures = {engine.on ? engine.percent.value_or(-1) : -2};
      figures.insert(figures.end(), engine.mhz.begin(), engine.mhz.end());
      return figures;
    }
  return {};
}
std::map<std::string, std::pair<double, double>> degrees(const Tegrastats& found) {
  std::map<std::string, std::pair<double, double>> all;
  for (const auto& each : found.temperatures) all[each.name] = {each.celsius, each.peak.value_or(-1)};
  return all;
}
std::map<std::string, Figures> rails(const Tegrastats& found) {
  std::map<std::string, Figures> all;
  for (const auto& each : found.rails) all[each.name] = {each.milliwatts, each.average, each.peak.value_or(-1)};
  return all;
}

void test_old_boards() {
  Tegrastats found = parse_tegrastats(kNano);
  check(memory(found.ram) == Figures{613, 3964, 634, 4, -1}, "Nano: RAM");
  check(memory(found.swap) == Figures{0, 1982, -1, -1, 0}, "Nano: SWAP");
  check(!found.iram && cores(found) == Figures{2, 102, 1, 102, 0, 102, 0, 102}, "Nano: CPU");
  check(engine(found, "EMC_FREQ") == Figures{0} && engine(found, "GR3D_FREQ") == Figures{0}, "Nano: engines");
  check(found.engines.size() == 2, "Nano: two engines");
  check(degrees(found) ==
            std::map<std::string, std::pair<double, double>>{
                {"PLL", {39, -1}}, {"CPU", {40.5, -1}}, {"GPU", {41, -1}}, {"AO", {46, -1}}, {"thermal", {41, -1}}},
        "Nano: temperatures, without the PMIC");
  check(rails(found) == std::map<std::string, Figures>{{"POM_5V_IN", {943, 943, -1}},
                                                       {"POM_5V_GPU", {0, 0, -1}},
                                                       {"POM_5V_CPU", {123, 123, -1}}},
        "Nano: rails");
  found = parse_tegrastats("RAM 613/3964MB (lfb 634x4MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102,1%@102] EMC_FREQ 0%");
  check(memory(found.iram) == Figures{0, 252, 1, 252, -1} && found.cores.size() == 2, "Nano: IRAM");

  found = parse_tegrastats(kTx2);
  check(cores(found) == Figures{2, 345, -2, -1, -2, -1, -2, -1, -2, -1, -2, -1}, "TX2: CPU");
  check(engine(found, "EMC_FREQ") == Figures{13, 40} && engine(found, "GR3D_FREQ") == Figures{0, 114}, "TX2: engines");
  check(engine(found, "APE") == Figures{-1, 150} && found.engines.size() == 3, "TX2: APE");
  check(found.temperatures.size() == 8 && degrees(found)["Tdiode"].first == 36, "TX2: temperatures");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_IN", {2003, 2658, -1}},
                                                       {"VDD_CPU", {320, 518, -1}},
                                                       {"VDD_GPU", {400, 735, -1}},
                                                       {"VDD_SOC", {400, 415, -1}},
                                                       {"VDD_WIFI", {0, 0, -1}},
                                                       {"VDD_DDR", {240, 348, -1}}},
        "TX2: rails");

  found = parse_tegrastats(kXavier);
  check(!found.swap && memory(found.ram) == Figures{1903, 15692, 3251, 4, -1}, "Xavier: RAM");
  check(cores(found) == Figures{1, 1190, 0, 1190}, "Xavier: CPU the cores");
  check(degrees(found)["CPU"].first == 33.5 && degrees(found)["GPU"].first == 32, "Xavier: CPU and GPU the sensors");
  check(rails(found) == std::map<std::string, Figures>{{"GPU", {0, 0, -1}},
                                                       {"CPU", {216, 216, -1}},
                                                       {"SOC", {864, 864, -1}},
                                                       {"CV", {0, 0, -1}},
                                                       {"VDDRQ", {144, 144, -1}},
                                                       {"SYS5V", {1889, 1889, -1}}},
        "Xavier: CPU and GPU the rails");
}

void test_new_boards() {
  Tegrastats found = parse_tegrastats(kOrinNano);
  check(memory(found.ram) == Figures{6185, 7620, 8, 2, -1} && memory(found.swap) == Figures{851, 3810, -1, -1, 1},
        "Orin Nano: memory");
  check(cores(found) == Figures{15, 729, 11, 729, 14, 729, 13, 729, 11, 729, 8, 729}, "Orin Nano: CPU");
  check(engine(found, "GR3D_FREQ") == Figures{63, 621} && engine(found, "EMC_FREQ") == Figures{43, 2133},
        "Orin Nano: engines");
  for (const char* const name : {"NVDEC", "NVJPG", "NVJPG1", "VIC", "OFA"})
    check(engine(found, name) == Figures{-2}, name);
  check(engine(found, "APE") == Figures{-1, 200} && found.engines.size() == 8, "Orin Nano: APE");
  check(found.temperatures.size() == 6 && degrees(found)["tj"].first == 53.968, "Orin Nano: temperatures");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_IN", {12479, 12479, -1}},
                                                       {"VDD_CPU_GPU_CV", {4667, 4667, -1}},
                                                       {"VDD_SOC", {2817, 2817, -1}}},
        "Orin Nano: rails");

  found = parse_tegrastats(kAgxOrin);
  check(engine(found, "GR3D_FREQ") == Figures{0, 0, 0} && engine(found, "NVENC0") == Figures{79, 166},
        "AGX Orin: engines");
  check(found.engines.size() == 6 && found.temperatures.size() == 5, "AGX Orin: six engines, five temperatures");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_GPU_SOC", {2412, 2412, -1}},
                                                       {"VDD_CPU_CV", {1607, 1607, -1}},
                                                       {"VIN_SYS_5V0", {4707, 4707, -1}}},
        "AGX Orin: rails");

  found = parse_tegrastats(kAgxOrin72);
  check(engine(found, "EMC_FREQ").empty() && engine(found, "GR3D_FREQ") == Figures{0}, "JetPack 7.2: no EMC");
  check(degrees(found)["cpu"] == std::pair(47.906, 48.343) && degrees(found)["soc1"] == std::pair(47.093, 47.25),
        "JetPack 7.2: peaks");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_GPU_SOC", {3034, 3049, 3412}},
                                                       {"VDD_CPU_CV", {1137, 1296, 2273}},
                                                       {"VIN_SYS_5V0", {4939, 4924, 5040}}},
        "JetPack 7.2: rails");

  found = parse_tegrastats(kThor);
  check(engine(found, "GR3D_FREQ") == Figures{-1, 0, 0, 0} && engine(found, "NVENC0_FREQ") == Figures{-1, 0},
        "Thor: clocks without a load");
  check(engine(found, "EMC_FREQ") == Figures{0, 665} && engine(found, "APE") == Figures{-1, 300}, "Thor: engines");
  check(degrees(found).size() == 4 && degrees(found)["soc012"].first == 33.781, "Thor: temperatures");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_GPU", {0, 0, -1}},
                                                       {"VDD_CPU_SOC_MSS", {4165, 4165, -1}},
                                                       {"VIN_SYS_5V0", {4126, 4126, -1}}},
        "Thor: rails");

  found = parse_tegrastats(kThor392);
  check(engine(found, "GR3D_FREQ") == Figures{-1, 314, 315, 316}, "Thor r39.2: the GPU");
  check(degrees(found)["tj"] == std::pair(35.906, 35.906), "Thor r39.2: temperatures");
  check(rails(found) == std::map<std::string, Figures>{{"VDD_GPU", {4925, 4925, 4925}},
                                                       {"VDD_CPU_SOC_MSS", {7953, 8332, 8710}},
                                                       {"VIN_SYS_5V0", {6667, 6717, 6767}},
                                                       {"VIN", {16802, 16802, -1}}},
        "Thor r39.2: rails, and the board's input");
}

bool nothing(const std::string& line) {
  const Tegrastats found = parse_tegrastats(line);
  return !found.ram && !found.swap && !found.iram && found.cores.empty() && found.engines.empty() &&
         found.temperatures.empty() && found.rails.empty();
}

void test_broken_lines() {
  for (const char* const line : {"",
                                 " ",
                                 "RAM",
                                 "RAM 613",
                                 "RAM 613/",
                                 "RAM MB/3964MB (lfb",
                                 "SWAP (cached 0MB)",
                                 "CPU [",
                                 "CPU [2%@102",
                                 "CPU [2%@102,1",
                                 "CPU [on]",
                                 "CPU [2%@]",
                                 "CPU [99999999999%@1]",
                                 "VDD_IN 12mW",
                                 "VDD_IN 12mW/",
                                 "VDD_IN /12mW",
                                 "VDD_IN 12mW/12mW/12mW/12mW",
                                 "VDD_IN 99999999999/1",
                                 "VDD_IN 12mW/12mWx",
                                 "GR3D_FREQ 63%@[621",
                                 "GR3D_FREQ @",
                                 "GR3D_FREQ @[a]",
                                 "GR3D_FREQ %",
                                 "cpu@C",
                                 "cpu@",
                                 "@53C",
                                 "cpu@53",
                                 "cpu@53C/",
                                 "cpu@1e300C",
                                 "cpu@nanC",
                                 "CV0@-256C",
                                 "PMIC@100C",
                                 "NC 0/0",
                                 "12-12-2024 08:38:09",
                                 "\x1b[31m 5/5",
                                 "\xff\xff 5/5"})
    check(nothing(line), std::string("'") + line + "' has nothing");
  check(rails(parse_tegrastats("NC 0mW/0mW VDD_IN 5mW/6mW junk")) ==
            std::map<std::string, Figures>{{"VDD_IN", {5, 6, -1}}},
        "items behind and before what is unknown");
  check(parse_tegrastats("VDD_GPU -33mW/-20mW").rails.size() == 1, "a current that flows back");
  check(nothing(std::string(1 << 20, 'A') + " 5/5"), "a name without an end");
  std::string many;
  for (int i = 0; i < 100'000; ++i) many += "VDD_IN 1/1 ";
  check(parse_tegrastats(many).rails.size() <= 1024, "a line without an end");

  std::mt19937 random(0);
  size_t survived = 0;
  for (const char* const good : {kNano, kTx2, kXavier, kOrinNano, kAgxOrin72, kThor, kThor392})
    for (int i = 0; i < (kSlow ? 100 : 2000); ++i) {
      std::string line = good;
      for (int change = 0; change < 3; ++change) {
        const size_t at = random() % line.size();
        switch (random() % 3) {
          case 0: line[at] = static_cast<char>(random()); break;
          case 1: line.erase(at, random() % 20); break;
          default: line.insert(at, line.substr(random() % line.size(), random() % 20));
        }
        if (line.empty()) line = "x";
      }
      const Tegrastats found = parse_tegrastats(line);
      survived += found.rails.size() < 20 && found.cores.size() < 40;
    }
  check(survived == 7 * (kSlow ? 100 : 2000), "lines at random");
}

// A program named so, in front of all others.
void install(const FakeDevice& device, const std::string& script) {
  device.write("/tegrastats", "#!/bin/sh\n" + script);
  chmod((device.root + "/tegrastats").c_str(), 0755);
}

void test_program() {
  const FakeDevice device;
  const std::string path = std::getenv("PATH");
  setenv("PATH", (device.root + ":" + path).c_str(), 1);
  const double start = seconds_now();
  install(device, "[ \"$1 $2\" = '--interval 7' ] || exit 1\necho warming up\nwhile echo '" + std::string(kThor392) +
                      "' && sleep 0.02; do :; done\n");
  {
    TegrastatsReader reader(7);
    check(reader.rails() == std::vector<std::string>{"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"}, "its rails");
    std::vector<double> watts(4);
    int lines = 0;
    for (int i = 0; i < 1000 && lines < 5; ++i) lines += reader.read(watts.data());
    check(lines == 5 && watts == std::vector<double>{4.925, 7.953, 6.667, 16.802}, "its watts");
  }
  install(device, "trap '' TERM\necho VDD_IN 5/5 VDD_SOC 1/1\necho VDD_SOC 2/2\nwhile :; do sleep 0.1; done\n");
  {
    TegrastatsReader reader(1);
    std::vector<double> watts(2);
    bool read = false;
    for (int i = 0; i < 1000 && !read; ++i) read = reader.read(watts.data());
    check(read && std::isnan(watts[0]) && watts[1] == 2e-3, "a line that lacks a rail");
    check(!reader.read(watts.data()), "a program that says no more");
  }
  install(device, "exit 3\n");
  check(TegrastatsReader(1).rails().empty(), "a program that fails at once");
  install(device, "head -c 300000 /dev/zero | tr '\\0' x; echo; echo VDD_IN 7/7; sleep 9\n");
  check(TegrastatsReader(1).rails() == std::vector<std::string>{"VDD_IN"}, "behind a line without an end");
  std::string said;
  setenv("PATH", "/nowhere", 1);
  try {
    said = TegrastatsReader(1).rails().empty() ? "nothing" : "rails";  // an emulator tells it only so
  } catch (const std::system_error& error) {
    said = "nothing";
  }
  check(said == "nothing", "there is no such program");
  setenv("PATH", path.c_str(), 1);
  check(seconds_now() - start < 20, "programs end in time");
}

}  // namespace

int main() {
  test_old_boards();
  test_new_boards();
  test_broken_lines();
  test_program();
  return report();
}
