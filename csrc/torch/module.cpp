// The Python module: importing it registers every op; it also says how it was built.
//
// Eager calls come through here: torch.ops parses a schema of a dozen arguments in 3 us, pybind11 in less than one.
#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "core/cpu_isa.h"
#include "torch/ops/block_norm.h"
#include "torch/ops/block_prox.h"
#include "torch/ops/distillation_loss.h"
#include "torch/ops/factor_loss.h"
#include "torch/ops/linear_distillation_loss.h"
#include "torch/ops/logit_regression.h"
#include "torch/ops/noisy_logits.h"
#include "torch/ops/sparse_conv2d.h"
#include "torch/ops/sparse_linear.h"
#include "torch/ops/variational_kl.h"
#include "torch/ops/variational_layer.h"

namespace {

using torch::wrap_pybind_function_no_gil;

template <typename Op>
void define_loss(pybind11::module& m) {
  using pykd::glue::Loss;
  const auto name = [](const char* form) { return Loss<Op>::name(form); };
  m.def(Op::kName, wrap_pybind_function_no_gil(Loss<Op>::eager));
  m.def(name("_and_grad").c_str(), wrap_pybind_function_no_gil(Loss<Op>::eager_and_grad));
  m.def(name("_and_grad_out").c_str(), wrap_pybind_function_no_gil(Loss<Op>::eager_and_grad_out));
}

// positions [stored], values [stored, block rows, block columns]; halves: float16 or bfloat16 if they are wanted, too
auto sparse_pack(const pybind11::array_t<int64_t, pybind11::array::c_style>& positions,
                 const pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>& values,
                 int64_t rows, int64_t columns, int64_t groups, at::Device device, at::ScalarType halves) {
  TORCH_CHECK_VALUE(positions.ndim() == 1 && values.ndim() == 3 && values.shape(0) == positions.shape(0),
                    "sparse_pack: values must be [stored, block rows, block columns] for positions [stored]");
  const pykd::DType dtype = halves == at::kHalf       ? pykd::DType::kFloat16
                            : halves == at::kBFloat16 ? pykd::DType::kBFloat16
                                                      : pykd::DType::kFloat32;
  return pykd::glue::sparse_pack({positions.data(), values.data(), positions.shape(0), rows, columns, values.shape(1),
                                  values.shape(2), groups, dtype},
                                 device);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pykd's compiled operators (torch.ops.pykd.*)";
  m.attr("torch_version") = PYKD_BUILD_TORCH;
  m.attr("cuda") = static_cast<bool>(PYKD_WITH_CUDA);
  m.attr("cuda_reason") = PYKD_CUDA_REASON;
  m.def("isa", &pykd::cpu_isa_name, "The instruction set the CPU kernels run with: baseline, avx2 or avx512.");
  m.def(
      "bfloat16", [] { return pykd::cpu_bfloat16() != pykd::CpuBFloat16::kNone; },
      "Whether the CPU multiplies bfloat16 itself.");
  m.def("block_norm", wrap_pybind_function_no_gil(pykd::glue::block_norm));
  m.def("block_norm_and_grad", wrap_pybind_function_no_gil(pykd::glue::block_norm_and_grad));
  m.def("block_norm_and_grad_out", wrap_pybind_function_no_gil(pykd::glue::block_norm_and_grad_out));
  m.def("block_norms", wrap_pybind_function_no_gil(pykd::glue::block_norms));
  m.def("block_prox_", wrap_pybind_function_no_gil(pykd::glue::block_prox_));
  define_loss<pykd::glue::DistillationLossOp>(m);
  m.def("factor_loss", wrap_pybind_function_no_gil(pykd::glue::factor_loss));
  m.def("factor_loss_and_grad", wrap_pybind_function_no_gil(pykd::glue::factor_loss_and_grad));
  m.def("linear_distillation_loss", wrap_pybind_function_no_gil(pykd::glue::LinearDistillationLossOp::eager));
  m.def("linear_distillation_loss_and_grad",
        wrap_pybind_function_no_gil(pykd::glue::LinearDistillationLossOp::eager_and_grad));
  define_loss<pykd::glue::LogitRegressionOp>(m);
  m.def("noisy_logits", wrap_pybind_function_no_gil(pykd::glue::noisy_logits));
  m.def("noisy_logits_out", wrap_pybind_function_no_gil(pykd::glue::noisy_logits_out));
  m.def("sparse_conv2d", wrap_pybind_function_no_gil(pykd::glue::sparse_conv2d));
  m.def("sparse_linear", wrap_pybind_function_no_gil(pykd::glue::sparse_linear));
  m.def("sparse_pack", torch::wrap_pybind_function(sparse_pack), py::arg("positions"), py::arg("values"),
        py::arg("rows"), py::arg("columns"), py::arg("groups"), py::arg("device"), py::arg("halves"));
  m.def("variational_kl", wrap_pybind_function_no_gil(pykd::glue::variational_kl));
  m.def("variational_kl_and_grad", wrap_pybind_function_no_gil(pykd::glue::variational_kl_and_grad));
  m.def("variational_kl_and_grad_out", wrap_pybind_function_no_gil(pykd::glue::variational_kl_and_grad_out));
  m.def("variational_linear", wrap_pybind_function_no_gil(pykd::glue::variational_linear));
  m.def("variational_conv2d", wrap_pybind_function_no_gil(pykd::glue::variational_conv2d));
}
