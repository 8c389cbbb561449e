"""The record of what the CUDA kernels take, benchmarks/results/gpu/registers.json: whole, and shown on its page.

Not here: the build for every architecture that makes it (`make cuda`); one small kernel is built so, where nvcc is.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import registers  # noqa: E402

RECORD = json.loads(registers.RECORD.read_text())


def test_every_kernel_of_the_sources_is_there_for_every_architecture_and_none_spills_more_than_is_known():
    assert len(registers.kernels_of_sources()) > 20
    assert registers.faults(RECORD) == [], "run `make cuda`"
    assert all(len(registers.architectures(kernel)) == 8 for kernel in RECORD["kernels"].values())


def test_the_page_shows_the_record():
    assert registers.table(RECORD) in registers.PAGE.read_text()


def test_what_is_wrong_is_told():
    record = copy.deepcopy(RECORD)
    first, second, *_ = record["kernels"]
    record["kernels"][first]["90"][2] = 10_000
    del record["kernels"][second]["80"]
    for name in [name for name in record["kernels"] if name.startswith("pool2d: ")]:
        del record["kernels"][name]
    assert registers.faults(record) == [
        f"{first} spills 10000 bytes for sm_90",
        f"{second} is not built for sm_80",
        "pool2d: places is not in the record",
    ]


def test_warps_that_registers_leave_room_for():
    assert [registers.warps(*each) for each in [(32, 256), (64, 256), (65, 256), (255, 128), (40, 1024)]] == [
        64,
        32,
        24,
        8,
        32,
    ]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is needed")
def test_one_kernel_builds_for_all_architectures_as_recorded(tmp_path):
    tools = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}

    def cmake(*arguments):
        run = subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False, env=tools)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    cmake("-G", "Ninja", "-S", ROOT, "-B", tmp_path, "-DPYKD_CARD=ON", "-DPYKD_CUDA_ARCHS=all", "-DPYKD_WERROR=ON")
    log = cmake("--build", tmp_path, "--target", "cuda/pool2d_cuda.o")
    built = registers.record_of(log, tmp_path / "cuda")["kernels"]
    recorded = {name: kernel for name, kernel in RECORD["kernels"].items() if name.startswith("pool2d: ")}
    if registers.nvcc() == RECORD["nvcc"]:
        assert built == recorded
    else:
        assert {name: list(kernel) for name, kernel in built.items()} == {
            name: list(kernel) for name, kernel in recorded.items()
        }
