"""Other people's ways to run a sparse layer or a sparse network on the CPU, each as a call that can be timed.

A peer is a function of a case and a number of threads that returns the call; it skips, with the reason, where a
package, the processor or the format does not allow it. The packages are those of ``pip install 'pykd[peers]'``.
"""

import importlib
from types import ModuleType

import pytest
import torch


def package(name: str) -> ModuleType:
    """The module of an optional package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return pytest.skip(f"{name} is not installed: pip install 'pykd[peers]'")


def needs_bfloat16() -> None:
    """Skips where oneDNN has no bfloat16 of the processor's own: torch would emulate it, many times slower."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 arithmetic")
