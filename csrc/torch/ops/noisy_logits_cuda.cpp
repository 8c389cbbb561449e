// noisy_logits on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/noisy_logits.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& logits, const NoisyLogits& args) {
  launch_on(logits, 0, [&](void*, auto stream) { return noisy_logits_cuda(args, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { NoisyLogitsOp<run_cuda>::implement(m); }

}  // namespace pykd::glue
