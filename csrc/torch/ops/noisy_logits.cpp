// noisy_logits on the CPU, its autograd and its registration.
#include "torch/ops/noisy_logits.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/dispatch.h"

namespace pykd::glue {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Seed = std::optional<Tensor>;

// Threads are worth their start from about 16 us of work on.
void run_cpu(const Tensor&, const NoisyLogits& args) {
  constexpr int64_t kLogitsPerTask = 16384;
  const int64_t rows_per_task = std::max<int64_t>(1, kLogitsPerTask / args.classes);
  if (args.rows <= rows_per_task)
    noisy_logits_cpu(args, 0, args.rows);
  else
    at::parallel_for(0, args.rows, rows_per_task,
                     [&](int64_t begin, int64_t end) { noisy_logits_cpu(args, begin, end); });
}

using Cpu = NoisyLogitsOp<run_cpu>;

Tensor call(const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS) {
  static auto op = find<decltype(Cpu::forward)>("noisy_logits");
  return op.call(logits, seed, sigma, alpha, per_sample, additive, row_offset);
}

void call_out(const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS, const Tensor& out) {
  static auto op = find<decltype(Cpu::out)>("noisy_logits", "out");
  op.call(logits, seed, sigma, alpha, per_sample, additive, row_offset, out);
}

// The op is affine: its gradient is the gradient with the same noise, by the op itself, and so are further ones.
struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS) {
    at::AutoDispatchBelowADInplaceOrView below;
    if (sigma > 0 && alpha > 0 && !additive) {
      ctx->save_for_backward({*seed});
      ctx->saved_data["sigma"] = sigma;
      ctx->saved_data["alpha"] = alpha;
      ctx->saved_data["per_sample"] = per_sample;
      ctx->saved_data["row_offset"] = row_offset;
    }
    return call(logits, seed, sigma, alpha, per_sample, additive, row_offset);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor grad = grads[0];
    auto& saved = ctx->saved_data;
    if (const auto tensors = ctx->get_saved_variables(); !tensors.empty() && grad.defined())
      grad = call(grad, tensors[0], saved["sigma"].toDouble(), saved["alpha"].toDouble(), saved["per_sample"].toBool(),
                  false, saved["row_offset"].toInt());
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor autograd(const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS) {
  return Function::apply(logits, seed, sigma, alpha, per_sample, additive, row_offset);
}

// Also without autograd, in inference mode: tensors made outside it have versions there, too.
void out_in_place(const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS, const Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  call_out(logits, seed, sigma, alpha, per_sample, additive, row_offset, out);
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

void out_autograd(const Tensor& logits, const Seed& seed, PYKD_NOISY_LOGITS_OPTIONS, const Tensor& out) {
  PYKD_CHECK(!at::GradMode::is_enabled() || !(out.requires_grad() || logits.requires_grad()),
             "noisy_logits: out= has no gradient, pass logits and out detached");
  out_in_place(logits, seed, sigma, alpha, per_sample, additive, row_offset, out);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor noisy_logits(const Tensor& logits, Seed seed, const std::optional<at::Generator>& generator,
                    PYKD_NOISY_LOGITS_OPTIONS) {
  draw_seed(seed, generator, {sigma, alpha, per_sample, additive, 1, row_offset}, logits);
  return call(logits, seed, sigma, alpha, per_sample, additive, row_offset);
}

void noisy_logits_out(const Tensor& logits, Seed seed, const std::optional<at::Generator>& generator,
                      PYKD_NOISY_LOGITS_OPTIONS, const Tensor& out) {
  draw_seed(seed, generator, {sigma, alpha, per_sample, additive, 1, row_offset}, logits);
  call_out(logits, seed, sigma, alpha, per_sample, additive, row_offset, out);
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
#define PYKD_SCHEMA \
  "(Tensor logits, Tensor? seed, float sigma, float alpha, bool per_sample, bool additive, int row_offset"
  m.def("noisy_logits" PYKD_SCHEMA ") -> Tensor");
  m.def("noisy_logits.out" PYKD_SCHEMA ", Tensor(a!) out) -> ()");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { NoisyLogitsOp<nullptr>::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("noisy_logits", &autograd);
  m.impl("noisy_logits.out", &out_autograd);
}
TORCH_LIBRARY_IMPL(pykd, ADInplaceOrView, m) { m.impl("noisy_logits.out", &out_in_place); }

}  // namespace pykd::glue
