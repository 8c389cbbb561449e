"""``import pykd`` is light, and its names are there when they are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pykd


def test_import_brings_no_torch() -> None:
    code = "import sys, pykd, pykd.config; print(pykd.__version__, 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(pykd.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [pykd.__version__, "False"]


@pytest.mark.parametrize("name", dir(pykd))
def test_every_name_is_there(name: str) -> None:
    assert getattr(pykd, name) is not None


def test_unknown_name_is_told() -> None:
    with pytest.raises(AttributeError, match="module 'pykd' has no attribute 'distil'"):
        _ = pykd.distil
