"""Distillation methods, one file a paper, and the plain ways to train a student that they are compared with.

>>> METHODS["noisy_teacher"](sigma=0.25)
NoisyTeacher(alpha=0.8, sigma=0.25, noise_shape='logit', noise_kind='multiplicative', n_teachers=1)
"""

from pykd.methods.comparisons import StudentAlone, comparisons
from pykd.methods.logit_regression import LogitRegression
from pykd.methods.noisy_teacher import NoisyTeacher

METHODS: dict[str, type] = {
    "noisy_teacher": NoisyTeacher,
    "logit_regression": LogitRegression,
    "student_alone": StudentAlone,
}

__all__ = ["METHODS", "LogitRegression", "NoisyTeacher", "StudentAlone", "comparisons"]
