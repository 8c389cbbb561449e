// The sensors of a Jetson, read below a root folder, "/" or the copy of a device's files: power rails, temperatures,
// clocks, and signs of throttling. A computer without them has none, which is no error.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/text_file.h"

namespace pykd::runtime {

// The rails of all INA3221 power monitors, as the drivers of JetPack 5 to 7 (hwmon) or 4 (iio) offer them.
class PowerRails {
 public:
  // Opens those that have a name other than NC, and can be read now; `missing` tells of the others.
  PowerRails(const std::string& root, std::vector<std::string>& missing);

  const std::vector<std::string>& names() const { return names_; }
  void read(double* watts) const;  // NaN where a rail cannot be read

 private:
  struct Rail {
    TextFile power, voltage, current;  // mW, or mV and mA
    double watts() const;
  };
  void add(const std::string& name, Rail rail, std::vector<std::string>& missing);

  std::vector<std::string> names_;
  std::vector<Rail> rails_;
};

// Which rails together are what a module, or its board, takes: by the rails' names, not by the board's.
struct PowerTotal {
  std::vector<std::string> rails;
  std::string scope;  // "module", or "board"
};
std::optional<PowerTotal> power_total(const std::vector<std::string>& names);

// Degrees Celsius of the thermal zones that can be read now, by name: "cpu" for cpu-thermal.
std::map<std::string, double> temperatures(const std::string& root);

struct ClockRange {
  std::string name;                // "cpu", "gpu" or "emc", the memory's
  std::optional<double> min, max;  // MHz, what its governor may choose from
};

// What is looked at while something runs: the clocks in MHz, of the processor the fastest core's, and 1 where something
// throttles, else 0.
class Watch {
 public:
  explicit Watch(const std::string& root);

  const std::vector<ClockRange>& clocks() const { return ranges_; }  // that can be read
  size_t columns() const { return clocks_.size() + 1; }
  void read(double* columns);  // the clocks, then throttling since the last time; NaN where that cannot be read

 private:
  struct Clock {
    std::vector<TextFile> files;
    double unit;  // MHz
  };
  void add(const std::string& name, double unit, const std::vector<std::array<std::string, 3>>& now_min_max);

  std::vector<ClockRange> ranges_;
  std::vector<Clock> clocks_;
  std::vector<TextFile> states_;                       // above 0 where something is held back
  std::vector<std::pair<TextFile, double>> counters_;  // of over-currents, and what they were the last time
};

}  // namespace pykd::runtime
