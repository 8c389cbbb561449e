// A kernel's launch from the glue: guard, workspace, stream, check.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

namespace pykd::glue {

// launch(workspace, stream) on the device of `tensor`; the workspace is null where it has no bytes.
template <typename Launch>
void launch_on(const at::Tensor& tensor, int64_t workspace_bytes, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  at::Tensor workspace;
  if (workspace_bytes > 0) workspace = at::empty({workspace_bytes}, tensor.options().dtype(at::kByte));
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      launch(workspace.defined() ? workspace.mutable_data_ptr() : nullptr, at::cuda::getCurrentCUDAStream())));
}

}  // namespace pykd::glue
