// variational_linear and variational_conv2d on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/variational_layer.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& on, const VariationalLayer& args) {
  launch_on(on, 0, [&](void*, auto stream) { return variational_layer_cuda(args, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { VariationalLayerOps<run_cuda>::implement(m); }

}  // namespace pykd::glue
