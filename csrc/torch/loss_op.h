// What the glue of every loss on logits shares: allocation, the forms of the op, autograd, and their registration.
//
// An op describes itself as a struct:
//   kName, kSchema     the schema's parameters, as text
//   Tensors, Options   the same as lists of types: the tensors with the seed, which LossInputs is made of, and the rest
//   Settings           the options as one value, made of their list; `reduction` and `noise` are among them
//   spread             calls a function with tensors and options as that list
//   check              throws where a rule is broken
//   Kernel, pack       the kernel's struct, and what is the op's own in it
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>

#include "core/total.h"
#include "torch/dispatch.h"
#include "torch/dtype.h"
#include "torch/noise.h"

namespace pykd::glue {

using Seed = std::optional<at::Tensor>;
using Generator = std::optional<at::Generator>;

template <typename... Types>
struct List {};

enum class Reduction : int64_t { kNone, kBatchmean, kSum };

struct LossInputs {
  LossInputs(at::Tensor student, at::Tensor teacher, Seed seed)
      : student(std::move(student)), teacher(std::move(teacher)), seed(std::move(seed)) {}
  LossInputs(at::Tensor student, at::Tensor teacher, std::optional<at::Tensor> target, Seed seed)
      : student(std::move(student)), teacher(std::move(teacher)), target(std::move(target)), seed(std::move(seed)) {}

  // For the backward pass, and back.
  explicit LossInputs(const torch::autograd::variable_list& saved)
      : student(saved[0]), teacher(saved[1]), target(optional(saved[2])), seed(optional(saved[3])) {}
  torch::autograd::variable_list save() const {
    return {student, teacher, target.value_or(at::Tensor()), seed.value_or(at::Tensor())};
  }
  static std::optional<at::Tensor> optional(const at::Tensor& t) {
    return t.defined() ? std::optional(t) : std::nullopt;
  }

  at::Tensor student, teacher;
  std::optional<at::Tensor> target;
  Seed seed;
};

inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_reduced(int64_t reduction) { return reduction != static_cast<int64_t>(Reduction::kNone); }
inline bool is_batchmean(int64_t reduction) { return reduction == static_cast<int64_t>(Reduction::kBatchmean); }

inline void check_reduction(const char* op, int64_t reduction) {
  PYKD_CHECK(reduction >= 0 && reduction <= 2, op, ": reduction must be 0, 1 or 2, got ", reduction);
}

inline void check_logits(const char* op, const at::Tensor& student, const at::Tensor& teacher, int64_t reduction) {
  PYKD_CHECK(student.dim() == 2, op, ": student must be [rows, classes], got ", student.sym_sizes());
  PYKD_CHECK(student.sym_size(1) >= 1, op, ": student must have at least one class, got ", student.sym_sizes());
  PYKD_CHECK(student.sym_sizes() == teacher.sym_sizes(), op, ": teacher must have the shape of student ",
             student.sym_sizes(), ", got ", teacher.sym_sizes());
  PYKD_CHECK_TYPE(student.device() == teacher.device(), op, ": teacher must be on the student's device ",
                  student.device(), ", got ", teacher.device());
  const DType student_dtype = dtype_of(op, "student", student), teacher_dtype = dtype_of(op, "teacher", teacher);
  PYKD_CHECK_TYPE((student_dtype == DType::kFloat64) == (teacher_dtype == DType::kFloat64), op,
                  ": student and teacher must both be float64 or neither, got ", student.scalar_type(), " and ",
                  teacher.scalar_type());
  check_reduction(op, reduction);
}

inline void check_grad_loss(const char* op, const at::Tensor& grad_loss, const at::Tensor& student, int64_t reduction) {
  PYKD_CHECK(is_reduced(reduction) ? grad_loss.dim() == 0
                                   : grad_loss.dim() == 1 && grad_loss.sym_size(0) == student.sym_size(0),
             op, "_backward: grad_loss must have the shape of the loss, got ", grad_loss.sym_sizes());
  PYKD_CHECK_TYPE(grad_loss.scalar_type() == loss_dtype(student) && grad_loss.device() == student.device(), op,
                  "_backward: grad_loss must be ", loss_dtype(student), " on ", student.device(), ", got ",
                  grad_loss.scalar_type(), " on ", grad_loss.device());
}

// One call of a kernel: contiguous tensors in, outputs where defined.
template <typename Op>
struct LossCall {
  LossCall(const LossInputs& given, const typename Op::Settings& settings, const at::Tensor& loss,
           const at::Tensor& grad_student, const at::Tensor& grad_loss = {}, bool accumulate = false)
      : inputs(given) {
    inputs.student = inputs.student.contiguous();
    inputs.teacher = inputs.teacher.contiguous();
    if (inputs.target) inputs.target = inputs.target->contiguous();
    const at::Tensor &student = inputs.student, &teacher = inputs.teacher;
    if (grad_student.defined()) {
      check_overlap(Op::kName, "_and_grad", grad_student, "student", student);
      check_overlap(Op::kName, "_and_grad", grad_student, "teacher", teacher);
    }
    const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
    const bool reduced = is_reduced(settings.reduction);
    args.student = student.const_data_ptr();
    args.teacher = teacher.const_data_ptr();
    args.grad_loss = grad_loss.defined() ? grad_loss.const_data_ptr() : nullptr;
    args.row_loss = reduced ? nullptr : pointer(loss);
    args.loss = reduced ? pointer(loss) : nullptr;
    args.grad_student = pointer(grad_student);
    args.rows = student.size(0);
    args.classes = student.size(1);
    args.grad_loss_stride = grad_loss.defined() && grad_loss.dim() == 1 ? grad_loss.stride(0) : 0;
    args.student_dtype = dtype_of(Op::kName, "student", student);
    args.teacher_dtype = dtype_of(Op::kName, "teacher", teacher);
    args.accumulate = accumulate;
    args.noise = pack_noise(settings.noise, inputs.seed);
    Op::pack(args, inputs, settings);
  }

