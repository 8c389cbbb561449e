// block_prox_ on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/block_prox.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& first, const BlockProx& args) {
  launch_on(first, 0, [&](void*, auto stream) { return block_prox_cuda(args, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { BlockProxOp<run_cuda>::implement(m); }

}  // namespace pykd::glue
