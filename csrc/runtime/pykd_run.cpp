// pykd-run: answers images and arrays by a model file, and measures how fast.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "core/cpu_isa.h"
#include "runtime/engine.h"
#include "runtime/file.h"
#include "runtime/image.h"
#include "runtime/latencies.h"
#include "runtime/npy.h"
#include "runtime/pykd.h"

namespace pykd::runtime {
namespace {

constexpr const char* kHelp =
    R"(usage: pykd-run FILE [--input IMAGE|ARRAY.npy] [options]

Answers an image or an array by the network in FILE (*.pykd.safetensors), or measures it.

  --input X      a PPM or PGM image (P2, P3, P5, P6; at most 8 bits) of just the network's size, or an .npy file of
                 float32 or uint8 (pixels), one row or a batch of them. A grey image is given to a network of three
                 channels three times; the colours of an image for a network of one are weighed as
                 0.299 red + 0.587 green + 0.114 blue.
  --output Y     write the answers as they are, float32, to an .npy file instead
  --top N        name the N likeliest classes of each row (5)
  --batch N      rows taken at a time (as many as there are, up to 64; 1 with --bench)
  --threads N    threads that work (1)
  --cache FILE   remembers there what was measured on this machine
  --bench        measure latency and throughput instead, on the input or on zeros
  --json         say it as JSON
  --help, --version

Exit codes: 0 success, 1 the work failed, 2 usage.
)";

struct UsageError : std::runtime_error {
  using runtime_error::runtime_error;
};

struct Options {
  std::string file, input, output, cache;
  int64_t top = 5, batch = 0, threads = 1;
  bool bench = false, json = false;
};

int64_t number(const std::string& option, const std::string& text, int64_t most) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > most)
    throw UsageError(option + " " + text + ": give a whole number from 1 to " + std::to_string(most));
  return value;
}

Options parsed(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&]() -> const std::string& {
      if (++i == words.size()) throw UsageError(word + " needs a value: see pykd-run --help");
      return words[i];
    };
    if (word == "--input") {
      options.input = value();
    } else if (word == "--output") {
      options.output = value();
    } else if (word == "--cache") {
      options.cache = value();
    } else if (word == "--top") {
      options.top = number(word, value(), 1'000'000);
    } else if (word == "--batch") {
      options.batch = number(word, value(), kMostRows);
    } else if (word == "--threads") {
      options.threads = number(word, value(), kMostThreads);
    } else if (word == "--bench") {
      options.bench = true;
    } else if (word == "--json") {
      options.json = true;
    } else if (word.starts_with("-") || !options.file.empty()) {
      throw UsageError(word + " is not known: see pykd-run --help");
    } else {
      options.file = word;
    }
  }
  if (options.file.empty()) throw UsageError("no model file is given: see pykd-run --help");
  if (options.input.empty() && !options.bench) throw UsageError("give --input, or --bench to measure");
  if (options.bench && !options.output.empty()) throw UsageError("--bench writes no answers: leave out --output");
  return options;
}

// ---- what goes in --------------------------------------------------------------------------------------------------

// Rows of the network's input: floats, or pixels.
struct Rows {
  int64_t count = 0;
  std::vector<float> floats;
  std::vector<uint8_t> pixels;
};

Rows read_array(const Bytes& bytes, const std::vector<int64_t>& row) {
  const Array array = parse_npy(bytes.data.get(), bytes.size);
  Rows rows;
  if (array.shape == row) {
    rows.count = 1;
  } else if (array.shape.size() == row.size() + 1 && std::equal(row.begin(), row.end(), array.shape.begin() + 1)) {
    rows.count = array.shape[0];
  } else {
    throw FormatError("its shape is " + text(array.shape) + ", the network takes " + text(row) +
                      " or a batch of such rows");
  }
  if (array.pixels) {
    rows.pixels.assign(array.elements, array.elements + array.count);
  } else {
    rows.floats.resize(static_cast<size_t>(array.count));
    if (array.count) std::memcpy(rows.floats.data(), array.elements, rows.floats.size() * sizeof(float));
  }
  return rows;
}

Rows read_picture(const Bytes& bytes, const std::vector<int64_t>& row) {
  const Image image = parse_image(bytes.data.get(), bytes.size);
  const std::vector<int64_t> shape = {image.channels, image.height, image.width};
  const bool takes = row.size() == 3 && (row[0] == 1 || row[0] == 3) && row[1] == image.height && row[2] == image.width;
  if (!takes) throw FormatError("it is an image " + text(shape) + ", the network takes " + text(row));
  return {1, {}, with_channels(image, row[0]).pixels};
}

Rows read_rows(const std::string& path, const Model& file) {
  constexpr int64_t kLargest = int64_t{4} << 30;
  const Bytes bytes = read_file(path, kLargest, "image or array");
  const bool array = bytes.size > 0 && bytes.data[0] == 0x93;
  try {
    Rows rows = array ? read_array(bytes, file.input_shape) : read_picture(bytes, file.input_shape);
    if (!rows.pixels.empty() && file.mean.empty())
      throw FormatError("the network does not say what pixels mean (mean and std): give an .npy file of float32");
    return rows;
  } catch (const FormatError& error) {
    throw FormatError(path + ": " + error.what());
  }
}

// ---- what comes out ------------------------------------------------------------------------------------------------

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') result += '\\';
    result += letter;  // no control characters: the reader refuses them
  }
  return result + '"';
}

