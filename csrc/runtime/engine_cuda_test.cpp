// The engine on CUDA: random networks of all operators in every number of lanes and form of the weights, in float32 and
// on tensor cores, against the interpreter of network_test.h; plans that run at the same time. Under emulation also
// weights that plans share, and calls of CUDA that fail, each in turn.
#include <array>
#include <atomic>
#include <filesystem>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "runtime/network_test.h"
#include "runtime/program.h"

namespace {

using namespace pykd::runtime;
using namespace pykd::runtime::testing;

#if defined(PYKD_CARD)
void integrate(bool) {}  // a card is what it is
#else
pykd::emulation::Device& device() { return pykd::emulation::Device::get(); }
void integrate(bool integrated) { device().integrated = integrated; }
#endif

PlanOptions on_cuda(int64_t batch, int64_t lanes = 0, Precision precision = Precision::kFloat32) {
  return {.batch = batch, .measure = false, .lanes = lanes, .device = Device::kCuda, .precision = precision};
}

// Twice, with other rows in between: a graph holds no rows.
void compare_plan(const Network& network, Plan& plan, const Expected& expected, int64_t batch,
                  const std::string& name) {
  const std::vector<float> first = answered(plan, network, expected.input, batch);
  compare(expected, first, name);
  answered(plan, network, std::vector<float>(expected.input.size(), 0.25f), batch);
  check(first == answered(plan, network, expected.input, batch) ||
            std::ranges::any_of(first, [](float v) { return std::isnan(v); }),
        name + ": the same bits again");
}

void test_random_networks() {
  for (uint64_t seed = 0; seed < (kSlow ? 3 : 16); ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 2, 5, 17, 33});
    integrate(coin(random));
    const Expected expected = expect(random, model(*network), batch);
    const std::string name =
        "seed " + std::to_string(seed) + " batch " + std::to_string(batch) + " " + described(model(*network));
    for (const int64_t lanes : {0, 1, 16, 48}) {
      Plan plan(network, on_cuda(batch, lanes));
      compare_plan(*network, plan, expected, batch, name + " lanes " + std::to_string(lanes));
    }
    if (seed % 8) continue;
    PlanOptions options = on_cuda(batch);
    options.measure = true;
    Plan plan(network, options);
    compare_plan(*network, plan, expected, batch, name + " measured");
    check(std::ranges::all_of(plan.choices(), [](const Choice& c) { return c.us > 0; }), "with the layers' times");
  }
}

// Every form of every layer.
void test_forms() {
  for (uint64_t seed = 2000; seed < (kSlow ? 2002 : 2008); ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 3, 18});
    const Expected expected = expect(random, model(*network), batch);
    for (const int64_t lanes : {1, 32})
      for (size_t which = 0; which < 6; ++which) {
        Program program(network, lanes, batch, 1, Device::kCuda);
        for (size_t i = 0; i < program.steps().size(); ++i) {
          if (!program.steps()[i].is_layer()) continue;
          const auto& forms = network->forms(program.steps()[i].op);
          program.take(i, program.weight(i, forms[which % forms.size()].form));
        }
        std::vector<float> output(at(batch * product(output_shape(*network))));
        program.run(expected.input.data(), output.data(), batch, nullptr);
        compare(expected, output,
                "forms seed " + std::to_string(seed) + " lanes " + std::to_string(lanes) + " form " +
                    std::to_string(which) + " " + described(model(*network)));
      }
  }
}

// A network whose layers all have forms for tensor cores.
Model of_squares(Random& random) {
  Builder b(random, {16, 6, 7});
  const auto squares = [&](Op op, const Shape& shape) {
    op.weight.shape = shape;
    op.weight.dense = false;
    op.weight.block_rows = op.weight.block_columns = 16;
    const int64_t across = (product(shape) / shape[0] + 15) / 16;
    for (int64_t place = 0; place < (shape[0] + 15) / 16 * across; ++place)
      if (coin(random)) op.weight.positions.push_back(place);
    op.weight.values = normals(random, static_cast<int64_t>(op.weight.positions.size()) * 256, 0.2);
    // Beyond the edge there is nothing.
    for (size_t block = 0; block < op.weight.positions.size(); ++block)
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t c = 0; c < 16; ++c)
          if (op.weight.positions[block] / across * 16 + r >= shape[0] ||
              op.weight.positions[block] % across * 16 + c >= product(shape) / shape[0])
            op.weight.values[block * 256 + at(r * 16 + c)] = 0;
    op.bias = normals(random, shape[0]);
    op.padding = {1, 1};
    if (op.kind == Kind::kLinear) op.padding = {0, 0};
    return op;
  };
  b.add(squares(b.step(Kind::kConv2d), {32, 16, 3, 3}));
  b.add(b.step(Kind::kRelu));
  Op strided = squares(b.step(Kind::kConv2d), {40, 32, 3, 3});
  strided.stride = {2, 2};
  b.add(strided);
  b.add(b.step(Kind::kFlatten));
  b.add(squares(b.step(Kind::kLinear), {50, product(b.shape(b.last()))}));
  b.add(b.step(Kind::kTanh));
  b.linear(10, 0.5);
  return std::move(b.model);
}

