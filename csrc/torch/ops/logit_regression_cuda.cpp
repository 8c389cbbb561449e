// logit_regression on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/logit_regression.h"

namespace pykd::glue {
namespace {

void run_cuda(const LossCall<LogitRegressionOp>& call) {
  launch_on(call.inputs.student, logit_regression_workspace_bytes(call.args),
            [&](void* workspace, auto stream) { return logit_regression_cuda(call.args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { Loss<LogitRegressionOp>::implement<run_cuda>(m); }

}  // namespace pykd::glue
