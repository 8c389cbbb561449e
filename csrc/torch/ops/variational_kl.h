// variational_kl, the torch layer: rules and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "kernels/variational_kl/variational_kl.h"
#include "torch/dtype.h"

namespace pykd::glue {

using Tensors = std::vector<at::Tensor>;

// As module.cpp offers them to Python.
at::Tensor variational_kl(const Tensors& theta, const Tensors& log_sigma2);
std::tuple<at::Tensor, Tensors, Tensors> variational_kl_and_grad(const Tensors& theta, const Tensors& log_sigma2,
                                                                 double scale);
at::Tensor variational_kl_and_grad_out(const Tensors& theta, const Tensors& log_sigma2, double scale, bool accumulate,
                                       const Tensors& out_theta, const Tensors& out_log_sigma2);

// A device's implementations; without `run` they only allocate: Meta.
template <void (*run)(const at::Tensor& first, VariationalKl& args, const at::Tensor& kl)>
struct VariationalKlOp {
  using Two = std::tuple<Tensors, Tensors>;
  using Three = std::tuple<at::Tensor, Tensors, Tensors>;

  static at::Tensor forward(at::TensorList theta, at::TensorList log_sigma2) {
    check(theta, log_sigma2);
    at::Tensor kl = allocate_kl(theta);
    call(theta, log_sigma2, {}, {}, {}, kl, 1.0, false);
    return kl;
  }

  static Two backward(const at::Tensor& grad_kl, at::TensorList theta, at::TensorList log_sigma2) {
    check(theta, log_sigma2);
    PYKD_CHECK(grad_kl.dim() == 0, kName, "_backward: grad_kl must have the shape of the kl, got ",
               grad_kl.sym_sizes());
    Tensors grad_theta = allocate(theta), grad_log_sigma2 = allocate(log_sigma2);
    call(theta, log_sigma2, grad_theta, grad_log_sigma2, grad_kl, {}, 1.0, false);
    return {grad_theta, grad_log_sigma2};
  }

  static Three and_grad(at::TensorList theta, at::TensorList log_sigma2, double scale) {
    check(theta, log_sigma2);
    Tensors grad_theta = allocate(theta), grad_log_sigma2 = allocate(log_sigma2);
    at::Tensor kl = allocate_kl(theta);
    call(theta, log_sigma2, grad_theta, grad_log_sigma2, {}, kl, scale, false);
    return {kl, grad_theta, grad_log_sigma2};
  }

  static at::Tensor and_grad_out(at::TensorList theta, at::TensorList log_sigma2, double scale, bool accumulate,
                                 at::TensorList out_theta, at::TensorList out_log_sigma2) {
    check(theta, log_sigma2);
    check_out(out_theta, "theta", theta);
    check_out(out_log_sigma2, "log_sigma2", log_sigma2);
    if constexpr (run != nullptr) check_memory(theta, log_sigma2, out_theta, out_log_sigma2);
    at::Tensor kl = allocate_kl(theta);
    call(theta, log_sigma2, out_theta, out_log_sigma2, {}, kl, scale, accumulate);
    return kl;
  }

  static void implement(torch::Library& m) {
    m.impl("variational_kl", &forward);
    m.impl("variational_kl_backward", &backward);
    m.impl("variational_kl_and_grad", &and_grad);
    m.impl("variational_kl_and_grad.out", &and_grad_out);
  }

 private:
  static constexpr const char* kName = "variational_kl";

