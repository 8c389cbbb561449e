#include "runtime/record.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <concepts>
#include <cstdio>

#include "core/cpu_isa.h"
#include "runtime/pykd.h"

namespace pykd::runtime {
namespace {

// The bytes of the first character; 0 where the text does not begin with one of UTF-8.
size_t character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  const size_t size = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  if (size > text.size() || (first >= 0x80 && first < 0xC2)) return 0;
  for (size_t i = 1; i < size; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  const unsigned second = size > 2 ? byte(1) : 0;
  const bool wrong = (first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
                     (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F);
  return wrong ? 0 : size;
}

// JSON, written value after value.
class Writer {
 public:
  template <typename Fill>
  void object(const Fill& fill) {
    nested('{', '}', fill);
  }
  template <typename Items, typename Fill>
  void list(const Items& items, const Fill& fill) {
    nested('[', ']', [&] {
      for (const auto& item : items) {
        comma();
        fill(item);
      }
    });
  }
  template <typename Value>
  void operator()(std::string_view key, const Value& value) {
    comma();
    text_ += quoted(key) + ": ";
    put(value);
  }

  void put(std::string_view text) { text_ += quoted(text); }
  void put(const char* text) { put(std::string_view(text)); }
  void put(const std::string& text) { put(std::string_view(text)); }
  void put(bool value) { text_ += value ? "true" : "false"; }
  void put(std::integral auto value) { text_ += std::to_string(value); }
  void put(double value) {
    if (!std::isfinite(value)) return put(nullptr);
    char digits[32];
    text_.append(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  }
  void put(std::nullptr_t) { text_ += "null"; }
  template <typename Value>
  void put(const std::optional<Value>& value) {
    value ? put(*value) : put(nullptr);
  }
  template <typename Value>
  void put(const std::vector<Value>& values) {
    list(values, [this](const Value& value) { put(value); });
  }
  void put(const std::map<std::string, double>& values) {
    object([&] {
      for (const auto& [key, value] : values) (*this)(key, value);
    });
  }
  template <std::invocable Fill>
  void put(const Fill& fill) {
    fill();
  }

  const std::string& text() const { return text_; }

 private:
  void comma() {
    if (!fresh_) text_ += ", ";
    fresh_ = false;
  }
  template <typename Fill>
  void nested(char open, char close, const Fill& fill) {
    text_ += open;
    fresh_ = true;
    fill();
    text_ += close;
    fresh_ = false;
  }

  std::string text_;
  bool fresh_ = true;
};

std::string cuda_version(int number) {
  return std::to_string(number / 1000) + '.' + std::to_string(number % 1000 / 10);
}

void write(Writer& w, const Machine& m) {
  w.object([&] {
    const Board& board = m.board;
    w("name", board.name);
    w("soc", board.soc);
    w("module", board.module);
    w("l4t", board.l4t);
    w("jetpack", board.jetpack);
    w("power_mode", [&] {
      if (!board.power_mode) return w.put(nullptr);
      w.object([&] {
        w("name", board.power_mode);
        w("id", board.power_mode_id);
      });
    });
    w("processor", board.processor);
    w("isa", m.isa);
    w("cores", board.cores);
    w("memory_bytes", board.memory_bytes);
    w("cuda", [&] {
      if (!m.cuda) return w.put(nullptr);
      w.object([&] {
        w("name", m.cuda->name);
        w("capability", std::to_string(m.cuda->major) + '.' + std::to_string(m.cuda->minor));
        w("driver", cuda_version(m.cuda->driver));
        w("runtime", cuda_version(m.cuda->runtime));
        w("multiprocessors", m.cuda->multiprocessors);
        w("memory_bytes", m.cuda->memory);
        w("integrated", m.cuda->integrated);
      });
    });
    w("emulated", m.emulated);
    w("missing", board.missing);
  });
}

void write(Writer& w, const RunPower& power) {
  w.object([&] {
    w("source", power.source);
    w("rails", power.total.rails);
    w("scope", power.total.scope);
    w("samples", power.samples);
    w("samples_per_second", power.samples_per_second);
    w("window_begin", power.window_begin);
    w("window_seconds", power.window_seconds);
    w("idle_watts", power.idle_watts);
    w("watts", power.watts);
    w("millijoules_per_row", [&] {
      w.object([&] {
        w("total", power.total_millijoules);
        w("above_idle", power.above_idle_millijoules);
      });
    });
  });
}

void write(Writer& w, const RunResult& run, const std::vector<std::string>& kinds) {
  w.object([&] {
    w("engine", run.engine);
    w("version", run.version);
    w("form", run.dense ? "dense" : "sparse");
    w("device", name(run.device));
    w("precision", run.precision);
    w("threads", run.threads);
    w("batch", run.batch);
    w("latency_us", [&] {
      w.object([&] {
        w("mean", run.mean);
        w("min", run.min);
        w("p50", run.p50);
        w("p90", run.p90);
        w("p95", run.p95);
        w("p99", run.p99);
        w("max", run.max);
        w("runs", run.runs);
      });
    });
    w("repeats_p50_us", run.repeats_p50);
    w("rows_per_second", run.rows_per_second);
    w("peak_memory_bytes", run.peak_memory_bytes);
    w("weight_bytes", run.weight_bytes);
    w("workspace_bytes", run.workspace_bytes);
    w("lanes", run.lanes);
    w("layers", [&] {
      w.list(run.layers, [&](const Choice& layer) {
        w.object([&] {
          w("step", layer.op + 1);
          w("op", kinds[static_cast<size_t>(layer.op)]);
          w("form", layer.form);
          w("us", layer.us);
        });
      });
    });
    w("power", [&] { run.power ? write(w, *run.power) : w.put(nullptr); });
    w("clocks_mhz", [&] {
      w.object([&] {
        for (const RunClock& clock : run.clocks)
          w(clock.range.name, [&] {
            w.object([&] {
              w("min", clock.range.min);
              w("max", clock.range.max);
              w("seen", clock.seen);
            });
          });
      });
    });
    w("celsius", [&] {
      w.object([&] {
        w("start", run.celsius_start);
        w("end", run.celsius_end);
      });
    });
    w("throttled", run.throttled);
    w("missing", run.missing);
  });
}

std::string figure(double value, int digits) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}
std::string figure(const std::optional<int64_t>& value) { return value ? std::to_string(*value) : "-"; }

// Columns as wide as they must be; figures to the right, the first `texts` of them to the left.
std::string table(const std::vector<std::vector<std::string>>& rows, size_t texts) {
  std::vector<size_t> widths(rows[0].size());
  for (const auto& row : rows)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      line += (i ? "  " : "") + (i < texts ? row[i] + space : space + row[i]);
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + '\n';
  }
  return text;
}

}  // namespace

Machine machine(const std::string& root) {
  Machine found{read_board(root), cpu_isa_name(), {}, emulated()};
#if defined(__aarch64__)
  found.isa = "neon";
#endif
  try {
    found.cuda = cuda_device();
  } catch (const std::runtime_error& error) {
    found.board.missing.push_back(std::string("cuda: ") + error.what());
  }
  if (!found.emulated) found.board.missing.push_back("whether this is an emulation cannot be told");
  return found;
}

const char* name(Device device) { return device == Device::kCpu ? "cpu" : "cuda"; }
const char* name(Precision precision) {
  switch (precision) {
    case Precision::kFloat32: return "float32";
    case Precision::kFloat16: return "float16";
    case Precision::kBFloat16: break;
  }
  return "bfloat16";
}

std::string quoted(std::string_view text) {
  std::string result = "\"";
  while (!text.empty()) {
    const size_t size = character(text);
    const auto letter = static_cast<unsigned char>(text[0]);
    if (size == 0) {
      result += "\xEF\xBF\xBD";
    } else if (letter < 0x20 || letter == 0x7F) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", unsigned{letter});
      result += escape;
    } else {
      if (letter == '"' || letter == '\\') result += '\\';
      result += text.substr(0, size);
    }
    text.remove_prefix(std::max<size_t>(1, size));
  }
  return result + '"';
}

