// What a machine is: a Jetson's board, software and power mode, or any Linux computer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace pykd::runtime {

// What could not be had is empty, and `missing` says why, a sentence each.
struct Board {
  std::optional<std::string> name;             // "NVIDIA Jetson Orin Nano Developer Kit"
  std::optional<std::string> soc, module;      // of the device tree: "tegra234", "p3767-0005"
  std::optional<std::string> l4t, jetpack;     // "36.4.3", "6.2"
  std::optional<std::string> power_mode;       // its name, as "MAXN_SUPER"
  std::optional<int64_t> power_mode_id;        // differs from board to board
  std::optional<std::string> processor;        // "ARM Cortex-A78AE"; several kinds in one are joined by " + "
  std::optional<int64_t> cores, memory_bytes;  // online; without what the kernel keeps for itself
  std::vector<std::string> missing;
};

// Read below a root folder: "/", or the copy of a device's files. nvpmodel is asked, never told, and only on "/".
Board read_board(const std::string& root);

// Whether qemu-user runs this program, by the name of what really runs; nothing where that cannot be read.
std::optional<bool> emulated();

// JetPack of an L4T version, as far as it is known.
std::optional<std::string> jetpack_of(const std::string& l4t);

}  // namespace pykd::runtime