  static void check(at::TensorList theta, at::TensorList log_sigma2) {
    PYKD_CHECK(!theta.empty(), kName, ": theta must hold at least one tensor, got an empty list");
    PYKD_CHECK(theta.size() == log_sigma2.size(), kName, ": log_sigma2 must hold as many tensors as theta, ",
               theta.size(), ", got ", log_sigma2.size());
    for (size_t i = 0; i < theta.size(); ++i) {
      const at::Tensor &mean = theta[i], &log_variance = log_sigma2[i];
      dtype_of(kName, "theta", mean);
      PYKD_CHECK(mean.sym_sizes() == log_variance.sym_sizes(), kName, ": log_sigma2 must have the shape of theta ",
                 mean.sym_sizes(), ", got ", log_variance.sym_sizes());
      for (const at::Tensor& each : {mean, log_variance})
        PYKD_CHECK_TYPE(each.scalar_type() == theta[0].scalar_type() && each.device() == theta[0].device(), kName,
                        ": all tensors must have the dtype and device of the first, ", theta[0].scalar_type(), " on ",
                        theta[0].device(), ", got ", each.scalar_type(), " on ", each.device());
    }
  }

  static void check_out(at::TensorList out, const char* argument, at::TensorList weights) {
    PYKD_CHECK(out.size() == weights.size(), kName, "_and_grad: out must hold a buffer for each tensor of ", argument,
               ", ", weights.size(), ", got ", out.size());
    for (size_t i = 0; i < out.size(); ++i) check_buffer(kName, "_and_grad", out[i], argument, weights[i]);
  }

  // A kernel reads a layer's pair at a place before it writes there; what is not contiguous is copied before.
  static void check_memory(at::TensorList theta, at::TensorList log_sigma2, at::TensorList out_theta,
                           at::TensorList out_log_sigma2) {
    Tensors out(out_theta.begin(), out_theta.end());
    out.insert(out.end(), out_log_sigma2.begin(), out_log_sigma2.end());
    const Written written("variational_kl_and_grad", "out", out);
    for (size_t i = 0; i < theta.size(); ++i)
      for (const at::Tensor& each : {theta[i], log_sigma2[i]})
        PYKD_CHECK(!each.is_contiguous() || each.const_data_ptr() == out_theta[i].const_data_ptr() ||
                       each.const_data_ptr() == out_log_sigma2[i].const_data_ptr() || !written.shares(each),
                   kName, "_and_grad: out must lie apart from the weights, or each be its own, got memory of both");
  }

  static Tensors allocate(at::TensorList weights) {
    Tensors grads;
    for (const at::Tensor& weight : weights)
      grads.push_back(
          at::empty_symint(weight.sym_sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous)));
    return grads;
  }

  static at::Tensor allocate_kl(at::TensorList theta) {
    const auto dtype = theta[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return at::empty({}, theta[0].options().dtype(dtype));
  }

  static void call(at::TensorList theta, at::TensorList log_sigma2, at::TensorList grad_theta,
                   at::TensorList grad_log_sigma2, const at::Tensor& grad_kl, const at::Tensor& kl, double scale,
                   bool accumulate) {
    if constexpr (run != nullptr) {
      Tensors dense;  // keeps contiguous copies
      dense.reserve(2 * theta.size());
      const auto pointer = [&](const at::Tensor& weight) -> const void* {
        return dense.emplace_back(weight.contiguous()).const_data_ptr();
      };
      std::vector<VariationalWeights> layers;
      layers.reserve(theta.size());
      for (size_t i = 0; i < theta.size(); ++i)
        layers.push_back({pointer(theta[i]), pointer(log_sigma2[i]),
                          grad_theta.empty() ? nullptr : grad_theta[i].mutable_data_ptr(),
                          grad_theta.empty() ? nullptr : grad_log_sigma2[i].mutable_data_ptr(), theta[i].numel()});
      VariationalKl args{};
      args.layers = layers.data();
      args.count = static_cast<int64_t>(layers.size());
      args.grad_kl = grad_kl.defined() ? grad_kl.const_data_ptr() : nullptr;
      args.kl = kl.defined() ? kl.mutable_data_ptr() : nullptr;
      args.scale = scale;
      args.dtype = dtype_of(kName, "theta", theta[0]);
      args.accumulate = accumulate;
      run(theta[0], args, kl);
    }
  }
};

}  // namespace pykd::glue
