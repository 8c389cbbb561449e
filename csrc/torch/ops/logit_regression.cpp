// logit_regression: schemas, autograd, CPU and Meta implementations.
#include "torch/ops/logit_regression.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pykd::glue {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What every op here takes, in this order: in the schema and as arguments.
#define PYKD_SCHEMA                                \
  "Tensor student, Tensor teacher, Tensor? seed, " \
  "int reduction, float sigma, float alpha, bool per_sample, bool additive, int n_teachers, int row_offset"
#define PYKD_UNPACK(o)                                                                                             \
  (o).reduction, (o).noise.sigma, (o).noise.alpha, (o).noise.per_sample, (o).noise.additive, (o).noise.n_teachers, \
      (o).noise.row_offset

// Threads are worth their start from about 16 us of work on.
void run_cpu(const LogitRegressionCall& call) {
  constexpr int64_t kLogitsPerTask = 8192;
  LogitRegression args = call.args;
  double row_losses[256];  // a small batch's, which no allocation should delay
  Tensor more;
  if (args.loss) {
    if (args.rows > 256) more = at::empty({args.rows}, call.student.options().dtype(at::kDouble));
    args.row_loss = more.defined() ? more.mutable_data_ptr() : row_losses;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kLogitsPerTask / args.classes);
  if (args.rows <= rows_per_task)
    logit_regression_cpu(args, 0, args.rows);
  else
    at::parallel_for(0, args.rows, rows_per_task,
                     [&](int64_t begin, int64_t end) { logit_regression_cpu(args, begin, end); });
  if (args.loss) logit_regression_total_cpu(args);
}

Tensor logit_regression_cpu_op(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  Tensor loss = allocate_loss(student, options);
  run_cpu({student, teacher, seed, options, loss, {}});
  return loss;
}

Tensor logit_regression_meta(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  check_logit_regression(student, teacher, seed, PYKD_PACKED);
  return allocate_loss(student, PYKD_PACKED);
}

Tensor backward_cpu(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Seed& seed,
                    PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  check_grad_loss(grad_loss, student, options);
  Tensor grad = at::empty(student.sizes(), student.options());
  run_cpu({student, teacher, seed, options, {}, grad, grad_loss});
  return grad;
}

Tensor backward_meta(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Seed& seed,
                     PYKD_OPTIONS) {
  check_logit_regression(student, teacher, seed, PYKD_PACKED);
  check_grad_loss(grad_loss, student, PYKD_PACKED);
  return at::empty_symint(student.sym_sizes(), student.options());
}

std::tuple<Tensor, Tensor> and_grad_cpu(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  Tensor loss = allocate_loss(student, options), grad = at::empty(student.sizes(), student.options());
  run_cpu({student, teacher, seed, options, loss, grad});
  return {loss, grad};
}

std::tuple<Tensor, Tensor> and_grad_meta(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  check_logit_regression(student, teacher, seed, PYKD_PACKED);
  return {allocate_loss(student, PYKD_PACKED), at::empty_symint(student.sym_sizes(), student.options())};
}

Tensor and_grad_out_cpu(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS, bool accumulate,
                        const Tensor& out) {
  const auto options = PYKD_PACKED;
  check_logit_regression(student, teacher, seed, options);
  check_grad_buffer(out, student);
  Tensor loss = allocate_loss(student, options);
  run_cpu({student, teacher, seed, options, loss, out, {}, accumulate});
  return loss;
}

Tensor and_grad_out_meta(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS, bool,
                         const Tensor& out) {
  check_logit_regression(student, teacher, seed, PYKD_PACKED);
  check_grad_buffer(out, student);
  return allocate_loss(student, PYKD_PACKED);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

template <typename Signature>
auto find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

Tensor call_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Seed& seed,
                     const LogitRegressionOptions& o) {
  static auto op = find<decltype(backward_cpu)>("pykd::logit_regression_backward");
  return op.call(grad_loss, student, teacher, seed, PYKD_UNPACK(o));
}

// Kept for the backward pass as one value.
struct SavedOptions : torch::CustomClassHolder, LogitRegressionOptions {
  explicit SavedOptions(const LogitRegressionOptions& options) : LogitRegressionOptions(options) {}
};

struct LogitRegressionFunction : torch::autograd::Function<LogitRegressionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, const Seed& seed,
                        const LogitRegressionOptions& options) {
    static auto op = find<decltype(logit_regression_cpu_op)>("pykd::logit_regression");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({student, teacher, seed.value_or(Tensor())});
    ctx->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<SavedOptions>(options));
    return op.call(student, teacher, seed, PYKD_UNPACK(options));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto tensors = ctx->get_saved_variables();
    const auto capsule = ctx->saved_data["options"].toCapsule();
    const LogitRegressionOptions& options = static_cast<const SavedOptions&>(*capsule);
    const Seed seed = tensors[2].defined() ? Seed(tensors[2]) : std::nullopt;
    return {call_backward(grads[0], tensors[0], tensors[1], seed, options), Tensor(), Tensor(), Tensor()};
  }
};

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static Tensor forward(AutogradContext*, const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                        const Seed& seed, const LogitRegressionOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_loss, student, teacher, seed, options);
  }
  static variable_list backward(AutogradContext*, variable_list) {
    C10_THROW_ERROR(NotImplementedError, "logit_regression: the second derivative is not implemented");
  }
};

