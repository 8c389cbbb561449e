"""Every op once more in plain torch, same name and signature: the definition the kernels are judged against."""

from pykd.reference.logit_regression import logit_regression, logit_regression_and_grad

__all__ = ["logit_regression", "logit_regression_and_grad"]
