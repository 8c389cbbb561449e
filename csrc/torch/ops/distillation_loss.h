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
    const at::Tensor& student = inputs.student;
    check_logits(kName, student, inputs.teacher, s.reduction);
    PYKD_CHECK(s.temperature > 0 && std::isfinite(s.temperature), kName, ": temperature must be finite and > 0, got ",
               s.temperature);
    PYKD_CHECK(s.hard_weight >= 0 && s.hard_weight <= 1, kName, ": hard_weight must be in [0, 1], got ", s.hard_weight);
    PYKD_CHECK(s.label_smoothing >= 0 && s.label_smoothing <= 1, kName, ": label_smoothing must be in [0, 1], got ",
               s.label_smoothing);
    check_noise(kName, s.noise, inputs.seed, student);
    if (s.hard_weight == 0) return;
    PYKD_CHECK(inputs.target, kName, ": hard_weight ", s.hard_weight, " needs a target, pass target= or hard_weight=0");
    const at::Tensor& target = *inputs.target;
    PYKD_CHECK(target.dim() == 1 && target.sym_size(0) == student.sym_size(0), kName, ": target must be [rows] = [",
               student.sym_size(0), "], got ", target.sym_sizes());
    PYKD_CHECK_TYPE(target.scalar_type() == at::kLong, kName, ": target must be int64, got ", target.scalar_type());
    PYKD_CHECK_TYPE(target.device() == student.device(), kName, ": target must be on the student's device ",
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

}  // namespace pykd::glue
