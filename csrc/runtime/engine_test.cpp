// The engine against the interpreter of network_test.h: random networks of all operators in every number of lanes, form
// of the weights and number of threads; no memory allocated by a run; plans that run at the same time; the cache; the C
// API's bad arguments.
#include "runtime/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>
#include <random>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/kernel_test.h"
#include "runtime/network_test.h"
#include "runtime/planner.h"
#include "runtime/pykd.h"
#include "runtime/sha256.h"

// ---- what is allocated ---------------------------------------------------------------------------------------------

static std::atomic<int64_t> allocations{0};

static void* allocated(std::size_t size, std::size_t alignment) {
  ++allocations;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = alignment > 16 ? std::aligned_alloc(alignment, rounded) : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* operator new(std::size_t size) { return allocated(size, 16); }
void* operator new[](std::size_t size) { return allocated(size, 16); }
void* operator new(std::size_t size, std::align_val_t to) { return allocated(size, static_cast<std::size_t>(to)); }
void* operator new[](std::size_t size, std::align_val_t to) { return allocated(size, static_cast<std::size_t>(to)); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
// Not inlined: the compiler would see that what `new` gave goes to `free`.
[[gnu::noinline]] static void freed(void* memory) { std::free(memory); }
void operator delete(void* memory) noexcept { freed(memory); }
void operator delete[](void* memory) noexcept { freed(memory); }
void operator delete(void* memory, std::size_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::size_t) noexcept { freed(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { freed(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { freed(memory); }

namespace {

using namespace pykd::runtime;
using namespace pykd::runtime::testing;

void test_random_networks() {
  for (uint64_t seed = 0; seed < 120; ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 1, 2, 3, 15, 16, 17, 33, 48, 64, 70});
    const Expected expected = expect(random, model(*network), batch);
    const std::string name =
        "seed " + std::to_string(seed) + " batch " + std::to_string(batch) + " " + described(model(*network));
    for (const int64_t lanes : {int64_t{0}, int64_t{1}, int64_t{std::max(8, pykd::vector_lanes())}, int64_t{16},
                                int64_t{32}, int64_t{48}, int64_t{64}})
      for (const int threads : {1, 2, 3}) {
        if (threads > 1 && (seed + static_cast<uint64_t>(lanes) / 16) % 3 != static_cast<uint64_t>(threads) % 3)
          continue;
        Plan plan(network, {.batch = batch, .threads = threads, .measure = false, .lanes = lanes});
        const std::string its = name + " lanes " + std::to_string(lanes) + " threads " + std::to_string(threads);
        const std::vector<float> first = answered(plan, *network, expected.input, batch);
        compare(expected, first, its);
        check(first == answered(plan, *network, expected.input, batch) ||
                  std::ranges::any_of(first, [](float v) { return std::isnan(v); }),
              its + ": the same bits again");
      }
    if (seed % 4 == 0) {
      Plan plan(network, {.batch = batch, .threads = static_cast<int>(seed / 4 % 3) + 1});
      compare(expected, answered(plan, *network, expected.input, batch), name + " measured");
    }
  }
}

// Every form of every layer, which a plan would take on some machine; threads share every step.
void test_forms() {
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 2, 5, 16, 33});
    const Expected expected = expect(random, model(*network), batch);
    for (const int64_t lanes : {int64_t{1}, int64_t{std::max(8, pykd::vector_lanes())}, int64_t{48}})
      for (size_t which = 0; which < 6; ++which) {
        const int threads = static_cast<int>(which % 3) + 1;
        Program program(network, lanes, batch, threads);
        for (size_t i = 0; i < program.steps().size(); ++i) {
          Step& step = program.steps()[i];
          step.shared = true;
          if (!step.is_layer()) continue;
          const auto& forms = network->forms(step.op);
          program.take(i, program.weight(i, forms[which % forms.size()].form));
        }
        ThreadPool pool(threads);
        const Shape& answer = output_shape(*network);
        std::vector<float> output(at(batch * product(answer)));
        for (int64_t row = 0; row < batch; row += program.rows())
          program.run(expected.input.data() + row * product(model(*network).input_shape),
                      output.data() + row * product(answer), std::min(program.rows(), batch - row), &pool);
        compare(expected, output,
                "forms seed " + std::to_string(seed) + " batch " + std::to_string(batch) + " lanes " +
                    std::to_string(lanes) + " form " + std::to_string(which) + " " + described(model(*network)));
      }
  }
}

void test_networks() {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Random random(seed);
    for (Model& made : std::array{lenet(random, 0.95), residual(random)}) {
      const auto network = load(std::move(made));
      for (const int64_t batch : {1, 7, 64, 300})
        for (const int threads : {1, 2})
          for (const bool measured : {false, true}) {
            if (measured && (batch == 300 || seed)) continue;
            const Expected expected = expect(random, model(*network), batch);
            Plan plan(network, {.batch = batch, .threads = threads, .measure = measured});
            compare(
                expected, answered(plan, *network, expected.input, batch),
                pykd::testing::described({{"network of batch", batch}, {"threads", threads}, {"measured", measured}}));
            check(plan.weight_bytes() > 0 && plan.workspace_bytes() > 0, "bytes are told");
            const auto layers =
                std::ranges::count_if(model(*network).ops, [](const Op& op) { return !op.weight.shape.empty(); });
            check(static_cast<std::ptrdiff_t>(plan.choices().size()) == layers, "a choice for each layer");
            check(std::ranges::all_of(plan.choices(), [](const Choice& c) { return c.us > 0 && !c.form.empty(); }),
                  "with its time");
          }
    }
  }
}

void test_pixels() {
  Random random(5);
  const auto network = load(residual(random));
  for (const int64_t batch : {1, 5, 40})
    for (const int threads : {1, 2}) {
      std::vector<uint8_t> pixels(at(batch * 3 * 144));
      std::vector<float> input;
      for (size_t i = 0; i < pixels.size(); ++i) {
        pixels[i] = static_cast<uint8_t>(whole(random, 0, 255));
        const size_t channel = i / 144 % 3;
        input.push_back(static_cast<float>((pixels[i] / 255.0 - static_cast<double>(model(*network).mean[channel])) /
                                           static_cast<double>(model(*network).std[channel])));
      }
      Plan plan(network, {.batch = batch, .threads = threads, .measure = false});
      std::vector<float> output(at(batch * 10));
      plan.run(pixels.data(), output.data());
      check(output == answered(plan, *network, input, batch), "pixels are read as mean and std say");
    }
}

void test_nothing_is_allocated() {
  Random random(6);
  for (Model& made : std::array{lenet(random, 0.9), residual(random)}) {
    const auto network = load(std::move(made));
    const bool pixels = !model(*network).mean.empty();
    for (const int64_t batch : {1, 3, 100})
      for (const int threads : {1, 2}) {
        Plan plan(network, {.batch = batch, .threads = threads, .measure = false});
        const std::vector<float> input = normals(random, batch * product(model(*network).input_shape));
        const std::vector<uint8_t> image(pixels ? input.size() : 0);
        std::vector<float> output(at(batch * product(output_shape(*network))));
        const int64_t before = allocations;
        plan.run(input.data(), output.data());
        if (pixels) plan.run(image.data(), output.data());
        const int64_t after = allocations;
        check(after == before, "a run allocates nothing");
      }
  }
}

void test_plans_at_the_same_time() {
  Random random(7);
  const auto network = load(residual(random));
  const int64_t batch = 5;
  const std::vector<float> input = normals(random, batch * 3 * 144);
  Plan alone(network, {.batch = batch, .measure = false});
  const std::vector<float> expected = answered(alone, *network, input, batch);
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      Plan plan(network, {.batch = batch, .measure = false});
      for (int run = 0; run < 10; ++run) same += answered(plan, *network, input, batch) == expected;
      if (i == 0) Plan measured(network, {.batch = batch, .threads = 2});
    });
  for (std::thread& thread : threads) thread.join();
  check(same == 40, "plans at the same time answer as one alone");
}

