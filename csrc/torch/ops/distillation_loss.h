// distillation_loss, as the glue of all losses on logits wants it described.
#pragma once

#include <cmath>

#include "kernels/distillation_loss/distillation_loss.h"
#include "torch/loss_op.h"

namespace pykd::glue {

struct DistillationLossOp {
  static constexpr const char* kName = "distillation_loss";
  static constexpr const char* kSchema =
      "Tensor student, Tensor teacher, Tensor? target, Tensor? seed, int reduction, float temperature, "
      "float hard_weight, bool reverse, float label_smoothing, int ignore_index, " PYKD_NOISE_SCHEMA;
  using Tensors = List<const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const Seed&>;
  using Options = List<int64_t, double, double, bool, double, int64_t, PYKD_NOISE_TYPES>;
  using Kernel = DistillationLoss;

  struct Settings {
    int64_t reduction;
    double temperature;
    double hard_weight;
    bool reverse;
    double label_smoothing;
    int64_t ignore_index;
    NoiseOptions noise;
  };

  template <typename Function>
  static auto spread(const Function& f, const LossInputs& i, const Settings& s) {
    return f(i.student, i.teacher, i.target, i.seed, s.reduction, s.temperature, s.hard_weight, s.reverse,
             s.label_smoothing, s.ignore_index, PYKD_NOISE_SPREAD(s.noise));
  }

  static void check(const LossInputs& inputs, const Settings& s) {
    check_logits(kName, inputs.student, inputs.teacher, s.reduction);
    check_options(kName, inputs, s);
  }

  // Of the student only its rows and its device are looked at.
  static void check_options(const char* op, const LossInputs& inputs, const Settings& s) {
    const at::Tensor& student = inputs.student;
    PYKD_CHECK(s.temperature > 0 && std::isfinite(s.temperature), op, ": temperature must be finite and > 0, got ",
               s.temperature);
    PYKD_CHECK(s.hard_weight >= 0 && s.hard_weight <= 1, op, ": hard_weight must be in [0, 1], got ", s.hard_weight);
    PYKD_CHECK(s.label_smoothing >= 0 && s.label_smoothing <= 1, op, ": label_smoothing must be in [0, 1], got ",
               s.label_smoothing);
    check_noise(op, s.noise, inputs.seed, student);
    if (s.hard_weight == 0) return;
    PYKD_CHECK(inputs.target, op, ": hard_weight ", s.hard_weight, " needs a target, pass target= or hard_weight=0");
    const at::Tensor& target = *inputs.target;
    PYKD_CHECK(target.dim() == 1 && target.sym_size(0) == student.sym_size(0), op, ": target must be [rows] = [",
               student.sym_size(0), "], got ", target.sym_sizes());
    PYKD_CHECK_TYPE(target.scalar_type() == at::kLong, op, ": target must be int64, got ", target.scalar_type());
    PYKD_CHECK_TYPE(target.device() == student.device(), op, ": target must be on the student's device ",
                    student.device(), ", got ", target.device());
  }

  static void pack(Kernel& args, const LossInputs& inputs, const Settings& s) {
    args.target = s.hard_weight > 0 ? inputs.target->const_data_ptr<int64_t>() : nullptr;
    args.ignore_index = s.ignore_index;
    args.temperature = s.temperature;
    args.hard_weight = s.hard_weight;
    args.label_smoothing = s.label_smoothing;
    args.reverse = s.reverse;
    args.batchmean = is_batchmean(s.reduction);
  }
};

// The batch's targets that are not ignored; throws where one is wrong.
int64_t count_targets_cpu(const char* op, const DistillationLoss& args);
// The rows of a call whose targets are right, on torch's threads.
void run_distillation_loss_cpu(const DistillationLoss& args, int64_t targets);

}  // namespace pykd::glue
