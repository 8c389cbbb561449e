// variational_kl on the CPU, its autograd and its registration.
#include "torch/ops/variational_kl.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/total.h"
#include "torch/dispatch.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void run_cpu(const Tensor& first, VariationalKl& args, const Tensor& kl) {
  const int64_t chunks = variational_kl_chunks(args);
  const Tensor sums = at::empty({std::max<int64_t>(chunks, 1)}, first.options().dtype(at::kDouble));
  args.chunk_kl = sums.mutable_data_ptr();
  if (chunks <= 1)
    variational_kl_cpu(args, 0, chunks);
  else
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { variational_kl_cpu(args, begin, end); });
  if (!args.kl) return;
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += sums.const_data_ptr<double>()[i];
  total *= args.scale;
  if (kl.scalar_type() == at::kDouble)
    *kl.mutable_data_ptr<double>() = total;
  else
    *kl.mutable_data_ptr<float>() = static_cast<float>(total);
}

using Cpu = VariationalKlOp<run_cpu>;

Tensor call(TensorList theta, TensorList log_sigma2) {
  static auto op = find<decltype(Cpu::forward)>("variational_kl");
  return op.call(theta, log_sigma2);
}
Cpu::Two call_backward(const Tensor& grad_kl, TensorList theta, TensorList log_sigma2) {
  static auto op = find<decltype(Cpu::backward)>("variational_kl_backward");
  return op.call(grad_kl, theta, log_sigma2);
}
Cpu::Three call_and_grad(TensorList theta, TensorList log_sigma2, double scale) {
  static auto op = find<decltype(Cpu::and_grad)>("variational_kl_and_grad");
  return op.call(theta, log_sigma2, scale);
}
Tensor call_out(TensorList theta, TensorList log_sigma2, double scale, bool accumulate, TensorList out_theta,
                TensorList out_log_sigma2) {
  static auto op = find<decltype(Cpu::and_grad_out)>("variational_kl_and_grad", "out");
  return op.call(theta, log_sigma2, scale, accumulate, out_theta, out_log_sigma2);
}

variable_list joined(const Tensors& one, const Tensors& other) {
  variable_list all(one.begin(), one.end());
  all.insert(all.end(), other.begin(), other.end());
  return all;
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, TensorList theta, TensorList log_sigma2) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(joined(theta.vec(), log_sigma2.vec()));
    return call(theta, log_sigma2);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const TensorList all(saved);
    const auto [grad_theta, grad_log_sigma2] =
        call_backward(grads[0], all.slice(0, all.size() / 2), all.slice(all.size() / 2));
    return joined(grad_theta, grad_log_sigma2);
  }
};

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext*, const Tensor& grad_kl, TensorList theta, TensorList log_sigma2) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [grad_theta, grad_log_sigma2] = call_backward(grad_kl, theta, log_sigma2);
    return joined(grad_theta, grad_log_sigma2);
  }
  static variable_list backward(AutogradContext*, variable_list) {
    C10_THROW_ERROR(NotImplementedError, "variational_kl: the second derivative is not implemented");
  }
};

Tensor autograd(TensorList theta, TensorList log_sigma2) { return Function::apply(theta, log_sigma2); }

Cpu::Two backward_autograd(const Tensor& grad_kl, TensorList theta, TensorList log_sigma2) {
  if (at::GradMode::is_enabled()) {
    const variable_list all = NoSecondDerivative::apply(grad_kl, theta, log_sigma2);
    const auto middle = all.begin() + static_cast<std::ptrdiff_t>(theta.size());
    return {Tensors(all.begin(), middle), Tensors(middle, all.end())};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_kl, theta, log_sigma2);
}

// The forms that return the gradients are not differentiable themselves.
Cpu::Three and_grad_autograd(TensorList theta, TensorList log_sigma2, double scale) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call_and_grad(theta, log_sigma2, scale);
}

// Also without autograd, in inference mode: tensors made outside it have versions there, too.
Tensor out_in_place(TensorList theta, TensorList log_sigma2, double scale, bool accumulate, TensorList out_theta,
                    TensorList out_log_sigma2) {
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor kl = call_out(theta, log_sigma2, scale, accumulate, out_theta, out_log_sigma2);
  for (const TensorList list : {out_theta, out_log_sigma2})
    for (const Tensor& out : list)
      if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
  return kl;
}

Tensor out_autograd(TensorList theta, TensorList log_sigma2, double scale, bool accumulate, TensorList out_theta,
                    TensorList out_log_sigma2) {
  for (const TensorList list : {out_theta, out_log_sigma2})
    for (const Tensor& out : list)
      PYKD_CHECK(!at::GradMode::is_enabled() || !out.requires_grad(),
                 "variational_kl_and_grad: out must not require grad, pass it detached");
  return out_in_place(theta, log_sigma2, scale, accumulate, out_theta, out_log_sigma2);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor variational_kl(const Tensors& theta, const Tensors& log_sigma2) { return call(theta, log_sigma2); }
std::tuple<Tensor, Tensors, Tensors> variational_kl_and_grad(const Tensors& theta, const Tensors& log_sigma2,
                                                             double scale) {
  return call_and_grad(theta, log_sigma2, scale);
}
Tensor variational_kl_and_grad_out(const Tensors& theta, const Tensors& log_sigma2, double scale, bool accumulate,
                                   const Tensors& out_theta, const Tensors& out_log_sigma2) {
  return call_out(theta, log_sigma2, scale, accumulate, out_theta, out_log_sigma2);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def("variational_kl(Tensor[] theta, Tensor[] log_sigma2) -> Tensor");
  m.def("variational_kl_backward(Tensor grad_kl, Tensor[] theta, Tensor[] log_sigma2) -> (Tensor[], Tensor[])");
  m.def("variational_kl_and_grad(Tensor[] theta, Tensor[] log_sigma2, float scale) -> (Tensor, Tensor[], Tensor[])");
  m.def(
      "variational_kl_and_grad.out(Tensor[] theta, Tensor[] log_sigma2, float scale, bool accumulate, "
      "Tensor(a!)[] out_theta, Tensor(b!)[] out_log_sigma2) -> Tensor");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { VariationalKlOp<nullptr>::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("variational_kl", &autograd);
  m.impl("variational_kl_backward", &backward_autograd);
  m.impl("variational_kl_and_grad", &and_grad_autograd);
  m.impl("variational_kl_and_grad.out", &out_autograd);
}
TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { m.impl("variational_kl_and_grad.out", &out_in_place); }

}  // namespace pykd::glue
