// variational_linear and variational_conv2d on the CPU, their autograd and their registration.
#include "torch/ops/variational_layer.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "torch/dispatch.h"
#include "torch/dtype.h"
#include "torch/noise.h"

namespace pykd::glue {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;
using Bias = std::optional<Tensor>;
using Seed = std::optional<Tensor>;

constexpr NoiseOptions unit_noise(int64_t row_offset) { return {1.0, 1.0, false, true, 1, row_offset}; }

// Inside, products are of the dtypes that the tensors have.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

at::ScalarType wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor square_of(const Tensor& x) {
  const Tensor as_wide = x.to(wide(x));
  return at::mul(as_wide, as_wide);
}

// Of input, theta, log_sigma2, bias; undefined where they are not asked for.
using Grads = std::array<Tensor, 4>;

// ---- the products of the two layers: grads is all of the backward pass that follows the noise ----

struct Linear {
  static Tensor apply(const Tensor& x, const Tensor& w, const Bias& bias) {
    return bias ? at::addmm(*bias, x, w.t()) : at::mm(x, w.t());
  }

  // The squares' memory takes v sigma^2, and the other product adds itself to that.
  static Grads grads(const Tensor& g, const Tensor& v, const Tensor& x, const Tensor& theta, const Tensor& sigma2,
                     const Needed& needed) {
    const auto [of_x, of_theta, of_log_sigma2, of_bias] = needed;
    Grads grads;
    Tensor squares;
    if (of_theta) grads[1] = at::mm(g.t(), x);
    if (of_log_sigma2) {
      squares = square_of(x);
      grads[2] = at::mm(v.t(), squares).mul_(sigma2);
    }
    if (of_x) {
      Tensor to = squares.defined() ? squares : at::empty(x.sizes(), sigma2.options());
      at::mm_out(to, v, sigma2).mul_(x);
      grads[0] = x.scalar_type() == to.scalar_type() ? to.addmm_(g, theta, 2) : to.mul_(2).add_(at::mm(g, theta));
    }
    if (of_bias) grads[3] = g.sum(0);
    return grads;
  }
};

struct Conv2d {
  Tensor apply(const Tensor& x, const Tensor& w, const Bias& bias) const {
    return at::convolution(x, w, bias, stride, padding, dilation, false, {0, 0}, groups);
  }

  Grads grads(const Tensor& g, const Tensor& v, const Tensor& x, const Tensor& theta, const Tensor& sigma2,
              const Needed& needed) const {
    const auto [of_x, of_theta, of_log_sigma2, of_bias] = needed;
    Grads grads;
    if (of_x || of_theta || of_bias)
      std::tie(grads[0], grads[1], grads[3]) = products(g, x, theta, {of_x, of_theta, of_bias});
    if (of_x || of_log_sigma2) {
      Tensor of_squares;
      std::tie(of_squares, grads[2], std::ignore) = products(v, square_of(x), sigma2, {of_x, of_log_sigma2, false});
      if (of_x)
        grads[0] = grads[0].to(of_squares.scalar_type()).addcmul_(x.to(of_squares.scalar_type()), of_squares, 2);
      if (of_log_sigma2) grads[2].mul_(sigma2);
    }
    return grads;
  }

  std::tuple<Tensor, Tensor, Tensor> products(const Tensor& g, const Tensor& x, const Tensor& w,
                                              std::array<bool, 3> mask) const {
    return at::convolution_backward(g, x, w, at::IntArrayRef{w.size(0)}, stride, padding, dilation, false, {0, 0},
                                    groups, mask);
  }

  IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// ---- a pass, on tensors whose shapes and dtypes are checked ----

VariationalLayer pack(const char* op, const Tensor& sample, const Tensor& seed, int64_t row_offset) {
  VariationalLayer args{};
  args.rows = sample.size(0);
  args.classes = args.rows ? sample.numel() / args.rows : 1;
  args.dtype = dtype_of(op, "input", sample);
  args.noise = pack_noise(unit_noise(row_offset), seed);
  return args;
}

// Threads are worth their start from about 16 us of work on.
constexpr int64_t kValuesPerTask = 16384;

// sigma^2. On the CPU torch's own exponential takes four times as long.
Tensor exponential_of(const Tensor& log_sigma2, at::ScalarType dtype) {
  if (!log_sigma2.is_cpu()) return log_sigma2.to(dtype).exp();
  const Tensor from = log_sigma2.contiguous();
  Tensor to = at::empty(from.sizes(), from.options().dtype(dtype));
  const VarianceWeights args{from.const_data_ptr(), to.mutable_data_ptr(),
                             dtype_of("variational_layer", "log_sigma2", from)};
  at::parallel_for(0, from.numel(), kValuesPerTask,
                   [&](int64_t begin, int64_t end) { variance_weights_cpu(args, begin, end); });
  return to;
}

template <typename Layer>
Sampled forward(const char* op, RunLayer run, const Layer& layer, const Tensor& x, const Tensor& theta,
                const Tensor& log_sigma2, const Bias& bias, const Tensor& seed, int64_t row_offset) {
  const WithoutAutocast without;
  const auto dtype = x.scalar_type();
  Tensor variance_weight = exponential_of(log_sigma2, wide(x));
  Tensor sample = layer.apply(x, theta.to(dtype), bias ? Bias(bias->to(dtype)) : Bias()).contiguous();
  Tensor deviation = layer.apply(square_of(x), variance_weight, {}).contiguous();
  if (sample.numel()) {
    VariationalLayer args = pack(op, sample, seed, row_offset);
    args.sample = sample.mutable_data_ptr();
    args.deviation = deviation.mutable_data_ptr();
    run(sample, args);
  }
  return {sample, deviation, variance_weight};
}

template <typename Layer>
Tensors backward(const char* op, RunLayer run, const Layer& layer, const Tensor& g, const Tensor& x,
                 const Tensor& theta, const Tensor& variance_weight, const Tensor& deviation, const Tensor& seed,
                 int64_t row_offset, Needed needed) {
  const WithoutAutocast without;
  const auto dtype = x.scalar_type();
  Tensor grad_variance;
  if (needed[0] || needed[2]) {
    grad_variance = at::empty_like(deviation);
    if (g.numel()) {
      VariationalLayer args = pack(op, g, seed, row_offset);
      args.grad_sample = g.const_data_ptr();
      args.deviation = deviation.mutable_data_ptr();
      args.grad_variance = grad_variance.mutable_data_ptr();
      run(g, args);
    }
  }
  const Grads all = layer.grads(g, grad_variance, x, theta.to(dtype), variance_weight, needed);
  Tensors grads;
  for (size_t i = 0; i < all.size(); ++i)
    if (needed[i]) grads.push_back(all[i].to(i == 0 ? dtype : theta.scalar_type()));
  return grads;
}

// ---- rules ----

void check(const char* op, PYKD_LAYER_TENSORS, int64_t dims, const Seed& seed, int64_t row_offset) {
  const bool is_double = dtype_of(op, "input", input) == DType::kFloat64;
  dtype_of(op, "theta", theta);
  PYKD_CHECK(theta.dim() == dims, op, ": theta must be ", dims == 2 ? "[out, in]" : "[out, in / groups, height, width]",
             ", got ", theta.sym_sizes());
  PYKD_CHECK(theta.sym_numel() >= 1, op, ": theta must have at least one weight, got ", theta.sym_sizes());
  PYKD_CHECK(log_sigma2.sym_sizes() == theta.sym_sizes(), op, ": log_sigma2 must have the shape of theta ",
             theta.sym_sizes(), ", got ", log_sigma2.sym_sizes());
  PYKD_CHECK_TYPE((theta.scalar_type() == at::kDouble) == is_double, op,
                  ": input and theta must both be float64 or neither, got ", input.scalar_type(), " and ",
                  theta.scalar_type());
  PYKD_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == theta.sym_size(0)), op, ": bias must be [",
             theta.sym_size(0), "], got ", bias->sym_sizes());
  const auto alike = [&](const char* name, const Tensor& t) {
    PYKD_CHECK_TYPE(t.scalar_type() == theta.scalar_type() && t.device() == theta.device(), op, ": ", name,
                    " must have the dtype and device of theta, ", theta.scalar_type(), " on ", theta.device(), ", got ",
                    t.scalar_type(), " on ", t.device());
  };
  alike("log_sigma2", log_sigma2);
  if (bias) alike("bias", *bias);
  PYKD_CHECK_TYPE(input.device() == theta.device(), op, ": input must be on theta's device ", theta.device(), ", got ",
                  input.device());
  check_noise(op, unit_noise(row_offset), seed, input, "input");
}

