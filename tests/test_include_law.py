"""The include law of CONTRIBUTING.md: which file may include or import which, read from the sources."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CXX = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
PYTHON = sorted((ROOT / "pykd").rglob("*.py"))

STD = r"<[a-z0-9_]+>"  # the standard library's headers have no folder and no suffix
SIMD = r"<(immintrin|arm_neon)\.h>"
CUDA = r"<cuda_(runtime|fp16|bf16)\.h>"
CORE = r'"core/(?!cuda\.h)\w+\.h"'
EMULATION = r'<ucontext\.h>|<sanitizer/(asan|tsan)_interface\.h>|"emulation/\w+\.h"'
BINDINGS = r"<pybind11/.+>|<torch/csrc/(Exceptions|utils/pybind)\.h>"
DOOR = r'"kernels/(\w+)/\1\.h"'
RUNTIME = r'"runtime/(fuzz/)?\w+\.h"'
POSIX = r"<(sys/(mman|stat|wait)|fcntl|poll|spawn|unistd)\.h>"
TORCH = r"<(ATen/.+|c10/.+|torch/library\.h|torch/csrc/autograd/custom_function\.h)>"

# The first pattern that fits a file (below csrc/) decides; {op} is the stem of its room.
LAW = [
    ("core/cuda.h", [STD, CORE, CUDA, r'"emulation/\w+\.h"']),
    ("core/kernel_test.h", [STD, CORE, r'<cuda_runtime\.h>|"emulation/cuda_runtime\.h"']),
    ("core/cpu_isa.cpp", [STD, CORE, r"<(cpuid|unistd|sys/(syscall|auxv))\.h>"]),
    ("core/*", [STD, CORE, SIMD]),
    ("emulation/*", [STD, CORE, EMULATION]),
    ("kernels/*/*_cuda.cu", [STD, r'"core/\w+\.h"', r'"kernels/{op}/\w+\.h"']),
    ("kernels/*/*_test.cpp", [STD, CORE, DOOR]),
    ("kernels/*/*", [STD, CORE, r'"kernels/{op}/\w+\.h"']),
    ("runtime/pykd.h", [r"<std(def|int)\.h>"]),  # C
    ("runtime/module.cpp", [STD, CORE, RUNTIME, r"<pybind11/.+>"]),
    ("runtime/json.*", [STD, RUNTIME, r"<nlohmann/json\.hpp>"]),
    ("runtime/*_cuda.cpp", [STD, r'"core/\w+\.h"', DOOR, RUNTIME]),
    ("runtime/*", [STD, CORE, DOOR, RUNTIME, POSIX]),
    ("torch/module.cpp", [STD, CORE, TORCH, r'"torch/(ops/)?\w+\.h"', BINDINGS]),
    ("torch/ops/linear_distillation_loss*", [STD, TORCH, r'"torch/(ops/distillation_loss|ops/{op}|cuda_call)\.h"']),
    ("torch/ops/*", [STD, CORE, TORCH, r'"torch/\w+\.h"', r'"torch/ops/{op}\.h"', r'"kernels/{op}/{op}\.h"']),
    ("torch/*", [STD, CORE, TORCH, r'"torch/\w+\.h"', r'"kernels/planes/planes\.h"']),
]


def code(source: str) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def room(path: str) -> str:
    if path.startswith("kernels/"):
        return path.split("/")[1]
    return re.sub(r"(_cuda)?\.\w+$", "", path.split("/")[-1])


def broken_includes(path: str, source: str) -> list[str]:
    """The includes of csrc/<path> that the law does not allow."""
    allowed = next(patterns for files, patterns in LAW if fnmatch(path, files))
    patterns = [pattern.replace("{op}", room(path)) for pattern in allowed]
    includes = re.findall(r"^\s*#\s*include\s+(\S+)", code(source), re.MULTILINE)
    return [include for include in includes if not any(re.fullmatch(pattern, include) for pattern in patterns)]


@pytest.mark.parametrize("file", CXX, ids=lambda p: str(p.relative_to(CSRC)))
def test_cxx_includes(file):
    path = str(file.relative_to(CSRC))
    assert broken_includes(path, file.read_text()) == []
    if path.startswith("torch/"):
        assert "<<<" not in code(file.read_text()), "launches belong to csrc/kernels"


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("core/dtype.h", "<ATen/ATen.h>"),
        ("core/simd.h", "<cuda_runtime.h>"),
        ("kernels/a/a_cpu.cpp", '"core/cuda.h"'),
        ("kernels/a/a_cuda.cu", "<cuda_runtime.h>"),
        ("kernels/a/a_math.h", '"kernels/b/b.h"'),
        ("kernels/a/a_test.cpp", "<torch/library.h>"),
        ("torch/ops/a.cpp", "<torch/extension.h>"),
        ("torch/ops/a.cpp", '"kernels/a/a_math.h"'),
        ("torch/ops/a_cuda.cpp", '"torch/ops/b.h"'),
        ("torch/ops/a.h", "<pybind11/pybind11.h>"),
    ],
)
def test_broken_law_is_seen(path, include):
    assert broken_includes(path, f"#include {include}\n#include <cstdint>\n// #include <nowhere/x.h>") == [include]


# From the roof down. A unit imports what lies below it or beside it, without circles.
FLOORS = [
    {"__main__", "cli"},
    {"grids", "jobs", "report", "reproduce", "sweeps"},
    {"runs"},
    {"methods", "nn"},
    {"ops", "training", "deploy", "pruning"},
    {"models", "data", "sparse", "config"},
    {"errors", "_extension", "_files", "_svg"},
]
APART = {"reference", "testing"}  # for tests and benchmarks alone
CORE_ONLY = {"ops", "reference", "sparse", "nn", "deploy", "_extension", "_files", "errors"}  # `pip install pykd` alone
CORE_PACKAGES = {"torch", "numpy", "safetensors", "pykd"}
OF_EXTRAS = {"pykd.deploy.onnx": {"onnx"}, "pykd.deploy.onnx_network": {"onnxruntime"}}


def unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """The modules a file imports when it runs, those inside its functions too; imports for types alone do not count."""

    class Visitor(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: set[str] = set()

        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            self.found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{file}: relative imports hide the floor"
            base = node.module or ""
            modules = [f"{base}.{alias.name}" for alias in node.names]
            self.found.update(m if is_module(m) else base for m in modules)

    visitor = Visitor()
    visitor.visit(ast.parse(file.read_text()))
    return visitor.found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "pykd"}


@pytest.mark.parametrize("file", PYTHON, ids=module_of)
def test_python_imports(file):
    module = module_of(file)
    here, found = unit(module), imports(file)
    if here in CORE_ONLY:
        outside = {name.partition(".")[0] for name in found} - CORE_PACKAGES - set(sys.stdlib_module_names)
        assert outside <= OF_EXTRAS.get(module, set()), "this part stands on the core packages alone"
    if here == "reference":
        assert {unit(name) for name in own(found)} <= {"reference", "sparse"}
        assert "ops.pykd" not in file.read_text()
        return
    if here in APART:
        return
    assert {unit(name) for name in own(found)} & APART == set(), "only tests and benchmarks open it"
    if here == "ops" and module != "pykd.ops":
        rooms = {name for name in own(found) if unit(name) == "ops" and not name.split(".")[-1].startswith("_")}
        assert rooms == set(), "an op does not know another"
    if here:
        height = next(i for i, floor in enumerate(FLOORS) if here in floor)
        upstairs = set().union(*FLOORS[:height])
        assert {unit(name) for name in own(found)} & upstairs == set(), "imports go down, not up"


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for file in PYTHON:
        here = unit(module_of(file))
        if here not in APART | {""}:
            graph.setdefault(here, set()).update({unit(name) for name in own(imports(file))} - {here, ""})
    while leaves := {node for node, below in graph.items() if not below & graph.keys()}:
        for leaf in leaves:
            del graph[leaf]
    assert graph == {}, "these import one another"


def test_import_pykd_imports_no_torch():
    program = "import sys, pykd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