// Strides beyond the image, of two convolutions whose layouts differ in little else.
void test_large_strides() {
  Random random(12);
  const auto answers = [&](Builder& builder, int first, int second, const char* name) {
    builder.add(builder.step(Kind::kFlatten, {first}));
    builder.add(builder.step(Kind::kFlatten, {second}));
    builder.add(builder.step(Kind::kConcat, {builder.last() - 1, builder.last()}));
    const auto network = load(std::move(builder.model));
    const Expected expected = expect(random, model(*network), 2);
    Plan plan(network, {.batch = 2, .measure = false});
    compare(expected, answered(plan, *network, expected.input, 2), name);
  };
  for (const bool turned : {false, true}) {
    Builder layers(random, {16, 64, 2});
    const auto far = [&] { layers.conv2d(0, 3, 1, 1, 1, 0, {2, 65'538}); };
    if (!turned) far();
    layers.add(layers.step(Kind::kTanh, {0}));
    const int near_input = layers.last();
    layers.conv2d(near_input, 3, 2, 1, 1, 0, {2, 2});
    const int near = layers.last();
    if (turned) far();
    answers(layers, turned ? layers.last() : 1, near, "a large stride beside a small one");
    Builder image(random, {1, 2, 1});
    image.conv2d(0, 1, 1, 2, 1, 0, turned ? std::array<int64_t, 2>{1, 2} : std::array<int64_t, 2>{65'537, 1}, {0, 1});
    image.conv2d(0, 1, 1, 1, 1, 0, turned ? std::array<int64_t, 2>{65'537, 1} : std::array<int64_t, 2>{1, 2}, {0, 1});
    answers(image, 1, 2, "strides of one sum");
  }
}

void test_large_batches() {
  Random random(8);
  const auto network = load(lenet(random, 0.98));
  const int64_t batch = 5000;
  const Expected expected = expect(random, model(*network), batch);
  Plan plan(network, {.batch = batch, .threads = 2, .measure = false});
  compare(expected, answered(plan, *network, expected.input, batch), "a large batch");
  check(plan.workspace_bytes() < 4 << 20, "whose values do not lie in memory at once");
}

// ---- the cache -----------------------------------------------------------------------------------------------------

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

void test_cache() {
  Random random(9);
  const auto network = load(lenet(random, 0.9));
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() /
      ("pykd_engine_test." + std::to_string(random()) + "." + std::to_string(std::random_device()()));
  const std::string path = folder / "plans.json";
  const std::vector<float> input = normals(random, 20 * 784);
  const auto planned = [&](const std::string& cache) {
    Plan plan(network, {.batch = 20, .cache = cache});
    std::string forms = std::to_string(plan.lanes());
    for (const Choice& choice : plan.choices()) forms += " " + choice.form + " " + std::to_string(choice.us);
    return std::pair(forms, answered(plan, *network, input, 20));
  };
  const auto measured = planned(path);
  const std::string text = text_of(path);
  check(text.starts_with("{\"pykd plans\":1}\n{\"key\":\""), "measured plans are remembered");
  const auto recalled = planned(path);
  check(recalled.second == measured.second, "a remembered plan gives the same bits");
  check(text_of(path) == text, "and is not measured again");
  const size_t steps = text.find("\"steps\":[");
  write(path, std::regex_replace(text, std::regex(",[0-9.e-]+\\]"), ",123456]"));
  check(planned(path).first.find(" 123456") != std::string::npos, "what it says is taken");
  for (const std::string& broken :
       {std::string("{\"pykd plans\":1}\n{\"key\":\"") + std::string(64, '0') + "\"}\n",
        text.substr(0, text.size() / 2), text.substr(0, text.find("\"lanes\"")) + "\"lanes\":7,\"steps\":[]}\n",
        text.substr(0, steps) + "\"steps\":[[9,9,0,0,1],[9,9,0,0,1],[9,9,0,0,1],[0,0,0,0,1],[0,0,0,0,1]]}\n",
        text.substr(0, steps) + "\"steps\":[[1,1,2,0,1],[1,1,2,0,1],[1,1,2,0,1],[0,0,0,0,1],[0,0,0,0,1]]}\n",
        text.substr(0, steps) + "\"steps\":[[1,1,0,0],3]}\n",
        text.substr(0, steps) + "\"steps\":[" + std::string(5000, '[')}) {
    write(path, broken);
    const auto again = planned(path);
    check(again.second.size() == 200 && text_of(path).size() > 40, "what is broken in a cache is measured again");
    check(planned(path).second == again.second, "and then remembered");
  }
  std::string full = text;
  for (int i = 0; i < 69; ++i) full += "{\"key\":\"" + std::to_string(i) + std::string(60'000, 'x') + "\"}\n";
  write(path, full);  // with the next plan it is larger than what is read
  std::filesystem::resize_file(path, (4 << 20) - 10);
  const auto forgotten = planned(path);
  check(text_of(path).size() < 4 << 20 && planned(path) == forgotten, "a full cache loses its oldest lines");
  for (const char* foreign : {"a letter\n", "{\"pykd plans\":2}\n", "{}"}) {
    write(path, foreign);
    planned(path);
    check(text_of(path) == foreign, "another's file is left alone");
  }
  check(planned(folder).second.size() == 200, "a folder is no cache");
  check(planned("/dev/null/x").second.size() == 200, "a cache that cannot be written is none");
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++files;
  check(files == 1, "no draft is left");
  std::filesystem::remove_all(folder);
}

// ---- misuse --------------------------------------------------------------------------------------------------------

void test_refused_options() {
  Random random(10);
  const auto network = load(lenet(random, 0.9));
  const auto refused = [&](const PlanOptions& options, const std::string& words) {
    try {
      Plan plan(network, options);
      check(false, "refused: " + words);
    } catch (const std::invalid_argument& error) {
      check(std::string(error.what()).find(words) != std::string::npos,
            std::string("says ") + words + ": " + error.what());
    }
  };
  refused({.batch = 0}, "batch should be 1 to 65536 rows, got 0");
  refused({.batch = 65'537}, "batch");
  refused({.batch = INT64_MAX}, "batch");
  refused({.threads = 0}, "threads should be 1 to 256, got 0");
  refused({.threads = 100'000}, "threads");
  refused({.lanes = 7}, "lanes should be");
  refused({.lanes = 80}, "lanes should be");
}

// Padding that no memory holds.
void test_too_large() {
  Random random(11);
  Builder builder(random, {1 << 20, 1, 1});
  Op op = builder.step(Kind::kConv2d, {0});
  op.weight.shape = {1, 1 << 20, 1, 1};
  op.weight.dense = false;
  op.padding = {1 << 20, 1 << 20};
  op.stride = {1, 1};  // as the reader would refuse it; the engine does not rely on that
  op.shape = {1, (1 << 21) + 1, (1 << 21) + 1};
  builder.model.ops.push_back(op);
  try {
    Plan plan(load(std::move(builder.model)), {.measure = false});
    check(false, "too large a network is refused");
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find("too large") != std::string::npos, error.what());
  }
}

// A file of one linear layer without zeros, and what reads it.
std::string small_file(bool pixels) {
  const std::string values(reinterpret_cast<const char*>(std::array<float, 6>{1, 2, 3, 4, 5, 6}.data()), 24);
  const std::string vectors(reinterpret_cast<const char*>(std::array<float, 2>{0.5f, -100}.data()), 8);
  const auto hash = [](const std::string& bytes) { return sha256(bytes.data(), bytes.size()); };
  const std::string description =
      std::string(R"({"version":1,"input":{"shape":[3],"dtype":"float32")") +
      (pixels ? R"(,"mean":[0,0,0],"std":[1,1,1])" : "") +
      R"(},"values":"float32","ops":[{"op":"linear","shape":[2,3]},{"op":"relu"}],"classes":["a","b"],"sha256":{"values":")" +
      hash(values) + R"(","vectors":")" + hash(vectors) + R"("},"provenance":{},"licence":"none"})";
  std::string quoted;
  for (const char c : description) quoted += c == '"' ? std::string("\\\"") : std::string(1, c);
  const std::string header =
      R"({"__metadata__":{"pykd":")" + quoted + R"(","sha256":")" + hash(description) +
      R"("},"vectors":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"values":{"dtype":"F32","shape":[6],"data_offsets":[8,32]}})";
  const uint64_t size = header.size();
  std::string file(reinterpret_cast<const char*>(&size), 8);
  return file + header + vectors + values;
}

void test_c_api() {
  const auto fails = [](pykd_status got, pykd_status expected, const std::string& words) {
    check(got == expected, "status of: " + words);
    check(std::string(pykd_last_error()).find(words) != std::string::npos, words + " in: " + pykd_last_error());
  };
  pykd_model* model = nullptr;
  pykd_plan* plan = nullptr;
  check(std::string(pykd_version()) == PYKD_VERSION, "version");
  fails(pykd_model_load(nullptr, &model), PYKD_ERROR_ARGUMENT, "pykd_model_load needs all its pointers");
  fails(pykd_model_load("there/is/none", nullptr), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_load("there/is/none", &model), PYKD_ERROR_FILE, "there/is/none");
  check(model == nullptr, "no model of a failure");
  pykd_model* const garbage = reinterpret_cast<pykd_model*>(&model);
  model = garbage;
  fails(pykd_model_load(nullptr, &model), PYKD_ERROR_ARGUMENT, "null");
  check(model == nullptr, "nothing that looks like a model either");
  fails(pykd_model_load_bytes("nothing", 7, &model), PYKD_ERROR_FILE, "the bytes are no model file");
  const std::string file = small_file(false);
  check(pykd_model_load_bytes(file.data(), file.size(), &model) == PYKD_OK, std::string("loads: ") + pykd_last_error());
  if (!model) return;
  const int64_t* sides = nullptr;
  size_t rank = 0, classes = 0;
  int takes = 7;
  check(pykd_model_input_shape(model, &sides, &rank) == PYKD_OK && rank == 1 && sides[0] == 3, "input shape");
  check(pykd_model_output_shape(model, &sides, &rank) == PYKD_OK && rank == 1 && sides[0] == 2, "output shape");
  check(pykd_model_classes(model, &classes) == PYKD_OK && classes == 2, "classes");
  const char* name = nullptr;
  check(pykd_model_class(model, 1, &name) == PYKD_OK && std::string(name) == "b", "a class");
  check(pykd_model_takes_pixels(model, &takes) == PYKD_OK && takes == 0, "takes no pixels");
  fails(pykd_model_class(model, 2, &name), PYKD_ERROR_ARGUMENT, "2 classes");
  fails(pykd_model_input_shape(nullptr, &sides, &rank), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_output_shape(model, nullptr, &rank), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_classes(model, nullptr), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_takes_pixels(nullptr, &takes), PYKD_ERROR_ARGUMENT, "null");

  pykd_plan_options options = PYKD_PLAN_OPTIONS;
  fails(pykd_plan_create(nullptr, &options, &plan), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_plan_create(model, &options, nullptr), PYKD_ERROR_ARGUMENT, "null");
  options.size = 3;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "PYKD_PLAN_OPTIONS");
  options = PYKD_PLAN_OPTIONS;
  options.batch = -1;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "batch");
  options = PYKD_PLAN_OPTIONS;
  options.threads = 1'000'000;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "threads");
  options = PYKD_PLAN_OPTIONS;
  options.measure = 5;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "measure");
  options = PYKD_PLAN_OPTIONS;
  options.device = 2;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "PYKD_CPU or PYKD_CUDA");
  options.device = PYKD_CUDA;
  options.precision = -1;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "precision");
  check(plan == nullptr, "no plan of a failure");
  check(pykd_plan_create(model, nullptr, &plan) == PYKD_OK && plan, "a plan without options");
  if (!plan) return;
  pykd_model_free(model);
  const float input[3] = {1, 1, 1};
  float output[2] = {};
  check(pykd_plan_run(plan, input, 3, output, 2) == PYKD_OK && output[0] == 6.5f && output[1] == 0, "answers");
  fails(pykd_plan_run(plan, input, 2, output, 2), PYKD_ERROR_ARGUMENT,
        "reads 3 numbers and writes 2, got places for 2 and 2");
  fails(pykd_plan_run(plan, input, 3, output, 20), PYKD_ERROR_ARGUMENT, "got places for 3 and 20");
  fails(pykd_plan_run(plan, nullptr, 3, output, 2), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_plan_run(nullptr, input, 3, output, 2), PYKD_ERROR_ARGUMENT, "null");
  const uint8_t pixels[3] = {255, 0, 51};
  fails(pykd_plan_run_pixels(plan, pixels, 3, output, 2), PYKD_ERROR_ARGUMENT, "pixels");
  pykd_plan_free(plan);
  pykd_plan_free(nullptr);
  pykd_model_free(nullptr);

  const std::string other = small_file(true);
  check(pykd_model_load_bytes(other.data(), other.size(), &model) == PYKD_OK,
        std::string("loads: ") + pykd_last_error());
  if (!model) return;
  check(pykd_plan_create(model, nullptr, &plan) == PYKD_OK, "a plan of pixels");
  check(pykd_plan_run_pixels(plan, pixels, 3, output, 2) == PYKD_OK && std::abs(output[0] - 2.1f) < 1e-6f,
        "answers pixels");
  pykd_plan_free(plan);
  pykd_model_free(model);
}

}  // namespace

int main() {
  test_random_networks();
  test_forms();
  test_networks();
  test_pixels();
  test_nothing_is_allocated();
  test_plans_at_the_same_time();
  test_large_strides();
  test_large_batches();
  test_cache();
  test_refused_options();
  test_too_large();
  test_c_api();
  return report();
}
