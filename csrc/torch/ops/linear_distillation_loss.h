// linear_distillation_loss: the distillation loss of two linear layers' outputs, which are never whole in memory.
//
//   s = student_hidden student_weight^T     t = teacher_hidden teacher_weight^T     loss = distillation_loss(s, t)
//
// The rows go in chunks, whose logits share two buffers. The kernel of distillation_loss writes the gradient g of a
// chunk over its s, and
//   grad_student_hidden[chunk] = g student_weight     grad_student_weight += g^T student_hidden[chunk]
#pragma once

#include <ATen/autocast_mode.h>

#include <array>

#include "torch/ops/distillation_loss.h"

namespace pykd::glue {

struct LinearInputs {
  explicit LinearInputs(const torch::autograd::variable_list& saved)
      : LinearInputs(saved[0], saved[1], saved[2], saved[3], LossInputs::optional(saved[4]),
                     LossInputs::optional(saved[5])) {}
  LinearInputs(at::Tensor student_hidden, at::Tensor student_weight, at::Tensor teacher_hidden,
               at::Tensor teacher_weight, std::optional<at::Tensor> target, Seed seed)
      : student_hidden(std::move(student_hidden)),
        student_weight(std::move(student_weight)),
        teacher_hidden(std::move(teacher_hidden)),
        teacher_weight(std::move(teacher_weight)),
        target(std::move(target)),
        seed(std::move(seed)) {}

  torch::autograd::variable_list save() const {
    return {student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            target.value_or(at::Tensor()),
            seed.value_or(at::Tensor())};
  }
  // What distillation_loss asks of its logits, but for their classes.
  LossInputs of_rows() const { return {student_hidden, teacher_hidden, target, seed}; }

  at::Tensor student_hidden, student_weight, teacher_hidden, teacher_weight;
  std::optional<at::Tensor> target;
  Seed seed;
};

// Runs the kernel on a chunk; `targets` are those of the batch that are not ignored, which only the CPU counts.
using RunChunk = void (*)(const LossCall<DistillationLossOp>& chunk, int64_t targets);
// The gradients that are asked for: of student_hidden and student_weight.
using NeededOfStudent = std::array<bool, 2>;
// The loss and these gradients; what is not asked for is an empty tensor.
using LossAndGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// All forms of the op: of the loss times grad_loss where that is defined. Without `run` it only allocates: Meta.
// chunk_rows is for tests; 0 leaves it to the op.
LossAndGrads linear_loss(RunChunk run, const LinearInputs& inputs, const DistillationLossOp::Settings& settings,
                         const at::Tensor& grad_loss, bool wants_loss, NeededOfStudent needed, int64_t chunk_rows);

template <typename Tensors, typename Options>
struct LinearLoss;

template <typename... T, typename... O>
struct LinearLoss<List<T...>, List<O...>> {
  using Tensor = at::Tensor;
  using Settings = DistillationLossOp::Settings;
  using Needed = NeededOfStudent;
  using Grads = std::tuple<Tensor, Tensor>;

  // ---- a device's implementations ----

  template <RunChunk run>
  static Tensor forward(T... tensors, O... options, int64_t chunk_rows) {
    return std::get<0>(linear_loss(run, {tensors...}, {options...}, {}, true, {false, false}, chunk_rows));
  }

  template <RunChunk run>
  static Grads backward(const Tensor& grad_loss, T... tensors, O... options, Needed needed, int64_t chunk_rows) {
    const auto [_, grad_hidden, grad_weight] =
        linear_loss(run, {tensors...}, {options...}, grad_loss, false, needed, chunk_rows);
    return {grad_hidden, grad_weight};
  }

  template <RunChunk run>
  static LossAndGrads and_grad(T... tensors, O... options, Needed needed, int64_t chunk_rows) {
    return linear_loss(run, {tensors...}, {options...}, {}, true, needed, chunk_rows);
  }

  // ---- calls through the dispatcher ----

  static constexpr const char *kForward = "linear_distillation_loss", *kBackward = "linear_distillation_loss_backward",
                              *kAndGrad = "linear_distillation_loss_and_grad";