  LossInputs inputs;
  typename Op::Kernel args;
};

// Rows on torch's threads, which are worth their start from about 16 us of work on: logits_per_task.
template <typename Kernel, typename Rows>
void run_rows_cpu(Kernel args, int64_t logits_per_task, double loss_scale, const Rows& run) {
  double row_losses[256];  // a small batch's, which no allocation should delay
  at::Tensor more;
  if (args.loss) {
    if (args.rows > 256) more = at::empty({args.rows}, at::kDouble);
    args.row_loss = more.defined() ? more.mutable_data_ptr() : row_losses;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, logits_per_task / args.classes);
  if (args.rows <= rows_per_task)
    run(args, 0, args.rows);
  else
    at::parallel_for(0, args.rows, rows_per_task, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  const DType dtype = args.student_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (args.loss) total_cpu(args.row_loss, dtype, args.rows, loss_scale, args.loss);
}

// The options of one call, kept for the backward pass as one value.
template <typename Settings>
struct Saved : torch::CustomClassHolder {
  explicit Saved(const Settings& settings) : settings(settings) {}
  const Settings settings;
};

template <typename Op, typename Tensors = typename Op::Tensors, typename Options = typename Op::Options>
struct Loss;

template <typename Op, typename... T, typename... O>
struct Loss<Op, List<T...>, List<O...>> {
  using Tensor = at::Tensor;
  using Settings = typename Op::Settings;
  using Run = void (*)(const LossCall<Op>&);
  using Pair = std::tuple<Tensor, Tensor>;

  static Tensor allocate_loss(const LossInputs& inputs, const Settings& settings) {
    const auto dtype = inputs.student.options().dtype(loss_dtype(inputs.student));
    return is_reduced(settings.reduction) ? at::empty({}, dtype)
                                          : at::empty_symint({inputs.student.sym_size(0)}, dtype);
  }
  static Tensor allocate_grad(const LossInputs& inputs) {
    return at::empty_symint(inputs.student.sym_sizes(), inputs.student.options());
  }

  // ---- a device's implementations; without `run` they only allocate: Meta ----

  template <Run run>
  static Tensor forward(T... tensors, O... options) {
    const LossInputs inputs{tensors...};
    const Settings settings{options...};
    Op::check(inputs, settings);
    Tensor loss = allocate_loss(inputs, settings);
    if constexpr (run != nullptr) run({inputs, settings, loss, {}});
    return loss;
  }

  template <Run run>
  static Tensor backward(const Tensor& grad_loss, T... tensors, O... options) {
    const LossInputs inputs{tensors...};
    const Settings settings{options...};
    Op::check(inputs, settings);
    check_grad_loss(Op::kName, grad_loss, inputs.student, settings.reduction);
    Tensor grad = allocate_grad(inputs);
    if constexpr (run != nullptr) run({inputs, settings, {}, grad, grad_loss});
    return grad;
  }

  template <Run run>
  static Pair and_grad(T... tensors, O... options) {
    const LossInputs inputs{tensors...};
    const Settings settings{options...};
    Op::check(inputs, settings);
    Tensor loss = allocate_loss(inputs, settings), grad = allocate_grad(inputs);
    if constexpr (run != nullptr) run({inputs, settings, loss, grad});
    return {loss, grad};
  }

  template <Run run>
  static Tensor and_grad_out(T... tensors, O... options, bool accumulate, const Tensor& out) {
    const LossInputs inputs{tensors...};
    const Settings settings{options...};
    Op::check(inputs, settings);
    check_buffer(Op::kName, "_and_grad", out, "student", inputs.student);
    Tensor loss = allocate_loss(inputs, settings);
    if constexpr (run != nullptr) run({inputs, settings, loss, out, {}, accumulate});
    return loss;
  }

  // ---- calls through the dispatcher ----

  static std::string name(const char* form = "") { return std::string(Op::kName) + form; }
  static Tensor call_forward(const LossInputs& inputs, const Settings& settings) {
    static auto op = find<Tensor(T..., O...)>(name());
    return Op::spread([](const auto&... all) { return op.call(all...); }, inputs, settings);
  }
  static Tensor call_backward(const Tensor& grad_loss, const LossInputs& inputs, const Settings& settings) {
    static auto op = find<Tensor(const Tensor&, T..., O...)>(name("_backward"));
    return Op::spread([&](const auto&... all) { return op.call(grad_loss, all...); }, inputs, settings);
  }
  static Pair call_and_grad(const LossInputs& inputs, const Settings& settings) {
    static auto op = find<Pair(T..., O...)>(name("_and_grad"));
    return Op::spread([](const auto&... all) { return op.call(all...); }, inputs, settings);
  }
  static Tensor call_and_grad_out(const LossInputs& inputs, const Settings& settings, bool accumulate,
                                  const Tensor& out) {
    static auto op = find<Tensor(T..., O..., bool, const Tensor&)>(name("_and_grad"), "out");
    return Op::spread([&](const auto&... all) { return op.call(all..., accumulate, out); }, inputs, settings);
  }

  // ---- autograd ----

  struct Function : torch::autograd::Function<Function> {
    using Context = torch::autograd::AutogradContext;
    using Variables = torch::autograd::variable_list;

    static Tensor forward(Context* ctx, const Tensor&, const LossInputs& inputs, const Settings& settings) {
      at::AutoDispatchBelowADInplaceOrView below;
      ctx->save_for_backward(inputs.save());
      ctx->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<Saved<Settings>>(settings));
      return call_forward(inputs, settings);
    }

    static Variables backward(Context* ctx, Variables grads) {
      const auto capsule = ctx->saved_data["options"].toCapsule();
      const Settings& settings = static_cast<const Saved<Settings>&>(*capsule).settings;
      return {call_backward(grads[0], LossInputs(ctx->get_saved_variables()), settings), Tensor(), Tensor()};
    }
  };

  struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
    using Context = torch::autograd::AutogradContext;
    using Variables = torch::autograd::variable_list;

    static Tensor forward(Context*, const Tensor& grad_loss, const Tensor&, const LossInputs& inputs,
                          const Settings& settings) {
      at::AutoDispatchBelowADInplaceOrView below;
      return call_backward(grad_loss, inputs, settings);
    }
    static Variables backward(Context*, Variables) {
      C10_THROW_ERROR(NotImplementedError, name(": the second derivative is not implemented"));
    }
  };

