// The C API over the C++ one: no exception leaves it.
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/engine.h"
#include "runtime/pykd.h"

using namespace pykd::runtime;

struct pykd_model {
  std::shared_ptr<const Network> network;
};

struct pykd_plan {
  Plan plan;
  size_t inputs, outputs;
  bool takes_pixels;
};

namespace {

// Of a fixed size: to tell of exhausted memory takes none.
thread_local char last_error[1024] = "";

pykd_status fail(pykd_status status, const char* sentence) {
  size_t i = 0;
  for (; i + 1 < sizeof last_error && sentence[i]; ++i) last_error[i] = sentence[i];
  last_error[i] = 0;
  return status;
}

template <typename Call>
pykd_status guarded(const Call& call) {
  try {
    return call();
  } catch (const FormatError& error) {
    return fail(PYKD_ERROR_FILE, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(PYKD_ERROR_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(PYKD_ERROR_MEMORY, "there is not enough memory: use a smaller batch or fewer threads");
  } catch (const std::exception& error) {
    return fail(PYKD_ERROR_SYSTEM, error.what());
  }
}

// Whether all are given; says so otherwise.
template <typename... Pointers>
bool given(const char* call, Pointers... pointers) {
  if ((pointers && ...)) return true;
  char sentence[128];
  std::snprintf(sentence, sizeof sentence, "%s needs all its pointers, got a null one", call);
  fail(PYKD_ERROR_ARGUMENT, sentence);
  return false;
}

template <typename Load>
pykd_status load_model(pykd_model** to, const Load& load) {
  return guarded([&] {
    *to = new pykd_model{load()};
    return PYKD_OK;
  });
}

pykd_status give_shape(const std::vector<int64_t>& shape, const int64_t** sides, size_t* rank) {
  *sides = shape.data();
  *rank = shape.size();
  return PYKD_OK;
}

template <typename Input>
pykd_status run(pykd_plan* plan, const Input* input, size_t inputs, float* output, size_t outputs) {
  if (inputs != plan->inputs || outputs != plan->outputs) {
    char sentence[160];
    std::snprintf(sentence, sizeof sentence, "the plan reads %zu numbers and writes %zu, got places for %zu and %zu",
                  plan->inputs, plan->outputs, inputs, outputs);
    return fail(PYKD_ERROR_ARGUMENT, sentence);
  }
  return guarded([&] {
    plan->plan.run(input, output);
    return PYKD_OK;
  });
}

}  // namespace

const char* pykd_version(void) { return PYKD_VERSION; }
const char* pykd_last_error(void) { return last_error; }

pykd_status pykd_model_load(const char* path, pykd_model** to) {
  if (to) *to = nullptr;
  if (!given("pykd_model_load", path, to)) return PYKD_ERROR_ARGUMENT;
  return load_model(to, [&] { return load(path); });
}

pykd_status pykd_model_load_bytes(const void* bytes, size_t size, pykd_model** to) {
  if (to) *to = nullptr;
  if (!given("pykd_model_load_bytes", bytes, to)) return PYKD_ERROR_ARGUMENT;
  return load_model(to, [&] { return load(static_cast<const unsigned char*>(bytes), size); });
}

void pykd_model_free(pykd_model* model) { delete model; }

pykd_status pykd_model_input_shape(const pykd_model* of, const int64_t** sides, size_t* rank) {
  if (!given("pykd_model_input_shape", of, sides, rank)) return PYKD_ERROR_ARGUMENT;
  return give_shape(model(*of->network).input_shape, sides, rank);
}

pykd_status pykd_model_output_shape(const pykd_model* of, const int64_t** sides, size_t* rank) {
  if (!given("pykd_model_output_shape", of, sides, rank)) return PYKD_ERROR_ARGUMENT;
  return give_shape(output_shape(*of->network), sides, rank);
}

pykd_status pykd_model_classes(const pykd_model* of, size_t* count) {
  if (!given("pykd_model_classes", of, count)) return PYKD_ERROR_ARGUMENT;
  *count = model(*of->network).classes.size();
  return PYKD_OK;
}

pykd_status pykd_model_class(const pykd_model* of, size_t number, const char** name) {
  if (!given("pykd_model_class", of, name)) return PYKD_ERROR_ARGUMENT;
  const auto& classes = model(*of->network).classes;
  if (number >= classes.size()) {
    char sentence[128];
    std::snprintf(sentence, sizeof sentence, "the model has %zu classes: ask for a number below that, got %zu",
                  classes.size(), number);
    return fail(PYKD_ERROR_ARGUMENT, sentence);
  }
  *name = classes[number].c_str();
  return PYKD_OK;
}

pykd_status pykd_model_takes_pixels(const pykd_model* of, int* takes) {
  if (!given("pykd_model_takes_pixels", of, takes)) return PYKD_ERROR_ARGUMENT;
  *takes = !model(*of->network).mean.empty();
  return PYKD_OK;
}

pykd_status pykd_plan_create(const pykd_model* of, const pykd_plan_options* options, pykd_plan** to) {
  if (to) *to = nullptr;
  if (!given("pykd_plan_create", of, to)) return PYKD_ERROR_ARGUMENT;
  const pykd_plan_options usual = PYKD_PLAN_OPTIONS;
  if (!options) options = &usual;
  if (options->size != sizeof(pykd_plan_options))
    return fail(PYKD_ERROR_ARGUMENT, "options.size should be sizeof(pykd_plan_options): begin with PYKD_PLAN_OPTIONS");
  if (options->measure != 0 && options->measure != 1)
    return fail(PYKD_ERROR_ARGUMENT, "options.measure should be 0 or 1");
  if (options->device != PYKD_CPU && options->device != PYKD_CUDA)
    return fail(PYKD_ERROR_ARGUMENT, "options.device should be PYKD_CPU or PYKD_CUDA");
  if (options->precision < PYKD_FLOAT32 || options->precision > PYKD_BFLOAT16)
    return fail(PYKD_ERROR_ARGUMENT, "options.precision should be PYKD_FLOAT32, PYKD_FLOAT16 or PYKD_BFLOAT16");
  return guarded([&] {
    const PlanOptions wanted{.batch = options->batch,
                             .threads = options->threads,
                             .measure = options->measure == 1,
                             .cache = options->cache ? options->cache : "",
                             .device = static_cast<Device>(options->device),
                             .precision = static_cast<Precision>(options->precision)};
    const Model& its = model(*of->network);
    const auto rows = static_cast<size_t>(options->batch);
    *to = new pykd_plan{Plan(of->network, wanted), rows * static_cast<size_t>(product(its.input_shape)),
                        rows * static_cast<size_t>(product(output_shape(*of->network))), !its.mean.empty()};
    return PYKD_OK;
  });
}

void pykd_plan_free(pykd_plan* plan) { delete plan; }

pykd_status pykd_plan_run(pykd_plan* plan, const float* input, size_t inputs, float* output, size_t outputs) {
  if (!given("pykd_plan_run", plan, input, output)) return PYKD_ERROR_ARGUMENT;
  return run(plan, input, inputs, output, outputs);
}

pykd_status pykd_plan_run_pixels(pykd_plan* plan, const uint8_t* pixels, size_t inputs, float* output, size_t outputs) {
  if (!given("pykd_plan_run_pixels", plan, pixels, output)) return PYKD_ERROR_ARGUMENT;
  if (!plan->takes_pixels)
    return fail(PYKD_ERROR_ARGUMENT, "the model file does not say how pixels are read: use pykd_plan_run");
  return run(plan, pixels, inputs, output, outputs);
}
