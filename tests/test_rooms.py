"""One op is one room: every operator that torch knows as pykd::* has all of its files, kernels, words and tests."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import pykd.ops
import pykd.reference
from pykd._extension import load

ROOT = Path(__file__).parents[1]
NAMES = sorted(n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("pykd::"))
PUBLIC = [n for n in NAMES if not n.endswith("_backward") and "." not in n]


ROOMS = {  # of the ops that share one, or whose name is not their room's
    "block_norms": "block_norm",
    "block_prox_": "block_prox",
    "variational_conv2d": "variational_layer",
    "variational_linear": "variational_layer",
}


def stem(name: str) -> str:
    """The room of an op: its backward, its ``_and_grad`` form and their overloads live where it does."""
    op = re.sub(r"(_backward|_and_grad)$", "", name.partition(".")[0])
    return ROOMS.get(op, op)


STEMS = sorted({stem(n) for n in NAMES})
FILES = [
    "csrc/kernels/{op}/{op}.h",
    "csrc/kernels/{op}/{op}_math.h",
    "csrc/kernels/{op}/{op}_cpu.cpp",
    "csrc/kernels/{op}/{op}_cuda.cu",
    "csrc/kernels/{op}/{op}_test.cpp",
    "csrc/torch/ops/{op}.h",
    "csrc/torch/ops/{op}.cpp",
    "csrc/torch/ops/{op}_cuda.cpp",
    "pykd/ops/{op}.py",
    "pykd/reference/{op}.py",
    "tests/ops/test_{op}.py",
    "benchmarks/test_{op}.py",
]
SECTIONS = ["Args", "Returns", "Raises", "Gradients", "Cost", "Determinism", "Example"]
TESTS = [
    "test_matches_reference",
    "test_opcheck",
    "test_extreme_",
    "test_no_rows",
    "test_broken_rules_say_which",
    "test_compiles",
]
GRADIENT_TESTS = ["test_gradcheck", "test_second_derivative_"]
INFERENCE = {"sparse_conv2d", "sparse_linear"}  # ops without a gradient; their arithmetic is core/sparse_panels.h
WITHOUT_KERNEL = {"linear_distillation_loss"}  # between two products its kernel is that of distillation_loss
OTHER_KERNELS = {"elementwise", "planes", "pool2d"}  # rooms that serve the ops or the engine, and are none themselves


def has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"pykd::{name}", key))


def test_torch_knows_every_room():
    assert {path.name for path in (ROOT / "csrc" / "kernels").iterdir()} - OTHER_KERNELS == set(STEMS) - WITHOUT_KERNEL


@pytest.mark.parametrize("op", STEMS)
def test_files_are_there(op):
    files = [file for file in FILES if not (op in INFERENCE and file.endswith("_math.h"))]
    files = [file for file in files if not (op in WITHOUT_KERNEL and file.startswith("csrc/kernels/"))]
    assert [file for file in (f.format(op=op) for f in files) if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("op", STEMS)
def test_fixed_kinds_of_test_are_there(op):
    source = ROOT / "tests" / "ops" / f"test_{op}.py"
    functions = [node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)]
    ops = [getattr(pykd.ops, name) for name in PUBLIC if stem(name) == op]
    seeded = any("seed" in inspect.signature(function).parameters for function in ops)
    kinds = TESTS + (["test_gradient_raises"] if op in INFERENCE else GRADIENT_TESTS)
    kinds += ["test_seed_decides"] if seeded else []
    assert [kind for kind in kinds if not any(function.startswith(kind) for function in functions)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_reference_has_the_same_signature(name):
    assert inspect.signature(getattr(pykd.ops, name)) == inspect.signature(getattr(pykd.reference, name))
    assert name in pykd.ops.__all__
    assert name in pykd.reference.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_function_lives_in_its_room(name):
    assert getattr(pykd.ops, name).__module__ == f"pykd.ops.{stem(name)}"
    assert getattr(pykd.reference, name).__module__ == f"pykd.reference.{stem(name)}"


@pytest.mark.parametrize("name", NAMES)
def test_autograd_is_registered(name):
    assert has_kernel(name, "Autograd"), "without it a gradient is missing and nothing says so"


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_registered(name):
    devices = ["CPU", "Meta"] + (["CUDA"] if load().cuda else [])
    assert [device for device in devices if not has_kernel(name, device)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_the_sections(name):
    function = getattr(pykd.ops, name)
    doc = inspect.getdoc(function) or ""
    assert re.findall(r"^(\w+):$", doc, re.MULTILINE) == SECTIONS
    args = doc.partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    assert re.findall(r"^    (\w+): ", args, re.MULTILINE) == list(inspect.signature(function).parameters)
    assert ">>> " in doc.partition("\nExample:\n")[2]


def test_only_rooms_and_shared_helpers_lie_in_ops():
    for package in (pykd.ops, pykd.reference):
        modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
        public = {name for name in modules if not name.startswith("_")}
        exported = {importlib.import_module(getattr(package, n).__module__).__name__ for n in package.__all__}
        assert {f"{package.__name__}.{name}" for name in public} - exported <= {"pykd.reference.philox"}
