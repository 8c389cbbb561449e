// logit_regression on the CPU, and its registration.
#include "torch/ops/logit_regression.h"

namespace pykd::glue {
namespace {

void run_cpu(const LossCall<LogitRegressionOp>& call) {
  run_rows_cpu(call.args, 8192, call.args.loss_scale, logit_regression_cpu);
}

}  // namespace

PYKD_REGISTER_LOSS(LogitRegressionOp, run_cpu)

}  // namespace pykd::glue
