"""The compiled module: what it says when it does not fit the running torch, and what it must not contain."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from pykd import _extension

ROOT = Path(__file__).parents[1]
RUNNING = torch.__version__.partition("+")[0]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Writes what a build recorded."""
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    return lambda **record: (tmp_path / "_build_info.json").write_text(json.dumps(record))


def test_loads_where_it_fits():
    assert _extension.load().torch_version == RUNNING


@pytest.mark.parametrize(
    ("record", "cuda", "message"),
    [
        (None, None, "pykd's operators are not compiled here"),
        ({"torch": "1.2.3", "cuda": None}, None, f"compiled for torch 1.2.3, but torch {RUNNING} is running"),
        ({"torch": RUNNING, "cuda": "13.0"}, None, "compiled for CUDA 13.0, but the running torch has no CUDA"),
        ({"torch": RUNNING, "cuda": "13.0"}, "12.8", "compiled for CUDA 13.0, but the running torch has CUDA 12.8"),
    ],
)
def test_misfit_is_told_in_one_sentence(recorded, monkeypatch, record, cuda, message):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if record:
        recorded(**record)
    with pytest.raises(ImportError, match=re.escape(message) + r".*: run `pip install .*\.$") as error:
        _extension.load()
    assert "\n" not in str(error.value)


def test_other_minor_cuda_fits(recorded, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    recorded(torch=RUNNING, cuda="13.0")
    assert _extension.load().torch_version == RUNNING


def test_no_path_of_the_building_machine_is_left():
    binary = Path(_extension.load().__file__).read_bytes()
    assert [path for path in (ROOT, Path(torch.__file__).parent) if str(path).encode() in binary] == []


def test_libraries_are_those_torch_has_loaded():
    readelf = subprocess.run(["readelf", "-d", _extension.load().__file__], check=True, capture_output=True, text=True)
    assert "RPATH" not in readelf.stdout
    assert "RUNPATH" not in readelf.stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf.stdout)
    known = r"(lib(c10|torch)\w*|lib(cudart|stdc\+\+|gcc_s|pthread|m|c)|ld-linux\S*)\.so"
    assert [library for library in needed if not re.match(known, library)] == []


def test_unknown_level_is_told(monkeypatch):
    monkeypatch.setenv("PYKD_CPU_ISA", "AVX2")
    with pytest.raises(ImportError, match=r"PYKD_CPU_ISA should be baseline, avx2 or avx512, got 'AVX2'"):
        _extension.load()


def test_parallel_loops_run_on_torchs_threads():
    """at::parallel_for is serial without OpenMP, and a second runtime would not know torch's number of threads."""
    module = _extension.load().__file__
    asked = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True).stdout
    linked = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "GOMP_parallel" in asked
    assert "libgomp" not in linked
