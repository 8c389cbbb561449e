// Lines of NVIDIA's program tegrastats, of the Nano's L4T 32 to Thor's 39, and the program itself as a source of power.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/process.h"

namespace pykd::runtime {

struct Tegrastats {
  struct Memory {
    int64_t used, total;                   // MB; of IRAM kB
    std::optional<int64_t> blocks, block;  // the largest free blocks: how many, how large; of swap none
    std::optional<int64_t> cached;         // of swap, MB
  };
  struct Core {
    bool on;
    std::optional<int64_t> percent, mhz;
  };
  struct Engine {  // whatever has a load or a clock: EMC_FREQ, GR3D_FREQ, NVDEC, APE
    std::string name;
    bool on;
    std::optional<int64_t> percent;
    std::vector<int64_t> mhz;  // of each unit
  };
  struct Temperature {
    std::string name;
    double celsius;
    std::optional<double> peak;
  };
  struct Rail {
    std::string name;
    int64_t milliwatts, average;
    std::optional<int64_t> peak;
  };

  std::optional<Memory> ram, swap, iram;
  std::vector<Core> cores;
  std::vector<Engine> engines;
  std::vector<Temperature> temperatures;  // without a sensor's -256 for no power and the PMIC's constant
  std::vector<Rail> rails;                // without NC, not connected
};

// Takes what it knows and skips everything else: any line, broken or not, is one.
Tegrastats parse_tegrastats(std::string_view line);

// tegrastats as it runs, until this object ends.
class TegrastatsReader {
 public:
  // Waits for the first line that has rails, some seconds at most. Throws std::system_error where there is no such
  // program.
  explicit TegrastatsReader(int milliseconds);

  const std::vector<std::string>& rails() const { return rails_; }  // of that line; none: it had none
  bool read(double* watts);  // of the next line, NaN where it lacks a rail; false: none came within 20 ms

 private:
  Process program_;
  std::vector<std::string> rails_;
};

}  // namespace pykd::runtime
