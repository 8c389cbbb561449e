// pykd-run: answers images and arrays by a model file, compares answers with recorded ones, and measures how fast.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/bench.h"
#include "runtime/engine.h"
#include "runtime/npy.h"
#include "runtime/pykd.h"
#include "runtime/record.h"
#include "runtime/rows.h"
#include "runtime/text_file.h"

namespace pykd::runtime {
namespace {

constexpr const char* kHelp =
    R"(usage: pykd-run FILE --input IMAGE|ARRAY.npy [options]
       pykd-run FILE --bench [options]
       pykd-run --devices [--root DIR]

Answers an image or an array by the network in FILE (*.pykd.safetensors), or measures it on this machine.

  --input X      a PPM or PGM image (P2, P3, P5, P6; at most 8 bits) of just the network's size, or an .npy file of
                 float32 or uint8 (pixels), one row or a batch of them. A grey image is given to a network of three
                 channels three times; the colours of an image for a network of one are weighed as
                 0.299 red + 0.587 green + 0.114 blue. With --bench random numbers take its place.
  --check Y      compare the answers to the input with those in an .npy file of float32; exit code 1 where they differ
                 by more than rounding
  --output Y     write the answers as they are, float32, to an .npy file instead
  --top N        name the N likeliest classes of each row (5)
  --json         say the classes as JSON
  --batch N      rows taken at a time (as many as there are, up to 64)
  --threads N    threads that work (1); on CUDA they mean nothing
  --device D     cpu or cuda (cpu)
  --precision P  float32, float16 or bfloat16, of what CUDA's tensor cores multiply (float32)
  --dense        every weight lies dense in memory
  --cache FILE   remembers there what was measured to plan
  --devices      say what this machine is: board, software, processor, CUDA device
  --help, --version

Measuring, --bench, takes lists for what it goes through, such as --batch 1,8,64 --device cpu,cuda, and prints a table:

  --batch, --threads, --device, --precision   lists (1, 1, cpu, float32)
  --dense        also the network with every weight dense
  --seconds S    of each of three repeats, after up to 2 s to warm up (2)
  --power        idle power first, then the energy of each row, from the board's INA3221 or else from tegrastats
  --samples CSV  write every sample of power
  --json FILE    write everything as JSON
  --trtexec LOG  logs of TensorRT's trtexec to put beside it, a list; their names say precision and batch:
                 anything-float16-8.log
  --root DIR     read sensors and versions in DIR/sys, DIR/etc, DIR/proc, the copy of a device's files (/)

It reads, and never sets, power modes and clocks. What cannot be had is told, and the rest is measured.

Exit codes: 0 success, 1 the work failed, 2 usage.
)";

struct UsageError : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Options {
  BenchOptions bench;  // of which all but lists holds for answers, too
  std::string output, json_file;
  int64_t top = 5;
  bool batch = false, measure = false, json = false, devices = false;
};

constexpr Device kDevices[] = {Device::kCpu, Device::kCuda};
constexpr Precision kPrecisions[] = {Precision::kFloat32, Precision::kFloat16, Precision::kBFloat16};

int64_t number(const std::string& option, const std::string& text, int64_t most) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > most)
    throw UsageError(option + " " + text + ": give a whole number from 1 to " + std::to_string(most));
  return value;
}

auto named(const std::string& option, const std::string& text, const auto& values) {
  std::string all;
  for (const auto value : values) {
    if (text == name(value)) return value;
    all += (all.empty() ? "" : ", ") + std::string(name(value));
  }
  throw UsageError(option + " " + text + ": give one of " + all);
}

