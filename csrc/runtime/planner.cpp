#include "runtime/planner.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/cpu_isa.h"
#include "runtime/json.h"
#include "runtime/pykd.h"
#include "runtime/sha256.h"

namespace pykd::runtime {
namespace {

constexpr double kHopeless = 2.5;       // what is estimated to take so many times the best is not measured
constexpr double kWorthSharing = 2e-5;  // seconds of a step; waking a thread takes some microseconds
constexpr double kSetOff = 1e-5;        // seconds until threads that run apart do so
constexpr double kSample = 1e-4;        // seconds that are timed at a time
constexpr double kEnough = 0.03;        // seconds for which one way is timed at most, but for its last repeat
constexpr int kSamples = 5;
constexpr double kMovedFloat = 3e-10;  // seconds to bring a value of the input or output into lanes or back

bool on_cuda(const PlanOptions& options) { return options.device == Device::kCuda; }

std::vector<int64_t> lanes_of(const PlanOptions& options) {
  if (options.lanes) return {options.lanes};
  std::vector<int64_t> lanes{1};
  const int64_t least = on_cuda(options) ? kCudaLanes : std::max(8, vector_lanes());
  for (int64_t each = least; each <= 64 && options.batch > 1; each += each < 16 ? least : 16) {
    const int64_t padded = ceil_div(options.batch, each) * each;
    if (each == least || padded * 4 <= options.batch * 5) lanes.push_back(each);
  }
  return lanes;
}

struct Candidate {
  Program program;
  double seconds;               // of the whole batch
  std::vector<double> steps{};  // seconds of each for one call
};

// How often a thread calls the program for a batch.
double calls(const Program& program, const PlanOptions& options) {
  const int64_t all = ceil_div(options.batch, program.rows());
  return static_cast<double>(program.apart() ? ceil_div(all, options.threads) : all);
}

// Seconds for the batch, of those that one call takes.
double of_batch(double seconds, const Program& program, const PlanOptions& options) {
  return seconds * calls(program, options) + (program.apart() ? kSetOff : 0);
}

// What tensor cores multiply: tiles of 16 rows, in pairs of columns.
bool fits_tensor_cores(const Form& form, const LayerCost& layer) {
  return form.rows > kTileRows / 2 && (form.columns ? form.columns : layer.columns) % 2 == 0;
}

// The forms by the estimate, the best first. There is none for CUDA: the file's own first, of two bytes where asked
// for.
std::vector<std::pair<double, Form>> forms_of(const Network& network, const Step& step, const PlanOptions& options) {
  std::vector<std::pair<double, Form>> forms;
  for (const FormCount& each : network.forms(step.op)) {
    if (options.dense && each.form.columns != 0) continue;
    Form form = each.form;
    if (options.precision != Precision::kFloat32 && fits_tensor_cores(form, step.cost)) {
      form.values = options.precision == Precision::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
      forms.push_back({0, form});
    }
    forms.push_back({on_cuda(options) ? 0 : seconds(each, step.cost), each.form});
  }
  std::ranges::stable_sort(forms, {}, &std::pair<double, Form>::first);
  return forms;
}

// Takes what is estimated to be best.
Candidate estimated(const std::shared_ptr<const Network>& network, int64_t lanes, const PlanOptions& options) {
  Candidate c{Program(network, lanes, options.batch, options.threads, options.device), 0};
  Program& program = c.program;
  const bool may_share = options.threads > 1 && !program.apart();
  for (size_t i = 0; i < program.steps().size(); ++i) {
    Step& step = program.steps()[i];
    double cost = 0;
    if (step.is_layer()) {
      const auto [least, form] = forms_of(*network, step, options).front();
      program.take(i, program.weight(i, form));
      cost = least;
      step.shared = may_share && cost > kWorthSharing;
    }
    c.steps.push_back(step.shared ? cost / options.threads : cost);
    c.seconds += c.steps.back();
  }
  if (lanes > 1 && !on_cuda(options)) {
    int64_t moved = 0;
    for (const auto& shape : {network->model().input_shape, output_shape(*network)}) moved += product(shape);
    c.seconds += static_cast<double>(moved * program.rows()) * kMovedFloat;
  }
  c.seconds = of_batch(c.seconds, program, options);
  return c;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Of several ways to do one thing, in turns, so that what else the machine does hits all of them: the least seconds.
template <typename Way>
std::vector<double> race(size_t ways, const Way& way) {
  std::vector<double> least(ways, 0);
  std::vector<int> repeats(ways, 1);
  const double start = now();
  for (size_t i = 0; i < ways; ++i) {
    way(i, 1);  // into the caches
    const double begin = now();
    way(i, 1);
    least[i] = now() - begin;
    repeats[i] = static_cast<int>(std::clamp(kSample / std::max(least[i], 1e-8), 1.0, 1000.0));
  }
  for (int sample = 0; sample < kSamples && now() - start < kEnough * static_cast<double>(ways); ++sample)
    for (size_t i = 0; i < ways; ++i) {
      const double begin = now();
      way(i, repeats[i]);
      least[i] = std::min(least[i], (now() - begin) / repeats[i]);
    }
  return least;
}

std::vector<float> random_input(int64_t count) {
  std::vector<float> input(static_cast<size_t>(count));
  uint32_t word = 1;
  for (float& value : input) {
    word = word * 1664525 + 1013904223;
    value = static_cast<float>(word >> 8) * 0x1p-23f - 1;
  }
  return input;
}

// Calls the program as a plan does, on random rows.
class Caller {
 public:
  Caller(const Network& network, int64_t most_rows, ThreadPool* pool)
      : input_(random_input(most_rows * product(network.model().input_shape))),
        output_(static_cast<size_t>(most_rows * product(output_shape(network)))),
        pool_(pool) {}

  ThreadPool* sharing(const Program& program) const { return program.apart() ? nullptr : pool_; }
  void operator()(Program& program) { program.run(input_.data(), output_.data(), program.rows(), sharing(program)); }

 private:
  std::vector<float> input_, output_;
  ThreadPool* pool_;
};

// Takes what is measured to be best: the forms step by step where it stands; what the threads share by whole calls,
// since a step alone finds in each thread's caches what it read the last time.
void measure(Candidate& c, const Network& network, const PlanOptions& options, Caller& call) {
  Program& program = c.program;
  for (Step& step : program.steps()) step.shared = false;
  call(program);  // values of the size they have, in all steps
  for (size_t i = 0; i < program.steps().size(); ++i) {
    Step& step = program.steps()[i];
    std::vector<std::pair<double, Form>> forms;
    std::vector<LayerWeight> weights;
    if (step.is_layer()) {
      forms = forms_of(network, step, options);
      std::erase_if(forms, [best = forms.front().first](const auto& form) { return form.first > kHopeless * best; });
      for (const auto& form : forms) weights.push_back(program.weight(i, form.second));
    }
    const auto least = race(std::max<size_t>(1, forms.size()), [&](size_t form, int repeats) {
      if (step.is_layer()) program.take(i, weights[form]);
      program.repeat(i, repeats, nullptr);
    });
    const auto best = std::ranges::min_element(least);
    if (step.is_layer()) program.take(i, std::move(weights[static_cast<size_t>(best - least.begin())]));
    c.steps[i] = *best / program.rounds();
  }
  ThreadPool* const sharing = call.sharing(program);
  if (!sharing) return;
  constexpr double kLeast[] = {HUGE_VAL, 10 * kWorthSharing, kWorthSharing};  // seconds of a step that is shared
  const auto share = [&](double seconds) {
    for (size_t i = 0; i < program.steps().size(); ++i) program.steps()[i].shared = c.steps[i] >= seconds;
  };
  const auto least = race(std::size(kLeast), [&](size_t way, int repeats) {
    share(kLeast[way]);
    for (int i = 0; i < repeats; ++i) call(program);
  });
  share(kLeast[std::ranges::min_element(least) - least.begin()]);
  for (size_t i = 0; i < program.steps().size(); ++i)
    if (const Step& step = program.steps()[i]; step.shared)
      c.steps[i] = race(1, [&](size_t, int repeats) { program.repeat(i, repeats, sharing); })[0];
}

// ---- what was measured before --------------------------------------------------------------------------------------

constexpr std::string_view kHead = R"({"pykd plans":1})";
constexpr std::uintmax_t kLargestCache = 4 << 20;  // bytes
constexpr std::ptrdiff_t kMostPlans = 1000;
constexpr size_t kLongestPlan = 1 << 16;

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  std::string text;
  for (std::string line; std::getline(file, line) && !line.empty();)  // of the first one
    if (line.starts_with("model name") || line.starts_with("CPU implementer") || line.starts_with("CPU part"))
      text += line + '\n';
  return text;
}

std::string key_of(const Network& network, const PlanOptions& options) {
  std::ostringstream text;
  text << PYKD_VERSION << '\n' << processor() << cpu_isa_name();
  if (on_cuda(options)) {
    const CudaDevice device = cuda_device();
    text << ' ' << device.name << ' ' << device.major << device.minor << ' ' << device.driver << ' ' << device.runtime
         << ' ' << static_cast<int>(options.precision);
  }
  for (const int64_t number : {options.batch, int64_t{options.threads}, options.lanes, int64_t{options.dense}})
    text << ' ' << number;
  text << ' ' << network.fingerprint();
  const std::string whole = text.str();
  return sha256(whole.data(), whole.size());
}

// The file's lines after its first one; nothing where it is none of ours.
std::optional<std::vector<std::string>> read_lines(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) return std::vector<std::string>();
  if (!std::filesystem::is_regular_file(status) || std::filesystem::file_size(path, error) > kLargestCache || error)
    return std::nullopt;
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::vector<std::string>();
  if (line != kHead) return std::nullopt;
  std::vector<std::string> lines;
  while (std::getline(file, line)) lines.push_back(line);
  return lines;
}

std::string line_of(const std::string& key) { return R"({"key":")" + key + '"'; }

std::optional<Candidate> recall(const std::shared_ptr<const Network>& network, const PlanOptions& options,
                                const std::string& key) {
  const auto lines = read_lines(options.cache);
  if (!lines) return std::nullopt;
  const auto line =
      std::ranges::find_if(*lines, [&](const std::string& each) { return each.starts_with(line_of(key)); });
  if (line == lines->end()) return std::nullopt;
  try {
    const Document document(*line, "plan");
    Json lanes = document.root(), steps = document.root();
    if (!document.root().find("lanes", lanes) || !document.root().find("steps", steps) || !lanes.is_whole(1, 64) ||
        !steps.is(JsonType::kList) || std::ranges::count(lanes_of(options), lanes.whole()) == 0)
      return std::nullopt;
    Candidate c{Program(network, lanes.whole(), options.batch, options.threads, options.device), 0};
    if (steps.size() != c.program.steps().size()) return std::nullopt;
    size_t i = 0;
    for (const Json each : steps) {
      Step& step = c.program.steps()[i];
      if (!each.is(JsonType::kList) || each.size() != 5) return std::nullopt;
      auto at = each.begin();
      const Json rows = *at, columns = *++at, values = *++at, shared = *++at, us = *++at;
      if (!rows.is_whole(0, INT64_MAX) || !columns.is_whole(0, INT64_MAX) || !values.is_whole(0, 3) ||
          !shared.is_whole(0, 1) || !us.is_number())
        return std::nullopt;
      if (step.is_layer()) {
        const Form form{rows.whole(), columns.whole(), static_cast<DType>(values.whole())};
        const auto forms = forms_of(*network, step, options);
        if (std::ranges::none_of(forms, [&](const auto& known) { return known.second == form; })) return std::nullopt;
        c.program.take(i, c.program.weight(i, form));
      }
      step.shared = options.threads > 1 && !c.program.apart() && shared.whole();
      c.steps.push_back(us.number() * 1e-6);
      ++i;
    }
    return c;
  } catch (const FormatError&) {  // no JSON
    return std::nullopt;
  } catch (const std::invalid_argument&) {  // more lanes than fit
    return std::nullopt;
  }
}

void remember(const std::string& path, const std::string& key, Candidate& c) {
  auto lines = read_lines(path);
  if (!lines) return;
  std::ostringstream line;
  line << line_of(key) << R"(,"lanes":)" << c.program.lanes() << R"(,"steps":[)";
  for (size_t i = 0; i < c.program.steps().size(); ++i) {
    const Step& step = c.program.steps()[i];
    const Form form = step.is_layer() ? c.program.weight(i).form : Form{0, 0};
    line << (i ? ",[" : "[") << form.rows << ',' << form.columns << ',' << static_cast<int>(form.values) << ','
         << step.shared << ',' << c.steps[i] * 1e6 << ']';
  }
  line << "]}";
  if (line.view().size() > kLongestPlan) return;
  std::erase_if(*lines, [&](const std::string& each) {
    return !each.starts_with(R"({"key":")") || each.starts_with(line_of(key));
  });
  lines->push_back(line.str());
  std::uintmax_t bytes = kHead.size() + 1;
  auto kept = lines->end();  // the last ones, as many as are read again
  while (kept != lines->begin() && lines->end() - kept < kMostPlans && bytes + (kept - 1)->size() < kLargestCache)
    bytes += (--kept)->size() + 1;
  lines->erase(lines->begin(), kept);

  static std::atomic<int> writers{0};
  const std::string draft = path + '.' + std::to_string(getpid()) + '.' + std::to_string(++writers);
  std::error_code error;
  if (const auto folder = std::filesystem::path(path).parent_path(); !folder.empty())
    std::filesystem::create_directories(folder, error);
  std::ofstream file(draft);
  file << kHead << '\n';
  for (const std::string& each : *lines) file << each << '\n';
  file.close();
  if (file) std::filesystem::rename(draft, path, error);
  if (!file || error) std::filesystem::remove(draft, error);
}

Planned finished(Candidate c, const PlanOptions& options) {
  Planned planned{std::move(c.program), {}};
  planned.program.prepare();
  const double times = calls(planned.program, options);
  for (size_t i = 0; i < planned.program.steps().size(); ++i)
    if (const Step& step = planned.program.steps()[i]; step.is_layer())
      planned.choices.push_back({step.op, name(planned.program.weight(i).form), c.steps[i] * times * 1e6});
  return planned;
}

}  // namespace

