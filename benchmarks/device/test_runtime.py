"""The engine on a device, sparse beside dense: batches, threads, processor and GPU. Needs numpy and no torch.

    PYKD_TORCH=off pip install . && pip install pytest pytest-benchmark
    python -m pytest benchmarks/device --benchmark-only --benchmark-json=device.json
    python benchmarks/table.py device.json

``PYKD_MODELS`` may name a folder of model files (``*.pykd.safetensors``); without it there are LeNet-300-100 and
LeNet-5 with 95 % of their weights zero, single ones or blocks of 16x16. Dense is the same network with no weight zero.
"""

import atexit
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from turns import Call, in_turns, measure_case

import pykd
from pykd import _runtime
from pykd.deploy import Model, ModelFile, read
from pykd.deploy.graph import Op, checked_options
from pykd.deploy.model_file import write
from pykd.sparse import SparseWeight

MODELS = os.environ.get("PYKD_MODELS")
BATCHES = (1, 8, 64)
BLOCKS, ROUNDS, SECONDS = 3, 9, 3e-3  # turns, rounds of a turn, and a round's length, about
Block = tuple[int, int]

MACHINE: dict[str, Any] = json.loads(_runtime.machine())
VERSIONS = {"pykd": pykd.__version__, "numpy": np.__version__, "python": platform.python_version()}


def weight(shape: tuple[int, ...], block: Block) -> SparseWeight:
    """A normal weight of which 95 % of the blocks are zero, but of each row of blocks one is not."""
    random = np.random.default_rng(sum(shape))
    matrix = random.normal(size=(shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    grid = [-(-length // side) for length, side in zip(matrix.shape, block, strict=True)]
    kept = random.random(grid) < 0.05
    kept[np.arange(grid[0]), random.integers(grid[1], size=grid[0])] = True
    mask = kept.repeat(block[0], 0)[: matrix.shape[0]].repeat(block[1], 1)[:, : matrix.shape[1]]
    return SparseWeight((matrix * mask).reshape(shape), block=block)


def network(name: str, block: Block) -> ModelFile:
    """LeNet-300-100 or LeNet-5 (Caffe's) with weights out of a generator."""
    ops: list[Op] = []

    def add(kind: str, shape: tuple[int, ...] = (), **options: Any) -> None:
        made = checked_options(kind, options)
        layer = (weight(shape, block), np.zeros(shape[0], np.float32)) if shape else ()
        ops.append(Op(kind, (len(ops),), made, *layer))

    if name == "LeNet-5":
        for shape in ((20, 1, 5, 5), (50, 20, 5, 5)):
            add("conv2d", shape)
            add("max_pool2d", kernel=(2, 2))
    add("flatten")
    shapes = [(500, 800), (10, 500)] if name == "LeNet-5" else [(300, 784), (100, 300), (10, 100)]
    for shape in shapes:
        add("linear", shape)
        if shape[0] > 10:
            add("relu")
    return ModelFile((1, 28, 28), ops)


def folder() -> Path:
    """For files of this run."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def file_of(name: str) -> Path:
    """The model file of a network."""
    if MODELS:
        return Path(MODELS, name)
    path = folder() / "sparse.pykd.safetensors"
    size, _, pattern = name.partition(", ")
    write(network(size, (16, 16) if "16x16" in pattern else (1, 1)), path)
    return path


@cache
def dense_of(name: str) -> Path:
    """The same network with small numbers in place of zeros."""
    model = read(file_of(name))
    ops = []
    for op in model.ops:
        if op.weight is not None:
            values = op.weight.dense()
            op = replace(op, weight=SparseWeight(np.where(values == 0, np.float32(1e-3), values)))
        ops.append(op)
    path = folder() / "dense.pykd.safetensors"
    write(replace(model, ops=ops, values="float32"), path)
    return path


NAMES = [f"{size}, 95 % {pattern}" for size in ("LeNet-300-100", "LeNet-5") for pattern in ("unstructured", "16x16")]
if MODELS:
    NAMES = sorted(path.name for path in Path(MODELS).glob("*.pykd.safetensors"))
    if not NAMES:
        raise SystemExit(f"PYKD_MODELS={MODELS}: there is no *.pykd.safetensors in it")


def settings() -> Iterator[tuple[str, str, int]]:
    """Devices with precisions and numbers of threads."""
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        yield "cpu", "float32", threads
    if MACHINE["cuda"]:
        yield "cuda", "float32", 1
        yield "cuda", "float16", 1


def runs() -> Iterator[Any]:
    """Network, batch, setting, implementation and turn of every measurement, in order."""
    for name in NAMES:
        for batch in BATCHES:
            for setting in settings():
                for block, way in in_turns(["pykd", "dense"], BLOCKS):
                    label = f"{name}-{batch}-{'-'.join(map(str, setting))}T-{way}-{block}".replace(" ", "")
                    yield pytest.param(name, batch, setting, way, block, id=label)


@cache
def prepared(name: str, batch: int, setting: tuple[str, str, int], way: str) -> tuple[Call, int]:
    """The call, planned and warmed up, and how many make a round."""
    file = dense_of(name) if way == "dense" else file_of(name)
    device, precision, threads = setting
    model = Model(file, threads=threads, device=device, precision=precision)
    rows = np.random.default_rng(batch).normal(size=(batch, *model.input_shape)).astype(np.float32)
    for _ in range(10):
        begin = perf_counter()
        model(rows)
        seconds = perf_counter() - begin
    return lambda: model(rows), max(1, round(SECONDS / seconds))


@pytest.mark.parametrize("name, batch, setting, way, block", list(runs()))
def test_runtime(benchmark, name, batch, setting, way, block):
    call, iterations = prepared(name, batch, setting, way)
    benchmark.extra_info.update(machine=MACHINE, versions=VERSIONS)
    device, precision, threads = setting
    where = device if device == "cpu" else MACHINE["cuda"]["name"]
    case = f"{name}, batch {batch}"
    measure_case(
        benchmark, call, "engine", case, threads, way, block, ROUNDS, iterations, device=where, dtype=precision
    )