void test_tensor_cores() {
  for (uint64_t seed = 0; seed < (kSlow ? 1 : 2); ++seed) {
    Random random(seed);
    const auto network = load(of_squares(random));
    for (const int64_t batch : kSlow ? std::vector<int64_t>{5} : std::vector<int64_t>{1, 5, 20})
      for (const auto& [precision, unit, word] : {std::tuple{Precision::kFloat16, 0x1p-11, "float16"},
                                                  std::tuple{Precision::kBFloat16, 0x1p-8, "bfloat16"}}) {
        const Expected expected = expect(random, model(*network), batch, unit);
        for (const int64_t lanes : {1, 16}) {
          Plan plan(network, on_cuda(batch, lanes, precision));
          const std::string name = pykd::testing::described({{"squares of batch", batch}, {"lanes", lanes}}) + word;
          compare_plan(*network, plan, expected, batch, name);
          const auto choices = plan.choices();
          for (size_t i = 0; i < 3; ++i)
            check(choices[i].form == std::string("sparse 16x16 ") + word, name + ": on tensor cores");
        }
      }
  }
}

void test_dense() {
  Random random(3);
  const auto network = load(of_squares(random));
  PlanOptions options = on_cuda(2);
  options.dense = true;
  const Expected expected = expect(random, model(*network), 2);
  Plan plan(network, options);
  compare_plan(*network, plan, expected, 2, "dense");
  check(std::ranges::all_of(plan.choices(), [](const Choice& c) { return c.form == "dense"; }), "all lie dense");
}

#if !defined(PYKD_CARD)
void test_weights_are_uploaded_once() {
  Random random(4);
  const auto network = load(lenet(random, 0.9));
  device().integrated = true;
  const size_t before = device().used;
  Plan first(network, on_cuda(1));
  const size_t one = device().used;
  Plan second(network, on_cuda(1));
  const size_t two = device().used;
  check(one - before == two - one + static_cast<size_t>(first.weight_bytes()), "the second plan brings no weights");
  device().integrated = false;
  Plan third(network, on_cuda(1));
  check(device().used - two == two - one + (784 + 10) * sizeof(float), "memory of its own where none is shared");
  device().integrated = true;
}

Model of_one_layer(Random& random) {
  Builder b(random, {8});
  b.linear(4, 0.5);
  return std::move(b.model);
}

// A call launches a graph and waits; what it needs was there when the plan was.
void test_calls_allocate_nothing() {
  Random random(8);
  const auto network = load(of_one_layer(random));
  const std::vector<float> input(8);
  std::vector<float> output(4);
  for (const bool measure : {false, true}) {
    PlanOptions options = on_cuda(1, 1);
    options.measure = measure;
    Plan plan(network, options);
    device().fails_after = 2;
    plan.run(input.data(), output.data());
    check(device().fails_after == 0, "two calls of CUDA that may fail");
    device().fails_after = -1;
  }
}

// Plans use the first device, also in threads that use another one otherwise, which they go on with.
void test_threads_of_another_device() {
  Random random(9);
  const auto network = load(of_one_layer(random));
  const std::vector<float> input = normals(random, 2 * 8);
  Plan plan(network, on_cuda(2));
  const std::vector<float> expected = answered(plan, *network, input, 2);
  std::thread([&] {
    cudaSetDevice(1);
    PlanOptions options = on_cuda(2, 1);
    options.measure = true;
    Plan made_here(network, options);
    check(answered(plan, *network, input, 2) == expected, "a plan of another thread");
    check(answered(made_here, *network, input, 2).size() == expected.size(), "a plan made there");
    int current = 0;
    cudaGetDevice(&current);
    check(current == 1, "the thread's device stays");
  }).join();
}

// Where plans of more lanes do not fit beside that of one, it is taken.
void test_little_memory() {
  Random random(10);
  const auto network = load(of_squares(random));
  const size_t before = device().used;
  size_t one = 0;
  {
    Plan plan(network, on_cuda(17, 1));
    one = device().used - before;
  }
  device().memory = before + one + one / 4;
  Plan plan(network, on_cuda(17));
  check(plan.lanes() == 1, "what fits is taken");
  device().memory = size_t{1} << 30;
}

