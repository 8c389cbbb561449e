"""`PYKD_TORCH=off pip install .`: the engine alone, built and run where torch cannot be imported."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import pykd
from pykd.deploy import export, load
from pykd.deploy.sources import engine_sources
from pykd.testing import assert_matches

ROOT = Path(__file__).parents[1]
SYSTEM = {"libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libpthread.so", "linux-vdso.so", "ld-linux-x86-64.so"}
SYSTEM |= {"ld-linux-aarch64.so"}
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
ANSWER = """
import sys
import numpy as np
import pykd.deploy
assert pykd.__file__.startswith(sys.argv[1]), pykd.__file__
np.save(sys.argv[4], pykd.deploy.Model(sys.argv[2])(np.load(sys.argv[3])))
assert not {"torch", "safetensors"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with pykd in it, and with a torch and a safetensors that cannot be imported; the environment for it."""
    folder = tmp_path_factory.mktemp("installed")
    for package in ("torch", "safetensors"):
        (folder / f"{package}.py").write_text("raise ImportError('left out')\n")
    environment = {**os.environ, "PYKD_TORCH": "off", "PYTHONPATH": str(folder), "PYKD_CACHE": "off"}
    environment["PYKD_CUDA"] = "off"  # libpykd.so has it, in tests/deploy
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", folder, ROOT], env=environment, check=True)
    return folder, environment


def test_it_answers(installed, tmp_path):
    folder, environment = installed
    network = pykd.models.build("lenet5", in_shape=(1, 28, 28), classes=10).eval()
    file, rows, answers = tmp_path / "a.pykd.safetensors", tmp_path / "rows.npy", tmp_path / "answers.npy"
    export(network, file, torch.zeros(1, 1, 28, 28))
    np.save(rows, np.random.default_rng(0).normal(size=(3, 1, 28, 28)).astype(np.float32))
    arguments = [sys.executable, "-c", ANSWER, folder, file, rows, answers]
    subprocess.run(arguments, cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        expected = load(file)(torch.from_numpy(np.load(rows)))
    assert_matches(
        torch.from_numpy(np.load(answers)), expected, length=1024, magnitude=10 * float(expected.abs().max())
    )


def test_it_holds_the_engine_alone(installed):
    folder, _ = installed
    assert {path.name.partition(".")[0] for path in (folder / "pykd").glob("*.so")} == {"_runtime"}
    assert not (folder / "pykd" / "_build_info.json").exists()
    metadata = next(folder.glob("pykd-*.dist-info/METADATA")).read_text()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-") and "extra" not in line] == [
        "Requires-Python: >=3.10",
        "Requires-Dist: numpy",
    ]


def test_it_carries_what_bundles_need(installed):
    folder, _ = installed
    deploy = folder / "pykd" / "deploy"
    carried = {str(path.relative_to(deploy / "source")) for path in (deploy / "source").rglob("*") if path.is_file()}
    assert carried == engine_sources(ROOT).keys() == engine_sources(deploy / "source").keys()
    assert {"CMakeLists.txt", "LICENSE", "csrc/runtime/pykd_run.cpp", "csrc/kernels/planes/planes_cuda.cu"} <= carried
    assert {"third_party/nlohmann/json.hpp", "third_party/nlohmann/LICENSE"} <= carried
    assert not [name for name in carried if "_test." in name or "/torch/" in name]
    assert (deploy / "device" / "run.sh").read_bytes() == (ROOT / "pykd/deploy/device/run.sh").read_bytes()


def test_nvcc_builds_the_kernels_for_jetsons():
    cross, native = ROOT / "build" / "cross", ROOT / "build" / "jetson"
    build = cross if (cross / "cuda" / "planes_cuda.o").is_file() else native  # `make cross` has compiled them already
    cmake = [shutil.which("cmake", path=PATH), "-DPYKD_RUNTIME=ON", "-S", ROOT, "-B", build]
    if build == native:
        settings = [
            "-G",
            "Ninja",
            "-DPYKD_CUDA_ARCHS=87;110",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=PATH)}",
        ]
        told = subprocess.run([*cmake, *settings], check=True, capture_output=True, text=True).stdout
        if "the engine has CUDA" not in told:
            pytest.skip(next(line for line in told.splitlines() if "the engine has no CUDA" in line))
    rooms = ("elementwise", "planes", "pool2d", "sparse_conv2d", "sparse_linear")
    objects = [f"cuda/{room}_cuda.o" for room in rooms]
    subprocess.run([cmake[0], "--build", build, "--target", *objects], check=True, capture_output=True)
    assert all((build / each).stat().st_size > 0 for each in objects)
    command = (build / "build.ninja").read_text()
    assert "code=sm_87" in command and "code=sm_110" in command and "code=compute_110" in command


@pytest.mark.parametrize(
    ("archs", "compiler", "why"), [("80;90", "false", "this host compiler"), ("75;80", "c++", "compute capability 8.0")]
)
def test_the_engine_goes_without_kernels_that_nvcc_refuses(archs, compiler, why, tmp_path):
    cmake, ninja = (shutil.which(tool, path=PATH) for tool in ("cmake", "ninja"))
    settings = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DPYKD_RUNTIME=ON", f"-DPYKD_CUDA_ARCHS={archs}"]
    environment = {**os.environ, "CUDAHOSTCXX": shutil.which(compiler), "PATH": PATH}
    environment.setdefault("CUDA_HOME", "/usr/local/cuda")
    command = [cmake, *settings, "-S", ROOT, "-B", tmp_path]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    if "no CUDA toolkit" in told:
        pytest.skip("there is no nvcc here")
    assert re.search(f"the engine has no CUDA: .*{why}", told)
    reason = "CMakeFiles/engine.dir/csrc/runtime/no_device.cpp.o"  # holds the sentence
    subprocess.run([cmake, "--build", tmp_path, "--target", reason], check=True, capture_output=True)
    assert why.encode() in (tmp_path / reason).read_bytes()


def libraries(file: Path) -> set[str]:
    """The names, without versions, of what the loader gives a file."""
    ldd = subprocess.run(["ldd", file], check=True, capture_output=True, text=True).stdout
    return {Path(line.split()[0]).name.partition(".so")[0] + ".so" for line in ldd.splitlines()}


def test_links_to_the_system_alone(installed):
    folder, _ = installed
    cmake = shutil.which("cmake", path=PATH)
    build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-off"
    subprocess.run([cmake, "--build", build, "--target", "pykd", "pykd-run"], check=True, capture_output=True)
    made = [build / "libpykd.so", build / "pykd-run", *(folder / "pykd").glob("_runtime*.so")]
    assert {file.name: libraries(file) - SYSTEM for file in made} == {file.name: set() for file in made}
    exported = {}
    for file in made:
        listed = subprocess.run(["nm", "-D", "--defined-only", file], check=True, capture_output=True, text=True).stdout
        exported[file] = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
        assert not [name for name in exported[file] if re.match("_*cuda", name)], "torch has another runtime of CUDA"
    assert "pykd_plan_run" in exported[made[0]]
    assert all(name.startswith("pykd_") for name in exported[made[0]])


def test_a_wrong_choice_is_told():
    environment = {**os.environ, "PYKD_TORCH": "perhaps"}
    setup = [sys.executable, ROOT / "setup.py", "--name"]
    told = subprocess.run(setup, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr == "pykd: PYKD_TORCH must be on or off, got 'perhaps'.\n"