Planned make_plan(const std::shared_ptr<const Network>& network, const PlanOptions& options, ThreadPool* pool) {
  const bool remembers = options.measure && !options.cache.empty();
  const std::string key = remembers ? key_of(*network, options) : "";
  if (remembers)
    if (auto known = recall(network, options, key)) return finished(std::move(*known), options);
  std::vector<Candidate> candidates;
  for (const int64_t lanes : lanes_of(options)) {
    try {
      candidates.push_back(estimated(network, lanes, options));
    } catch (const std::invalid_argument&) {
      if (candidates.empty()) throw;  // fewer lanes fit
    } catch (const std::bad_alloc&) {
      if (candidates.empty()) throw;  // likewise, or one plan at a time
    }
  }
  std::ranges::stable_sort(candidates, {}, &Candidate::seconds);
  if (options.measure) {
    std::erase_if(candidates,
                  [best = candidates.front().seconds](const Candidate& c) { return c.seconds > kHopeless * best; });
    int64_t most_rows = 0;
    for (const Candidate& c : candidates) most_rows = std::max(most_rows, c.program.rows());
    Caller call(*network, most_rows, pool);
    for (Candidate& c : candidates) measure(c, *network, options, call);
    const auto least = race(candidates.size(), [&](size_t i, int repeats) {
      for (int repeat = 0; repeat < repeats; ++repeat) call(candidates[i].program);
    });
    for (size_t i = 0; i < candidates.size(); ++i)
      candidates[i].seconds = of_batch(least[i], candidates[i].program, options);
    std::ranges::stable_sort(candidates, {}, &Candidate::seconds);
    if (remembers) remember(options.cache, key, candidates.front());
  }
  return finished(std::move(candidates.front()), options);
}

}  // namespace pykd::runtime