std::string json(const Machine& machine) {
  Writer w;
  write(w, machine);
  return w.text() + '\n';
}

std::string json(const DeviceResult& result) {
  Writer w;
  w.object([&] {
    w("pykd_device_result", 1);
    w("pykd", PYKD_VERSION);
    w("time", result.time);
    w("machine", [&] { write(w, result.machine); });
    w("model", [&] {
      w.object([&] {
        w("file", result.model.file);
        w("sha256", result.model.sha256);
        w("bytes", result.model.bytes);
        w("dense_bytes", result.model.dense_bytes);
        w("weights", result.model.weights);
        w("nonzeros", result.model.nonzeros);
      });
    });
    w("check", [&] {
      if (!result.check) return w.put(nullptr);
      w.object([&] {
        w("rows", result.check->rows);
        w("largest_difference", result.check->largest_difference);
        w("tolerance", result.check->tolerance);
        w("equal", result.check->equal());
      });
    });
    w("runs", [&] { w.list(result.runs, [&](const RunResult& run) { write(w, run, result.model.kinds); }); });
  });
  return w.text() + '\n';
}

std::string lines(const Machine& machine) {
  const Board& board = machine.board;
  const auto said = [](const auto& text) { return text.value_or("unknown"); };
  std::string text = "board      " + said(board.name);
  if (board.soc || board.module) text += " (" + said(board.soc) + ", module " + said(board.module) + ")";
  if (board.l4t) text += "\nsoftware   L4T " + *board.l4t + ", JetPack " + said(board.jetpack);
  if (board.power_mode)
    text +=
        "\npower mode " + *board.power_mode + (board.power_mode_id ? " (id " + figure(board.power_mode_id) + ")" : "");
  text += "\nprocessor  " + said(board.processor) + ", " + figure(board.cores) + " cores, " + machine.isa;
  if (machine.emulated == true) text += ", EMULATED: no times and no power";
  text += "\nmemory     " +
          (board.memory_bytes ? figure(static_cast<double>(*board.memory_bytes) * 1e-6, 0) + " MB" : "unknown");
  text += "\nCUDA       ";
  if (const auto& cuda = machine.cuda)
    text += cuda->name + ", capability " + std::to_string(cuda->major) + '.' + std::to_string(cuda->minor) +
            ", driver " + cuda_version(cuda->driver) + ", runtime " + cuda_version(cuda->runtime) +
            (cuda->integrated ? ", memory shared with the processor" : "");
  else
    text += "none";
  for (const std::string& why : board.missing) text += "\nmissing    " + why;
  return text + '\n';
}

