#include "runtime/engine.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/cpu_isa.h"
#include "runtime/planner.h"

namespace pykd::runtime {
namespace {

void check(const PlanOptions& options) {
  if (options.batch < 1 || options.batch > kMostRows)
    throw std::invalid_argument("batch should be 1 to " + std::to_string(kMostRows) + " rows, got " +
                                std::to_string(options.batch));
  if (options.threads < 1 || options.threads > kMostThreads)
    throw std::invalid_argument("threads should be 1 to " + std::to_string(kMostThreads) + ", got " +
                                std::to_string(options.threads));
  const int64_t side_by_side = options.device == Device::kCuda ? kCudaLanes : vector_lanes();
  if (options.lanes < 0 || options.lanes > 64 || (options.lanes > 1 && options.lanes % side_by_side != 0))
    throw std::invalid_argument("lanes should be 0, 1 or a multiple of " + std::to_string(side_by_side) +
                                " up to 64, got " + std::to_string(options.lanes));
  if (options.device == Device::kCuda) cuda_device();
  if (options.device == Device::kCpu && options.precision != Precision::kFloat32)
    throw std::invalid_argument("the engine multiplies in float32 on the CPU: leave precision at float32");
}

}  // namespace

std::shared_ptr<const Network> load(Model model) { return std::make_shared<const Network>(std::move(model)); }
std::shared_ptr<const Network> load(const char* path) { return load(read_model(path)); }
std::shared_ptr<const Network> load(const unsigned char* bytes, size_t size) {
  try {
    return load(parse_model(bytes, size));
  } catch (const FormatError& error) {
    throw FormatError(std::string("the bytes are no model file of pykd, or were damaged: ") + error.what() +
                      "; export it anew");
  }
}

const Model& model(const Network& network) { return network.model(); }

const std::vector<int64_t>& output_shape(const Network& network) {
  return network.shape(static_cast<int>(network.model().ops.size()));
}

struct Plan::State {
  State(std::shared_ptr<const Network> given, PlanOptions options)
      : network(std::move(given)),
        batch(options.batch),
        inputs(product(network->model().input_shape)),
        outputs(product(output_shape(*network))) {
    if (options.device == Device::kCuda) options.threads = 1;
    if (options.threads > 1) pool = std::make_unique<ThreadPool>(options.threads);
    Planned planned = make_plan(network, options, pool.get());
    choices = std::move(planned.choices);
    programs.push_back(std::move(planned.program));
    for (int i = 1; programs[0].apart() && i < options.threads; ++i) {
      Program& made = programs.emplace_back(network, programs[0].lanes(), batch, options.threads);
      for (size_t step = 0; step < made.steps().size(); ++step)
        if (made.steps()[step].is_layer()) made.take(step, programs[0].weight(step));
    }
    const Model& model = network->model();
    if (model.mean.empty()) return;
    for (size_t channel = 0; channel < model.mean.size(); ++channel)
      for (size_t pixel = 0; pixel < 256; ++pixel)
        values.push_back(
            static_cast<float>((static_cast<double>(pixel) / 255 - static_cast<double>(model.mean[channel])) /
                               static_cast<double>(model.std[channel])));
    unpacked.assign(programs.size(), std::vector<float>(static_cast<size_t>(programs[0].rows() * inputs)));
  }

  // A part of the batch at a time: source(program, row, rows) is where its rows lie.
  template <typename Source>
  void run(const Source& source, float* output) {
    const int64_t rows = programs[0].rows(), parts = (batch + rows - 1) / rows;
    const auto some = [&](size_t i, int64_t begin, int64_t end, ThreadPool* sharing) {
      for (int64_t row = begin * rows; row < std::min(batch, end * rows); row += rows) {
        const int64_t count = std::min(rows, batch - row);
        programs[i].run(source(i, row, count), output + row * outputs, count, sharing);
      }
    };
    if (!programs[0].apart()) return some(0, 0, parts, pool.get());
    const int64_t threads = pool->threads();
    pool->each([&](int i) { some(static_cast<size_t>(i), parts * i / threads, parts * (i + 1) / threads, nullptr); });
  }

  // Rows of pixels to what the network reads.
  const float* unpack(size_t i, const uint8_t* pixels, int64_t rows) noexcept {
    const auto channels = static_cast<int64_t>(values.size() / 256);
    const int64_t each = inputs / channels;
    float* to = unpacked[i].data();
    for (int64_t plane = 0; plane < rows * channels; ++plane) {
      const float* const value = values.data() + plane % channels * 256;
      for (int64_t pixel = 0; pixel < each; ++pixel) *to++ = value[*pixels++];
    }
    return unpacked[i].data();
  }

  std::shared_ptr<const Network> network;
  int64_t batch, inputs, outputs;  // values of a row
  std::unique_ptr<ThreadPool> pool;
  std::vector<Program> programs;  // one for each thread that runs apart
  std::vector<Choice> choices;
  std::vector<float> values;                 // [channels, 256] of pixels; empty: the file has no mean
  std::vector<std::vector<float>> unpacked;  // for each program
};

Plan::Plan(std::shared_ptr<const Network> network, const PlanOptions& options) {
  check(options);
  state_ = std::make_unique<State>(std::move(network), options);
}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

void Plan::run(const float* input, float* output) {
  const int64_t inputs = state_->inputs;
  state_->run([=](size_t, int64_t row, int64_t) { return input + row * inputs; }, output);
}

void Plan::run(const uint8_t* pixels, float* output) {
  State& state = *state_;
  state.run([&](size_t i, int64_t row, int64_t rows) { return state.unpack(i, pixels + row * state.inputs, rows); },
            output);
}

std::vector<Choice> Plan::choices() const { return state_->choices; }

int64_t Plan::workspace_bytes() const {
  int64_t bytes = 0;
  for (const Program& program : state_->programs) bytes += program.workspace_bytes();
  for (const auto& rows : state_->unpacked) bytes += static_cast<int64_t>(rows.size() * sizeof(float));
  return bytes;
}

int64_t Plan::weight_bytes() const { return state_->programs[0].weight_bytes(); }
int64_t Plan::lanes() const { return state_->programs[0].lanes(); }

}  // namespace pykd::runtime