constexpr const char *kLinear = "variational_linear", *kConv2d = "variational_conv2d";

void check_linear(PYKD_LAYER_TENSORS, const Seed& seed, int64_t row_offset) {
  check(kLinear, input, theta, log_sigma2, bias, 2, seed, row_offset);
  PYKD_CHECK(input.dim() >= 1 && input.sym_size(-1) == theta.sym_size(1), kLinear, ": input must be [..., ",
             theta.sym_size(1), "], got ", input.sym_sizes());
}

// The sizes of the output.
std::vector<c10::SymInt> check_conv2d(PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const Seed& seed, int64_t row_offset) {
  check(kConv2d, input, theta, log_sigma2, bias, 4, seed, row_offset);
  PYKD_CHECK(groups >= 1 && theta.sym_size(0) % groups == 0, kConv2d, ": groups must divide the ", theta.sym_size(0),
             " outputs, got ", groups);
  PYKD_CHECK(input.dim() == 4 && input.sym_size(1) == theta.sym_size(1) * groups, kConv2d, ": input must be [rows, ",
             theta.sym_size(1) * groups, ", height, width], got ", input.sym_sizes());
  const auto pair = [](const char* name, IntArrayRef values, int64_t least) {
    PYKD_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, kConv2d, ": ", name,
               " must be one or two integers >= ", least, ", got ", values);
  };
  pair("stride", stride, 1);
  pair("padding", padding, 0);
  pair("dilation", dilation, 1);
  std::vector<c10::SymInt> sizes = {input.sym_size(0), theta.sym_size(0)};
  for (size_t i = 0; i < 2; ++i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    const c10::SymInt room = input.sym_size(axis) + 2 * padding[i] - dilation[i] * (theta.sym_size(axis) - 1) - 1;
    PYKD_CHECK(room >= 0, kConv2d, ": input must be as large as the kernel, got ", input.sym_sizes(), " for ",
               theta.sym_sizes(), " with padding ", padding);
    sizes.push_back(room / stride[i] + 1);
  }
  return sizes;
}

void check_kept(const char* op, const Tensor& grad, const Tensor& input, const Tensor& deviation) {
  PYKD_CHECK(grad.sym_numel() == deviation.sym_numel(), op, "_backward: grad must have the shape of the output, got ",
             grad.sym_sizes());
  PYKD_CHECK_TYPE(grad.scalar_type() == input.scalar_type() && grad.device() == input.device(), op,
                  "_backward: grad must have the dtype and device of input, got ", grad.scalar_type(), " on ",
                  grad.device());
}

}  // namespace

// ---- a device's passes ----

Sampled linear_forward(RunLayer run, PYKD_LAYER_TENSORS, const Tensor& seed, int64_t row_offset) {
  check_linear(input, theta, log_sigma2, bias, seed, row_offset);
  auto sizes = input.sizes().vec();
  const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  const Tensor x = input.reshape({rows, theta.size(1)});
  auto [sample, deviation, variance_weight] =
      forward(kLinear, run, Linear(), x, theta, log_sigma2, bias, seed, row_offset);
  sizes.back() = theta.size(0);
  return {sample.view(sizes), deviation, variance_weight};
}

Sampled conv2d_forward(RunLayer run, PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset) {
  check_conv2d(input, theta, log_sigma2, bias, stride, padding, dilation, groups, seed, row_offset);
  return forward(kConv2d, run, Conv2d{stride, padding, dilation, groups}, input, theta, log_sigma2, bias, seed,
                 row_offset);
}

