"""Distillation methods, one file a paper, and the plain ways to train a student that they are compared with.

>>> METHODS["noisy_teacher"](sigma=0.25).objective
'regression'
"""

from collections.abc import Callable
from functools import partial

from pykd.methods.attention_transfer import AttentionTransfer
from pykd.methods.bayesian_compression import BayesianCompression
from pykd.methods.comparisons import HintonDistillation, LogitRegression, StudentAlone, comparisons
from pykd.methods.cross_distillation import CrossDistillation
from pykd.methods.factor_transfer import FactorTransfer
from pykd.methods.fitnet import FitNet
from pykd.methods.noisy_teacher import NoisyTeacher
from pykd.methods.variational_student import VariationalStudent
from pykd.training import Method

METHODS: dict[str, Callable[..., Method]] = {
    "noisy_teacher": NoisyTeacher,
    "logit_regression": LogitRegression,
    "kd": HintonDistillation,
    "student_alone": StudentAlone,
    "variational_student": VariationalStudent,
    "sparse_vd": partial(VariationalStudent, lambda_t=0.0, lambda_g=0.0),
    "bayesian_compression": BayesianCompression,
    "factor_transfer": FactorTransfer,
    "attention_transfer": AttentionTransfer,
    "cross_distillation": CrossDistillation,
    "fitnet": FitNet,
}

__all__ = [
    "METHODS",
    "AttentionTransfer",
    "BayesianCompression",
    "CrossDistillation",
    "FactorTransfer",
    "FitNet",
    "HintonDistillation",
    "LogitRegression",
    "NoisyTeacher",
    "StudentAlone",
    "VariationalStudent",
    "comparisons",
]
