"""Loads the compiled operators, after a check that they were built for the torch that runs."""

import importlib
import json
import os
import platform
from pathlib import Path
from types import ModuleType

_REBUILD = "run `pip install --no-build-isolation --no-deps --force-reinstall .` in pykd's source folder"


def load() -> ModuleType:
    """Import ``pykd._C``, which registers ``torch.ops.pykd.*``.

    Returns:
        The module. Its attributes say how it was built: ``torch_version``, ``cuda``, ``cuda_reason``.

    Raises:
        ImportError: if nothing is compiled here, or for another torch or Python, with how to rebuild; or if the
            environment variable ``PYKD_CPU_ISA`` names no level.

    Example:
        >>> load().torch_version in __import__("torch").__version__
        True
    """
    import torch

    isa = os.environ.get("PYKD_CPU_ISA", "")
    if isa not in ("", "baseline", "avx2", "avx512"):
        raise ImportError(f"PYKD_CPU_ISA should be baseline, avx2 or avx512, got {isa!r}: correct or unset it.")
    record = Path(__file__).with_name("_build_info.json")
    if not record.exists():
        raise ImportError(f"pykd's operators are not compiled here: {_REBUILD}.")
    built = json.loads(record.read_text())
    running = torch.__version__.partition("+")[0]
    if built["torch"] != running:
        raise ImportError(f"pykd was compiled for torch {built['torch']}, but torch {running} is running: {_REBUILD}.")
    if built["cuda"] and _major(built["cuda"]) != _major(torch.version.cuda):
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise ImportError(f"pykd was compiled for CUDA {built['cuda']}, but the running torch has {cuda}: {_REBUILD}.")
    try:
        return importlib.import_module("pykd._C")
    except ModuleNotFoundError as error:
        raise ImportError(f"pykd is not compiled for this Python, {platform.python_version()}: {_REBUILD}.") from error


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]
