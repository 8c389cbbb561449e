// block_norm on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/block_norm.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& first, BlockNorm& args, const at::Tensor&) {
  launch_on(first, block_norm_workspace_bytes(args),
            [&](void* workspace, auto stream) { return block_norm_cuda(args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { BlockNormOp<run_cuda>::implement(m); }

}  // namespace pykd::glue