// Of "a,b" what `read` makes of each.
template <typename Read>
auto list(const std::string& text, const Read& read) {
  std::vector<decltype(read(text))> values;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    values.push_back(read(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return values;
}

Options parsed(const std::vector<std::string>& words) {
  Options options;
  BenchOptions& bench = options.bench;
  options.measure = std::ranges::find(words, "--bench") != words.end();
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&]() -> const std::string& {
      if (++i == words.size()) throw UsageError(word + " needs a value: see pykd-run --help");
      return words[i];
    };
    if (word == "--input") {
      bench.input = value();
    } else if (word == "--check") {
      bench.check = value();
    } else if (word == "--output") {
      options.output = value();
    } else if (word == "--cache") {
      bench.cache = value();
    } else if (word == "--samples") {
      bench.samples = value();
    } else if (word == "--root") {
      bench.root = value();
    } else if (word == "--trtexec") {
      bench.trtexec = list(value(), [](const std::string& path) { return path; });
    } else if (word == "--top") {
      options.top = number(word, value(), 1'000'000);
    } else if (word == "--batch") {
      options.batch = true;
      bench.batches = list(value(), [&](const std::string& text) { return number(word, text, kMostRows); });
    } else if (word == "--threads") {
      bench.threads =
          list(value(), [&](const std::string& text) { return static_cast<int>(number(word, text, kMostThreads)); });
    } else if (word == "--device") {
      bench.devices = list(value(), [&](const std::string& text) { return named(word, text, kDevices); });
    } else if (word == "--precision") {
      bench.precisions = list(value(), [&](const std::string& text) { return named(word, text, kPrecisions); });
    } else if (word == "--seconds") {
      const auto seconds = to_number(value());
      if (!seconds || *seconds < 0.001 || *seconds > 86'400)
        throw UsageError(word + " " + words[i] + ": give a number from 0.001 to 86400");
      bench.seconds = *seconds;
    } else if (word == "--devices") {
      options.devices = true;
    } else if (word == "--dense") {
      bench.dense = true;
    } else if (word == "--power") {
      bench.power = true;
    } else if (word == "--json") {
      options.json = true;
      if (options.measure) options.json_file = value();
    } else if (word.starts_with("-") && word != "--bench") {
      throw UsageError(word + " is not known: see pykd-run --help");
    } else if (word != "--bench") {
      if (!bench.file.empty()) throw UsageError(word + " is not known: see pykd-run --help");
      bench.file = word;
    }
  }
  if (options.devices) return options;
  if (bench.file.empty()) throw UsageError("no model file is given: see pykd-run --help");
  if (bench.input.empty() && !options.measure) throw UsageError("give --input, or --bench to measure");
  if (bench.input.empty() && !bench.check.empty()) throw UsageError("--check needs the --input that was answered");
  if (options.measure && !options.output.empty()) throw UsageError("--bench writes no answers: leave out --output");
  if (options.measure) return options;
  if (bench.power || !bench.samples.empty() || !bench.trtexec.empty()) throw UsageError("to measure, add --bench");
  if (bench.batches.size() + bench.threads.size() + bench.devices.size() + bench.precisions.size() > 4)
    throw UsageError("lists are for --bench: give one of each");
  return options;
}

std::string format(const char* pattern, auto... values) {
  char line[160];
  std::snprintf(line, sizeof line, pattern, values...);
  return line;
}

void softmax(float* values, size_t count) {
  const float most = *std::max_element(values, values + count);
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(values[i]) - most);
  for (size_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(std::exp(static_cast<double>(values[i]) - most) / sum);
}

void show(std::vector<float>& answers, int64_t rows, const Model& file, const Options& options) {
  const size_t classes = answers.size() / static_cast<size_t>(std::max<int64_t>(1, rows));
  const auto top = std::min(static_cast<size_t>(options.top), classes);
  std::vector<size_t> order(classes);
  for (int64_t row = 0; row < rows; ++row) {
    float* const values = answers.data() + static_cast<size_t>(row) * classes;
    if (file.ops.empty() || file.ops.back().kind != Kind::kSoftmax) softmax(values, classes);
    std::iota(order.begin(), order.end(), size_t{0});
    const auto likelier = [values](size_t a, size_t b) {  // NaN last
      return values[a] > values[b] || (values[a] == values[b] && a < b) ||
             (values[b] != values[b] && values[a] == values[a]);
    };
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(top), order.end(), likelier);
    std::string line = options.json ? format("{\"row\": %lld, \"answers\": [", static_cast<long long>(row))
                                    : format("%lld:", static_cast<long long>(row));
    for (size_t i = 0; i < top; ++i) {
      const std::string name = file.classes.empty() ? std::to_string(order[i]) : file.classes[order[i]];
      const auto share = static_cast<double>(values[order[i]]);
      if (!options.json)
        line += "  " + name + format(" %.2f%%", 100 * share);
      else
        line += (i ? ", " : "") + ("{\"class\": " + quoted(name)) +
                (std::isfinite(share) ? format(", \"probability\": %.6g}", share) : ", \"probability\": null}");
    }
    std::printf("%s%s\n", line.c_str(), options.json ? "]}" : "");
  }
}

