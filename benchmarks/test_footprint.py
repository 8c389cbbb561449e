"""What the engine costs beside its answers: bytes on disk, resident memory and the time to start, beside onnxruntime.

    make engine
    python -m pytest benchmarks/test_footprint.py --benchmark-only --benchmark-json=footprint.json
    python benchmarks/table.py footprint.json

A program reads a network and one row, answers it with one thread, says the likeliest class and ends; onnxruntime has
the same network dense, as ONNX. Memory is the peak of what is resident; the time is that from the process's start to
its line. "pykd" is libpykd.so, beside all libraries of onnxruntime, and Python with ``pykd.deploy.Model``, beside
Python with onnxruntime. "First start" has no cache of what the planner measured. "Only numpy" reads the row alone.
``PYKD_ENGINE`` names the folder of pykd-run and libpykd.so, ``PYKD_ENGINE_CUDA`` that of another build, whose files are
shown beside.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from alternating import in_turns, measure_case
from peers import package, runtimes
from test_networks import LARGE, LENET, file_of

from pykd.deploy import read

ROOT = Path(__file__).parents[1]
ENGINE = Path(os.environ.get("PYKD_ENGINE", ROOT / "build" / "engine"))
ENGINE_CUDA = os.environ.get("PYKD_ENGINE_CUDA")
TURNS, ROUNDS = 3, 5

PYKD = """
import sys
import numpy as np
from pykd.deploy import Model
print(Model(sys.argv[1], threads=1)(np.load(sys.argv[2])).argmax(), flush=True)
"""
ONNXRUNTIME = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(session.run(None, {"input": np.load(sys.argv[2])})[0].argmax(), flush=True)
"""
NUMPY = """
import sys
import numpy as np
print(np.load(sys.argv[2]).argmax(), flush=True)
"""
# Says the peak of a program's resident memory in kilobytes. Linux counts that of the process which becomes the program,
# too: so it is small itself.
PEAK = """
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cstdio>
int main(int, char** argv) {
  const pid_t child = fork();
  if (child == 0) { execv(argv[1], argv + 1); _exit(127); }
  int status; rusage used;
  wait4(child, &status, 0, &used);
  std::printf("%ld\\n", used.ru_maxrss);
  return status != 0;
}
"""


@cache
def folder() -> Path:
    """For files of this run."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


def engine_file(name: str, where: Path = ENGINE) -> Path:
    if not (where / name).exists():
        pytest.skip(f"{where} holds no {name}: run make engine")
    return where / name


@cache
def peak_program() -> Path:
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no c++ was found on the PATH")
    program = folder() / "peak"
    subprocess.run([compiler, "-O1", "-x", "c++", "-", "-o", program], input=PEAK, text=True, check=True)
    return program


@cache
def files(network: str) -> tuple[Path, Path, Path]:
    """The model file, its dense ONNX graph and a row."""
    model = read(file_of(network))
    graph, row = (Path(tempfile.mkdtemp(dir=folder()), name) for name in ("dense.onnx", "row.npy"))
    graph.write_bytes(runtimes.graph(model))
    np.save(row, np.random.default_rng(0).normal(size=(1, *model.input_shape)).astype(np.float32))
    return file_of(network), graph, row


def command(network: str, name: str) -> tuple[list[str], dict[str, str]]:
    """The program that answers the row, and its environment."""
    model, graph, row = map(str, files(network))
    environment = {key: value for key, value in os.environ.items() if key != "PYKD_CACHE"}
    environment["XDG_CACHE_HOME"] = str(folder() / "cache")
    if name == "pykd":
        return [sys.executable, "-c", PYKD, model, row], environment
    if name.startswith("pykd-run"):
        remembered = [] if name == "pykd-run, first start" else ["--cache", str(folder() / "plans.json")]
        return [str(engine_file("pykd-run")), model, "--input", row, "--top", "1", *remembered], environment
    if name == "onnxruntime":
        package("onnxruntime")
        return [sys.executable, "-c", ONNXRUNTIME, graph, row], environment
    return [sys.executable, "-c", NUMPY, graph, row], environment


# Compared are Python with pykd and Python with onnxruntime, and library with library.
PROGRAMS = ["pykd", "pykd-run", "pykd-run, first start", "onnxruntime", "only numpy"]
SIZES = ["pykd", "pykd-run", "pykd with CUDA", "pykd-run with CUDA", "onnxruntime"]


def runs(names: list[str]) -> list:
    """Network, implementation and turn of every measurement, in order."""
    return [
        pytest.param(network, name, turn, id=f"{network}-{name}-{turn}".replace(" ", ""))
        for network in (LENET, LARGE)
        for turn, name in in_turns(names, TURNS)
    ]


@pytest.mark.parametrize("name", SIZES)
def test_bytes_on_disk(benchmark, name):
    where = ENGINE
    if "CUDA" in name:
        if not ENGINE_CUDA:
            pytest.skip("PYKD_ENGINE_CUDA names no other build")
        where = Path(ENGINE_CUDA)
    if name == "onnxruntime":
        found = list(Path(package("onnxruntime").__file__).parent.rglob("*.so*"))
    else:
        found = [engine_file("pykd-run" if name.startswith("pykd-run") else "libpykd.so", where)]
    bytes = sum(file.stat().st_size for file in found)
    benchmark.extra_info.update(value=bytes / 1e6, unit="MB")
    measure_case(benchmark, lambda: None, "bytes on disk", "the engine's code", 1, name, 0, 1, 1)


@pytest.mark.parametrize("network, name, turn", runs(PROGRAMS))
def test_resident_memory(benchmark, network, name, turn):
    words, environment = command(network, name)
    said = []

    def peak() -> None:
        result = subprocess.run([peak_program(), *words], env=environment, capture_output=True, text=True, check=True)
        said.append(int(result.stdout.split()[-1]))

    measure_case(benchmark, peak, "resident memory", f"{network}, one row", 1, name, turn, 1, 1)
    benchmark.extra_info.update(value=said[-1] * 1024 / 1e6, unit="MB")


@pytest.mark.parametrize("network, name, turn", runs(PROGRAMS))
def test_start(benchmark, network, name, turn):
    words, environment = command(network, name)
    running: list[subprocess.Popen] = []

    def end() -> None:
        for process in running:
            process.communicate()
            assert process.returncode == 0
        running.clear()

    def answer() -> None:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline()

    measure_case(benchmark, answer, "start to first answer", f"{network}, one row", 1, name, turn, ROUNDS, 1, setup=end)
    end()
