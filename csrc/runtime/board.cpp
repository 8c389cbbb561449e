#include "runtime/board.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <map>
#include <sstream>
#include <system_error>

#include "runtime/process.h"
#include "runtime/text_file.h"

namespace pykd::runtime {
namespace {

// What lies in text between two marks; nothing where either is not there.
std::optional<std::string> between(const std::string& text, std::string_view begin, std::string_view end) {
  const size_t at = text.find(begin);
  if (at == text.npos) return std::nullopt;
  const size_t from = at + begin.size(), to = text.find_first_of(end, from);
  return to == text.npos ? std::nullopt : std::optional(text.substr(from, to - from));
}

bool is_version(const std::string& text) {
  return !text.empty() && text.size() < 20 && text.find_first_not_of("0123456789.") == text.npos;
}

// "p3767-0005" of "nvidia,p3768-0000+p3767-0005-super": the module stands behind the board that carries it.
std::optional<std::string> module_of(std::string_view compatible) {
  constexpr std::string_view kForm = "p0000-0000";
  const size_t plus = compatible.rfind('+'), comma = compatible.find(',');
  if (plus == compatible.npos && comma == compatible.npos) return std::nullopt;
  const std::string_view part = compatible.substr((plus == compatible.npos ? comma : plus) + 1, kForm.size());
  const auto fits = [](char letter, char form) {
    return form == '0' ? letter >= '0' && letter <= '9' : letter == form;
  };
  return std::ranges::equal(part, kForm, fits) ? std::optional<std::string>(part) : std::nullopt;
}

void read_device_tree(const std::string& root, Board& board) {
  for (const char* const folder : {"/proc/device-tree", "/sys/firmware/devicetree/base"}) {
    if (!board.name) board.name = read_line(root + folder + "/model");
    if (board.soc) continue;
    std::istringstream strings(read_text(root + folder + "/compatible").value_or(""));
    for (std::string string; std::getline(strings, string, '\0');) {
      string = printable(string);
      if (string.starts_with("nvidia,tegra")) board.soc = string.substr(std::strlen("nvidia,"));
      if (!board.module) board.module = module_of(string);
    }
  }
  if (!board.name || !board.soc)
    board.missing.push_back("the device tree, which names a board, cannot be read or names no Tegra");
}

// "# R36 (release), REVISION: 4.3, GCID: ..."
void read_l4t(const std::string& root, Board& board) {
  const std::string text = read_text(root + "/etc/nv_tegra_release").value_or("");
  const auto release = between(text, "# R", " ("), revision = between(text, "REVISION: ", ",\n");
  if (release && revision && is_version(*release) && is_version(*revision)) board.l4t = *release + '.' + *revision;
  if (!board.l4t) return board.missing.push_back("/etc/nv_tegra_release does not say a version of L4T");
  board.jetpack = jetpack_of(*board.l4t);
  if (!board.jetpack) board.missing.push_back("which JetPack has L4T " + *board.l4t + " is not known");
}

std::optional<int64_t> whole(const std::optional<std::string>& text) {
  int64_t value = 0;
  if (!text) return std::nullopt;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  return error == std::errc() && end == text->data() + text->size() ? std::optional(value) : std::nullopt;
}

// nvpmodel keeps "pmode:0002 ..." and a list with "< POWER_MODEL ID=2 NAME=MAXN_SUPER >".
void read_power_mode(const std::string& root, Board& board) {
  board.power_mode_id =
      whole(between(read_text(root + "/var/lib/nvpmodel/status").value_or("") + '\n', "pmode:", " \n"));
  std::istringstream modes(read_text(root + "/etc/nvpmodel.conf").value_or(""));
  for (std::string line; board.power_mode_id && std::getline(modes, line);)
    if (line.starts_with('<') && line.find("POWER_MODEL") != line.npos &&
        whole(between(line, " ID=", " >")) == board.power_mode_id)
      if (const auto name = between(line, " NAME=", " >")) board.power_mode = printable(*name);
  if (!board.power_mode && root == "/") {  // "NV Power Mode: MAXN_SUPER", and its number on the next line
    try {
      Process program({"nvpmodel", "-q"});
      constexpr std::string_view kMark = "NV Power Mode:";
      for (std::optional<std::string> line; (line = program.line(5));) {
        if (board.power_mode && !board.power_mode_id) board.power_mode_id = whole(printable(*line));
        if (const size_t at = line->find(kMark); at != line->npos) {
          board.power_mode = printable(line->substr(at + kMark.size()));
          board.power_mode_id.reset();
        }
      }
    } catch (const std::system_error&) {  // no such program
    }
  }
  if (!board.power_mode) board.missing.push_back("neither nvpmodel nor its files name a power mode");
}

std::string arm_name(const std::string& implementer, const std::string& part) {
  static const std::map<std::string, std::string> kNames = {
      {"0x41 0xd03", "ARM Cortex-A53"}, {"0x41 0xd07", "ARM Cortex-A57"},   {"0x41 0xd08", "ARM Cortex-A72"},
      {"0x41 0xd0b", "ARM Cortex-A76"}, {"0x41 0xd42", "ARM Cortex-A78AE"}, {"0x41 0xd83", "ARM Neoverse-V3AE"},
      {"0x4e 0x003", "NVIDIA Denver"},  {"0x4e 0x004", "NVIDIA Carmel"}};
  const auto known = kNames.find(implementer + ' ' + part);
  return known != kNames.end() ? known->second : "Arm, implementer " + implementer + ", part " + part;
}

void read_processor(const std::string& root, Board& board) {
  std::istringstream text(read_text(root + "/proc/cpuinfo").value_or(""));
  std::vector<std::string> kinds;
  std::string implementer;
  int64_t cores = 0;
  for (std::string line; std::getline(text, line);) {
    const size_t colon = std::min(line.find(':'), line.size());
    const std::string key = printable(line.substr(0, colon)),
                      value = printable(line.substr(std::min(colon + 1, line.size())));
    if (key == "processor") ++cores;
    if (key == "CPU implementer") implementer = value;
    const std::string kind = key == "CPU part" ? arm_name(implementer, value) : key == "model name" ? value : "";
    if (!kind.empty() && std::ranges::find(kinds, kind) == kinds.end()) kinds.push_back(kind);
  }
  if (std::ranges::any_of(kinds, [](const std::string& kind) { return kind.starts_with("ARMv"); }))
    std::erase_if(kinds, [](const std::string& kind) { return kind.starts_with("ARMv"); });  // beside each part
  for (const std::string& kind : kinds) board.processor = board.processor ? *board.processor + " + " + kind : kind;
  if (cores) board.cores = cores;
  if (!board.processor || !cores) board.missing.push_back("/proc/cpuinfo does not name the processor");
}

}  // namespace

std::optional<std::string> jetpack_of(const std::string& l4t) {
  static constexpr std::array<std::array<const char*, 2>, 10> kKnown = {{{"36.4.0", "6.1"},
                                                                         {"36.4.3", "6.2"},
                                                                         {"36.4.4", "6.2.1"},
                                                                         {"36.4.7", "6.2.1"},
                                                                         {"36.5.0", "6.2.2"},
                                                                         {"38.2.", "7.0"},
                                                                         {"38.4.0", "7.1"},
                                                                         {"39.2.0", "7.2"},
                                                                         {"35.", "5.x"},
                                                                         {"32.7.", "4.6.x"}}};
  for (const auto& [version, jetpack] : kKnown)
    if (l4t == version || (std::string_view(version).ends_with('.') && l4t.starts_with(version))) return jetpack;
  return std::nullopt;
}

Board read_board(const std::string& root) {
  Board board;
  read_device_tree(root, board);
  read_l4t(root, board);
  read_power_mode(root, board);
  read_processor(root, board);
  const std::string memory = read_text(root + "/proc/meminfo").value_or("");
  if (const auto kib = whole(printable(between(memory, "MemTotal:", "k").value_or(""))))
    board.memory_bytes = *kib << 10;
  else
    board.missing.push_back("/proc/meminfo does not say how large the memory is");
  return board;
}

std::optional<bool> emulated() {
  // qemu answers for /proc/self/exe in the program's place, but not for this name of the same link.
  char path[4096];
  const ssize_t length = readlink("/proc/thread-self/exe", path, sizeof path);
  if (length <= 0) return std::nullopt;
  const std::string_view name(path, static_cast<size_t>(length));
  return name.substr(name.rfind('/') + 1).starts_with("qemu-");
}

}  // namespace pykd::runtime