  static Tensor forward_autograd(T... tensors, O... options) {
    const LossInputs inputs{tensors...};
    return Function::apply(inputs.student, inputs, Settings{options...});
  }

  static Tensor backward_autograd(const Tensor& grad_loss, T... tensors, O... options) {
    const LossInputs inputs{tensors...};
    const Settings settings{options...};
    if (at::GradMode::is_enabled()) return NoSecondDerivative::apply(grad_loss, inputs.student, inputs, settings);
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_loss, inputs, settings);
  }

  // The forms that return the gradient are not differentiable themselves.
  static Pair and_grad_autograd(T... tensors, O... options) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_and_grad({tensors...}, {options...});
  }

  // Also without autograd, in inference mode: tensors made outside it have versions there, too.
  static Tensor and_grad_out_in_place(T... tensors, O... options, bool accumulate, const Tensor& out) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor loss = call_and_grad_out({tensors...}, {options...}, accumulate, out);
    if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
    return loss;
  }

  static Tensor and_grad_out_autograd(T... tensors, O... options, bool accumulate, const Tensor& out) {
    PYKD_CHECK(!at::GradMode::is_enabled() || !out.requires_grad(), Op::kName,
               "_and_grad: out must not require grad, pass it detached");
    return and_grad_out_in_place(tensors..., options..., accumulate, out);
  }

  // ---- as module.cpp offers them to Python: a seed that noise needs and that is not given is drawn ----

  static LossInputs with_seed(LossInputs inputs, const Generator& generator, const Settings& settings) {
    draw_seed(inputs.seed, generator, settings.noise, inputs.student);
    return inputs;
  }
  static Tensor eager(T... tensors, const Generator& generator, O... options) {
    const Settings settings{options...};
    return call_forward(with_seed({tensors...}, generator, settings), settings);
  }
  static Pair eager_and_grad(T... tensors, const Generator& generator, O... options) {
    const Settings settings{options...};
    return call_and_grad(with_seed({tensors...}, generator, settings), settings);
  }
  static Tensor eager_and_grad_out(T... tensors, const Generator& generator, O... options, bool accumulate,
                                   const Tensor& out) {
    const Settings settings{options...};
    return call_and_grad_out(with_seed({tensors...}, generator, settings), settings, accumulate, out);
  }

  // ---- registration ----

  static void define(torch::Library& m) {
    const std::string schema = Op::kSchema;
    m.def((name("(") + schema + ") -> Tensor").c_str());
    m.def((name("_backward(Tensor grad_loss, ") + schema + ") -> Tensor").c_str());
    m.def((name("_and_grad(") + schema + ") -> (Tensor loss, Tensor grad_student)").c_str());
    m.def((name("_and_grad.out(") + schema + ", bool accumulate, Tensor(a!) out) -> Tensor loss").c_str());
  }

  template <Run run>
  static void implement(torch::Library& m) {
    m.impl(Op::kName, &forward<run>);
    m.impl(name("_backward").c_str(), &backward<run>);
    m.impl(name("_and_grad").c_str(), &and_grad<run>);
    m.impl(name("_and_grad.out").c_str(), &and_grad_out<run>);
  }

  static void implement_autograd(torch::Library& m) {
    m.impl(Op::kName, &forward_autograd);
    m.impl(name("_backward").c_str(), &backward_autograd);
    m.impl(name("_and_grad").c_str(), &and_grad_autograd);
    m.impl(name("_and_grad.out").c_str(), &and_grad_out_autograd);
  }

  static void implement_in_place(torch::Library& m) { m.impl(name("_and_grad.out").c_str(), &and_grad_out_in_place); }
};

// In an op's .cpp, once.
#define PYKD_REGISTER_LOSS(Op, run_cpu)                                      \
  TORCH_LIBRARY_FRAGMENT(pykd, m) { Loss<Op>::define(m); }                   \
  TORCH_LIBRARY_IMPL(pykd, CPU, m) { Loss<Op>::implement<run_cpu>(m); }      \
  TORCH_LIBRARY_IMPL(pykd, Meta, m) { Loss<Op>::implement<nullptr>(m); }     \
  TORCH_LIBRARY_IMPL(pykd, Autograd, m) { Loss<Op>::implement_autograd(m); } \
  TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { Loss<Op>::implement_in_place(m); }

}  // namespace pykd::glue
