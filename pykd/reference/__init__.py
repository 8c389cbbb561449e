"""Every op once more in plain torch, same name and signature: the definition the kernels are judged against."""

from pykd.reference.distillation_loss import distillation_loss, distillation_loss_and_grad
from pykd.reference.logit_regression import logit_regression, logit_regression_and_grad
from pykd.reference.noisy_logits import noisy_logits

__all__ = [
    "distillation_loss",
    "distillation_loss_and_grad",
    "logit_regression",
    "logit_regression_and_grad",
    "noisy_logits",
]