Tensor logit_regression_autograd(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS) {
  return LogitRegressionFunction::apply(student, teacher, seed, PYKD_PACKED);
}

Tensor backward_autograd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Seed& seed,
                         PYKD_OPTIONS) {
  const auto options = PYKD_PACKED;
  if (at::GradMode::is_enabled()) return NoSecondDerivative::apply(grad_loss, student, teacher, seed, options);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(grad_loss, student, teacher, seed, options);
}

// The forms that return the gradient are not differentiable themselves.
std::tuple<Tensor, Tensor> and_grad_autograd(const Tensor& student, const Tensor& teacher, const Seed& seed,
                                             PYKD_OPTIONS) {
  static auto op = find<decltype(and_grad_cpu)>("pykd::logit_regression_and_grad");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(student, teacher, seed, PYKD_UNPACK(PYKD_PACKED));
}

// Also without autograd, in inference mode: tensors made outside it have versions there, too.
Tensor and_grad_out_in_place(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS,
                             bool accumulate, const Tensor& out) {
  static auto op = find<decltype(and_grad_out_cpu)>("pykd::logit_regression_and_grad", "out");
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor loss = op.call(student, teacher, seed, PYKD_UNPACK(PYKD_PACKED), accumulate, out);
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
  return loss;
}

Tensor and_grad_out_autograd(const Tensor& student, const Tensor& teacher, const Seed& seed, PYKD_OPTIONS,
                             bool accumulate, const Tensor& out) {
  PYKD_CHECK(!at::GradMode::is_enabled() || !out.requires_grad(),
             "logit_regression_and_grad: out must not require grad, pass it detached");
  return and_grad_out_in_place(student, teacher, seed, PYKD_UNPACK(PYKD_PACKED), accumulate, out);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor logit_regression(const Tensor& student, const Tensor& teacher, Seed seed, const Generator& generator,
                        PYKD_OPTIONS) {
  static auto op = find<decltype(logit_regression_cpu_op)>("pykd::logit_regression");
  const auto options = PYKD_PACKED;
  draw_seed(seed, generator, options.noise, student);
  return op.call(student, teacher, seed, PYKD_UNPACK(options));
}

std::tuple<Tensor, Tensor> logit_regression_and_grad(const Tensor& student, const Tensor& teacher, Seed seed,
                                                     const Generator& generator, PYKD_OPTIONS) {
  static auto op = find<decltype(and_grad_cpu)>("pykd::logit_regression_and_grad");
  const auto options = PYKD_PACKED;
  draw_seed(seed, generator, options.noise, student);
  return op.call(student, teacher, seed, PYKD_UNPACK(options));
}

Tensor logit_regression_and_grad_out(const Tensor& student, const Tensor& teacher, Seed seed,
                                     const Generator& generator, PYKD_OPTIONS, bool accumulate, const Tensor& out) {
  static auto op = find<decltype(and_grad_out_cpu)>("pykd::logit_regression_and_grad", "out");
  const auto options = PYKD_PACKED;
  draw_seed(seed, generator, options.noise, student);
  return op.call(student, teacher, seed, PYKD_UNPACK(options), accumulate, out);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
  m.def("logit_regression(" PYKD_SCHEMA ") -> Tensor");
  m.def("logit_regression_backward(Tensor grad_loss, " PYKD_SCHEMA ") -> Tensor");
  m.def("logit_regression_and_grad(" PYKD_SCHEMA ") -> (Tensor loss, Tensor grad_student)");
  m.def("logit_regression_and_grad.out(" PYKD_SCHEMA ", bool accumulate, Tensor(a!) out) -> Tensor loss");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) {
  m.impl("logit_regression", &logit_regression_cpu_op);
  m.impl("logit_regression_backward", &backward_cpu);
  m.impl("logit_regression_and_grad", &and_grad_cpu);
  m.impl("logit_regression_and_grad.out", &and_grad_out_cpu);
}
TORCH_LIBRARY_IMPL(pykd, Meta, m) {
  m.impl("logit_regression", &logit_regression_meta);
  m.impl("logit_regression_backward", &backward_meta);
  m.impl("logit_regression_and_grad", &and_grad_meta);
  m.impl("logit_regression_and_grad.out", &and_grad_out_meta);
}
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("logit_regression", &logit_regression_autograd);
  m.impl("logit_regression_backward", &backward_autograd);
  m.impl("logit_regression_and_grad", &and_grad_autograd);
  m.impl("logit_regression_and_grad.out", &and_grad_out_autograd);
}
TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { m.impl("logit_regression_and_grad.out", &and_grad_out_in_place); }

}  // namespace pykd::glue
