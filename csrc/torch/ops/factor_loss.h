// factor_loss, the torch layer: rules and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "kernels/factor_loss/factor_loss.h"
#include "torch/dtype.h"

namespace pykd::glue {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// As module.cpp offers them to Python.
at::Tensor factor_loss(const at::Tensor& student, const at::Tensor& teacher, int64_t p, bool by_row);
Three factor_loss_and_grad(const at::Tensor& student, const at::Tensor& teacher, int64_t p, bool by_row);

// A device's implementations; without `run` they only allocate: Meta.
template <void (*run)(const at::Tensor& student, const FactorLoss& args)>
struct FactorLossOp {
  using Tensor = at::Tensor;
  using Two = std::tuple<Tensor, Tensor>;

  static Tensor forward(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
    check(student, teacher, p);
    const Tensor loss = allocate_loss(student);
    call(student, teacher, p, by_row, loss, {}, {}, {});
    return loss;
  }

  // A gradient that is not wanted has no elements.
  static Two backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, int64_t p, bool by_row,
                      bool wants_student, bool wants_teacher) {
    check(student, teacher, p);
    PYKD_CHECK(grad_loss.dim() == 0, kName, "_backward: grad_loss must have the shape of the loss, got ",
               grad_loss.sym_sizes());
    PYKD_CHECK_TYPE(grad_loss.scalar_type() == loss_dtype(student) && grad_loss.device() == student.device(), kName,
                    "_backward: grad_loss must be ", loss_dtype(student), " on ", student.device(), ", got ",
                    grad_loss.scalar_type(), " on ", grad_loss.device());
    const Tensor grad_student = allocate_grad(student, wants_student),
                 grad_teacher = allocate_grad(teacher, wants_teacher);
    if (wants_student || wants_teacher)
      call(student, teacher, p, by_row, {}, grad_loss, wants_student ? grad_student : Tensor(),
           wants_teacher ? grad_teacher : Tensor());
    return {grad_student, grad_teacher};
  }

  static Three and_grad(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row) {
    check(student, teacher, p);
    const Tensor loss = allocate_loss(student), grad_student = allocate_grad(student, true),
                 grad_teacher = allocate_grad(teacher, true);
    call(student, teacher, p, by_row, loss, {}, grad_student, grad_teacher);
    return {loss, grad_student, grad_teacher};
  }

  static void implement(torch::Library& m) {
    m.impl("factor_loss", &forward);
    m.impl("factor_loss_backward", &backward);
    m.impl("factor_loss_and_grad", &and_grad);
  }

 private:
  static constexpr const char* kName = "factor_loss";

  static at::ScalarType loss_dtype(const Tensor& factor) {
    return factor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }

  static void check(const Tensor& student, const Tensor& teacher, int64_t p) {
    PYKD_CHECK(student.dim() >= 2, kName, ": student must be [rows, ...] with two dimensions or more, got ",
               student.sym_sizes());
    for (const auto& size : student.sym_sizes().slice(1))
      PYKD_CHECK(size >= 1, kName, ": student must have at least one entry a row, got ", student.sym_sizes());
    PYKD_CHECK(student.sym_sizes() == teacher.sym_sizes(), kName, ": teacher must have the shape of student ",
               student.sym_sizes(), ", got ", teacher.sym_sizes());
    PYKD_CHECK_TYPE(student.device() == teacher.device(), kName, ": teacher must be on the student's device ",
                    student.device(), ", got ", teacher.device());
    const DType student_dtype = dtype_of(kName, "student", student),
                teacher_dtype = dtype_of(kName, "teacher", teacher);
    PYKD_CHECK_TYPE((student_dtype == DType::kFloat64) == (teacher_dtype == DType::kFloat64), kName,
                    ": student and teacher must both be float64 or neither, got ", student.scalar_type(), " and ",
                    teacher.scalar_type());
    PYKD_CHECK(p == 1 || p == 2, kName, ": p must be 1 or 2, got ", p);
  }

  static Tensor allocate_loss(const Tensor& student) {
    return at::empty({}, student.options().dtype(loss_dtype(student)).memory_format(at::MemoryFormat::Contiguous));
  }

  static Tensor allocate_grad(const Tensor& factor, bool wanted) {
    const auto options = factor.options().memory_format(at::MemoryFormat::Contiguous);
    return wanted ? at::empty_symint(factor.sym_sizes(), options) : at::empty({0}, options);
  }

  static void call(const Tensor& student, const Tensor& teacher, int64_t p, bool by_row, const Tensor& loss,
                   const Tensor& grad_loss, const Tensor& grad_student, const Tensor& grad_teacher) {
    if constexpr (run != nullptr) {
      const Tensor dense_student = student.contiguous(), dense_teacher = teacher.contiguous();
      const auto pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
      FactorLoss args{};
      args.student = dense_student.const_data_ptr();
      args.teacher = dense_teacher.const_data_ptr();
      args.grad_loss = grad_loss.defined() ? grad_loss.const_data_ptr() : nullptr;
      args.loss = pointer(loss);
      args.grad_student = pointer(grad_student);
      args.grad_teacher = pointer(grad_teacher);
      args.rows = student.size(0);
      args.entries = 1;
      for (const int64_t size : student.sizes().slice(1)) args.entries *= size;
      const int64_t count = by_row ? args.rows : args.rows * args.entries;
      args.scale = count > 0 ? 1 / static_cast<double>(count) : 1;
      args.student_dtype = dtype_of(kName, "student", student);
      args.teacher_dtype = dtype_of(kName, "teacher", teacher);
      args.p = static_cast<int>(p);
      args.by_row = by_row;
      run(dense_student, args);
    }
  }
};

}  // namespace pykd::glue
