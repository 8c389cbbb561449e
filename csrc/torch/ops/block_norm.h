// block_norm and block_norms, the torch layer: rules and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "kernels/block_norm/block_norm.h"
#include "torch/blocks.h"

namespace pykd::glue {

// As module.cpp offers them to Python.
at::Tensor block_norm(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS, bool by_size);
std::tuple<at::Tensor, Tensors> block_norm_and_grad(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS,
                                                    bool by_size, double scale);
at::Tensor block_norm_and_grad_out(const Tensors& weights, const Tensors& teachers, PYKD_GROUPS, bool by_size,
                                   double scale, bool accumulate, const Tensors& out);
at::Tensor block_norms(const at::Tensor& weight, PYKD_GROUPS);

// A device's implementations; without `run` they only allocate: Meta.
template <void (*run)(const at::Tensor& first, BlockNorm& args, const at::Tensor& value)>
struct BlockNormOp {
  using Two = std::tuple<at::Tensor, Tensors>;

  static at::Tensor forward(at::TensorList weights, at::TensorList teachers, PYKD_GROUPS, bool by_size) {
    check(weights, teachers, groups, rows, columns);
    at::Tensor value = allocate_value(weights);
    call(weights, teachers, {groups, rows, columns, linf}, by_size, {}, {}, {}, value, 1.0, false);
    return value;
  }

  static Tensors backward(const at::Tensor& grad_value, at::TensorList weights, at::TensorList teachers, PYKD_GROUPS,
                          bool by_size) {
    check(weights, teachers, groups, rows, columns);
    PYKD_CHECK(grad_value.dim() == 0, kName, "_backward: grad_value must have the shape of the value, got ",
               grad_value.sym_sizes());
    PYKD_CHECK_TYPE(grad_value.scalar_type() == value_dtype(weights[0]) && grad_value.device() == weights[0].device(),
                    kName, "_backward: grad_value must be ", value_dtype(weights[0]), " on ", weights[0].device(),
                    ", got ", grad_value.scalar_type(), " on ", grad_value.device());
    Tensors grads = allocate(weights);
    call(weights, teachers, {groups, rows, columns, linf}, by_size, grads, {}, grad_value, {}, 1.0, false);
    return grads;
  }

  static Two and_grad(at::TensorList weights, at::TensorList teachers, PYKD_GROUPS, bool by_size, double scale) {
    check(weights, teachers, groups, rows, columns);
    Tensors grads = allocate(weights);
    at::Tensor value = allocate_value(weights);
    call(weights, teachers, {groups, rows, columns, linf}, by_size, grads, {}, {}, value, scale, false);
    return {value, grads};
  }

  static at::Tensor and_grad_out(at::TensorList weights, at::TensorList teachers, PYKD_GROUPS, bool by_size,
                                 double scale, bool accumulate, at::TensorList out) {
    check(weights, teachers, groups, rows, columns);
    PYKD_CHECK(out.size() == weights.size(), kName, "_and_grad: out must hold a buffer for each weight, ",
               weights.size(), ", got ", out.size());
    for (size_t i = 0; i < out.size(); ++i) check_buffer(kName, "_and_grad", out[i], "the weight", weights[i]);
    if constexpr (run != nullptr) check_memory(weights, teachers, out);
    at::Tensor value = allocate_value(weights);
    call(weights, teachers, {groups, rows, columns, linf}, by_size, out, {}, {}, value, scale, accumulate);
    return value;
  }

  static at::Tensor norms(const at::Tensor& weight, PYKD_GROUPS) {
    const Grouping grouping{groups, rows, columns, linf};
    check_weights("block_norms", at::TensorList(weight), grouping);
    const auto [grid_rows, grid_columns] = grid_of(weight, grouping);
    const auto options = weight.options().dtype(value_dtype(weight));
    at::Tensor found = groups == kIn    ? at::empty_symint({grid_columns}, options)
                       : groups == kOut ? at::empty_symint({grid_rows}, options)
                                        : at::empty_symint({grid_rows, grid_columns}, options);
    if constexpr (run != nullptr)
      if (weight.numel() == 0) found.zero_();
    call(weight, {}, grouping, false, {}, found, {}, {}, 1.0, false);
    return found;
  }