std::string lines(const DeviceResult& result) {
  std::string text = lines(result.machine);
  const ModelFacts& model = result.model;
  text += "model      " + printable(model.file) + ": " + std::to_string(model.bytes) + " bytes, " +
          std::to_string(model.nonzeros) + " of " + std::to_string(model.weights) + " weights are not zero; dense " +
          std::to_string(model.dense_bytes) + " bytes\n";
  if (result.check) text += "check      " + line(*result.check) + '\n';
  std::vector<std::vector<std::string>> rows = {{"engine", "form", "device", "precision", "threads", "batch", "p50 us",
                                                 "p99 us", "max us", "rows/s", "peak MB", "W idle", "W", "mJ/row total",
                                                 "above idle", "throttled"}};
  const bool times = result.machine.emulated != true;
  const auto measured = [times](double value, int digits) { return times ? figure(value, digits) : "-"; };
  for (const RunResult& run : result.runs) {
    const RunPower power = run.power.value_or(RunPower{});
    rows.push_back({run.engine, run.dense ? "dense" : "sparse", name(run.device), run.precision, figure(run.threads),
                    figure(run.batch), measured(run.p50, 2), measured(run.p99, 2), measured(run.max, 2),
                    measured(run.rows_per_second, 1),
                    run.peak_memory_bytes ? figure(static_cast<double>(*run.peak_memory_bytes) * 1e-6, 1) : "-",
                    measured(power.idle_watts, 2), measured(power.watts, 2), measured(power.total_millijoules, 4),
                    measured(power.above_idle_millijoules, 4), run.throttled ? *run.throttled ? "yes" : "no" : "-"});
  }
  text += '\n' + table(rows, 4);
  std::vector<std::string> told;  // once, what all runs miss
  for (const RunResult& run : result.runs)
    for (const std::string& why : run.missing)
      if (std::ranges::find(told, why) == told.end()) {
        text += "missing    " + why + '\n';
        told.push_back(why);
      }
  if (result.runs.size() == 1 && !result.runs[0].layers.empty()) {
    rows = {{"layer", "form", "step", "us"}};
    for (const Choice& layer : result.runs[0].layers)
      rows.push_back({model.kinds[static_cast<size_t>(layer.op)], layer.form, std::to_string(layer.op + 1),
                      measured(layer.us, 3)});
    text += '\n' + table(rows, 2);
  }
  return text;
}

}  // namespace pykd::runtime
