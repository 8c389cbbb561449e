// For tests: the files of a device in a folder of their own, as the kernel and NVIDIA's software offer them.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace pykd::testing {

class FakeDevice {
 public:
  FakeDevice() {
    char name[] = "/tmp/pykd_device_XXXXXX";
    root = mkdtemp(name);
  }
  ~FakeDevice() { std::filesystem::remove_all(root); }
  FakeDevice(const FakeDevice&) = delete;

  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(root + path).parent_path());
    std::ofstream(root + path) << text;
  }

  // millivolts and milliamperes of each channel
  struct Channel {
    std::string label;
    int voltage, current;
  };
  void ina3221(const std::string& address, const std::vector<Channel>& channels) const {
    const std::string driver = "/sys/bus/i2c/drivers/ina3221/", device = "/sys/devices/platform/c240000.i2c/" + address;
    const std::string hwmon = device + "/hwmon/hwmon" + address.back();
    for (size_t i = 0; i < channels.size(); ++i) {
      const std::string number = std::to_string(i + 1);
      write(hwmon + "/in" + number + "_label", channels[i].label + '\n');
      write(hwmon + "/in" + number + "_input", std::to_string(channels[i].voltage) + '\n');
      write(hwmon + "/curr" + number + "_input", std::to_string(channels[i].current) + '\n');
      write(hwmon + "/curr" + number + "_max_alarm", "0\n");
      write(hwmon + "/curr" + number + "_crit_alarm", "0\n");
    }
    write(hwmon + "/in7_label", "sum of shunt voltages\n");
    write(hwmon + "/in7_input", "123\n");
    std::filesystem::create_directories(root + driver);
    std::filesystem::create_directory_symlink(root + device, root + driver + address);
  }

  void identity(const std::string& model, const std::string& compatible, const std::string& release,
                const std::string& mode, const std::string& modes, int cores, const std::string& core) const {
    write("/proc/device-tree/model", model + '\0');
    write("/proc/device-tree/compatible", compatible);
    write("/etc/nv_tegra_release", "# " + release + ", GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed\n");
    write("/var/lib/nvpmodel/status", mode);
    write("/etc/nvpmodel.conf", "# a comment with POWER_MODEL ID=2 NAME=WRONG\n< PM_CONFIG DEFAULT=0 >\n" + modes);
    std::string text;
    for (int i = 0; i < cores; ++i) text += "processor\t: " + std::to_string(i) + "\nBogoMIPS\t: 62.50\n" + core + '\n';
    write("/proc/cpuinfo", text);
    write("/proc/meminfo", "MemTotal:        7802880 kB\nMemFree:          123 kB\n");
  }

  void zone(int number, const std::string& type, const std::string& temperature) const {
    const std::string folder = "/sys/devices/virtual/thermal/thermal_zone" + std::to_string(number);
    write(folder + "/type", type + '\n');
    write(folder + "/temp", temperature + '\n');
  }

  void clock(const std::string& device, const std::string& now, const std::string& min, const std::string& max) const {
    const std::string folder = "/sys/class/devfreq/" + device;
    write(folder + "/cur_freq", now + '\n');
    write(folder + "/min_freq", min + '\n');
    write(folder + "/max_freq", max + '\n');
  }

  void core(int number, const std::string& now) const {
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(number) + "/cpufreq";
    write(folder + "/scaling_cur_freq", now + '\n');
    write(folder + "/scaling_min_freq", "115200\n");
    write(folder + "/scaling_max_freq", "1728000\n");
  }

  std::string root;
};

inline const std::string kA78 = "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\n";

}  // namespace pykd::testing
