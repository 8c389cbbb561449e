// logit_regression on CUDA: guard, workspace, stream, launch, check. Compiled by the host compiler; no kernel in sight.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "torch/ops/logit_regression.h"

namespace pykd::glue {
namespace {

using at::Tensor;

void run_cuda(const LogitRegressionCall& call) {
  const c10::cuda::CUDAGuard guard(call.student.device());
  Tensor workspace;
  if (const int64_t bytes = logit_regression_workspace_bytes(call.args))
    workspace = at::empty({bytes}, call.student.options().dtype(at::kByte));
  C10_CUDA_CHECK(static_cast<cudaError_t>(logit_regression_cuda(
      call.args, workspace.defined() ? workspace.mutable_data_ptr() : nullptr, at::cuda::getCurrentCUDAStream())));
}

Tensor logit_regression_cuda_op(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  Tensor loss = allocate_loss(student, options);
  run_cuda({student, teacher, seed, options, loss, {}});
  return loss;
}

Tensor backward_cuda(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Seed& seed,
                     PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  check_grad_loss(grad_loss, student, options);
  Tensor grad = at::empty(student.sizes(), student.options());
  run_cuda({student, teacher, seed, options, {}, grad, grad_loss});
  return grad;
}

std::tuple<Tensor, Tensor> and_grad_cuda(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  Tensor loss = allocate_loss(student, options), grad = at::empty(student.sizes(), student.options());
  run_cuda({student, teacher, seed, options, loss, grad});
  return {loss, grad};
}

Tensor and_grad_out_cuda(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS, bool accumulate,
                         const Tensor& out) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  check_grad_buffer(out, student);
  Tensor loss = allocate_loss(student, options);
  run_cuda({student, teacher, seed, options, loss, out, {}, accumulate});
  return loss;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) {
  m.impl("logit_regression", &logit_regression_cuda_op);
  m.impl("logit_regression_backward", &backward_cuda);
  m.impl("logit_regression_and_grad", &and_grad_cuda);
  m.impl("logit_regression_and_grad.out", &and_grad_out_cuda);
}

}  // namespace pykd::glue
