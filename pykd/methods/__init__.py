"""Distillation methods, one file a paper, and the plain ways to train a student that they are compared with.

>>> METHODS["noisy_teacher"](sigma=0.25).objective
'regression'
"""

from pykd.methods.comparisons import HintonDistillation, LogitRegression, StudentAlone, comparisons
from pykd.methods.noisy_teacher import NoisyTeacher
from pykd.training import Method

METHODS: dict[str, type[Method]] = {
    "noisy_teacher": NoisyTeacher,
    "logit_regression": LogitRegression,
    "hinton": HintonDistillation,
    "student_alone": StudentAlone,
}

__all__ = ["METHODS", "HintonDistillation", "LogitRegression", "NoisyTeacher", "StudentAlone", "comparisons"]
