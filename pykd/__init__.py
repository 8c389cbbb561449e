"""Small, sparse networks out of large ones: fused operators for PyTorch and complete distillation methods on top.

Importing ``pykd`` imports no torch; what needs it is loaded when it is first used.

>>> import pykd
>>> pykd.methods.NoisyTeacher(sigma=0.25).alpha
0.8
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykd import config, data, deploy, errors, methods, models, nn, ops, pruning, reference, sparse, training
    from pykd.training.distill import distill

try:
    __version__ = version("pykd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "config",
    "data",
    "deploy",
    "distill",
    "errors",
    "methods",
    "models",
    "nn",
    "ops",
    "pruning",
    "reference",
    "sparse",
    "training",
]


def __getattr__(name: str) -> Any:
    if name == "distill":
        from pykd.training import distill

        return distill
    if name in __all__:
        return importlib.import_module(f"pykd.{name}")
    raise AttributeError(f"module 'pykd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
