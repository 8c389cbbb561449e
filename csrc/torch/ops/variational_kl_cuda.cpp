// variational_kl on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/variational_kl.h"

namespace pykd::glue {
namespace {

void run_cuda(const at::Tensor& first, VariationalKl& args, const at::Tensor&) {
  launch_on(first, variational_kl_workspace_bytes(args),
            [&](void* workspace, auto stream) { return variational_kl_cuda(args, workspace, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { VariationalKlOp<run_cuda>::implement(m); }

}  // namespace pykd::glue
