"""Every op once more in plain torch, same name and signature: the definition the kernels are judged against."""

from pykd.reference.block_norm import block_norm, block_norm_and_grad, block_norms
from pykd.reference.block_prox import block_prox_
from pykd.reference.distillation_loss import distillation_loss, distillation_loss_and_grad
from pykd.reference.factor_loss import factor_loss, factor_loss_and_grad
from pykd.reference.linear_distillation_loss import linear_distillation_loss, linear_distillation_loss_and_grad
from pykd.reference.logit_regression import logit_regression, logit_regression_and_grad
from pykd.reference.noisy_logits import noisy_logits
from pykd.reference.sparse_conv2d import sparse_conv2d
from pykd.reference.sparse_linear import sparse_linear
from pykd.reference.variational_kl import variational_kl, variational_kl_and_grad
from pykd.reference.variational_layer import variational_conv2d, variational_linear

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
