// sparse_conv2d on CUDA. Compiled by the host compiler; no kernel in sight.
#include <array>
#include <map>
#include <mutex>

#include "torch/cuda_call.h"
#include "torch/ops/sparse_conv2d.h"
#include "torch/planes.h"

namespace pykd::glue {
namespace {

// Copied to the device once for each geometry: later calls do not wait for it, and can be captured in a graph. Never
// freed, since CUDA may be gone before the process ends.
at::Tensor offsets_of(const Conv2dGeometry& g, const PlaneLayout& planes, at::Device device) {
  using Key = std::array<int64_t, 12>;
  static std::mutex& mutex = *new std::mutex;
  static auto& known = *new std::map<Key, at::Tensor>;
  const Key key{g.channels, g.height,    g.width,     g.kernel_h,   g.kernel_w,   g.stride_h,
                g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w, device.index()};
  const std::lock_guard lock(mutex);
  at::Tensor& offsets = known[key];
  if (!offsets.defined()) {
    const at::Tensor host = at::empty({g.channels * g.kernel_h * g.kernel_w}, at::kInt);
    conv2d_offsets(g, planes, host.mutable_data_ptr<int32_t>());
    offsets = host.to(device);
  }
  return offsets;
}

void run_cuda(const at::Tensor& input, const at::Tensor& packed, const PackedSparse& weight,
              const Conv2dGeometry& geometry, const float* bias, bool relu, at::Tensor& output) {
  constexpr const char* kName = SparseConv2dOp<nullptr>::kName;
  const PlaneLayout planes = conv2d_planes(geometry, 1);
  check_planes(kName, planes, input);
  const at::Tensor offsets = offsets_of(geometry, planes, input.device());
  const int64_t batch = input.size(0), height = geometry.out_height(), width = geometry.out_width();
  const at::Tensor to =
      input.scalar_type() == at::kFloat ? output : at::empty(output.sizes(), output.options().dtype(at::kFloat));
  const DType dtype = dtype_of(kName, "input", input);
  SparseConv2d args{};
  args.weight = tiles_of(packed.const_data_ptr(), has_halves(weight, dtype) ? weight.halves : weight.panels);
  args.offsets = offsets.const_data_ptr<int32_t>();
  args.group_stride = planes.group_stride();
  args.row_stride = planes.row_stride();
  args.lanes = 1;
  args.out_height = height;
  args.out_width = width;
  args.output = to.mutable_data_ptr<float>();
  args.out_row_stride = width;
  args.out_channel_stride = height * width;
  args.out_group_stride = weight.rows * height * width;
  args.bias = bias;
  args.activation = relu ? Activation::kRelu : Activation::kNone;
  const int64_t bytes = static_cast<int64_t>(sizeof(float)) * (batch * planes.group_stride() + kPlaneSlack);
  launch_on(input, bytes, [&](void* workspace, auto stream) {
    float* const from = static_cast<float*>(workspace);
    args.planes = from;
    const CudaStatus status = pack_planes_cuda({input.const_data_ptr(), from, batch, planes, dtype}, stream);
    return status ? status : sparse_conv2d_cuda(args, batch, stream);
  });
  if (!to.is_same(output)) output.copy_(to);
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { m.impl("sparse_conv2d", &SparseConv2dOp<run_cuda>::forward); }

}  // namespace pykd::glue