Tensors linear_backward(RunLayer run, PYKD_KEPT_TENSORS, const Tensor& seed, int64_t row_offset, Needed needed) {
  check_kept(kLinear, grad, input, deviation);
  const Tensor g = grad.contiguous().view(deviation.sizes()), x = input.reshape({deviation.size(0), theta.size(1)});
  Tensors grads = backward(kLinear, run, Linear(), g, x, theta, variance_weight, deviation, seed, row_offset, needed);
  if (needed[0]) grads[0] = grads[0].view(input.sizes());
  return grads;
}

Tensors conv2d_backward(RunLayer run, PYKD_KEPT_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset,
                        Needed needed) {
  check_kept(kConv2d, grad, input, deviation);
  return backward(kConv2d, run, Conv2d{stride, padding, dilation, groups}, grad.contiguous(), input, theta,
                  variance_weight, deviation, seed, row_offset, needed);
}

namespace {

// ---- Meta: shapes alone ----

Sampled allocate(std::vector<c10::SymInt> sizes, std::vector<c10::SymInt> rows, const Tensor& input,
                 const Tensor& theta) {
  const auto options = input.options().dtype(wide(input));
  return {at::empty_symint(sizes, input.options()), at::empty_symint(rows, options),
          at::empty_symint(theta.sym_sizes(), options)};
}

Sampled linear_meta(PYKD_LAYER_TENSORS, const Tensor& seed, int64_t row_offset) {
  check_linear(input, theta, log_sigma2, bias, seed, row_offset);
  auto sizes = input.sym_sizes().vec();
  c10::SymInt rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows = rows * sizes[i];
  sizes.back() = theta.sym_size(0);
  return allocate(sizes, {rows, theta.sym_size(0)}, input, theta);
}

Sampled conv2d_meta(PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset) {
  const auto sizes = check_conv2d(input, theta, log_sigma2, bias, stride, padding, dilation, groups, seed, row_offset);
  return allocate(sizes, sizes, input, theta);
}

Tensors grads_meta(const char* op, const Tensor& grad, const Tensor& input, const Tensor& theta,
                   const Tensor& deviation, Needed needed) {
  check_kept(op, grad, input, deviation);
  Tensors grads;
  if (needed[0]) grads.push_back(at::empty_symint(input.sym_sizes(), input.options()));
  for (const bool each : {needed[1], needed[2]})
    if (each) grads.push_back(at::empty_symint(theta.sym_sizes(), theta.options()));
  if (needed[3]) grads.push_back(at::empty_symint({theta.sym_size(0)}, theta.options()));
  return grads;
}

Tensors linear_grads_meta(const Tensor& grad, const Tensor& input, const Tensor& theta, const Tensor&, const Tensor&,
                          const Tensor& deviation, const Tensor&, int64_t, Needed needed) {
  return grads_meta(kLinear, grad, input, theta, deviation, needed);
}
Tensors conv2d_grads_meta(const Tensor& grad, const Tensor& input, const Tensor& theta, const Tensor&, const Tensor&,
                          const Tensor& deviation, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, const Tensor&,
                          int64_t, Needed needed) {
  return grads_meta(kConv2d, grad, input, theta, deviation, needed);
}

// ---- CPU ----

void run_cpu(const Tensor&, const VariationalLayer& args) {
  const int64_t rows_per_task = std::max<int64_t>(1, kValuesPerTask / args.classes);
  if (args.rows <= rows_per_task)
    variational_layer_cpu(args, 0, args.rows);
  else
    at::parallel_for(0, args.rows, rows_per_task,
                     [&](int64_t begin, int64_t end) { variational_layer_cpu(args, begin, end); });
}

using Cpu = VariationalLayerOps<run_cpu>;

// ---- autograd ----

Sampled call_linear(PYKD_LAYER_TENSORS, const Tensor& seed, int64_t row_offset) {
  static auto op = find<decltype(Cpu::linear)>(kLinear);
  return op.call(input, theta, log_sigma2, bias, seed, row_offset);
}
Sampled call_conv2d(PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset) {
  static auto op = find<decltype(Cpu::conv2d)>(kConv2d);
  return op.call(input, theta, log_sigma2, bias, stride, padding, dilation, groups, seed, row_offset);
}
Tensors call_linear_backward(PYKD_KEPT_TENSORS, const Tensor& seed, int64_t row_offset, Needed needed) {
  static auto op = find<decltype(Cpu::linear_grads)>("variational_linear_backward");
  return op.call(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset, needed);
}
Tensors call_conv2d_backward(PYKD_KEPT_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset,
                             Needed needed) {
  static auto op = find<decltype(Cpu::conv2d_grads)>("variational_conv2d_backward");
  return op.call(grad, input, theta, log_sigma2, variance_weight, deviation, stride, padding, dilation, groups, seed,
                 row_offset, needed);
}

struct Shape {
  bool convolution = false;  // the others are a convolution's
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 0;
};

// The gradients asked for, at their places among n.
variable_list spread(const Tensors& found, const Needed& needed, size_t n) {
  variable_list all(n);
  size_t next = 0;
  for (size_t i = 0; i < needed.size(); ++i)
    if (needed[i]) all[i] = found[next++];
  return all;
}

struct Function : torch::autograd::Function<Function> {
  static variable_list forward(AutogradContext* ctx, PYKD_LAYER_TENSORS, const Tensor& seed, int64_t row_offset,
                               const Shape& shape) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, deviation, variance_weight] =
        shape.convolution ? call_conv2d(input, theta, log_sigma2, bias, shape.stride, shape.padding, shape.dilation,
                                        shape.groups, seed, row_offset)
                          : call_linear(input, theta, log_sigma2, bias, seed, row_offset);
    ctx->save_for_backward({input, theta, log_sigma2, variance_weight, deviation, seed});
    ctx->mark_non_differentiable({deviation, variance_weight});
    ctx->set_materialize_grads(false);
    ctx->saved_data["row_offset"] = row_offset;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["stride"] = shape.stride;
    ctx->saved_data["padding"] = shape.padding;
    ctx->saved_data["dilation"] = shape.dilation;
    ctx->saved_data["groups"] = shape.groups;
    return {output, deviation, variance_weight};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    constexpr size_t kArguments = 7;
    if (!grads[0].defined()) return variable_list(kArguments);
    const variable_list kept = ctx->get_saved_variables();
    const auto& saved = ctx->saved_data;
    const auto& [input, theta, log_sigma2, variance_weight, deviation, seed] =
        std::tie(kept[0], kept[1], kept[2], kept[3], kept[4], kept[5]);
    const bool has_bias = saved.at("bias").toBool();
    const Needed needed = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                           has_bias && ctx->needs_input_grad(3)};
    const int64_t row_offset = saved.at("row_offset").toInt(), groups = saved.at("groups").toInt();
    const Tensor grad = grads[0].to(input.scalar_type());
    const Tensors found =
        groups ? call_conv2d_backward(grad, input, theta, log_sigma2, variance_weight, deviation,
                                      saved.at("stride").toIntVector(), saved.at("padding").toIntVector(),
                                      saved.at("dilation").toIntVector(), groups, seed, row_offset, needed)
               : call_linear_backward(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset,
                                      needed);
    return spread(found, needed, kArguments);
  }
};

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext* ctx, PYKD_KEPT_TENSORS, const Tensor& seed, int64_t row_offset,
                               const Shape& shape, const Needed& needed) {
    at::AutoDispatchBelowADInplaceOrView below;
    if (ctx) ctx->saved_data["op"] = std::string(shape.convolution ? kConv2d : kLinear);
    return shape.convolution
               ? call_conv2d_backward(grad, input, theta, log_sigma2, variance_weight, deviation, shape.stride,
                                      shape.padding, shape.dilation, shape.groups, seed, row_offset, needed)
               : call_linear_backward(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset,
                                      needed);
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    C10_THROW_ERROR(NotImplementedError,
                    ctx->saved_data["op"].toStringRef() + ": the second derivative is not implemented");
  }
};

