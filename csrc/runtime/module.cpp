// The Python module pykd._runtime: the engine on numpy arrays, without torch. pykd.deploy.Model is its face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_isa.h"
#include "runtime/bench.h"
#include "runtime/engine.h"
#include "runtime/latencies.h"
#include "runtime/pykd.h"
#include "runtime/record.h"

namespace py = pybind11;

namespace pykd::runtime {
namespace {

struct SharedNetwork {
  std::shared_ptr<const Network> network;
};

Device device_of(const std::string& text) {
  for (const Device device : {Device::kCpu, Device::kCuda})
    if (text == name(device)) return device;
  throw std::invalid_argument("device should be cpu or cuda, got " + text);
}

Precision precision_of(const std::string& text) {
  for (const Precision precision : {Precision::kFloat32, Precision::kFloat16, Precision::kBFloat16})
    if (text == name(precision)) return precision;
  throw std::invalid_argument("precision should be float32, float16 or bfloat16, got " + text);
}

py::tuple tuple_of(const auto& items) {
  py::tuple result(items.size());
  for (size_t i = 0; i < items.size(); ++i) result[i] = items[i];
  return result;
}

// A plan that several of Python's threads may call: one after another.
class SharedPlan {
 public:
  SharedPlan(const SharedNetwork& network, const PlanOptions& options)
      : network_(network.network), plan_(network.network, options), batch_(options.batch) {}

  py::array_t<float> run(const py::array& input) {
    const bool pixels = py::isinstance<py::array_t<uint8_t>>(input);
    const int needed = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
    if ((!pixels && !py::isinstance<py::array_t<float>>(input)) || (input.flags() & needed) != needed)
      throw std::invalid_argument(
          "the input should be float32 or uint8 in C order: pass numpy.ascontiguousarray of it");
    const Model& file = model(*network_);
    if (pixels && file.mean.empty())
      throw std::invalid_argument("the file does not say what pixels mean (mean and std): give float32");
    const std::vector<int64_t> given(input.shape(), input.shape() + input.ndim()), wanted = of_batch(file.input_shape);
    if (given != wanted) throw std::invalid_argument("the input should be " + text(wanted) + ", got " + text(given));
    py::array_t<float> output(of_batch(output_shape(*network_)));
    const void* const from = input.data();
    float* const to = output.mutable_data();
    const py::handle kept = output.release();
    PyThreadState* const state = PyEval_SaveThread();
    {
      const std::lock_guard one(mutex_);
      if (pixels)
        plan_.run(static_cast<const uint8_t*>(from), to);
      else
        plan_.run(static_cast<const float*>(from), to);
    }
    PyEval_RestoreThread(state);  // ends a daemon thread once the interpreter does, which no destructor would bear
    return py::reinterpret_steal<py::array_t<float>>(kept);
  }

  std::vector<double> latencies(double seconds) {
    const auto floats = [this](const std::vector<int64_t>& row) {
      return std::vector<float>(static_cast<size_t>(batch_ * product(row)));
    };
    const std::vector<float> input = floats(model(*network_).input_shape);
    std::vector<float> output = floats(output_shape(*network_));
    const std::lock_guard one(mutex_);
    return runtime::latencies([&] { plan_.run(input.data(), output.data()); }, seconds);
  }

  py::list choices() const {
    py::list all;
    for (const Choice& choice : plan_.choices())
      all.append(py::make_tuple(choice.op + 1, name(model(*network_).ops[static_cast<size_t>(choice.op)].kind),
                                choice.form, choice.us));
    return all;
  }

  const Plan& plan() const { return plan_; }

 private:
  std::vector<int64_t> of_batch(std::vector<int64_t> row) const {
    row.insert(row.begin(), batch_);
    return row;
  }

