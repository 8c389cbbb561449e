#include "runtime/sensors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

namespace pykd::runtime {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr double kMostWatts = 1e4;  // of a rail; more is no reading
constexpr const char* kDrivers = "/sys/bus/i2c/drivers/";
constexpr const char* kThermal = "/sys/devices/virtual/thermal";

}  // namespace

// ---- power ---------------------------------------------------------------------------------------------------------

PowerRails::PowerRails(const std::string& root, std::vector<std::string>& missing) {
  for (const std::string& device : entries(root + kDrivers + "ina3221", ""))
    for (const std::string& hwmon : entries(device + "/hwmon", "hwmon"))
      for (const char channel : {'1', '2', '3'})  // in7 is the sum of their shunts' voltages, no rail
        if (const auto name = read_line(hwmon + "/in" + channel + "_label"))
          add(*name, {{}, TextFile(hwmon + "/in" + channel + "_input"), TextFile(hwmon + "/curr" + channel + "_input")},
              missing);
  for (const std::string& device : entries(root + kDrivers + "ina3221x", ""))
    for (const std::string& iio : entries(device, "iio:device"))
      for (const char channel : {'0', '1', '2'})
        if (const auto name = read_line(iio + "/rail_name_" + channel))
          add(*name,
              {TextFile(iio + "/in_power" + channel + "_input"), TextFile(iio + "/in_voltage" + channel + "_input"),
               TextFile(iio + "/in_current" + channel + "_input")},
              missing);
}

void PowerRails::add(const std::string& name, Rail rail, std::vector<std::string>& missing) {
  if (name == "NC") return;  // not connected
  if (std::isnan(rail.watts())) return missing.push_back("the power rail " + name + " cannot be read");
  if (std::ranges::find(names_, name) != names_.end())
    return missing.push_back("the power rail " + name + " is there twice: the first one is read");
  names_.push_back(name);
  rails_.push_back(std::move(rail));
}

double PowerRails::Rail::watts() const {
  double watts = kNone;
  if (const auto milliwatts = power.number())
    watts = *milliwatts * 1e-3;
  else if (const auto millivolts = voltage.number())
    watts = *millivolts * current.number().value_or(kNone) * 1e-6;
  return std::abs(watts) < kMostWatts ? watts : kNone;
}

void PowerRails::read(double* watts) const {
  for (const Rail& rail : rails_) *watts++ = rail.watts();
}

