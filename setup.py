"""Lets CMake compile pykd._runtime and, against the running torch, pykd._C; the rest stands in pyproject.toml."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
HOW = "pip install --no-build-isolation --no-deps ."
TORCH = os.environ.get("PYKD_TORCH", "on").lower()
if TORCH not in ("on", "off"):
    sys.exit(f"pykd: PYKD_TORCH must be on or off, got {TORCH!r}.")


def tool(name: str) -> str:
    """The program beside the running Python (CMake and ninja are wheels, too), else the one on the PATH."""
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))
    if path is None:
        sys.exit(f"pykd: {name} is needed to compile pykd: run `pip install 'cmake>=3.22' ninja`, then `{HOW}`.")
    return path


def headers(package: str) -> str:
    """The folder of the C++ headers that an installed Python package carries."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"pykd: {package} is needed to compile pykd: run `pip install {package}`, then `{HOW}`.")
    return str(Path(spec.origin).with_name("include"))


def torch_settings() -> dict[str, str]:
    """What CMake is told about the torch to build against."""
    if TORCH == "off":
        return {"PYKD_TORCH_DIR": "", "PYKD_PYBIND11_INCLUDE": headers("pybind11")}
    try:
        import torch
    except ImportError:
        sys.exit(
            "pykd: pykd is compiled against the torch it will run with, and this build sees none: "
            f"run `pip install 'torch>=2.11' 'setuptools>=77' 'cmake>=3.22' ninja nlohmann_json`, then `{HOW}`; "
            "or set PYKD_TORCH=off for the engine alone."
        )
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or tuple(map(int, release.groups())) < (2, 11):
        sys.exit(f"pykd: torch must be 2.11 or newer, found {torch.__version__}: run `pip install 'torch>=2.11'`.")
    folder = Path(torch.__file__).parent
    return {
        "PYKD_TORCH_DIR": str(folder),
        "PYKD_TORCH_VERSION": torch.__version__.partition("+")[0],
        "PYKD_TORCH_CUDA": torch.version.cuda or "",
        "PYKD_PYBIND11_INCLUDE": str(folder / "include"),
    }


class CMakeBuild(build_ext):
    """Builds in build/, which is kept, so that a second build compiles only what changed."""

    def build_extensions(self) -> None:
        output = Path(self.get_ext_fullpath("pykd._runtime")).resolve().parent
        torch = torch_settings()
        settings = {
            **torch,
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "PYKD_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYKD_JSON_INCLUDE": headers("nlohmann_json"),
            "PYKD_OUTPUT": str(output),
            "PYKD_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PYKD_CUDA": os.environ.get("PYKD_CUDA", "auto"),
            "PYKD_WERROR": os.environ.get("PYKD_WERROR", "OFF"),
            "PYKD_CUDA_ARCHS": os.environ.get("PYKD_CUDA_ARCHS", ""),
        }
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.get('PYKD_TORCH_VERSION', '-off')}"
        cmake = tool("cmake")
        jobs = os.environ.get("MAX_JOBS")
        output.mkdir(parents=True, exist_ok=True)
        for command in (
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *(f"-D{k}={v}" for k, v in settings.items())],
            [cmake, "--build", str(build), *(["-j", jobs] if jobs else [])],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError:
                sys.exit("pykd: the build failed; the lines above say where.")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: what the build recorded lies beside the extension it describes."""
        super().copy_extensions_to_source()
        if TORCH == "on":
            self.copy_file(str(Path(self.build_lib) / "pykd" / "_build_info.json"), str(ROOT / "pykd"))


class WithSources(build_py):
    """A wheel carries the engine's sources, for `pykd bundle`; an editable install has them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "pykd" / "deploy" / "source"
        shutil.rmtree(folder, ignore_errors=True)
        for name, file in runpy.run_path(str(ROOT / "pykd/deploy/sources.py"))["engine_sources"](ROOT).items():
            self.mkpath(str((folder / name).parent))
            self.copy_file(str(file), str(folder / name))


modules = ["pykd._runtime"] if TORCH == "off" else ["pykd._C", "pykd._runtime"]
setup(
    ext_modules=[Extension(name, sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithSources},
    install_requires=["numpy"] if TORCH == "off" else ["torch>=2.11", "numpy", "safetensors"],
    python_requires=">=3.10" if TORCH == "off" else ">=3.11",
    options={"build": {"build_base": "build/torch-off"}} if TORCH == "off" else {},  # a wheel takes all that lies there
)
