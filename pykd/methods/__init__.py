"""Distillation methods, one file a paper, and the plain ways to train a student that they are compared with.

>>> METHODS["noisy_teacher"](sigma=0.25)
NoisyTeacher(alpha=0.8, sigma=0.25, noise_shape='logit', noise_kind='multiplicative', n_teachers=1)
"""

from pykd.methods.comparisons import LogitRegression, StudentAlone, comparisons
from pykd.methods.noisy_teacher import NoisyTeacher
from pykd.training import Method

METHODS: dict[str, type[Method]] = {
    "noisy_teacher": NoisyTeacher,
    "logit_regression": LogitRegression,
    "student_alone": StudentAlone,
}

__all__ = ["METHODS", "LogitRegression", "NoisyTeacher", "StudentAlone", "comparisons"]
