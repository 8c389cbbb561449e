// distillation_loss on the CPU, and its registration.
#include "torch/ops/distillation_loss.h"

namespace pykd::glue {
namespace {

void run_cpu(const LossCall<DistillationLossOp>& call) {
  run_distillation_loss_cpu(call.args, count_targets_cpu(DistillationLossOp::kName, call.args));
}

}  // namespace

int64_t count_targets_cpu(const char* op, const DistillationLoss& args) {
  int64_t wrong;
  const int64_t targets = distillation_loss_targets_cpu(args, wrong);
  PYKD_CHECK(wrong < 0, op, ": target must be in [0, ", args.classes, ") or ignore_index ", args.ignore_index, ", got ",
             args.target[wrong], " in row ", wrong);
  return targets;
}

void run_distillation_loss_cpu(const DistillationLoss& args, int64_t targets) {
  const int64_t bytes = distillation_loss_workspace_bytes_cpu(args);
  run_rows_cpu(args, 4096, 1, [&](const DistillationLoss& with_row_loss, int64_t begin, int64_t end) {
    at::Tensor workspace;
    if (bytes > 0) workspace = at::empty({bytes}, at::kByte);
    distillation_loss_cpu(with_row_loss, targets, workspace.defined() ? workspace.mutable_data_ptr() : nullptr, begin,
                          end);
  });
}

PYKD_REGISTER_LOSS(DistillationLossOp, run_cpu)

}  // namespace pykd::glue
