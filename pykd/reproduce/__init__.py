"""The papers' experiments: the runs that they are, and what the results say beside the papers' claims.

>>> list(PAPERS)
['noisy_teacher', 'variational_student', 'factor_transfer', 'cross_distillation']
"""

from pykd.reproduce import cross_distillation, factor_transfer, noisy_teacher, variational_student
from pykd.reproduce._paper import Paper

PAPERS: dict[str, Paper] = {
    "noisy_teacher": noisy_teacher,
    "variational_student": variational_student,
    "factor_transfer": factor_transfer,
    "cross_distillation": cross_distillation,
}

__all__ = ["PAPERS", "Paper", "cross_distillation", "factor_transfer", "noisy_teacher", "variational_student"]