  static void implement(torch::Library& m) {
    m.impl("block_norm", &forward);
    m.impl("block_norm_backward", &backward);
    m.impl("block_norm_and_grad", &and_grad);
    m.impl("block_norm_and_grad.out", &and_grad_out);
    m.impl("block_norms", &norms);
  }

 private:
  static constexpr const char* kName = "block_norm";

  static void check(at::TensorList weights, at::TensorList teachers, int64_t groups, int64_t rows, int64_t columns) {
    const Grouping grouping{groups, rows, columns, false};
    check_weights(kName, weights, grouping);
    if (teachers.empty()) return;
    PYKD_CHECK(teachers.size() == weights.size(), kName, ": teachers must hold a weight for each of weights, ",
               weights.size(), ", got ", teachers.size());
    check_weights(kName, teachers, grouping);
    PYKD_CHECK_TYPE(teachers[0].device() == weights[0].device(), kName, ": teachers must be on the weights' device ",
                    weights[0].device(), ", got ", teachers[0].device());
    PYKD_CHECK_TYPE((teachers[0].scalar_type() == at::kDouble) == (weights[0].scalar_type() == at::kDouble), kName,
                    ": weights and teachers must both be float64 or neither, got ", weights[0].scalar_type(), " and ",
                    teachers[0].scalar_type());
  }

  // What is not contiguous is copied before any gradient is written.
  static void check_memory(at::TensorList weights, at::TensorList teachers, at::TensorList out) {
    const Written written("block_norm_and_grad", "out", out);
    for (size_t i = 0; i < out.size(); ++i)
      PYKD_CHECK(!weights[i].is_contiguous() || weights[i].const_data_ptr() == out[i].const_data_ptr() ||
                     !written.shares(weights[i]),
                 kName, "_and_grad: out must lie apart from the weights, or each be its own, got memory of both");
    for (const at::Tensor& teacher : teachers)
      PYKD_CHECK(!teacher.is_contiguous() || !written.shares(teacher), kName,
                 "_and_grad: out must lie apart from teachers, got memory of both");
  }

  static at::ScalarType value_dtype(const at::Tensor& weight) {
    return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }
  static at::Tensor allocate_value(at::TensorList weights) {
    return at::empty({}, weights[0].options().dtype(value_dtype(weights[0])));
  }
  static Tensors allocate(at::TensorList weights) {
    Tensors grads;
    for (const at::Tensor& weight : weights) grads.push_back(at::empty_symint(weight.sym_sizes(), weight.options()));
    return grads;
  }

  static void call(at::TensorList weights, at::TensorList teachers, const Grouping& grouping, bool by_size,
                   at::TensorList grads, const at::Tensor& norms, const at::Tensor& grad_value, const at::Tensor& value,
                   double scale, bool accumulate) {
    if constexpr (run != nullptr) {
      Tensors dense;  // contiguous; never moved, as its room is reserved
      dense.reserve(2 * weights.size());
      std::vector<BlockNormWeight> packed;
      packed.reserve(weights.size());
      for (size_t i = 0; i < weights.size(); ++i) {
        const at::Tensor& weight = dense.emplace_back(weights[i].contiguous());
        BlockNormWeight w{};
        w.student = weight.const_data_ptr();
        w.blocks = blocks_of(weight, grouping);
        if (!grads.empty()) w.grad = grads[i].mutable_data_ptr();
        if (!teachers.empty()) {
          const at::Tensor& teacher = dense.emplace_back(teachers[i].contiguous());
          w.teacher = teacher.const_data_ptr();
          w.teacher_blocks = blocks_of(teacher, grouping);
        }
        if (norms.defined()) w.norms = norms.mutable_data_ptr();
        packed.push_back(w);
      }
      BlockNorm args{};
      args.weights = packed.data();
      args.count = static_cast<int64_t>(packed.size());
      args.grad_value = grad_value.defined() ? grad_value.const_data_ptr() : nullptr;
      args.value = value.defined() ? value.mutable_data_ptr() : nullptr;
      args.scale = scale;
      args.dtype = dtype_of(kName, "weights", weights[0]);
      args.teacher_dtype = teachers.empty() ? args.dtype : dtype_of(kName, "teachers", teachers[0]);
      args.linf = grouping.linf;
      args.by_size = by_size;
      args.accumulate = accumulate;
      run(weights[0], args, value);
    }
  }
};

}  // namespace pykd::glue
