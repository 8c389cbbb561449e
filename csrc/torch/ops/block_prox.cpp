// block_prox_ on the CPU and its registration.
#include "torch/ops/block_prox.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include "torch/dispatch.h"

namespace pykd::glue {
namespace {

using at::TensorList;

// Threads are worth their start from some units on.
void run_cpu(const at::Tensor&, const BlockProx& args) {
  const int64_t units = block_prox_units(args), units_per_task = args.linf ? 1 : 4;
  if (units <= units_per_task)
    block_prox_cpu(args, 0, units);
  else
    at::parallel_for(0, units, units_per_task, [&](int64_t begin, int64_t end) { block_prox_cpu(args, begin, end); });
}

using Cpu = BlockProxOp<run_cpu>;

void call(TensorList weights, PYKD_GROUPS, double threshold) {
  static auto op = find<decltype(Cpu::apply)>("block_prox_");
  op.call(weights, groups, rows, columns, linf, threshold);
}

// Also without autograd, in inference mode: tensors made outside it have versions there, too.
void in_place(TensorList weights, PYKD_GROUPS, double threshold) {
  at::AutoDispatchBelowADInplaceOrView below;
  call(weights, groups, rows, columns, linf, threshold);
  for (const at::Tensor& weight : weights)
    if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
}

void autograd(TensorList weights, PYKD_GROUPS, double threshold) {
  for (const at::Tensor& weight : weights)
    PYKD_CHECK(!at::GradMode::is_enabled() || !weight.requires_grad(),
               "block_prox_: it has no gradient, call it under torch.no_grad() or on detached weights");
  in_place(weights, groups, rows, columns, linf, threshold);
}

}  // namespace

void block_prox_(const Tensors& weights, PYKD_GROUPS, double threshold) {
  call(weights, groups, rows, columns, linf, threshold);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def("block_prox_(Tensor(a!)[] weights, " PYKD_GROUPS_SCHEMA ", float threshold) -> ()");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { BlockProxOp<nullptr>::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) { m.impl("block_prox_", &autograd); }
TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { m.impl("block_prox_", &in_place); }

}  // namespace pykd::glue
