// factor_loss on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/factor_loss.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& student, const FactorLoss& args) {
  launch_on(student, factor_loss_workspace_bytes(args),
            [&](void* workspace, auto stream) { return factor_loss_cuda(args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { FactorLossOp<run_cuda>::implement(m); }

}  // namespace pykd::glue
