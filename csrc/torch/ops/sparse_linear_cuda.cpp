// sparse_linear on CUDA. Compiled by the host compiler; no kernel in sight.
#include "torch/cuda_call.h"
#include "torch/ops/sparse_linear.h"
#include "torch/planes.h"

namespace pykd::glue {
namespace {

// Rows of the batch side by side; 1: they are read as they lie.
int64_t lanes_of(const PackedSparse& weight, int64_t rows) {
  if (rows <= 4 || (!weight.rowwise.pairs && weight.rowwise.height == kTileRows && rows <= 16)) return 1;
  return std::min<int64_t>(128, (rows + 15) / 16 * 16);
}

void run_cuda(const at::Tensor& input, const at::Tensor& packed, const PackedSparse& weight, const float* bias,
              bool relu, at::Tensor& output) {
  SparseLinear args{};
  args.batch = input.numel() / weight.columns;
  args.in = weight.columns;
  args.out = weight.rows;
  args.lanes = lanes_of(weight, args.batch);
  const DType dtype = dtype_of(SparseLinearOp<nullptr>::kName, "input", input);
  const bool halves = has_halves(weight, dtype);
  args.weight = tiles_of(packed.const_data_ptr(), halves            ? weight.halves
                                                  : args.lanes == 1 ? weight.rowwise
                                                                    : weight.panels);
  args.bias = bias;
  args.activation = relu ? Activation::kRelu : Activation::kNone;
  if (halves && takes_halves(args.weight, input.const_data_ptr(), args.in))
    return launch_on(input, 0, [&](void*, auto stream) {
      return sparse_linear_halves_cuda(
          {args.weight, static_cast<const uint16_t*>(input.const_data_ptr()),
           static_cast<uint16_t*>(output.mutable_data_ptr()), bias, args.batch, args.in, args.out, args.activation},
          stream);
    });
  if (args.lanes == 1) {
    const at::Tensor from = input.to(at::kFloat);
    const at::Tensor to = input.scalar_type() == at::kFloat ? output : at::empty(output.sizes(), from.options());
    args.input = from.const_data_ptr<float>();
    args.output = to.mutable_data_ptr<float>();
    launch_on(input, 0, [&](void*, auto stream) { return sparse_linear_cuda(args, stream); });
    if (!to.is_same(output)) output.copy_(to);
    return;
  }
  const PlaneLayout in = feature_planes(args.in, args.lanes), out = feature_planes(args.out, args.lanes);
  const int64_t planes = in.groups(args.batch) * in.group_stride() + kPlaneSlack;
  const int64_t results = out.groups(args.batch) * out.group_stride();
  launch_on(input, static_cast<int64_t>(sizeof(float)) * (planes + results), [&](void* workspace, auto stream) {
    float* const from = static_cast<float*>(workspace);
    float* const to = from + planes;
    args.input = from;
    args.output = to;
    CudaStatus status = pack_planes_cuda({input.const_data_ptr(), from, args.batch, in, dtype}, stream);
    if (!status) status = sparse_linear_cuda(args, stream);
    return status ? status : unpack_planes_cuda({to, output.mutable_data_ptr(), args.batch, out, dtype}, stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykd, CUDA, m) { m.impl("sparse_linear", &SparseLinearOp<run_cuda>::forward); }

}  // namespace pykd::glue
