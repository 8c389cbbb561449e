"""The model file of a finished network, and what this machine has.

Reading a file needs no torch: :func:`read` gives its description. :func:`export` writes one, :func:`load` makes a torch
module of one.
"""

from typing import TYPE_CHECKING, Any

from pykd.deploy.model_file import ModelFile, read

if TYPE_CHECKING:
    from pykd.deploy.network import load
    from pykd.deploy.tracing import export

__all__ = ["ModelFile", "export", "load", "read"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from pykd.deploy.tracing import export

        return export
    if name == "load":
        from pykd.deploy.network import load

        return load
    raise AttributeError(f"module 'pykd.deploy' has no attribute {name!r}")