  template <typename Function>
  static auto spread(const Function& f, const LinearInputs& i, const Settings& s) {
    return DistillationLossOp::spread(
        [&](const Tensor&, const Tensor&, const auto&... rest) {
          return f(i.student_hidden, i.student_weight, i.teacher_hidden, i.teacher_weight, rest...);
        },
        i.of_rows(), s);
  }
  static Tensor call_forward(const LinearInputs& inputs, const Settings& settings, int64_t chunk_rows = 0) {
    static auto op = find<Tensor(T..., O..., int64_t)>(kForward);
    return spread([&](const auto&... all) { return op.call(all..., chunk_rows); }, inputs, settings);
  }
  static Grads call_backward(const Tensor& grad_loss, const LinearInputs& inputs, const Settings& settings,
                             Needed needed, int64_t chunk_rows) {
    static auto op = find<Grads(const Tensor&, T..., O..., Needed, int64_t)>(kBackward);
    return spread([&](const auto&... all) { return op.call(grad_loss, all..., needed, chunk_rows); }, inputs, settings);
  }
  static LossAndGrads call_and_grad(const LinearInputs& inputs, const Settings& settings, Needed needed = {true, true},
                                    int64_t chunk_rows = 0) {
    static auto op = find<LossAndGrads(T..., O..., Needed, int64_t)>(kAndGrad);
    return spread([&](const auto&... all) { return op.call(all..., needed, chunk_rows); }, inputs, settings);
  }

  // ---- autograd ----

  struct Function : torch::autograd::Function<Function> {
    using Context = torch::autograd::AutogradContext;
    using Variables = torch::autograd::variable_list;
    static constexpr const char* kKept[] = {"grad_student_hidden", "grad_student_weight"};

    // The gradients are made beside the loss, while the logits are there; but float16, whose gradients need the scale
    // that comes from above, and rows with an upstream of their own make them in the backward pass.
    static Tensor forward(Context* ctx, const Tensor& student_hidden, const Tensor&, const LinearInputs& inputs,
                          const Settings& settings, Needed needed, int64_t chunk_rows) {
      at::AutoDispatchBelowADInplaceOrView below;
      ctx->save_for_backward(inputs.save());
      ctx->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<Saved<Settings>>(settings));
      ctx->saved_data["chunk_rows"] = chunk_rows;
      const bool early = is_reduced(settings.reduction) && student_hidden.scalar_type() != at::kHalf;
      if (!early || !(needed[0] || needed[1])) return call_forward(inputs, settings, chunk_rows);
      const auto [loss, grad_hidden, grad_weight] = call_and_grad(inputs, settings, needed, chunk_rows);
      if (needed[0]) ctx->saved_data[kKept[0]] = grad_hidden;
      if (needed[1]) ctx->saved_data[kKept[1]] = grad_weight;
      return loss;
    }

    // What is kept is given away, so that it is not there twice; whoever comes again has it computed anew.
    static Variables backward(Context* ctx, Variables grads) {
      const LinearInputs inputs(ctx->get_saved_variables());
      Variables found(6);
      Needed needed;
      for (size_t i = 0; i < needed.size(); ++i) {
        const auto kept = ctx->saved_data.find(kKept[i]);
        needed[i] = ctx->needs_input_grad(i);
        if (!needed[i] || kept == ctx->saved_data.end() || at::GradMode::is_enabled()) continue;
        found[i] = kept->second.toTensor();
        ctx->saved_data.erase(kept);
        found[i].mul_(grads[0]);
        needed[i] = false;
      }
      if (!needed[0] && !needed[1]) return found;
      const auto capsule = ctx->saved_data["options"].toCapsule();
      const Settings& settings = static_cast<const Saved<Settings>&>(*capsule).settings;
      const auto [grad_hidden, grad_weight] =
          call_backward(grads[0], inputs, settings, needed, ctx->saved_data["chunk_rows"].toInt());
      if (needed[0]) found[0] = grad_hidden;
      if (needed[1]) found[1] = grad_weight;
      return found;
    }
  };

  struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
    using Context = torch::autograd::AutogradContext;
    using Variables = torch::autograd::variable_list;

