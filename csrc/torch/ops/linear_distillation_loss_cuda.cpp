// linear_distillation_loss on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/linear_distillation_loss.h"

namespace pykd::glue {
namespace {

void run_cuda(const LossCall<DistillationLossOp>& chunk, int64_t) {
  launch_on(chunk.inputs.student, distillation_loss_workspace_bytes_cuda(chunk.args),
            [&](void* workspace, auto stream) { return distillation_loss_cuda(chunk.args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { LinearDistillationLossOp::implement<run_cuda>(m); }

}  // namespace pykd::glue
