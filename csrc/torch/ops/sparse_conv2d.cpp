// sparse_conv2d on the CPU, its autograd and its registration.
#include "torch/ops/sparse_conv2d.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "core/cpu_isa.h"
#include "torch/dispatch.h"
#include "torch/planes.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;

// Images side by side in a vector; 1: its lanes are pixels. Measured on AVX2: rows that fill no vector are better off
// beside those of other images, where most lanes have one.
int64_t lanes_of(const Conv2dGeometry& g, int64_t batch) {
  const int64_t lanes = std::max(8, vector_lanes()), groups = (batch + lanes - 1) / lanes;
  return g.out_width() <= 16 && batch * 4 >= groups * lanes * (g.out_width() <= 2 ? 2 : 3) ? lanes : 1;
}

// About how often a batch reads the weight, and so would look up the places of its columns.
int64_t readings(const Conv2dGeometry& g, int64_t batch) {
  constexpr int64_t kFloats = 48;  // that are computed at a time
  return batch * g.out_height() * g.out_width() / kFloats;
}

void run_cpu(const Tensor& input, const Tensor& packed, const PackedSparse& weight, const Conv2dGeometry& geometry,
             const float* bias, bool relu, Tensor& output) {
  constexpr const char* kName = SparseConv2dOp<nullptr>::kName;
  check_buffer_is_of(kName, packed, weight);
  const int64_t batch = input.size(0), lanes = lanes_of(geometry, batch);
  const int64_t height = geometry.out_height(), width = geometry.out_width();
  // Of short rows many a vector would begin in the middle of a cache line.
  const PlaneLayout planes = conv2d_planes(geometry, lanes, lanes == 1 && geometry.stride_w == 1 && width <= 8);
  check_planes(kName, planes, input);
  const DType dtype = dtype_of(kName, "input", input);
  SparseConv2d args{};
  args.weight = tiles_of(packed.const_data_ptr(), weight.panels);
  args.group_stride = planes.group_stride();
  args.row_stride = planes.row_stride();
  args.lanes = lanes;
  args.out_height = height;
  args.out_width = width;
  args.out_row_stride = width * lanes;
  args.out_channel_stride = height * args.out_row_stride;
  args.out_group_stride = weight.rows * args.out_channel_stride;
  args.bias = bias;
  args.activation = relu ? Activation::kRelu : Activation::kNone;
  const int64_t columns = geometry.channels * geometry.kernel_h * geometry.kernel_w;
  const bool resolved = args.weight.pairs && readings(geometry, batch) >= 4;
  const PlaneLayout results{weight.rows, lanes, {height, 0, 1, 1, height}, {width, 0, 1, 1, width}};
  const Pipeline pipeline{{input.const_data_ptr(), nullptr, batch, planes, dtype},
                          {nullptr, output.mutable_data_ptr(), batch, results, dtype},
                          lanes != 1 || dtype != DType::kFloat32,
                          columns + (resolved ? 2 * args.weight.runs : 0)};
  pipeline.through(
      args.weight, tasks_of(args.weight, batch * height * width),
      [&](int32_t* offsets) {
        conv2d_offsets(geometry, planes, offsets);
        for (int64_t i = 0; resolved && i < 2 * args.weight.runs; ++i)
          offsets[columns + i] = offsets[args.weight.columns[i]];
      },
      [&](int64_t images, const float* from, float* to, int64_t tile_begin, int64_t tile_end, const int32_t* offsets) {
        SparseConv2d part = args;
        part.planes = from;
        part.output = to;
        part.offsets = resolved ? nullptr : offsets;
        if (resolved) part.weight.columns = offsets + columns;
        sparse_conv2d_cpu(part, 0, planes.groups(images), tile_begin, tile_end);
      });
}

using Cpu = SparseConv2dOp<run_cpu>;

Tensor call(PYKD_SPARSE_TENSORS, PYKD_SPARSE_CONV) {
  static auto op = find<decltype(Cpu::forward)>(Cpu::kName);
  return op.call(input, packed, head, bias, kernel, stride, padding, dilation, relu);
}

Tensor autograd(PYKD_SPARSE_TENSORS, PYKD_SPARSE_CONV) {
  check_no_gradient(Cpu::kName, input, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return call(input, packed, head, bias, kernel, stride, padding, dilation, relu);
}

}  // namespace

// ---- a call from Python, past the interpreter's parsing of schemas ----

Tensor sparse_conv2d(const Tensor& input, const Tensor& packed, const Tensor& host, const Bias& bias,
                     std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                     std::array<int64_t, 2> dilation, bool relu) {
  return call(input, packed, head_of(host), bias, kernel, stride, padding, dilation, relu);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def(
      "sparse_conv2d(Tensor input, Tensor packed, int[] head, Tensor? bias, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation, bool relu) -> Tensor");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { m.impl(Cpu::kName, &Cpu::forward); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { m.impl(Cpu::kName, &SparseConv2dOp<nullptr>::forward); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) { m.impl(Cpu::kName, &autograd); }

}  // namespace pykd::glue