Sampled sampled(const variable_list& all) { return {all[0], all[1], all[2]}; }

Sampled linear_autograd(PYKD_LAYER_TENSORS, const Tensor& seed, int64_t row_offset) {
  return sampled(Function::apply(input, theta, log_sigma2, bias, seed, row_offset, Shape()));
}
Sampled conv2d_autograd(PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset) {
  return sampled(Function::apply(input, theta, log_sigma2, bias, seed, row_offset,
                                 Shape{true, stride.vec(), padding.vec(), dilation.vec(), groups}));
}

Tensors grads_autograd(PYKD_KEPT_TENSORS, const Tensor& seed, int64_t row_offset, const Shape& shape, Needed needed) {
  if (at::GradMode::is_enabled())
    return NoSecondDerivative::apply(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset,
                                     shape, needed);
  return NoSecondDerivative::forward(nullptr, grad, input, theta, log_sigma2, variance_weight, deviation, seed,
                                     row_offset, shape, needed);
}
Tensors linear_grads_autograd(PYKD_KEPT_TENSORS, const Tensor& seed, int64_t row_offset, Needed needed) {
  return grads_autograd(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset, Shape(), needed);
}
Tensors conv2d_grads_autograd(PYKD_KEPT_TENSORS, PYKD_CONV_OPTIONS, const Tensor& seed, int64_t row_offset,
                              Needed needed) {
  return grads_autograd(grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset,
                        Shape{true, stride.vec(), padding.vec(), dilation.vec(), groups}, needed);
}

}  // namespace

