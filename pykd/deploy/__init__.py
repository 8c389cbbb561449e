"""The model file of a finished network, the engine that answers it, and what this machine has.

:func:`export` writes a file, :func:`load` makes a torch module of one. :class:`Model` answers by the engine and
:func:`read` gives a file's description: neither needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykd.deploy.engine import Model
    from pykd.deploy.model_file import ModelFile, read
    from pykd.deploy.network import load
    from pykd.deploy.tracing import export

__all__ = ["Model", "ModelFile", "export", "load", "read"]

_HOMES = {"Model": "engine", "ModelFile": "model_file", "export": "tracing", "load": "network", "read": "model_file"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"pykd.deploy.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pykd.deploy' has no attribute {name!r}")
