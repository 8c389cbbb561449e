#include "runtime/tegrastats.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <limits>
#include <thread>

#include "runtime/text_file.h"

namespace pykd::runtime {
namespace {

constexpr int64_t kMost = 1'000'000'000;  // of any figure; more is no reading
constexpr size_t kMostItems = 1024, kLongestName = 40;
constexpr double kUnpowered = -256;

// What is left of an item, taken piece by piece.
class Text {
 public:
  explicit Text(std::string_view text) : rest_(text) {}

  bool take(std::string_view word) {
    if (!rest_.starts_with(word)) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  template <typename Number>
  bool number(Number& value) {
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc() || !(value >= -kMost && value <= kMost)) return false;
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return true;
  }
  template <typename Number>
  bool number(std::optional<Number>& value) {
    Number found{};
    if (!number(found)) return false;
    value = found;
    return true;
  }
  // "[1,2]"; nothing in it is fine, too.
  bool list(std::vector<int64_t>& values) {
    if (!take("[")) return false;
    for (int64_t value = 0; !take("]"); take(",")) {
      if (values.size() == kMostItems || !number(value)) return false;
      values.push_back(value);
    }
    return true;
  }
  bool done() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

bool is_name(std::string_view text) {
  const auto letter = [](char c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; };
  return !text.empty() && text.size() <= kLongestName && letter(text[0]) &&
         std::ranges::all_of(text, [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '_' || c == '-'; });
}

// "613/3964MB (lfb 634x4MB)", "0/1982MB (cached 0MB)" and "0/252kB(lfb 252kB)", without spaces.
std::optional<Tegrastats::Memory> memory(std::string_view words) {
  Tegrastats::Memory found{};
  const auto unit = [](Text& text) { return text.take("MB") || text.take("kB"); };
  Text text(words);
  if (!text.number(found.used) || !text.take("/") || !text.number(found.total) || !unit(text)) return std::nullopt;
  if (text.take("(cached")) {
    if (!text.number(found.cached)) found.cached.reset();
  } else if (text.take("(lfb") && text.number(found.blocks)) {
    if (text.take("x")) {
      text.number(found.block);
    } else {
      found.block = found.blocks;
      found.blocks = 1;
    }
  }
  return found;
}

std::vector<Tegrastats::Core> cores(std::string_view list) {
  std::vector<Tegrastats::Core> found;
  Text text(list);
  if (!text.take("[")) return {};
  while (!text.take("]")) {
    Tegrastats::Core core{!text.take("off"), {}, {}};
    if (core.on && (!text.number(core.percent) || !text.take("%"))) return {};
    if (core.on && text.take("@") && !text.number(core.mhz)) return {};
    if (found.size() == kMostItems || text.done()) return {};
    found.push_back(core);
    text.take(",");
  }
  return found;
}

// "12479mW/12479mW", "943/943", "3034mW/3049mW/3412mW"
std::optional<Tegrastats::Rail> rail(std::string_view name, std::string_view value) {
  Tegrastats::Rail found{std::string(name), 0, 0, {}};
  Text text(value);
  if (!text.number(found.milliwatts)) return std::nullopt;
  text.take("mW");
  if (!text.take("/") || !text.number(found.average)) return std::nullopt;
  text.take("mW");
  if (text.take("/") && (!text.number(found.peak) || !text.take("mW"))) return std::nullopt;
  return text.done() ? std::optional(found) : std::nullopt;
}

// "cpu@47.906C/48.343C"
std::optional<Tegrastats::Temperature> temperature(std::string_view word) {
  const std::string_view name = word.substr(0, word.find('@'));
  if (name.size() == word.size() || !is_name(name)) return std::nullopt;
  Tegrastats::Temperature found{std::string(name), 0, {}};
  Text text(word.substr(name.size() + 1));
  if (!text.number(found.celsius) || !text.take("C")) return std::nullopt;
  if (text.take("/") && (!text.number(found.peak) || !text.take("C"))) return std::nullopt;
  return text.done() ? std::optional(found) : std::nullopt;
}

// "off", "79%", "43%@2133", "63%@[621]", "@[0,0,0]", "@1600", "200"
std::optional<Tegrastats::Engine> engine(std::string_view name, std::string_view value) {
  Tegrastats::Engine found{std::string(name), true, {}, {}};
  Text text(value);
  int64_t figure = 0;
  if (text.take("off")) {
    found.on = false;
    return text.done() ? std::optional(found) : std::nullopt;
  }
  const bool first = text.number(figure), percent = first && text.take("%"), at = (!first || percent) && text.take("@");
  if (percent) found.percent = figure;
  if (first && !percent) found.mhz = {figure};
  if (!first && !at) return std::nullopt;
  if (at && text.number(figure))
    found.mhz = {figure};
  else if (at && !text.list(found.mhz))
    return std::nullopt;
  return text.done() ? std::optional(found) : std::nullopt;
}

}  // namespace

Tegrastats parse_tegrastats(std::string_view line) {
  std::vector<std::string_view> words;
  while (words.size() < kMostItems) {
    line.remove_prefix(std::min(line.find_first_not_of(" \t\r"), line.size()));
    if (line.empty()) break;
    words.push_back(line.substr(0, line.find_first_of(" \t\r")));
    line.remove_prefix(words.back().size());
  }
  Tegrastats found;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string_view name = words[i];
    if (const auto reading = temperature(name)) {
      if (reading->celsius > kUnpowered && name != "PMIC@100C") found.temperatures.push_back(*reading);
      continue;
    }
    if (!is_name(name) || i + 1 == words.size()) continue;
    const std::string_view value = words[i + 1];
    if (name == "RAM" || name == "SWAP" || name == "IRAM") {
      std::string joined;  // up to the closing bracket
      for (size_t next = i + 1; next < std::min(i + 4, words.size()) && !joined.ends_with(')'); ++next)
        joined += words[next];
      (name == "RAM" ? found.ram : name == "SWAP" ? found.swap : found.iram) = memory(joined);
    } else if (name == "CPU" && value.starts_with('[')) {
      found.cores = cores(value);
    } else if (const auto reading = rail(name, value)) {
      if (name != "NC") found.rails.push_back(*reading);
      ++i;
    } else if (const auto unit = engine(name, value)) {
      found.engines.push_back(*unit);
      ++i;
    }
  }
  return found;
}

TegrastatsReader::TegrastatsReader(int milliseconds)
    : program_({"tegrastats", "--interval", std::to_string(milliseconds)}) {
  constexpr int kMostLines = 5;  // without rails
  constexpr double kLongest = 3;
  for (int i = 0; i < kMostLines && rails_.empty(); ++i) {
    const auto line = program_.line(kLongest);
    if (!line) return;
    for (const auto& rail : parse_tegrastats(*line).rails)
      if (std::ranges::find(rails_, rail.name) == rails_.end()) rails_.push_back(rail.name);
  }
}

bool TegrastatsReader::read(double* watts) {
  constexpr double kWait = 0.02;
  const auto line = program_.line(kWait);
  if (!line) {
    if (program_.ended()) std::this_thread::sleep_for(std::chrono::duration<double>(kWait));
    return false;
  }
  const Tegrastats found = parse_tegrastats(*line);
  for (size_t i = 0; i < rails_.size(); ++i) {
    const auto rail = std::ranges::find(found.rails, rails_[i], &Tegrastats::Rail::name);
    watts[i] = rail == found.rails.end() ? std::numeric_limits<double>::quiet_NaN()
                                         : static_cast<double>(rail->milliwatts) * 1e-3;
  }
  return true;
}

}  // namespace pykd::runtime