// Each call of CUDA fails in turn: it is told, and nothing stays.
void test_failures() {
  Random random(5);
  const auto network = load(of_squares(random));
  const std::vector<float> input(16 * 42);
  std::vector<float> output(10);
  int told = 0;
  for (int call = 0; call < 1000; ++call) {
    const size_t before = device().used;
    device().fails_after = call;
    bool failed = false;
    try {
      Plan plan(network, on_cuda(1));
      plan.run(input.data(), output.data());
    } catch (const std::bad_alloc&) {
      failed = true;
    } catch (const std::runtime_error& error) {
      failed = std::string(error.what()).starts_with("CUDA: ");
    }
    const bool all_done = device().fails_after >= 0;
    device().fails_after = -1;
    check(device().used == before, "nothing stays on the device");
    if (all_done) break;
    check(failed, "call " + std::to_string(call) + " that fails is told");
    ++told;
  }
  check(told > 20 && told < 1000, "calls that fail are told");

  device().memory = device().used + 10'000;
  try {
    Plan plan(network, on_cuda(1));
    check(false, "too little memory is told");
  } catch (const std::bad_alloc&) {
  }
  device().memory = size_t{1} << 30;

  device().present = false;
  try {
    Plan plan(network, on_cuda(1));
    check(false, "no device is told");
  } catch (const std::runtime_error& error) {
    check(std::string(error.what()).starts_with("CUDA finds no device here"), error.what());
  }
  device().present = true;
  check(cuda_device().integrated && cuda_device().major == 8, "what the device says of itself");
}
#endif

void test_refused_options() {
  Random random(6);
  const auto network = load(lenet(random, 0.9));
  const auto refused = [&](const PlanOptions& options, const std::string& why) {
    try {
      Plan plan(network, options);
      check(false, why);
    } catch (const std::invalid_argument& error) {
      check(std::string(error.what()).starts_with(why), error.what());
    }
  };
  refused(on_cuda(1, 8), "lanes should be 0, 1 or a multiple of 16");
  refused({.precision = Precision::kFloat16}, "the engine multiplies in float32 on the CPU");
  Model large = of_squares(random);
  large.ops[0].weight.values[0] = 70'000;
  const auto beyond = load(std::move(large));
  try {
    Plan plan(beyond, on_cuda(1, 1, Precision::kFloat16));
    check(false, "a weight beyond float16 is told");
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).starts_with("a weight is larger than float16's 65504"), error.what());
  }
  Plan plan(beyond, on_cuda(1, 1, Precision::kBFloat16));
  check(plan.choices()[0].form == "sparse 16x16 bfloat16", "but within bfloat16");
}

void test_cache() {
  Random random(9);
  const auto network = load(of_squares(random));
  const auto path = std::filesystem::temp_directory_path() /
                    ("pykd_engine_cuda_test." + std::to_string(std::random_device()()) + ".json");
  const std::vector<float> input(16 * 42, 0.5f);
  const auto planned = [&](Precision precision) {
    PlanOptions options = on_cuda(1, 1, precision);
    options.measure = true;
    options.cache = path;
    Plan plan(network, options);
    std::string forms;
    for (const Choice& choice : plan.choices()) forms += choice.form + ";";
    return std::pair(forms, answered(plan, *network, input, 1));
  };
  const auto measured = planned(Precision::kFloat16);
  check(planned(Precision::kFloat16) == measured, "a plan with halves is remembered");
  check(planned(Precision::kFloat32).first.find("float16") == std::string::npos, "for its precision alone");
  std::filesystem::remove(path);
}

void test_plans_at_the_same_time() {
  Random random(7);
  const auto network = load(residual(random));
  const int64_t batch = 3;
  const std::vector<float> input = normals(random, batch * 3 * 144);
  Plan alone(network, on_cuda(batch));
  const std::vector<float> expected = answered(alone, *network, input, batch);
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      Plan plan(network, on_cuda(batch));
      for (int run = 0; run < 3; ++run) same += answered(plan, *network, input, batch) == expected;
    });
  for (std::thread& thread : threads) thread.join();
  check(same == 9, "plans at the same time answer as one alone");
}

}  // namespace

int main() {
  test_random_networks();
  test_forms();
  test_tensor_cores();
  test_dense();
  test_refused_options();
  test_cache();
  test_plans_at_the_same_time();
#if !defined(PYKD_CARD)
  test_weights_are_uploaded_once();
  test_calls_allocate_nothing();
  test_threads_of_another_device();
  test_little_memory();
  test_failures();
  check(device().used == 0, "all memory is given back");
#endif
  return report();
}
