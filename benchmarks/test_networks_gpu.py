"""Whole sparse networks on a CUDA device: pykd's engine, dense torch, and onnxruntime where it has CUDA.

A call takes rows from the processor's memory and brings the answers back there, as a program without torch has them.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from alternating import Call
from peers import package, runtimes
from peers.networks import Network, torch_layers
from sparse_cases import Implementations, measure, runs
from test_networks import LARGE, LENET, make

from pykd.deploy import Model

ROWS = [((network, batch), 1) for network in (LENET, LARGE) for batch in (1, 8, 64, 256)]


def pykd(precision: str) -> Callable[[Network, int], Call]:
    def prepared(case: Network, threads: int) -> Call:
        model, x = Model(case.file, device="cuda", precision=precision), case.x.numpy()
        return lambda: model(x)

    return prepared


def dense(dtype: torch.dtype, mode: str | None = None) -> Callable[[Network, int], Call]:
    """Torch's own layers; ``mode`` compiles them, "reduce-overhead" into CUDA graphs."""

    def prepared(case: Network, threads: int) -> Call:
        network = torch_layers(case.model).to("cuda", dtype)
        function = torch.compile(network, dynamic=False, mode=mode) if mode else network
        x, out = case.x.pin_memory(), case.out.pin_memory()

        def call() -> torch.Tensor:
            out.copy_(function(x.to("cuda", dtype, non_blocking=True)))
            return out

        return call

    return prepared


def onnxruntime(case: Network, threads: int) -> Call:
    ort = package("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    session = ort.InferenceSession(runtimes.graph(case.model), providers=["CUDAExecutionProvider"])
    x: np.ndarray = case.x.numpy()
    return lambda: session.run(None, {"input": x})[0]


IMPLEMENTATIONS: Implementations = {
    "pykd": pykd("float32"),
    "pykd float16": pykd("float16"),
    "pykd bfloat16": pykd("bfloat16"),
    "torch": dense(torch.float32),
    "torch float16": dense(torch.float16),
    "torch compiled, CUDA graphs": dense(torch.float32, "reduce-overhead"),
    "torch compiled float16, CUDA graphs": dense(torch.float16, "reduce-overhead"),
    "onnxruntime CUDA": onnxruntime,
}


@pytest.mark.gpu
@pytest.mark.parametrize("row, threads, name, block", runs(ROWS, lambda *row: list(IMPLEMENTATIONS)))
def test_networks_on_gpu(benchmark, row, threads, name, block):
    network, batch = row
    device = torch.cuda.get_device_name()
    title = f"{network}, batch {batch}"
    measure(benchmark, make, row, IMPLEMENTATIONS, "network", title, threads, name, block, device=device)
