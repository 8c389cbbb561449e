// distillation_loss on the CPU, and its registration.
#include "torch/ops/distillation_loss.h"

namespace pykd::glue {
namespace {

void run_cpu(const LossCall<DistillationLossOp>& call) {
  int64_t wrong;
  const int64_t targets = distillation_loss_targets_cpu(call.args, wrong);
  PYKD_CHECK(wrong < 0, "distillation_loss: target must be in [0, ", call.args.classes, ") or ignore_index ",
             call.args.ignore_index, ", got ", call.args.target[wrong], " in row ", wrong);
  const int64_t bytes = distillation_loss_workspace_bytes_cpu(call.args);
  run_rows_cpu(call, 4096, 1, [&](const DistillationLoss& args, int64_t begin, int64_t end) {
    at::Tensor workspace;
    if (bytes > 0) workspace = at::empty({bytes}, at::kByte);
    distillation_loss_cpu(args, targets, workspace.defined() ? workspace.mutable_data_ptr() : nullptr, begin, end);
  });
}

}  // namespace

PYKD_REGISTER_LOSS(DistillationLossOp, run_cpu)

}  // namespace pykd::glue
