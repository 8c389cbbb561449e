"""Fused operators, one function a file. Each equals its namesake in :mod:`pykd.reference`, faster."""

from pykd._extension import load

load()  # registers torch.ops.pykd, or says in one sentence why it cannot

from pykd.ops.block_norm import block_norm, block_norm_and_grad, block_norms  # noqa: E402
from pykd.ops.block_prox import block_prox_  # noqa: E402
from pykd.ops.distillation_loss import distillation_loss, distillation_loss_and_grad  # noqa: E402
from pykd.ops.factor_loss import factor_loss, factor_loss_and_grad  # noqa: E402
from pykd.ops.linear_distillation_loss import linear_distillation_loss, linear_distillation_loss_and_grad  # noqa: E402
from pykd.ops.logit_regression import logit_regression, logit_regression_and_grad  # noqa: E402
from pykd.ops.noisy_logits import noisy_logits  # noqa: E402
from pykd.ops.sparse_conv2d import sparse_conv2d  # noqa: E402
from pykd.ops.sparse_linear import sparse_linear  # noqa: E402
from pykd.ops.variational_kl import variational_kl, variational_kl_and_grad  # noqa: E402
from pykd.ops.variational_layer import variational_conv2d, variational_linear  # noqa: E402

__all__ = [
    "block_norm",
    "block_norm_and_grad",
    "block_norms",
    "block_prox_",
    "distillation_loss",
    "distillation_loss_and_grad",
    "factor_loss",
    "factor_loss_and_grad",
    "linear_distillation_loss",
    "linear_distillation_loss_and_grad",
    "logit_regression",
    "logit_regression_and_grad",
    "noisy_logits",
    "sparse_conv2d",
    "sparse_linear",
    "variational_conv2d",
    "variational_kl",
    "variational_kl_and_grad",
    "variational_linear",
]