std::string format(const char* pattern, auto... values) {
  char line[160];
  std::snprintf(line, sizeof line, pattern, values...);
  return line;
}

// Every row through the network, `batch` of them at a time; the last ones beside zeros.
std::vector<float> answered(Plan& plan, const Rows& rows, int64_t batch, size_t in, size_t out) {
  std::vector<float> answers(static_cast<size_t>(rows.count) * out), last(static_cast<size_t>(batch) * out);
  const auto run = [&](const auto& all) {
    auto some = all;
    for (int64_t row = 0; row < rows.count; row += batch) {
      const int64_t n = std::min(batch, rows.count - row);
      const size_t begin = static_cast<size_t>(row) * in, count = static_cast<size_t>(n) * in;
      some.assign(static_cast<size_t>(batch) * in, 0);
      std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(begin), count, some.begin());
      plan.run(some.data(), last.data());
      std::copy_n(last.begin(), static_cast<size_t>(n) * out,
                  answers.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(row) * out));
    }
  };
  rows.pixels.empty() ? run(rows.floats) : run(rows.pixels);
  return answers;
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

// ---- the benchmark -------------------------------------------------------------------------------------------------

void bench(Plan& plan, const Rows& rows, int64_t batch, size_t in, size_t out, const Model& file,
           const Options& options) {
  std::vector<float> input(static_cast<size_t>(batch) * in), output(static_cast<size_t>(batch) * out);
  std::vector<uint8_t> pixels(rows.pixels.empty() ? 0 : input.size());
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = rows.pixels[i % rows.pixels.size()];
  for (size_t i = 0; i < input.size() && !rows.floats.empty(); ++i) input[i] = rows.floats[i % rows.floats.size()];
  const std::vector<double> us = latencies(
      [&] { pixels.empty() ? plan.run(input.data(), output.data()) : plan.run(pixels.data(), output.data()); }, 1);
  const auto at = [&us](double share) { return us[static_cast<size_t>(share * static_cast<double>(us.size() - 1))]; };
  const double rows_a_second = 1e6 * static_cast<double>(batch) / at(0.5);
  const auto whole = [](auto value) { return static_cast<long long>(value); };
  const char* const pattern =
      options.json
          ? "{\"batch\": %lld, \"threads\": %lld, \"isa\": \"%s\", \"runs\": %lld, \"us\": {\"min\": %.3f, \"median\": "
            "%.3f, \"p90\": %.3f, \"p99\": %.3f}, \"rows_per_second\": %.6g, "
          : "batch %lld, threads %lld, %s, %lld runs\nlatency in us: min %.3f, median %.3f, p90 %.3f, p99 %.3f\n"
            "throughput: %.6g rows a second\n";
  std::printf(pattern, whole(batch), whole(options.threads), cpu_isa_name(), whole(us.size()), us[0], at(0.5), at(0.9),
              at(0.99), rows_a_second);
  std::printf(options.json ? "\"lanes\": %lld, \"bytes\": {\"file\": %lld, \"weights\": %lld, \"workspace\": %lld}, "
                             "\"layers\": ["
                           : "lanes %lld; bytes: file %lld, weights %lld, workspace %lld\n",
              whole(plan.lanes()), whole(file.file_bytes), whole(plan.weight_bytes()), whole(plan.workspace_bytes()));
  bool first = true;
  for (const Choice& choice : plan.choices()) {
    const char* const kind = name(file.ops[static_cast<size_t>(choice.op)].kind);
    if (options.json)
      std::printf("%s{\"step\": %d, \"op\": \"%s\", \"form\": %s, \"us\": %.3f}", first ? "" : ", ", choice.op + 1,
                  kind, quoted(choice.form).c_str(), choice.us);
    else
      std::printf("step %d, %s: %s, %.3f us\n", choice.op + 1, kind, choice.form.c_str(), choice.us);
    first = false;
  }
  if (options.json) std::printf("]}\n");
}

void work(const Options& options) {
  const auto network = load(options.file.c_str());
  const Model& file = model(*network);
  const std::vector<int64_t>& out_shape = output_shape(*network);
  const auto in = static_cast<size_t>(product(file.input_shape)), out = static_cast<size_t>(product(out_shape));
  if (!options.bench && options.output.empty() && out_shape.size() != 1)
    throw FormatError(options.file + " answers with " + text(out_shape) + ", not with classes: give --output Y.npy");
  const Rows rows = options.input.empty() ? Rows{} : read_rows(options.input, file);
  const int64_t batch = options.batch ? options.batch : options.bench ? 1 : std::clamp<int64_t>(rows.count, 1, 64);
  Plan plan(network, {.batch = batch, .threads = static_cast<int>(options.threads), .cache = options.cache});
  if (options.bench) return bench(plan, rows, batch, in, out, file, options);
  std::vector<float> answers = answered(plan, rows, batch, in, out);
  if (options.output.empty()) return show(answers, rows.count, file, options);
  std::vector<int64_t> shape = out_shape;
  shape.insert(shape.begin(), rows.count);
  write_array(options.output, answers, shape);
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
    work(parsed(all));
    if (std::fflush(stdout) != 0) return failed("cannot write the answers", 1);
    return 0;
  } catch (const UsageError& error) {
    return failed(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return failed("out of memory: give a smaller --batch", 1);
  } catch (const std::exception& error) {
    return failed(error.what(), 1);
  }
}
