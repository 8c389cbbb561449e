// variational_linear and variational_conv2d, the torch layer: the library's products, and the noise between them.
//
//   mean = op(x, theta) + bias     variance = op(x^2, sigma^2)     y = mean + sqrt(variance + 1e-8) * eps
//
// With g the gradient of y and v that of the variance:
//   grad_x = op'(g, theta) + 2 x op'(v, sigma^2)     grad_theta = op"(g, x)     grad_log_sigma2 = op"(v, x^2) sigma^2
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/variational_layer/variational_layer.h"

namespace pykd::glue {

#define PYKD_LAYER_TENSORS \
  const at::Tensor &input, const at::Tensor &theta, const at::Tensor &log_sigma2, const std::optional<at::Tensor>&bias
#define PYKD_CONV_OPTIONS at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups

// As module.cpp offers them to Python: a seed that is not given is drawn from the generator.
at::Tensor variational_linear(PYKD_LAYER_TENSORS, std::optional<at::Tensor> seed,
                              const std::optional<at::Generator>& generator, int64_t row_offset);
at::Tensor variational_conv2d(PYKD_LAYER_TENSORS, std::vector<int64_t> stride, std::vector<int64_t> padding,
                              std::vector<int64_t> dilation, int64_t groups, std::optional<at::Tensor> seed,
                              const std::optional<at::Generator>& generator, int64_t row_offset);

// Runs the kernel on the device of `on`.
using RunLayer = void (*)(const at::Tensor& on, const VariationalLayer& args);
// The output; and what the backward pass needs: the deviation and sigma^2.
using Sampled = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// Which gradients are asked for: of input, theta, log_sigma2, bias.
using Needed = std::array<bool, 4>;

// log_sigma2 is there for autograd, which must know that the gradients depend on it.
#define PYKD_KEPT_TENSORS                                                   \
  const at::Tensor &grad, const at::Tensor &input, const at::Tensor &theta, \
      [[maybe_unused]] const at::Tensor &log_sigma2, const at::Tensor &variance_weight, const at::Tensor &deviation

Sampled linear_forward(RunLayer run, PYKD_LAYER_TENSORS, const at::Tensor& seed, int64_t row_offset);
Sampled conv2d_forward(RunLayer run, PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const at::Tensor& seed, int64_t row_offset);
std::vector<at::Tensor> linear_backward(RunLayer run, PYKD_KEPT_TENSORS, const at::Tensor& seed, int64_t row_offset,
                                        Needed needed);
std::vector<at::Tensor> conv2d_backward(RunLayer run, PYKD_KEPT_TENSORS, PYKD_CONV_OPTIONS, const at::Tensor& seed,
                                        int64_t row_offset, Needed needed);

// A device's implementations.
template <RunLayer run>
struct VariationalLayerOps {
  static Sampled linear(PYKD_LAYER_TENSORS, const at::Tensor& seed, int64_t row_offset) {
    return linear_forward(run, input, theta, log_sigma2, bias, seed, row_offset);
  }
  static Sampled conv2d(PYKD_LAYER_TENSORS, PYKD_CONV_OPTIONS, const at::Tensor& seed, int64_t row_offset) {
    return conv2d_forward(run, input, theta, log_sigma2, bias, stride, padding, dilation, groups, seed, row_offset);
  }
  static std::vector<at::Tensor> linear_grads(PYKD_KEPT_TENSORS, const at::Tensor& seed, int64_t row_offset,
                                              Needed needed) {
    return linear_backward(run, grad, input, theta, log_sigma2, variance_weight, deviation, seed, row_offset, needed);
  }
  static std::vector<at::Tensor> conv2d_grads(PYKD_KEPT_TENSORS, PYKD_CONV_OPTIONS, const at::Tensor& seed,
                                              int64_t row_offset, Needed needed) {
    return conv2d_backward(run, grad, input, theta, log_sigma2, variance_weight, deviation, stride, padding, dilation,
                           groups, seed, row_offset, needed);
  }
  static void implement(torch::Library& m) {
    m.impl("variational_linear", &linear);
    m.impl("variational_linear_backward", &linear_grads);
    m.impl("variational_conv2d", &conv2d);
    m.impl("variational_conv2d_backward", &conv2d_grads);
  }
};

}  // namespace pykd::glue