// ---- calls from Python, past the interpreter's parsing of schemas ----

Tensor variational_linear(PYKD_LAYER_TENSORS, Seed seed, const std::optional<at::Generator>& generator,
                          int64_t row_offset) {
  draw_seed(seed, generator, unit_noise(row_offset), input);
  return std::get<0>(call_linear(input, theta, log_sigma2, bias, *seed, row_offset));
}

Tensor variational_conv2d(PYKD_LAYER_TENSORS, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, Seed seed,
                          const std::optional<at::Generator>& generator, int64_t row_offset) {
  draw_seed(seed, generator, unit_noise(row_offset), input);
  return std::get<0>(call_conv2d(input, theta, log_sigma2, bias, stride, padding, dilation, groups, *seed, row_offset));
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
#define PYKD_LAYER "Tensor input, Tensor theta, Tensor log_sigma2, Tensor? bias, "
#define PYKD_KEPT \
  "Tensor grad, Tensor input, Tensor theta, Tensor log_sigma2, Tensor variance_weight, Tensor deviation, "
#define PYKD_CONV "int[] stride, int[] padding, int[] dilation, int groups, "
#define PYKD_SAMPLED ") -> (Tensor output, Tensor deviation, Tensor variance_weight)"
  m.def("variational_linear(" PYKD_LAYER "Tensor seed, int row_offset" PYKD_SAMPLED);
  m.def("variational_conv2d(" PYKD_LAYER PYKD_CONV "Tensor seed, int row_offset" PYKD_SAMPLED);
  m.def("variational_linear_backward(" PYKD_KEPT "Tensor seed, int row_offset, bool[4] needed) -> Tensor[]");
  m.def("variational_conv2d_backward(" PYKD_KEPT PYKD_CONV "Tensor seed, int row_offset, bool[4] needed) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { Cpu::implement(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) {
  m.impl("variational_linear", &linear_meta);
  m.impl("variational_conv2d", &conv2d_meta);
  m.impl("variational_linear_backward", &linear_grads_meta);
  m.impl("variational_conv2d_backward", &conv2d_grads_meta);
}
TORCH_LIBRARY_IMPL(pykd, Autograd, m) {
  m.impl("variational_linear", &linear_autograd);
  m.impl("variational_conv2d", &conv2d_autograd);
  m.impl("variational_linear_backward", &linear_grads_autograd);
  m.impl("variational_conv2d_backward", &conv2d_grads_autograd);
}

}  // namespace pykd::glue
