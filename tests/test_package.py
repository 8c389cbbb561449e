"""``import pykd`` is light, and its names are there when they are asked for."""

import os
import subprocess
import sys
import tomllib
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


def test_a_wheel_carries_every_file() -> None:
    root = Path(pykd.__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pykd"]
    files = {file for file in (root / "pykd").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    carried = {file for pattern in patterns for file in (root / "pykd").glob(pattern)}
    built = {file for file in files if file.suffix in (".py", ".so") or file.name == "_build_info.json"}
    assert files - built - carried == set()


def test_unknown_name_is_told() -> None:
    with pytest.raises(AttributeError, match="module 'pykd' has no attribute 'distil'"):
        _ = pykd.distil
