// factor_loss on the CPU, its autograd and its registration.
#include "torch/ops/factor_loss.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/total.h"
#include "torch/dispatch.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kEntriesPerTask = 8192;  // some 8 us of work, for which a thread is worth its start

void run_cpu(const Tensor& student, const FactorLoss& given) {
  FactorLoss args = given;
  double row_losses[256];  // a small batch's, which no allocation should delay
  Tensor more;
  if (args.loss) {
    if (args.rows > 256) more = at::empty({args.rows}, student.options().dtype(at::kDouble));
    args.row_loss = more.defined() ? more.mutable_data_ptr() : row_losses;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kEntriesPerTask / args.entries);
  if (args.rows <= rows_per_task)
    factor_loss_cpu(args, 0, args.rows);
  else
    at::parallel_for(0, args.rows, rows_per_task,
                     [&](int64_t begin, int64_t end) { factor_loss_cpu(args, begin, end); });
  const DType dtype = args.student_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (args.loss) total_cpu(args.row_loss, dtype, args.rows, args.scale, args.loss);
}

using Cpu = FactorLossOp<run_cpu>;

Tensor call(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  static auto op = find<decltype(Cpu::forward)>("factor_loss");
  return op.call(student, teacher, p, by_row);
}
Cpu::Two call_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, int64_t p, bool by_row,
                       bool wants_student, bool wants_teacher) {
  static auto op = find<decltype(Cpu::backward)>("factor_loss_backward");
  return op.call(grad_loss, student, teacher, p, by_row, wants_student, wants_teacher);
}
Three call_and_grad(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  static auto op = find<decltype(Cpu::and_grad)>("factor_loss_and_grad");
  return op.call(student, teacher, p, by_row);
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({student, teacher});
    ctx->saved_data["p"] = p;
    ctx->saved_data["by_row"] = by_row;
    return call(student, teacher, p, by_row);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool wants[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    const auto [grad_student, grad_teacher] = call_backward(grads[0], saved[0], saved[1], ctx->saved_data["p"].toInt(),
                                                            ctx->saved_data["by_row"].toBool(), wants[0], wants[1]);
    return {wants[0] ? grad_student : Tensor(), wants[1] ? grad_teacher : Tensor(), Tensor(), Tensor()};
  }
};

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext*, const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                               int64_t p, bool by_row, bool wants_student, bool wants_teacher) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [grad_student, grad_teacher] =
        call_backward(grad_loss, student, teacher, p, by_row, wants_student, wants_teacher);
    return {grad_student, grad_teacher};
  }
  static variable_list backward(AutogradContext*, variable_list) {
    C10_THROW_ERROR(NotImplementedError, "factor_loss: the second derivative is not implemented");
  }
};

Tensor autograd(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  return Function::apply(student, teacher, p, by_row);
}

Cpu::Two backward_autograd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, int64_t p,
                           bool by_row, bool wants_student, bool wants_teacher) {
  if (at::GradMode::is_enabled()) {
    const variable_list both =
        NoSecondDerivative::apply(grad_loss, student, teacher, p, by_row, wants_student, wants_teacher);
    return {both[0], both[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_loss, student, teacher, p, by_row, wants_student, wants_teacher);
}

// The form that returns the gradients is not differentiable itself.
Three and_grad_autograd(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call_and_grad(student, teacher, p, by_row);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor factor_loss(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  return call(student, teacher, p, by_row);
}
Three factor_loss_and_grad(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
  return call_and_grad(student, teacher, p, by_row);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def("factor_loss(Tensor student, Tensor teacher, int p, bool by_row) -> Tensor");
  m.def(
      "factor_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, int p, bool by_row, bool wants_student, "
      "bool wants_teacher) -> (Tensor, Tensor)");
  m.def("factor_loss_and_grad(Tensor student, Tensor teacher, int p, bool by_row) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { FactorLossOp<nullptr>::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("factor_loss", &autograd);
  m.impl("factor_loss_backward", &backward_autograd);
  m.impl("factor_loss_and_grad", &and_grad_autograd);
}

}  // namespace pykd::glue
