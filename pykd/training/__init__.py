"""Training: stages, their loop on Accelerate, checkpoints, progress, and the run that strings them together."""

from pykd.training.distill import Run, distill
from pykd.training.measure import describe, evaluate
from pykd.training.progress import show
from pykd.training.run_folder import load_weights
from pykd.training.stage import (
    Batch,
    Converting,
    First,
    Method,
    Preceded,
    Stage,
    Starting,
    label_loss,
    mean_logits,
    unwrapped,
)
from pykd.training.teacher import FrozenTeacher

__all__ = [
    "Batch",
    "Converting",
    "First",
    "FrozenTeacher",
    "Method",
    "Preceded",
    "Run",
    "Stage",
    "Starting",
    "describe",
    "distill",
    "evaluate",
    "label_loss",
    "load_weights",
    "mean_logits",
    "show",
    "unwrapped",
]
