#include "runtime/trtexec.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <string_view>
#include <utility>

#include "runtime/model_file.h"

namespace pykd::runtime {
namespace {

using Line = TrtexecResult::Line;

bool take(std::string_view& text, std::string_view word) {
  if (!text.starts_with(word)) return false;
  text.remove_prefix(word.size());
  return true;
}

void skip(std::string_view& text) {
  while (take(text, " ") || take(text, "\t")) {
  }
}

// The number before its unit; NaN where there is none.
double figure(std::string_view text, std::string_view unit) {
  skip(text);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || !std::isfinite(value) || value < 0) return Line::kUnsaid;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  skip(text);
  return text.starts_with(unit) ? value : Line::kUnsaid;
}

void set(double& field, double value) {
  if (!std::isnan(value)) field = value;
}

constexpr std::pair<std::string_view, double Line::*> kFields[] = {{"min", &Line::min},
                                                                   {"max", &Line::max},
                                                                   {"mean", &Line::mean},
                                                                   {"median", &Line::median},
                                                                   {"percentile(90%)", &Line::p90},
                                                                   {"percentile(95%)", &Line::p95},
                                                                   {"percentile(99%)", &Line::p99}};

bool said(const Line& line) {
  return std::any_of(std::begin(kFields), std::end(kFields),
                     [&](const auto& each) { return !std::isnan(line.*each.second); });
}

// "min = 1.5 ms", "percentile(99%) = 1.9 ms"; of TensorRT 7 "min: 1.5 ms (end to end 1.6 ms)"
void read_field(std::string_view text, std::string_view separator, Line& line) {
  for (const auto& [name, field] : kFields)
    if (std::string_view value = text; take(value, name) && take(value, separator))
      set(line.*field, figure(value, "ms"));
}

// "percentile: 1.9 ms at 99% (...)" of TensorRT 7
void read_percentile(std::string_view text, Line& line) {
  if (!take(text, "percentile: ")) return;
  set(line.p90, figure(text, "ms at 90%"));
  set(line.p95, figure(text, "ms at 95%"));
  set(line.p99, figure(text, "ms at 99%"));
}

// "min = 1.5 ms, max = 2 ms, ..."; what has no figures explains what they are.
void read_fields(std::string_view text, Line& result) {
  Line line;
  while (!text.empty()) {
    skip(text);
    read_field(text, " = ", line);
    text.remove_prefix(std::min(text.size(), text.find(',')));
    take(text, ",");
  }
  if (said(line)) result = line;
}

// "v100300" and "v8601" (two digits of the patch, before them two or one of the minor), "v8.5.2": "10.3.0", "8.6.1",
// "8.5.2"
std::string version_of(std::string_view text) {
  const std::string_view word = text.substr(0, text.find_first_not_of("0123456789."));
  if (word.empty() || word.size() > 20 || word.front() == '.' || word.back() == '.') return "";
  if (word.find('.') != std::string_view::npos) return std::string(word);
  int number = 0;
  if (std::from_chars(word.data(), word.data() + word.size(), number).ec != std::errc() || number < 1000) return "";
  const int minors = number < 10'000 ? 10 : 100;
  return std::to_string(number / 100 / minors) + "." + std::to_string(number / 100 % minors) + "." +
         std::to_string(number % 100);
}

}  // namespace

TrtexecResult parse_trtexec(const std::string& text) {
  TrtexecResult result;
  Line* section = nullptr;  // of TensorRT 7
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.remove_suffix(1);
    if (take(line, "&&&& ")) {
      if (line.starts_with("FAILED")) throw FormatError("trtexec failed: its log says why");
      if (const size_t at = line.find("[TensorRT v"); at != std::string_view::npos)
        result.version = version_of(line.substr(at + 11));
    }
    for (skip(line); line.starts_with('['); skip(line)) {  // the time and the level
      const size_t end = line.find(']');
      line.remove_prefix(end == std::string_view::npos ? line.size() : end + 1);
    }
    if (line == "Host Latency" || line == "Enqueue Time" || line == "GPU Compute") {
      section = line.starts_with('H') ? &result.latency : line.starts_with('G') ? &result.gpu_compute : nullptr;
      if (section) *section = {};
    } else if (take(line, "Throughput:") || take(line, "throughput:")) {
      set(result.throughput, figure(line, "qps"));
    } else if (take(line, "Latency: ")) {
      read_fields(line, result.latency);
    } else if (take(line, "GPU Compute Time: ")) {
      read_fields(line, result.gpu_compute);
    } else if (take(line, "TensorRT version: ")) {
      if (result.version.empty()) result.version = version_of(line);
    } else if (section) {
      read_field(line, ": ", *section);
      read_percentile(line, *section);
    }
  }
  if (result.throughput == 0 && !said(result.latency) && !said(result.gpu_compute))
    throw FormatError("the log holds no figures of trtexec: give what it printed, its performance summary included");
  return result;
}

}  // namespace pykd::runtime