std::optional<PowerTotal> power_total(const std::vector<std::string>& names) {
  static const std::vector<PowerTotal> kTotals = {
      {{"VDD_IN"}, "module"},                                     // TX2, Xavier NX, Orin NX, Orin Nano
      {{"POM_5V_IN"}, "module"},                                  // Nano
      {{"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}, "module"},   // AGX Orin
      {{"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}, "module"},  // AGX Thor
      {{"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}, "module"},  // AGX Xavier
      {{"VIN"}, "board"},                                         // AGX Thor
  };
  const auto has = [&](const std::string& name) { return std::ranges::find(names, name) != names.end(); };
  const auto total =
      std::ranges::find_if(kTotals, [&](const PowerTotal& each) { return std::ranges::all_of(each.rails, has); });
  return total == kTotals.end() ? std::nullopt : std::optional(*total);
}

// ---- temperatures --------------------------------------------------------------------------------------------------

std::map<std::string, double> temperatures(const std::string& root) {
  constexpr double kUnpowered = -256, kHottest = 200;
  std::map<std::string, double> found;
  for (const std::string& zone : entries(root + kThermal, "thermal_zone")) {
    const auto millicelsius = read_number(zone + "/temp");  // fails where the zone has no power
    auto name = read_line(zone + "/type");
    if (!name || !millicelsius) continue;
    for (const std::string ending : {"-thermal", "-therm"})
      if (name->ends_with(ending)) name->resize(name->size() - ending.size());
    const double celsius = *millicelsius * 1e-3;
    if (celsius <= kUnpowered || celsius > kHottest || name->starts_with("PMIC")) continue;  // a PMIC says 100 always
    std::string key = *name;
    for (int again = 2; found.contains(key); ++again) key = *name + '_' + std::to_string(again);
    found[key] = celsius;
  }
  return found;
}

// ---- clocks and throttling -----------------------------------------------------------------------------------------

Watch::Watch(const std::string& root) {
  std::vector<std::array<std::string, 3>> cores, gpus, memories;
  for (const std::string& core : entries(root + "/sys/devices/system/cpu", "cpu"))
    cores.push_back(
        {core + "/cpufreq/scaling_cur_freq", core + "/cpufreq/scaling_min_freq", core + "/cpufreq/scaling_max_freq"});
  for (const std::string& device : entries(root + "/sys/class/devfreq", "")) {
    const std::string name = device.substr(device.rfind('/') + 1);
    const bool gpu = std::ranges::any_of(std::array{".gpu", ".gp10b", ".gv11b", ".ga10b"},
                                         [&](const char* ending) { return name.ends_with(ending); });
    const std::array<std::string, 3> files = {device + "/cur_freq", device + "/min_freq", device + "/max_freq"};
    if (gpu || name.starts_with("gpu-gpc-")) gpus.push_back(files);
    if (name == "bwmgr") memories.push_back(files);
  }
  const std::string debug = root + "/sys/kernel/debug/bpmp/debug/clk/emc/";  // for root alone
  if (memories.empty()) memories.push_back({debug + "rate", debug + "min_rate", debug + "max_rate"});
  add("cpu", 1e-3, cores);  // kHz
  add("gpu", 1e-6, gpus);   // Hz
  add("emc", 1e-6, memories);

  const auto keep = [this](const std::string& path) {
    if (TextFile file(path); file.number()) states_.push_back(std::move(file));
  };
  for (const std::string& device : entries(root + kThermal, "cooling_device")) {
    const std::string type = read_line(device + "/type").value_or("");  // a fan slows nothing down
    if (std::ranges::any_of(std::array{"throttle", "cpufreq", "devfreq"},
                            [&](const char* word) { return type.find(word) != type.npos; }))
      keep(device + "/cur_state");
  }
  for (const std::string& device : entries(root + kDrivers + "ina3221", ""))
    for (const std::string& hwmon : entries(device + "/hwmon", "hwmon"))
      for (const char channel : {'1', '2', '3'})
        if (read_line(hwmon + "/in" + channel + "_label").value_or("NC") != "NC")
          for (const char* const limit : {"_max_alarm", "_crit_alarm"}) keep(hwmon + "/curr" + channel + limit);
  for (const std::string& hwmon : entries(root + "/sys/class/hwmon", "hwmon"))
    if (read_line(hwmon + "/name") == "soctherm_oc")
      for (const char number : {'1', '2', '3'})
        if (TextFile file(hwmon + "/oc" + number + "_event_cnt"); const auto count = file.number())
          counters_.emplace_back(std::move(file), *count);
}

void Watch::add(const std::string& name, double unit, const std::vector<std::array<std::string, 3>>& now_min_max) {
  ClockRange range{name, {}, {}};
  Clock clock{{}, unit};
  for (const auto& [now, min, max] : now_min_max) {
    if (TextFile file(now); file.number()) clock.files.push_back(std::move(file));
    if (const auto least = read_number(min)) range.min = std::min(range.min.value_or(HUGE_VAL), *least * unit);
    if (const auto most = read_number(max)) range.max = std::max(range.max.value_or(0), *most * unit);
  }
  if (clock.files.empty()) return;
  ranges_.push_back(range);
  clocks_.push_back(std::move(clock));
}

void Watch::read(double* columns) {
  for (const Clock& clock : clocks_) {
    double fastest = kNone;
    for (const TextFile& file : clock.files) fastest = std::fmax(fastest, file.number().value_or(kNone) * clock.unit);
    *columns++ = fastest;
  }
  double throttled = kNone;
  for (const TextFile& state : states_)
    if (const auto value = state.number()) throttled = std::fmax(throttled, *value > 0);
  for (auto& [counter, before] : counters_)
    if (const auto value = counter.number()) throttled = std::fmax(throttled, *value > std::exchange(before, *value));
  *columns = throttled;
}

}  // namespace pykd::runtime
