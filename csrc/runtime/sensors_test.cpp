// What boards and their sensors say, figure by figure, from copies of their files; and files that are missing, fail or
// vanish.
#include "runtime/sensors.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>

#include "core/kernel_test.h"
#include "runtime/board.h"
#include "runtime/fake_device.h"
#include "runtime/model_file.h"

namespace {

using namespace pykd::runtime;
using namespace pykd::testing;
using Names = std::vector<std::string>;

bool near(double a, double b) { return std::abs(a - b) < 1e-9; }

std::vector<double> watts(const PowerRails& rails) {
  std::vector<double> values(rails.names().size());
  rails.read(values.data());
  return values;
}

void check_watts(const FakeDevice& device, const Names& names, const std::vector<double>& wanted, const Names& total,
                 const std::string& what) {
  Names missing;
  const PowerRails rails(device.root, missing);
  check(rails.names() == names, what + ": the rails' names");
  check(missing.empty(), what + ": nothing is missing");
  const auto found = watts(rails);
  check(std::ranges::equal(found, wanted, near), what + ": the rails' watts");
  const auto sum = power_total(rails.names());
  check(sum && sum->rails == total && sum->scope == "module", what + ": what makes up the module");
}

void check_board(const Board& board, const std::vector<std::string>& wanted, int64_t id, int64_t cores,
                 const std::string& what) {
  const std::vector<std::optional<std::string>> found = {board.name,    board.soc,        board.module,   board.l4t,
                                                         board.jetpack, board.power_mode, board.processor};
  for (size_t i = 0; i < found.size(); ++i)
    check(found[i] == wanted[i], what + ": " + wanted[i] + ", said: " + found[i].value_or("nothing"));
  check(board.power_mode_id == id && board.cores == cores, what + ": mode's id and cores");
  check(board.memory_bytes == int64_t{7802880} * 1024, what + ": memory");
  check(board.missing.empty(), what + ": nothing is missing");
}

void test_orin_nano() {
  const FakeDevice device;
  device.identity(
      "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
      std::string("nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0", 69),
      "R36 (release), REVISION: 4.3", "pmode:0002",
      "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n", 6, kA78);
  device.ina3221("1-0040", {{"VDD_IN", 4984, 1856}, {"VDD_CPU_GPU_CV", 4976, 504}, {"VDD_SOC", 4968, 320}});
  check_board(read_board(device.root),
              {"NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "tegra234", "p3767-0005", "36.4.3",
               "6.2", "MAXN_SUPER", "ARM Cortex-A78AE"},
              2, 6, "Orin Nano");
  check_watts(device, {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}, {9.250304, 2.507904, 1.58976}, {"VDD_IN"}, "Orin Nano");

  device.zone(0, "cpu-thermal", "53968");
  device.zone(1, "gpu-thermal", "53343");
  device.zone(2, "cv0-thermal", "");         // it has no power
  device.zone(3, "cv1-thermal", "-256000");  // nor has this
  device.zone(4, "PMIC-Die", "100000");
  device.zone(5, "soc0-thermal", "text");
  device.zone(10, "tj-thermal", "-1500");
  device.zone(11, "tj-thermal", "999999999");
  device.zone(12, "acpitz", "20000");
  device.zone(13, "acpitz", "21000");
  const std::map<std::string, double> wanted = {
      {"cpu", 53.968}, {"gpu", 53.343}, {"tj", -1.5}, {"acpitz", 20}, {"acpitz_2", 21}};
  const auto found = temperatures(device.root);
  check(std::ranges::equal(found, wanted,
                           [](auto& a, auto& b) { return a.first == b.first && near(a.second, b.second); }),
        "the temperatures");
}

void test_orin_nx_and_clocks() {
  const FakeDevice device;
  device.identity("NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
                  std::string("nvidia,p3509-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0", 63),
                  "R36 (release), REVISION: 5.0", "pmode:0000 fmode:quiet\n", "< POWER_MODEL ID=0 NAME=MAXN_SUPER >\n",
                  8, kA78);
  device.ina3221("1-0040", {{"VDD_IN", 19200, 500}, {"VDD_CPU_GPU_CV", 19200, 100}, {"NC", 0, 0}});
  check_board(read_board(device.root),
              {"NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "tegra234", "p3767-0000", "36.5.0", "6.2.2",
               "MAXN_SUPER", "ARM Cortex-A78AE"},
              0, 8, "Orin NX");
  check_watts(device, {"VDD_IN", "VDD_CPU_GPU_CV"}, {9.6, 1.92}, {"VDD_IN"}, "Orin NX");

  device.core(0, "729600");
  device.core(1, "1497600");
  device.clock("17000000.gpu", "306000000", "305999999", "1173000000");
  device.clock("15340000.vic", "115200000", "1", "2");
  device.write("/sys/kernel/debug/bpmp/debug/clk/emc/rate", "2133000000\n");
  Watch watch(device.root);
  const auto& clocks = watch.clocks();
  check(clocks.size() == 3 && watch.columns() == 4, "three clocks");
  if (clocks.size() == 3) {
    check(clocks[0].name == "cpu" && near(*clocks[0].min, 115.2) && near(*clocks[0].max, 1728),
          "the processor's range");
    check(clocks[1].name == "gpu" && near(*clocks[1].min, 305.999999) && near(*clocks[1].max, 1173), "the GPU's range");
    check(clocks[2].name == "emc" && !clocks[2].min && !clocks[2].max, "a memory without a range");
    std::vector<double> row(4);
    watch.read(row.data());
    check(near(row[0], 1497.6) && near(row[1], 306) && near(row[2], 2133), "the clocks");
    check(row[3] == 0, "alarms that are silent");
  }
  const auto throttles = [&](const std::string& path, const std::string& text) {
    Watch again(device.root);
    std::vector<double> row(4);
    again.read(row.data());
    const double before = row[3];
    device.write(path, text);
    again.read(row.data());
    return before == 0 && row[3] == 1;
  };
  const std::string alarm = "/sys/devices/platform/c240000.i2c/1-0040/hwmon/hwmon0/curr1_crit_alarm";
  check(throttles(alarm, "1\n"), "a current's alarm");
  device.write(alarm, "0\n");
  const std::string cooling = "/sys/devices/virtual/thermal/cooling_device";
  device.write(cooling + "0/type", "pwm-fan\n");
  device.write(cooling + "0/cur_state", "3\n");
  device.write(cooling + "1/type", "cpu-throttle-alert\n");
  device.write(cooling + "1/cur_state", "0\n");
  check(throttles(cooling + "1/cur_state", "1\n"), "a cooling device, but no fan");
  device.write(cooling + "1/cur_state", "0\n");
  device.write("/sys/class/hwmon/hwmon4/name", "soctherm_oc\n");
  device.write("/sys/class/hwmon/hwmon4/oc3_event_cnt", "37\n");
  check(throttles("/sys/class/hwmon/hwmon4/oc3_event_cnt", "38\n"), "events of over-current that are new");
  Watch none("/nowhere");
  double row = 0;
  none.read(&row);
  check(none.clocks().empty() && none.columns() == 1 && std::isnan(row), "nothing to look at");
}

void test_agx_orin() {
  const FakeDevice device;
  device.identity("NVIDIA Jetson AGX Orin Developer Kit",
                  std::string("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", 63),
                  "R36 (release), REVISION: 4.4", "pmode:0000", "< POWER_MODEL ID=0 NAME=MAXN >\n", 12, kA78);
  device.ina3221("1-0040", {{"VDD_GPU_SOC", 19000, 120}, {"VDD_CPU_CV", 19000, 80}, {"VIN_SYS_5V0", 4968, 953}});
  device.ina3221("1-0041", {{"NC", 0, 0}, {"VDDQ_VDD2_1V8AO", 4968, 80}, {"NC", 0, 0}});
  check_board(
      read_board(device.root),
      {"NVIDIA Jetson AGX Orin Developer Kit", "tegra234", "p3701-0005", "36.4.4", "6.2.1", "MAXN", "ARM Cortex-A78AE"},
      0, 12, "AGX Orin");
  check_watts(device, {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}, {2.28, 1.52, 4.734504, 0.39744},
              {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}, "AGX Orin");
}

void test_thor() {
  const FakeDevice device;
  device.identity("NVIDIA Jetson AGX Thor Developer Kit",
                  std::string("nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0", 63),
                  "R38 (release), REVISION: 4.0", "pmode:0000", "< POWER_MODEL ID=0 NAME=MAXN >\n", 14,
                  "CPU implementer\t: 0x41\nCPU part\t: 0xd83\n");
  device.ina3221("2-0040", {{"VDD_GPU", 12000, -33}, {"VDD_CPU_SOC_MSS", 12000, 347}, {"VIN_SYS_5V0", 5000, 825}});
  device.clock("gpu-gpc-0", "1575000000", "0", "1575000000");
  device.clock("gpu-nvd-0", "1", "1", "1");
  device.clock("bwmgr", "4266000000", "665600000", "4266000000");
  check_board(
      read_board(device.root),
      {"NVIDIA Jetson AGX Thor Developer Kit", "tegra264", "p3834-0008", "38.4.0", "7.1", "MAXN", "ARM Neoverse-V3AE"},
      0, 14, "Thor");
  check_watts(device, {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}, {-0.396, 4.164, 4.125},
              {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}, "Thor");
  Watch watch(device.root);
  std::vector<double> row(watch.columns());
  watch.read(row.data());
  check(row.size() == 3 && near(row[0], 1575) && near(row[1], 4266), "Thor's clocks");
}

void test_nano() {
  const FakeDevice device;
  device.identity("NVIDIA Jetson Nano Developer Kit",
                  std::string("nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0", 73),
                  "R32 (release), REVISION: 7.1", "pmode:0001",
                  "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=5W >\n", 4,
                  "model name\t: ARMv8 Processor rev 1 (v8l)\nCPU implementer\t: 0x41\nCPU part\t: 0xd07\n");
  const std::string iio = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/";
  const Names names = {"POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"};
  for (size_t i = 0; i < names.size(); ++i) device.write(iio + "rail_name_" + std::to_string(i), names[i] + '\n');
  device.write(iio + "in_power0_input", "943\n");
  device.write(iio + "in_power1_input", "0\n");
  device.write(iio + "in_voltage2_input", "5000\n");  // without a power of its own
  device.write(iio + "in_current2_input", "25\n");
  check_board(read_board(device.root),
              {"NVIDIA Jetson Nano Developer Kit", "tegra210", "p3448-0000", "32.7.1", "4.6.x", "5W", "ARM Cortex-A57"},
              1, 4, "Nano");
  check_watts(device, names, {0.943, 0, 0.125}, {"POM_5V_IN"}, "Nano");
}

void test_totals() {
  const auto rails = [](const Names& names) { return power_total(names).value_or(PowerTotal{}).rails; };
  check(rails({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}).size() == 6, "AGX Xavier's");
  check(rails({"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"}).size() == 3, "Thor's, beside its board's input");
  check(power_total({"VDD_GPU", "VIN"})->scope == "board", "Thor's board alone");
  check(!power_total({"VDD_GPU_SOC", "VIN_SYS_5V0"}), "a rail of AGX Orin's is missing");
  check(!power_total({"VDD_CORE"}) && !power_total({}), "rails that nobody knows");
  check(jetpack_of("38.2.1") == "7.0" && jetpack_of("35.4.1") == "5.x" && !jetpack_of("36.3.0") && !jetpack_of("3"),
        "JetPacks");
}

void test_failing_files() {
  const FakeDevice device;
  device.ina3221("1-0040", {{"VDD_IN", 5000, 1000}, {"VDD_CPU_GPU_CV", 1, 1}, {"VDD_SOC", 1, 1}});
  device.ina3221("1-0041", {{"VDD_IN", 5000, 1}, {"", 1, 1}, {"HUGE", 2000000000, 2000000000}});
  const std::string hwmon = "/sys/devices/platform/c240000.i2c/1-0040/hwmon/hwmon0/";
  std::filesystem::remove(device.root + hwmon + "in2_input");
  std::filesystem::create_directory(device.root + hwmon + "in2_input");
  device.write(hwmon + "curr3_input", "much\n");
  device.write(hwmon + "in4_label", "no channel\n");
  Names missing;
  const PowerRails rails(device.root, missing);
  check(rails.names() == Names{"VDD_IN"} && near(watts(rails)[0], 5), "the rail that can be read");
  check(missing.size() == 4, "four sentences");
  for (const char* const rail : {"VDD_CPU_GPU_CV cannot", "VDD_SOC cannot", "VDD_IN is there twice", "HUGE cannot"})
    check(std::ranges::any_of(missing, [&](auto& why) { return why.find(rail) != why.npos; }), rail);
  device.write(hwmon + "in1_input", "");  // vanishes
  check(std::isnan(watts(rails)[0]), "a rail that has vanished");
  device.write(hwmon + "in1_input", "4000\n");
  check(near(watts(rails)[0], 4), "a rail that came back");

  // A file of the kernel's that goes away while it is open.
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  const TextFile status("/proc/" + std::to_string(child) + "/oom_score_adj");
  check(status.number().has_value(), "a process's file");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  check(!status.number() && !status.text(), "the file of a process that is gone");

  check(PowerRails("/nowhere", missing).names().empty() && temperatures("/nowhere").empty(), "no sensors");
  const Board board = read_board("/nowhere");
  check(!board.name && !board.l4t && !board.power_mode && !board.cores && !board.memory_bytes, "an unknown machine");
  check(board.missing.size() == 5, "what is missing of it");
  device.write("/etc/nv_tegra_release", "# R36 (release), REVISION: \x1b[31m4.3\n");
  device.write("/var/lib/nvpmodel/status", "pmode:9999999999999999999999");
  device.write("/proc/device-tree/compatible", "nvidia,tegra234");
  device.write("/proc/device-tree/model", std::string(100'000, 'x') + "\x1b[31m");
  device.write("/proc/cpuinfo", "processor : 0\nCPU implementer : 0x99\nCPU part : 0x123\n");
  const Board broken = read_board(device.root);
  check(!broken.l4t && !broken.power_mode && !broken.module && broken.soc == "tegra234", "broken files");
  check(broken.name && broken.name->size() == 200, "a name without an end");
  check(broken.processor == "Arm, implementer 0x99, part 0x123", "a processor that nobody knows");
}

void test_text() {
  check(printable("  a\tb\x1b\xff c \nd") == "ab c" && printable("").empty() && printable("\n a") == "a", "printable");
  check(to_number(" -12.5\n") == -12.5 && !to_number("") && !to_number("1 2") && !to_number("inf") && !to_number("0x1"),
        "numbers");
  const FakeDevice device;
  for (const int number : {10, 2, 1}) device.write("/cpu" + std::to_string(number), "");
  const auto found = entries(device.root, "cpu");
  check(found.size() == 3 && found[0].ends_with("cpu1") && found[2].ends_with("cpu10"), "entries by their numbers");
  check(entries("/nowhere", "").empty() && entries("/dev/null", "").empty(), "no entries");
  write_whole(device.root + "/a", "one");
  write_whole(device.root + "/a", "two");
  check_writable(device.root + "/a");
  check(read_text(device.root + "/a") == "two" && entries(device.root, "a").size() == 1, "a file that is replaced");
  std::filesystem::create_symlink("/dev/null", device.root + "/null");  // stands for one that root may replace
  std::filesystem::create_symlink(device.root + "/a", device.root + "/link");
  for (const std::string& path :
       {device.root, device.root + "/null", device.root + "/link", std::string("/nowhere/a"), std::string("/proc/a")}) {
    std::string said;
    try {
      write_whole(path, "three");
    } catch (const FormatError& error) {
      said = error.what();
    }
    check(said.starts_with("cannot write " + path), said);
  }
  check(std::filesystem::is_symlink(device.root + "/null") && std::filesystem::is_symlink(device.root + "/link"),
        "what is no ordinary file stays");
  check(entries(device.root, "").size() == 6, "no draft stays");
  const auto native = emulated();
#if defined(PYKD_EMULATED)
  check(native == true, "qemu runs this");
#else
  check(native == false, "no emulation");
#endif
}

}  // namespace

int main() {
  test_orin_nano();
  test_orin_nx_and_clocks();
  test_agx_orin();
  test_thor();
  test_nano();
  test_totals();
  test_failing_files();
  test_text();
  return report();
}
