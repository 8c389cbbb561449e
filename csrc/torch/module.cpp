// The Python module: importing it registers every op; it also says how it was built.
//
// Eager calls come through here: torch.ops parses a schema of a dozen arguments in 3 us, pybind11 in less than one.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/cpu_isa.h"
#include "torch/ops/logit_regression.h"

PYBIND11_MODULE(_C, m) {
  using torch::wrap_pybind_function_no_gil;
  m.doc() = "pykd's compiled operators (torch.ops.pykd.*)";
  m.attr("torch_version") = PYKD_BUILD_TORCH;
  m.attr("cuda") = static_cast<bool>(PYKD_WITH_CUDA);
  m.attr("cuda_reason") = PYKD_CUDA_REASON;
  m.def("isa", &pykd::cpu_isa_name, "The instruction set the CPU kernels run with: baseline, avx2 or avx512.");
  m.def("logit_regression", wrap_pybind_function_no_gil(pykd::glue::logit_regression));
  m.def("logit_regression_and_grad", wrap_pybind_function_no_gil(pykd::glue::logit_regression_and_grad));
  m.def("logit_regression_and_grad_out", wrap_pybind_function_no_gil(pykd::glue::logit_regression_and_grad_out));
}
