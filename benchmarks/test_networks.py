"""Whole sparse networks in pykd's engine, against dense torch, dense runtimes and the sparse products in a row.

LeNet-300-100 with 95 % of its weights zero, and a VGG for CIFAR-10 whose layers are pruned by magnitude to shares of
the kind that variational students reach. ``PYKD_STUDENT`` may name the model file of a real student, which then takes
the VGG's place.
"""

import atexit
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from alternating import Call
from peers import networks
from peers.networks import Network
from sparse_cases import Implementations, measure, runs
from torch import nn
from torch.optim.swa_utils import update_bn

from pykd.deploy import Model, export
from pykd.models import VGG, LeNet300100

STUDENT = os.environ.get("PYKD_STUDENT")
LENET, LARGE = "LeNet-300-100, 95 %", f"student {Path(STUDENT).name}" if STUDENT else "VGG"
SPARSITIES = {
    LENET: [0.95] * 3,
    LARGE: [0.5, 0.8, 0.8, 0.85, 0.9, 0.9, 0.92, 0.95, 0.98, 0.98, 0.98, 0.98, 0.98, 0.95, 0.8],
}
ROWS = [((LENET, batch), threads) for threads in (1, 2) for batch in (1, 8, 64, 256)]
ROWS += [((LARGE, batch), threads) for threads in (1, 2) for batch in (1, 8, 64)]


def prune(network: nn.Module, sparsities: list[float]) -> None:
    """Makes the smallest of each layer's weights zero, in place."""
    weights = [module.weight for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for weight, sparsity in zip(weights, sparsities, strict=True):
        weight.data[weight.abs() <= weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values] = 0


@cache
def file_of(name: str) -> Path:
    """The model file of a network, made for this run where it is not a given one."""
    if name == LARGE and STUDENT:
        return Path(STUDENT)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    if name == LENET:
        shape, network = (1, 28, 28), LeNet300100(in_shape=(1, 28, 28), classes=10)
    else:
        shape, network = (3, 32, 32), VGG(in_shape=(3, 32, 32), classes=10)
    prune(network, SPARSITIES[name])
    update_bn([torch.randn(32, *shape)], network)
    path = Path(folder.name, "student.pykd.safetensors")
    export(network, path, torch.zeros(1, *shape))
    return path


def make(name: str, batch: int) -> Network:
    return Network(file_of(name), batch)


def pykd(case: Network, threads: int) -> Call:
    model, x = Model(case.file, threads=threads), case.x.numpy()
    return lambda: model(x)


IMPLEMENTATIONS: Implementations = {"pykd": pykd, **networks.PEERS}


@pytest.mark.parametrize("row, threads, name, block", runs(ROWS, lambda *row: list(IMPLEMENTATIONS)))
def test_networks(benchmark, row, threads, name, block):
    network, batch = row
    measure(benchmark, make, row, IMPLEMENTATIONS, "network", f"{network}, batch {batch}", threads, name, block)
