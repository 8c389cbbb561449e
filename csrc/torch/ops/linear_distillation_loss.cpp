// linear_distillation_loss: its rules, its chunks, the CPU, and its registration.
#include "torch/ops/linear_distillation_loss.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>

namespace pykd::glue {
namespace {

using at::Tensor;
using Settings = DistillationLossOp::Settings;

constexpr const char* kName = LinearDistillationLossOp::kForward;

void check(const LinearInputs& inputs, const Settings& settings, int64_t chunk_rows) {
  const Tensor &hidden = inputs.student_hidden, &weight = inputs.student_weight;
  const auto check_side = [&](const std::string& side, const Tensor& x, const Tensor& w) {
    const std::string of_x = side + "_hidden", of_w = side + "_weight";
    PYKD_CHECK(x.dim() == 2, kName, ": ", of_x, " must be [rows, features], got ", x.sym_sizes());
    PYKD_CHECK(x.sym_size(1) >= 1, kName, ": ", of_x, " must have at least one feature, got ", x.sym_sizes());
    PYKD_CHECK(w.dim() == 2 && w.sym_size(1) == x.sym_size(1), kName, ": ", of_w, " must be [classes, ", x.sym_size(1),
               "], got ", w.sym_sizes());
    dtype_of(kName, of_x.c_str(), x);
    PYKD_CHECK_TYPE(w.scalar_type() == x.scalar_type(), kName, ": ", of_w, " must have the dtype of ", of_x, ", ",
                    x.scalar_type(), ", got ", w.scalar_type());
    for (const auto& [name, t] : {std::pair(of_x, x), std::pair(of_w, w)})
      PYKD_CHECK_TYPE(t.device() == hidden.device(), kName, ": ", name, " must be on student_hidden's device ",
                      hidden.device(), ", got ", t.device());
  };
  check_side("student", hidden, weight);
  check_side("teacher", inputs.teacher_hidden, inputs.teacher_weight);
  PYKD_CHECK(weight.sym_size(0) >= 1, kName, ": student_weight must have at least one class, got ", weight.sym_sizes());
  PYKD_CHECK(inputs.teacher_weight.sym_size(0) == weight.sym_size(0), kName,
             ": teacher_weight must have the classes of student_weight, ", weight.sym_size(0), ", got ",
             inputs.teacher_weight.sym_sizes());
  PYKD_CHECK(inputs.teacher_hidden.sym_size(0) == hidden.sym_size(0), kName,
             ": teacher_hidden must have the rows of student_hidden, ", hidden.sym_size(0), ", got ",
             inputs.teacher_hidden.sym_sizes());
  PYKD_CHECK_TYPE((hidden.scalar_type() == at::kDouble) == (inputs.teacher_hidden.scalar_type() == at::kDouble), kName,
                  ": student and teacher must both be float64 or neither, got ", hidden.scalar_type(), " and ",
                  inputs.teacher_hidden.scalar_type());
  check_reduction(kName, settings.reduction);
  DistillationLossOp::check_options(kName, inputs.of_rows(), settings);
  PYKD_CHECK(chunk_rows >= 0, kName, ": chunk_rows must be >= 0, got ", chunk_rows);
}

// Eight chunks leave the logits an eighth of their memory, and add to the gradient of the weight few enough times that
// its own dtype holds the sum. Of fewer than 256 rows the four products wait for the weights: they read or write some
// five weights for eight multiplications a row and entry. Of 128000 classes in float32, 256 rows are 256 MB.
constexpr int64_t kFewChunks = 8, kLeastRows = 256, kMostBytes = 256 << 20;

int64_t rows_of_chunk(int64_t rows, int64_t bytes_of_row) {
  const int64_t most = std::max<int64_t>(1, kMostBytes / bytes_of_row);
  const int64_t chunks = std::max(std::clamp<int64_t>(rows / kLeastRows, 1, kFewChunks), (rows + most - 1) / most);
  return (rows + chunks - 1) / chunks;
}

// grad^T hidden, summed over the chunks: many of a 16-bit weight in float32, each of them rounded but not their sum.
class WeightGrad {
 public:
  WeightGrad(const Tensor& grad_weight, bool wide) : grad_weight(grad_weight), wide(wide) {}

  void add(const Tensor& grad, const Tensor& hidden) {
    if (!started || wide)
      at::mm_out(grad_weight, grad.t(), hidden);
    else
      grad_weight.addmm_(grad.t(), hidden);
    if (wide) total = started ? total.add_(grad_weight) : grad_weight.to(at::kFloat);
    started = true;
  }

  void finish() {
    if (!started) grad_weight.zero_();
    if (started && wide) grad_weight.copy_(total);
  }

