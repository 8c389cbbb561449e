// The Python module pykd._runtime: the engine on numpy arrays, without torch. pykd.deploy.Model is its face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_isa.h"
#include "runtime/engine.h"
#include "runtime/latencies.h"
#include "runtime/pykd.h"

namespace py = pybind11;

namespace pykd::runtime {
namespace {

struct SharedNetwork {
  std::shared_ptr<const Network> network;
};

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

PYBIND11_MODULE(_runtime, m) {
  m.attr("most_threads") = kMostThreads;
  m.def("isa", &cpu_isa_name);
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
      .def(py::init(
               [](const SharedNetwork& network, int64_t batch, int threads, bool measure, const std::string& cache) {
                 const py::gil_scoped_release released;
                 return std::make_unique<SharedPlan>(
                     network, PlanOptions{.batch = batch, .threads = threads, .measure = measure, .cache = cache});
               }),
           py::arg("network"), py::arg("batch") = 1, py::arg("threads") = 1, py::arg("measure") = true,
           py::arg("cache") = "")
      .def("run", &SharedPlan::run, py::arg("input"))
      .def("latencies", &SharedPlan::latencies, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("choices", &SharedPlan::choices)
      .def_property_readonly("workspace_bytes", [](const SharedPlan& self) { return self.plan().workspace_bytes(); })
      .def_property_readonly("weight_bytes", [](const SharedPlan& self) { return self.plan().weight_bytes(); });
}

}  // namespace
}  // namespace pykd::runtime
