// block_norm and block_norms on the CPU, their autograd and their registration.
#include "torch/ops/block_norm.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/dispatch.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Threads are worth their start from some units on.
void run_cpu(const Tensor& first, BlockNorm& args, const Tensor& value) {
  constexpr int64_t kUnitsPerTask = 4;
  const int64_t units = block_norm_units(args);
  Tensor values;
  if (args.value) {
    values = at::empty({std::max<int64_t>(units, 1)}, first.options().dtype(at::kDouble));
    args.unit_value = values.mutable_data_ptr<double>();
  }
  if (units <= kUnitsPerTask)
    block_norm_cpu(args, 0, units);
  else
    at::parallel_for(0, units, kUnitsPerTask, [&](int64_t begin, int64_t end) { block_norm_cpu(args, begin, end); });
  if (!args.value) return;
  double total = 0;
  for (int64_t i = 0; i < units; ++i) total += args.unit_value[i];
  total *= args.scale;
  if (value.scalar_type() == at::kDouble)
    *value.mutable_data_ptr<double>() = total;
  else
    *value.mutable_data_ptr<float>() = static_cast<float>(total);
}

using Cpu = BlockNormOp<run_cpu>;

struct Options {
  Grouping grouping;
  bool by_size;
};

Tensor call(TensorList weights, TensorList teachers, const Options& o) {
  static auto op = find<decltype(Cpu::forward)>("block_norm");
  const Grouping& g = o.grouping;
  return op.call(weights, teachers, g.groups, g.rows, g.columns, g.linf, o.by_size);
}
Tensors call_backward(const Tensor& grad_value, TensorList weights, TensorList teachers, const Options& o) {
  static auto op = find<decltype(Cpu::backward)>("block_norm_backward");
  const Grouping& g = o.grouping;
  return op.call(grad_value, weights, teachers, g.groups, g.rows, g.columns, g.linf, o.by_size);
}
Cpu::Two call_and_grad(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size, double scale) {
  static auto op = find<decltype(Cpu::and_grad)>("block_norm_and_grad");
  return op.call(weights, teachers, groups, rows, columns, linf, by_size, scale);
}
Tensor call_out(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size, double scale, bool accumulate,
                TensorList out) {
  static auto op = find<decltype(Cpu::and_grad_out)>("block_norm_and_grad", "out");
  return op.call(weights, teachers, groups, rows, columns, linf, by_size, scale, accumulate, out);
}
Tensor call_norms(const Tensor& weight, PYKD_GROUPS) {
  static auto op = find<decltype(Cpu::norms)>("block_norms");
  return op.call(weight, groups, rows, columns, linf);
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, TensorList weights, TensorList teachers, const Options& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list kept(weights.begin(), weights.end());
    kept.insert(kept.end(), teachers.begin(), teachers.end());
    ctx->save_for_backward(kept);
    const Grouping& g = options.grouping;
    ctx->saved_data["count"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["grouping"] = std::vector<int64_t>{g.groups, g.rows, g.columns, g.linf, options.by_size};
    return call(weights, teachers, options);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list kept = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(ctx->saved_data["count"].toInt());
    const auto g = ctx->saved_data["grouping"].toIntVector();
    const TensorList all(kept);
    variable_list found =
        call_backward(grads[0], all.slice(0, count), all.slice(count), {{g[0], g[1], g[2], g[3] != 0}, g[4] != 0});
    found.resize(kept.size() + 1);  // none for teachers and options
    return found;
  }
};

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext*, const Tensor& grad_value, TensorList weights, TensorList teachers,
                               const Options& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_value, weights, teachers, options);
  }
  static variable_list backward(AutogradContext*, variable_list) {
    C10_THROW_ERROR(NotImplementedError, "block_norm: the second derivative is not implemented");
  }
};

Tensor autograd(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size) {
  return Function::apply(weights, teachers, Options{{groups, rows, columns, linf}, by_size});
}

Tensors backward_autograd(const Tensor& grad_value, TensorList weights, TensorList teachers, PYKD_GROUPS,
                          bool by_size) {
  const Options options{{groups, rows, columns, linf}, by_size};
  if (at::GradMode::is_enabled()) return NoSecondDerivative::apply(grad_value, weights, teachers, options);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_value, weights, teachers, options);
}

// The forms that return the gradients, and the norms, are not differentiable.
Cpu::Two and_grad_autograd(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size, double scale) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call_and_grad(weights, teachers, groups, rows, columns, linf, by_size, scale);
}
Tensor norms_autograd(const Tensor& weight, PYKD_GROUPS) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call_norms(weight, groups, rows, columns, linf);
}

// Also without autograd, in inference mode: tensors made outside it have versions there, too.
Tensor out_in_place(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size, double scale, bool accumulate,
                    TensorList out) {
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor value = call_out(weights, teachers, groups, rows, columns, linf, by_size, scale, accumulate, out);
  for (const Tensor& each : out)
    if (!each.is_inference()) each.unsafeGetTensorImpl()->bump_version();
  return value;
}

Tensor out_autograd(TensorList weights, TensorList teachers, PYKD_GROUPS, bool by_size, double scale, bool accumulate,
                    TensorList out) {
  for (const Tensor& each : out)
    PYKD_CHECK(!at::GradMode::is_enabled() || !each.requires_grad(),
               "block_norm_and_grad: out must not require grad, pass it detached");
  return out_in_place(weights, teachers, groups, rows, columns, linf, by_size, scale, accumulate, out);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor block_norm(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS, bool by_size) {
  return call(weights, teachers, {{groups, rows, columns, linf}, by_size});
}
std::tuple<Tensor, Tensors> block_norm_and_grad(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS,
                                                bool by_size, double scale) {
  return call_and_grad(weights, teachers, groups, rows, columns, linf, by_size, scale);
}
Tensor block_norm_and_grad_out(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS, bool by_size, double scale,
                               bool accumulate, const Tensors& out) {
  return call_out(weights, teachers, groups, rows, columns, linf, by_size, scale, accumulate, out);
}
Tensor block_norms(const Tensor& weight, PYKD_GROUPS) { return call_norms(weight, groups, rows, columns, linf); }

TORCH_LIBRARY_FRAGMENT(pykd, m) {
#define PYKD_SCHEMA "Tensor[] weights, Tensor[] teachers, " PYKD_GROUPS_SCHEMA ", bool by_size"
  m.def("block_norm(" PYKD_SCHEMA ") -> Tensor");
  m.def("block_norm_backward(Tensor grad_value, " PYKD_SCHEMA ") -> Tensor[]");
  m.def("block_norm_and_grad(" PYKD_SCHEMA ", float scale) -> (Tensor, Tensor[])");
  m.def("block_norm_and_grad.out(" PYKD_SCHEMA ", float scale, bool accumulate, Tensor(a!)[] out) -> Tensor");
  m.def("block_norms(Tensor weight, " PYKD_GROUPS_SCHEMA ") -> Tensor");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { BlockNormOp<nullptr>::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("block_norm", &autograd);
  m.impl("block_norm_backward", &backward_autograd);
  m.impl("block_norm_and_grad", &and_grad_autograd);
  m.impl("block_norm_and_grad.out", &out_autograd);
  m.impl("block_norms", &norms_autograd);
}
TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { m.impl("block_norm_and_grad.out", &out_in_place); }

}  // namespace pykd::glue