    static Variables forward(Context*, const Tensor& grad_loss, const Tensor&, const Tensor&,
                             const LinearInputs& inputs, const Settings& settings, Needed needed, int64_t chunk_rows) {
      at::AutoDispatchBelowADInplaceOrView below;
      const auto [grad_hidden, grad_weight] = call_backward(grad_loss, inputs, settings, needed, chunk_rows);
      return {grad_hidden, grad_weight};
    }
    static Variables backward(Context*, Variables) {
      C10_THROW_ERROR(NotImplementedError, std::string(kForward) + ": the second derivative is not implemented");
    }
  };

  static Tensor forward_autograd(T... tensors, O... options, int64_t chunk_rows) {
    const LinearInputs inputs{tensors...};
    const auto wants = [](const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); };
    return Function::apply(inputs.student_hidden, inputs.student_weight, inputs, Settings{options...},
                           Needed{wants(inputs.student_hidden), wants(inputs.student_weight)}, chunk_rows);
  }

  static Grads backward_autograd(const Tensor& grad_loss, T... tensors, O... options, Needed needed,
                                 int64_t chunk_rows) {
    const LinearInputs inputs{tensors...};
    const Settings settings{options...};
    if (at::GradMode::is_enabled()) {
      const auto both = NoSecondDerivative::apply(grad_loss, inputs.student_hidden, inputs.student_weight, inputs,
                                                  settings, needed, chunk_rows);
      return {both[0], both[1]};
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_loss, inputs, settings, needed, chunk_rows);
  }

  // The form that returns the gradients is not differentiable itself.
  static LossAndGrads and_grad_autograd(T... tensors, O... options, Needed needed, int64_t chunk_rows) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_and_grad({tensors...}, {options...}, needed, chunk_rows);
  }

  // ---- autocast: the tensors of both layers, as a linear layer has it ----

  template <at::DeviceType device>
  static LinearInputs cast(LinearInputs inputs) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    for (Tensor* t : {&inputs.student_hidden, &inputs.student_weight, &inputs.teacher_hidden, &inputs.teacher_weight})
      *t = at::autocast::cached_cast(dtype, *t, device);
    return inputs;
  }

  template <at::DeviceType device>
  static Tensor forward_autocast(T... tensors, O... options, int64_t chunk_rows) {
    const LinearInputs inputs = cast<device>({tensors...});
    const c10::impl::ExcludeDispatchKeyGuard without(c10::autocast_dispatch_keyset);
    return call_forward(inputs, {options...}, chunk_rows);
  }

  template <at::DeviceType device>
  static LossAndGrads and_grad_autocast(T... tensors, O... options, Needed needed, int64_t chunk_rows) {
    const LinearInputs given{tensors...}, inputs = cast<device>(given);
    const c10::impl::ExcludeDispatchKeyGuard without(c10::autocast_dispatch_keyset);
    const auto [loss, grad_hidden, grad_weight] = call_and_grad(inputs, {options...}, needed, chunk_rows);
    return {loss, grad_hidden.to(given.student_hidden.scalar_type()),
            grad_weight.to(given.student_weight.scalar_type())};
  }

  // ---- as module.cpp offers them to Python: a seed that noise needs and that is not given is drawn ----

  static LinearInputs with_seed(LinearInputs inputs, const Generator& generator, const Settings& settings) {
    draw_seed(inputs.seed, generator, settings.noise, inputs.student_hidden);
    return inputs;
  }
  static Tensor eager(T... tensors, const Generator& generator, O... options) {
    const Settings settings{options...};
    return call_forward(with_seed({tensors...}, generator, settings), settings);
  }
  static LossAndGrads eager_and_grad(T... tensors, const Generator& generator, O... options) {
    const Settings settings{options...};
    return call_and_grad(with_seed({tensors...}, generator, settings), settings);
  }

  // ---- registration ----

  template <RunChunk run>
  static void implement(torch::Library& m) {
    m.impl(kForward, &forward<run>);
    m.impl(kBackward, &backward<run>);
    m.impl(kAndGrad, &and_grad<run>);
  }

  static void implement_autograd(torch::Library& m) {
    m.impl(kForward, &forward_autograd);
    m.impl(kBackward, &backward_autograd);
    m.impl(kAndGrad, &and_grad_autograd);
  }

  template <at::DeviceType device>
  static void implement_autocast(torch::Library& m) {
    m.impl(kForward, &forward_autocast<device>);
    m.impl(kAndGrad, &and_grad_autocast<device>);
  }
};

using LinearDistillationLossOp = LinearLoss<List<const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                 const at::Tensor&, const std::optional<at::Tensor>&, const Seed&>,
                                            DistillationLossOp::Options>;

}  // namespace pykd::glue
