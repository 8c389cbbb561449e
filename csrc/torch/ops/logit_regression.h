// logit_regression, the torch layer: rules, allocation and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "kernels/logit_regression/logit_regression.h"
#include "torch/dtype.h"
#include "torch/noise.h"

namespace pykd::glue {

using Seed = std::optional<at::Tensor>;
using Generator = std::optional<at::Generator>;

// The options of every op here, as parameters and as one value.
#define PYKD_OPTIONS \
  int64_t reduction, double sigma, double alpha, bool per_sample, bool additive, int64_t n_teachers, int64_t row_offset
#define PYKD_PACKED                                                           \
  LogitRegressionOptions {                                                    \
    reduction, { sigma, alpha, per_sample, additive, n_teachers, row_offset } \
  }

// As module.cpp offers them to Python: a seed that noise needs and that is not given is drawn from the generator.
at::Tensor logit_regression(const at::Tensor& student, const at::Tensor& teacher, Seed seed, const Generator& generator,
                            PYKD_OPTIONS);
std::tuple<at::Tensor, at::Tensor> logit_regression_and_grad(const at::Tensor& student, const at::Tensor& teacher,
                                                             Seed seed, const Generator& generator, PYKD_OPTIONS);
at::Tensor logit_regression_and_grad_out(const at::Tensor& student, const at::Tensor& teacher, Seed seed,
                                         const Generator& generator, PYKD_OPTIONS, bool accumulate,
                                         const at::Tensor& out);

enum class Reduction : int64_t { kNone, kBatchmean, kSum };

// What the ops share besides tensors, in the order of the schema.
struct LogitRegressionOptions {
  int64_t reduction;
  NoiseOptions noise;

  bool reduced() const { return reduction != static_cast<int64_t>(Reduction::kNone); }
};

inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_logit_regression(const at::Tensor& student, const at::Tensor& teacher, const Seed& seed,
                                   const LogitRegressionOptions& options) {
  const char* op = "logit_regression";
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
  PYKD_CHECK(options.reduction >= 0 && options.reduction <= 2, op, ": reduction must be 0, 1 or 2, got ",
             options.reduction);
  check_noise(op, options.noise, seed, student);
}

inline void check_grad_loss(const at::Tensor& grad_loss, const at::Tensor& student,
                            const LogitRegressionOptions& options) {
  const char* op = "logit_regression_backward";
  PYKD_CHECK(
      options.reduced() ? grad_loss.dim() == 0 : grad_loss.dim() == 1 && grad_loss.sym_size(0) == student.sym_size(0),
      op, ": grad_loss must have the shape of the loss, got ", grad_loss.sym_sizes());
  PYKD_CHECK_TYPE(grad_loss.scalar_type() == loss_dtype(student) && grad_loss.device() == student.device(), op,
                  ": grad_loss must be ", loss_dtype(student), " on ", student.device(), ", got ",
                  grad_loss.scalar_type(), " on ", grad_loss.device());
}

inline void check_grad_buffer(const at::Tensor& out, const at::Tensor& student) {
  const char* op = "logit_regression_and_grad";
  PYKD_CHECK(out.sym_sizes() == student.sym_sizes(), op, ": out must have the shape of student ", student.sym_sizes(),
             ", got ", out.sym_sizes());
  PYKD_CHECK_TYPE(out.scalar_type() == student.scalar_type() && out.device() == student.device(), op,
                  ": out must have the dtype and device of student, ", student.scalar_type(), " on ", student.device(),
                  ", got ", out.scalar_type(), " on ", out.device());
  PYKD_CHECK(out.is_contiguous(), op, ": out must be contiguous, got strides ", out.sym_strides());
}

// The kernel reads an element of the logits before it writes the gradient's, but not all of them.
inline void check_overlap(const at::Tensor& out, const char* argument, const at::Tensor& logits) {
  PYKD_CHECK(at::get_overlap_status(out, logits) != at::MemOverlapStatus::Partial,
             "logit_regression_and_grad: out must lie apart from ", argument, " or be it, got a part of its memory");
}

// The loss: [rows] when not reduced, else one value.
inline at::Tensor allocate_loss(const at::Tensor& student, const LogitRegressionOptions& options) {
  const auto dtype = student.options().dtype(loss_dtype(student));
  return options.reduced() ? at::empty({}, dtype) : at::empty_symint({student.sym_size(0)}, dtype);
}

// One call of the kernel: contiguous tensors in, outputs where defined.
struct LogitRegressionCall {
  LogitRegressionCall(const at::Tensor& student_, const at::Tensor& teacher_, const Seed& seed,
                      const LogitRegressionOptions& options, const at::Tensor& loss, const at::Tensor& grad_student,
                      const at::Tensor& grad_loss = {}, bool accumulate = false)
      : student(student_.contiguous()), teacher(teacher_.contiguous()) {
    if (grad_student.defined()) {
      check_overlap(grad_student, "student", student);
      check_overlap(grad_student, "teacher", teacher);
    }
    const int64_t rows = student.size(0);
    const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
    const double scale = options.reduction == static_cast<int64_t>(Reduction::kBatchmean) && rows > 0
                             ? 1.0 / static_cast<double>(rows)
                             : 1;
    args = {student.const_data_ptr(),
            teacher.const_data_ptr(),
            grad_loss.defined() ? grad_loss.const_data_ptr() : nullptr,
            options.reduced() ? nullptr : pointer(loss),
            options.reduced() ? pointer(loss) : nullptr,
            pointer(grad_student),
            rows,
            student.size(1),
            grad_loss.defined() && grad_loss.dim() == 1 ? grad_loss.stride(0) : 0,
            scale,
            scale,
            dtype_of("logit_regression", "student", student),
            dtype_of("logit_regression", "teacher", teacher),
            accumulate,
            pack_noise(options.noise, seed)};
  }

  at::Tensor student, teacher;
  LogitRegression args;
};

}  // namespace pykd::glue
