// distillation_loss on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/distillation_loss.h"

namespace pykd::glue {
namespace {

void run_cuda(const LossCall<DistillationLossOp>& call) {
  launch_on(call.inputs.student, distillation_loss_workspace_bytes_cuda(call.args),
            [&](void* workspace, auto stream) { return distillation_loss_cuda(call.args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { Loss<DistillationLossOp>::implement<run_cuda>(m); }

}  // namespace pykd::glue
