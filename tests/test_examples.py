"""Every script in examples/ runs, and says what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pykd

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {"plain_loop": "student: ", "compiled_loop": "last loss", "own_model": "student, noisy teacher"}


def test_all_examples_are_tested() -> None:
    # test_detection.py and the tests of the same names have these.
    elsewhere = {"factor_transfer_detection", "lightning_module", "hf_trainer"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS, *elsewhere}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(pykd.__file__).parents[1])}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
