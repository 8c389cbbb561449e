// logit_regression, as the glue of all losses on logits wants it described.
#pragma once

#include "kernels/logit_regression/logit_regression.h"
#include "torch/loss_op.h"

namespace pykd::glue {

struct LogitRegressionOp {
  static constexpr const char* kName = "logit_regression";
  static constexpr const char* kSchema =
      "Tensor student, Tensor teacher, Tensor? seed, int reduction, " PYKD_NOISE_SCHEMA;
  using Tensors = List<const at::Tensor&, const at::Tensor&, const Seed&>;
  using Options = List<int64_t, PYKD_NOISE_TYPES>;
  using Kernel = LogitRegression;

  struct Settings {
    int64_t reduction;
    NoiseOptions noise;
  };

  template <typename Function>
  static auto spread(const Function& f, const LossInputs& i, const Settings& s) {
    return f(i.student, i.teacher, i.seed, s.reduction, PYKD_NOISE_SPREAD(s.noise));
  }

  static void check(const LossInputs& inputs, const Settings& settings) {
    check_logits(kName, inputs.student, inputs.teacher, settings.reduction);
    check_noise(kName, settings.noise, inputs.seed, inputs.student);
  }

  static void pack(Kernel& args, const LossInputs&, const Settings& settings) {
    args.loss_scale = is_batchmean(settings.reduction) && args.rows > 0 ? 1.0 / static_cast<double>(args.rows) : 1;
    args.grad_scale = args.loss_scale;
  }
};

}  // namespace pykd::glue
