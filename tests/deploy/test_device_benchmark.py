"""``benchmarks/device`` runs where there is no torch, on its own networks and on given ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pykd.deploy import ModelFile
from pykd.deploy.graph import Op
from pykd.deploy.model_file import write
from pykd.sparse import SparseWeight

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [True, False])
def test_it_runs_without_torch(given, tmp_path):
    for package in ("torch", "safetensors"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('left out')\n")
    models = tmp_path / "models"
    models.mkdir()
    write(ModelFile((3,), [Op("linear", (0,), {}, SparseWeight(np.eye(3)))]), models / "a.pykd.safetensors")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, *sys.path[1:])))
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not xdist's worker
    environment = own | {"PYTHONPATH": paths} | ({"PYKD_MODELS": str(models)} if given else {})
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/device", "--benchmark-json", tmp_path / "record.json"]
    few = [] if given else ["-k", "LeNet-5 and cpu and 1T and 8"]
    result = subprocess.run([*command, *few], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [each["extra_info"] for each in json.loads((tmp_path / "record.json").read_text())["benchmarks"]]
    assert {each["implementation"] for each in found} == {"pykd", "dense"}
    names = {each["case"].rpartition(",")[0] for each in found}
    assert names == ({"a.pykd.safetensors"} if given else {"LeNet-5, 95 % unstructured", "LeNet-5, 95 % 16x16"})
    assert all("emulated" in each["machine"] and each["versions"]["numpy"] for each in found)
