"""A pytest plugin that runs the GPU benchmarks on the CPU, once and at small shapes, to find what would fail on a card.

CUDA graphs are made sure of by name alone, and nothing is compiled. Benchmarks that prepare their calls otherwise than
by ``alternating.prepared`` are left out.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import alternating

SIDE = 16  # no dimension is longer


class JSD(torch.nn.Module):
    """The signature of Liger-Kernel's."""

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()

    def forward(self, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class FusedLinearJSD(JSD):
    """Likewise."""

    def __init__(self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0) -> None:
        super().__init__(jsd_beta)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, other: torch.Tensor, labels=None):
        return super().forward(F.log_softmax(F.linear(x, weight), 1), F.log_softmax(F.linear(y, other), 1))


def prepared(implementations, shape, device, dtype, threads, variant, name, make=alternating.Case):
    assert device == "cuda"
    case = make(*(min(side, SIDE) for side in shape), "cpu", dtype)
    prepare = implementations(case, variant)[name]
    return (lambda: None) if name.endswith(", CUDA graph") else prepare()


def pytest_configure() -> None:
    alternating.prepared = prepared
    alternating.ROUND, alternating.ROUNDS, alternating.WARMUP = 1e-5, 1, 0
    torch.compile = lambda function, **_: function
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.get_device_name = lambda: "a card"
    torch.cuda.get_device_properties = lambda: types.SimpleNamespace(L2_cache_size=60e6)
    peaks = iter(range(1_000_000, 1_000_000_000, 1_000_000))
    torch.cuda.memory_allocated, torch.cuda.max_memory_allocated = lambda: 0, lambda: next(peaks)
    liger = types.ModuleType("liger_kernel.transformers")
    liger.LigerKLDIVLoss, liger.LigerJSD, liger.LigerFusedLinearJSD = torch.nn.KLDivLoss, JSD, FusedLinearJSD
    sys.modules["liger_kernel"], sys.modules["liger_kernel.transformers"] = types.ModuleType("liger_kernel"), liger


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item
        for item in items
        if getattr(item.module, "prepared", None) is prepared and item.callspec.params["block"] in (0, "peak")
    ]
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]
