// sparse_linear on the CPU, its autograd and its registration.
#include "torch/ops/sparse_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "torch/dispatch.h"
#include "torch/planes.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;

// Rows of the batch side by side in a vector; 1: they are read as they lie. Measured on AVX2, where vectors of a tile's
// rows win over panels the longer, the higher the tile.
int64_t lanes_of(const PackedSparse& weight, int64_t rows) {
  const PackedSparse::Set& tiles = weight.rowwise;
  if (rows == 1 || (!tiles.pairs && (tiles.height == kTileRows || rows <= tiles.height + 1))) return 1;
  return rows <= 16 ? 16 : 32;
}

void run_cpu(const Tensor& input, const Tensor& packed, const PackedSparse& weight, const float* bias, bool relu,
             Tensor& output) {
  check_buffer_is_of(SparseLinearOp<nullptr>::kName, packed, weight);
  SparseLinear args{};
  args.batch = input.numel() / weight.columns;
  args.in = weight.columns;
  args.out = weight.rows;
  args.lanes = lanes_of(weight, args.batch);
  args.weight = tiles_of(packed.const_data_ptr(), args.lanes == 1 ? weight.rowwise : weight.panels);
  args.bias = bias;
  args.activation = relu ? Activation::kRelu : Activation::kNone;
  const int64_t tasks = tasks_of(args.weight, args.batch);
  if (has_halves(weight, DType::kBFloat16) && input.scalar_type() == at::kBFloat16) {
    const SparseLinearBFloat16 halves{tiles_of(packed.const_data_ptr(), weight.halves),
                                      static_cast<const uint16_t*>(input.const_data_ptr()),
                                      output.mutable_data_ptr(),
                                      bias,
                                      args.in,
                                      args.out,
                                      args.activation,
                                      DType::kBFloat16,
                                      false};
    return share_tiles(halves.weight, tasks, [&](int64_t begin, int64_t end) {
      sparse_linear_bfloat16_cpu(halves, 0, args.batch, begin, end);
    });
  }
  if (args.lanes == 1) {
    const Tensor from = input.to(at::kFloat);
    Tensor to = input.scalar_type() == at::kFloat ? output : at::empty(output.sizes(), from.options());
    args.input = from.const_data_ptr<float>();
    args.output = to.mutable_data_ptr<float>();
    // The tiles alone: how many rows a call is given decides in which order their sums run.
    share_tiles(args.weight, tasks,
                [&](int64_t begin, int64_t end) { sparse_linear_cpu(args, 0, args.batch, begin, end); });
    if (!to.is_same(output)) output.copy_(to);
    return;
  }
  const DType dtype = dtype_of(SparseLinearOp<nullptr>::kName, "input", input);
  const Pipeline pipeline{{input.const_data_ptr(), nullptr, args.batch, feature_planes(args.in, args.lanes), dtype},
                          {nullptr, output.mutable_data_ptr(), args.batch, feature_planes(args.out, args.lanes), dtype},
                          true,
                          0};
  pipeline.through(
      args.weight, tasks, [](int32_t*) {},
      [&](int64_t batch, const float* planes, float* results, int64_t tile_begin, int64_t tile_end, const int32_t*) {
        SparseLinear part = args;
        part.batch = batch;
        part.input = planes;
        part.output = results;
        sparse_linear_cpu(part, 0, (batch + args.lanes - 1) / args.lanes, tile_begin, tile_end);
      });
}

using Cpu = SparseLinearOp<run_cpu>;

Tensor call(PYKD_SPARSE_TENSORS, bool relu) {
  static auto op = find<decltype(Cpu::forward)>(Cpu::kName);
  return op.call(input, packed, head, bias, relu);
}

Tensor autograd(PYKD_SPARSE_TENSORS, bool relu) {
  check_no_gradient(Cpu::kName, input, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return call(input, packed, head, bias, relu);
}

}  // namespace

// ---- a call from Python, past the interpreter's parsing of schemas ----

Tensor sparse_linear(const Tensor& input, const Tensor& packed, const Tensor& host, const Bias& bias, bool relu) {
  return call(input, packed, head_of(host), bias, relu);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def("sparse_linear(Tensor input, Tensor packed, int[] head, Tensor? bias, bool relu) -> Tensor");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { m.impl(Cpu::kName, &Cpu::forward); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { m.impl(Cpu::kName, &SparseLinearOp<nullptr>::forward); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) { m.impl(Cpu::kName, &autograd); }

}  // namespace pykd::glue