 private:
  Tensor grad_weight, total;
  const bool wide;
  bool started = false;
};

// Of the outputs those that are defined.
void run_chunks(RunChunk run, const LinearInputs& inputs, const Settings& settings, int64_t chunk_rows,
                const Tensor& grad_loss, const Tensor& row_loss, const Tensor& grad_hidden, const Tensor& grad_weight) {
  const Tensor hidden = inputs.student_hidden.contiguous(), weight = inputs.student_weight.contiguous();
  const bool soft = settings.hard_weight < 1, wants_grad = grad_hidden.defined() || grad_weight.defined();
  const int64_t rows = hidden.size(0), classes = weight.size(0);
  Tensor teacher_hidden, teacher_weight;
  if (soft) teacher_hidden = inputs.teacher_hidden.contiguous(), teacher_weight = inputs.teacher_weight.contiguous();
  LossInputs batch = inputs.of_rows();
  batch.target = settings.hard_weight > 0 ? std::optional(batch.target->contiguous()) : std::nullopt;

  DistillationLoss whole{};
  DistillationLossOp::pack(whole, batch, settings);
  whole.rows = rows;
  whole.classes = classes;
  const int64_t targets = hidden.is_cpu() ? count_targets_cpu(kName, whole) : 0;

  const int64_t of_student = hidden.element_size(), of_teacher = soft ? teacher_hidden.element_size() : 0;
  chunk_rows = chunk_rows ? std::min(chunk_rows, rows) : rows_of_chunk(rows, classes * (of_student + of_teacher));
  const Tensor student = at::empty({chunk_rows, classes}, hidden.options());
  const Tensor teacher = soft ? at::empty({chunk_rows, classes}, teacher_hidden.options()) : student;
  WeightGrad weight_grad(grad_weight, weight.element_size() == 2 && rows > kFewChunks * chunk_rows);
  for (int64_t begin = 0; begin < rows; begin += chunk_rows) {
    const int64_t n = std::min(chunk_rows, rows - begin);
    const auto part = [&](const Tensor& t) { return t.defined() && t.dim() ? t.narrow(0, begin, n) : t; };
    Tensor s = student.narrow(0, 0, n), t = teacher.narrow(0, 0, n);
    at::mm_out(s, part(hidden), weight.t());
    if (soft) at::mm_out(t, part(teacher_hidden), teacher_weight.t());

    Settings of_chunk = settings;
    of_chunk.reduction = static_cast<int64_t>(Reduction::kNone);
    of_chunk.noise.row_offset += begin;
    LossInputs logits(s, t, batch.seed);
    if (batch.target) logits.target = part(*batch.target);
    LossCall<DistillationLossOp> call(logits, of_chunk, part(row_loss), wants_grad ? s : Tensor(), part(grad_loss));
    call.args.batchmean = whole.batchmean;
    call.args.rows_before = begin;
    call.args.rows_after = rows - begin - n;
    run(call, targets);

    if (grad_hidden.defined()) {
      Tensor to = part(grad_hidden);
      at::mm_out(to, s, weight);
    }
    if (grad_weight.defined()) weight_grad.add(s, part(hidden));
  }
  if (grad_weight.defined()) weight_grad.finish();
}

void run_cpu(const LossCall<DistillationLossOp>& chunk, int64_t targets) {
  run_distillation_loss_cpu(chunk.args, targets);
}

}  // namespace

LossAndGrads linear_loss(RunChunk run, const LinearInputs& inputs, const Settings& settings, const Tensor& grad_loss,
                         bool wants_loss, NeededOfStudent needed, int64_t chunk_rows) {
  check(inputs, settings, chunk_rows);
  const Tensor& hidden = inputs.student_hidden;
  if (grad_loss.defined()) check_grad_loss(kName, grad_loss, hidden, settings.reduction);
  const bool reduced = is_reduced(settings.reduction);
  const auto loss_options = hidden.options().dtype(loss_dtype(hidden));
  const auto grad_of = [](const Tensor& t, bool wanted) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
  };
  const Tensor loss = reduced ? at::empty({}, loss_options) : at::empty_symint({hidden.sym_size(0)}, loss_options);
  const Tensor grad_hidden = grad_of(hidden, needed[0]), grad_weight = grad_of(inputs.student_weight, needed[1]);
  if (run) {
    Tensor row_loss;
    if (wants_loss) row_loss = reduced ? at::empty({hidden.size(0)}, loss_options) : loss;
    run_chunks(run, inputs, settings, chunk_rows, grad_loss, row_loss, needed[0] ? grad_hidden : Tensor(),
               needed[1] ? grad_weight : Tensor());
    if (wants_loss && reduced) loss.copy_(row_loss.sum(at::kDouble));
  }
  return {loss, grad_hidden, grad_weight};
}

TORCH_LIBRARY_FRAGMENT(pykd, m) {
#define PYKD_LINEAR_LOSS                                                                              \
  "Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight, "      \
  "Tensor? target, Tensor? seed, int reduction, float temperature, float hard_weight, bool reverse, " \
  "float label_smoothing, int ignore_index, " PYKD_NOISE_SCHEMA
  m.def("linear_distillation_loss(" PYKD_LINEAR_LOSS ", int chunk_rows=0) -> Tensor");
  m.def("linear_distillation_loss_backward(Tensor grad_loss, " PYKD_LINEAR_LOSS
        ", bool[2] needed, int chunk_rows=0) -> (Tensor grad_student_hidden, Tensor grad_student_weight)");
  m.def("linear_distillation_loss_and_grad(" PYKD_LINEAR_LOSS
        ", bool[2] needed=[True, True], int chunk_rows=0) -> "
        "(Tensor loss, Tensor grad_student_hidden, Tensor grad_student_weight)");
}
TORCH_LIBRARY_IMPL(pykd, CPU, m) { LinearDistillationLossOp::implement<run_cpu>(m); }
TORCH_LIBRARY_IMPL(pykd, Meta, m) { LinearDistillationLossOp::implement<nullptr>(m); }
TORCH_LIBRARY_IMPL(pykd, Autograd, m) { LinearDistillationLossOp::implement_autograd(m); }
TORCH_LIBRARY_IMPL(pykd, AutocastCPU, m) { LinearDistillationLossOp::implement_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(pykd, AutocastCUDA, m) { LinearDistillationLossOp::implement_autocast<at::kCUDA>(m); }

}  // namespace pykd::glue