void write_array(const std::string& path, const std::vector<float>& answers, const std::vector<int64_t>& shape) {
  std::FILE* const stream = std::fopen(path.c_str(), "wb");
  const std::string head = npy_head(shape);
  const bool written = stream && std::fwrite(head.data(), 1, head.size(), stream) == head.size() &&
                       std::fwrite(answers.data(), sizeof(float), answers.size(), stream) == answers.size();
  if (!stream || std::fclose(stream) != 0 || !written)
    throw FormatError("cannot write " + path + ": give another --output");
}

// Whether the answers are the recorded ones, where such are given.
bool work(const Options& options) {
  const BenchOptions& bench = options.bench;
  const auto network = load(bench.file.c_str());
  const Model& file = model(*network);
  std::vector<int64_t> shape = output_shape(*network);
  if (options.output.empty() && bench.check.empty() && shape.size() != 1)
    throw FormatError(bench.file + " answers with " + text(shape) + ", not with classes: give --output Y.npy");
  const Rows rows = read_rows(bench.input, file);
  std::vector<float> recorded;
  if (!bench.check.empty()) recorded = read_answers(bench.check, *network, rows.count);
  const int64_t batch = options.batch ? bench.batches[0] : std::clamp<int64_t>(rows.count, 1, 64);
  std::vector<float> found = answers(network, rows,
                                     {.batch = batch,
                                      .threads = bench.threads[0],
                                      .cache = bench.cache,
                                      .device = bench.devices[0],
                                      .precision = bench.precisions[0],
                                      .dense = bench.dense});
  if (!options.output.empty()) {
    shape.insert(shape.begin(), rows.count);
    write_array(options.output, found, shape);
  }
  if (!bench.check.empty()) {
    const Check check = compare(found, recorded, rows.count, bench.precisions[0]);
    std::printf("%s\n", line(check).c_str());
    return check.equal();
  }
  if (options.output.empty()) show(found, rows.count, file, options);
  return true;
}

bool bench(const Options& options) {
  if (!options.json_file.empty()) check_writable(options.json_file);
  const DeviceResult result = measure(
      options.bench, [](const std::string& doing) { std::fprintf(stderr, "pykd-run: %s ...\n", doing.c_str()); });
  if (!options.json_file.empty()) write_whole(options.json_file, json(result));
  std::fputs(lines(result).c_str(), stdout);
  const bool any = std::ranges::any_of(result.runs, [](const RunResult& run) { return run.runs.has_value(); });
  if (!any) std::fputs("pykd-run: nothing could be measured: see what is missing\n", stderr);
  return any && (options.bench.check.empty() || (result.check && result.check->equal()));
}

}  // namespace
}  // namespace pykd::runtime

int main(int count, char** words) {
  using namespace pykd::runtime;
  const auto failed = [](const char* sentence, int code) {
    std::fprintf(stderr, "pykd-run: %s\n", sentence);
    return code;
  };
  try {
    const std::vector<std::string> all(words + 1, words + count);
    const auto has = [&all](const char* word) { return std::find(all.begin(), all.end(), word) != all.end(); };
    if (all.empty() || has("--help") || has("-h")) {
      std::fputs(kHelp, all.empty() ? stderr : stdout);
      return all.empty() ? 2 : 0;
    }
    if (has("--version")) {
      std::printf("pykd-run %s\n", pykd_version());
      return 0;
    }
    const Options options = parsed(all);
    bool good = true;
    if (options.devices)
      std::fputs(lines(machine(options.bench.root)).c_str(), stdout);
    else
      good = options.measure ? bench(options) : work(options);
    if (std::fflush(stdout) != 0) return failed("cannot write the answers", 1);
    return good ? 0 : 1;
  } catch (const UsageError& error) {
    return failed(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return failed("out of memory: give a smaller --batch", 1);
  } catch (const std::exception& error) {
    return failed(error.what(), 1);
  }
}