  std::shared_ptr<const Network> network_;
  Plan plan_;
  int64_t batch_;
  std::mutex mutex_;
};

// The record as JSON. say(sentence) is called while it measures; what it raises ends the measurement.
std::string measured(const std::string& file, const std::vector<int64_t>& batches, const std::vector<int>& threads,
                     const std::vector<std::string>& devices, const std::vector<std::string>& precisions, bool dense,
                     bool power, double seconds, const std::string& input, const std::string& check,
                     const std::vector<std::string>& trtexec, const std::string& root, const std::string& cache,
                     const std::string& samples, const py::object& say) {
  BenchOptions options{file,    batches, threads, {},      {},   dense, power,
                       seconds, input,   check,   trtexec, root, cache, samples};
  for (const std::string& device : devices) options.devices.push_back(device_of(device));
  for (const std::string& precision : precisions) options.precisions.push_back(precision_of(precision));
  std::exception_ptr raised;
  DeviceResult result;
  try {
    const py::gil_scoped_release released;
    result = measure(options, [&](const std::string& doing) {
      const py::gil_scoped_acquire acquired;
      try {
        if (PyErr_CheckSignals()) throw py::error_already_set();
        if (!say.is_none()) say(doing);
      } catch (...) {
        raised = std::current_exception();
        throw Interrupted();
      }
    });
  } catch (const Interrupted&) {
  }
  if (raised) std::rethrow_exception(raised);
  return json(result);
}

PYBIND11_MODULE(_runtime, m) {
  m.attr("most_threads") = kMostThreads;
  m.def("isa", &cpu_isa_name);
  m.def("machine", [](const std::string& root) { return json(machine(root)); }, py::arg("root") = "/");
  m.def("measure", &measured, py::arg("file"), py::kw_only(), py::arg("batches") = std::vector<int64_t>{1},
        py::arg("threads") = std::vector<int>{1}, py::arg("devices") = std::vector<std::string>{"cpu"},
        py::arg("precisions") = std::vector<std::string>{"float32"}, py::arg("dense") = false, py::arg("power") = false,
        py::arg("seconds") = 2.0, py::arg("input") = "", py::arg("check") = "",
        py::arg("trtexec") = std::vector<std::string>{}, py::arg("root") = "/", py::arg("cache") = "",
        py::arg("samples") = "", py::arg("say") = py::none());
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const FormatError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });

  const auto get = [](auto field) {
    return [field](const SharedNetwork& self) { return field(model(*self.network)); };
  };
  py::class_<SharedNetwork>(m, "Network")
      .def(py::init([](const std::string& path) {
             const py::gil_scoped_release released;
             return SharedNetwork{load(path.c_str())};
           }),
           py::arg("path"))
      .def_property_readonly("input_shape", get([](const Model& file) { return tuple_of(file.input_shape); }))
      .def_property_readonly("output_shape",
                             [](const SharedNetwork& self) { return tuple_of(output_shape(*self.network)); })
      .def_property_readonly("takes_pixels", get([](const Model& file) { return !file.mean.empty(); }))
      .def_property_readonly("ends_in_softmax", get([](const Model& file) {
                               return !file.ops.empty() && file.ops.back().kind == Kind::kSoftmax;
                             }))
      .def_property_readonly("classes", get([](const Model& file) { return tuple_of(file.classes); }))
      .def_property_readonly("licence", get([](const Model& file) { return file.licence; }))
      .def_property_readonly("provenance", get([](const Model& file) {
                               py::dict words;
                               for (const auto& [key, value] : file.provenance) words[py::str(key)] = value;
                               return words;
                             }))
      .def_property_readonly("file_bytes", get([](const Model& file) { return file.file_bytes; }));

  py::class_<SharedPlan>(m, "Plan")
      .def(py::init([](const SharedNetwork& network, int64_t batch, int threads, bool measure, const std::string& cache,
                       const std::string& device, const std::string& precision) {
             const py::gil_scoped_release released;
             return std::make_unique<SharedPlan>(network, PlanOptions{.batch = batch,
                                                                      .threads = threads,
                                                                      .measure = measure,
                                                                      .cache = cache,
                                                                      .device = device_of(device),
                                                                      .precision = precision_of(precision)});
           }),
           py::arg("network"), py::arg("batch") = 1, py::arg("threads") = 1, py::arg("measure") = true,
           py::arg("cache") = "", py::arg("device") = "cpu", py::arg("precision") = "float32")
      .def("run", &SharedPlan::run, py::arg("input"))
      .def("latencies", &SharedPlan::latencies, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("choices", &SharedPlan::choices)
      .def_property_readonly("workspace_bytes", [](const SharedPlan& self) { return self.plan().workspace_bytes(); })
      .def_property_readonly("weight_bytes", [](const SharedPlan& self) { return self.plan().weight_bytes(); });
}

}  // namespace
}  // namespace pykd::runtime
