"""block_prox_ against what a user would write, eager and compiled; both sort where the norm is l1_linf.

The weights come near 0 as they are shrunk again and again, so every call begins with a copy of them, which is part of
all implementations' time. Floor: that copy, and 4 bytes read and written in place a float32 weight.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import Call, compiled, in_turns, measure_case, measure_on_gpu, prepared
from torch import Tensor

from pykd.ops import block_prox_

SHAPES = [(240, 400), (960, 1024)]  # about 1e5 and 1e6 weights, all of whole blocks
GPU_SHAPES = [(960, 1024), (9600, 10240)]
VARIANTS = [f"{norm}, {side}x{side}" for norm in ("l1_l2", "l1_linf") for side in (4, 16)]
THRESHOLD = 0.5


class Weight:
    """One weight, and the buffer that is shrunk."""

    def __init__(self, rows: int, columns: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows + columns)
        self.weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
        self.near = torch.empty_like(self.weight)


def plain(weight: Tensor, near: Tensor, side: int, linf: bool) -> None:
    rows, columns = weight.shape
    inside = weight.view(rows // side, side, columns // side, side).transpose(1, 2).flatten(2)
    if linf:
        ordered = inside.abs().sort(-1, descending=True).values
        count = torch.arange(1, side * side + 1, device=weight.device)
        levels = (ordered.cumsum(-1) - THRESHOLD) / count
        support = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
        level = levels.gather(-1, support - 1).clamp(min=0)
        inside = torch.minimum(torch.maximum(inside, -level), level)
    else:
        norms = inside.square().sum(-1, keepdim=True).sqrt()
        inside = inside * (1 - THRESHOLD / norms).clamp(min=0)
    near.copy_(inside.unflatten(2, (side, side)).transpose(1, 2).reshape(rows, columns))


def implementations(case: Weight, variant: str) -> dict[str, Callable[[], Call]]:
    norm, shape = variant.split(", ")
    side, linf = int(shape.split("x")[0]), norm == "l1_linf"

    def pykd() -> None:
        case.near.copy_(case.weight)
        block_prox_(case.near, groups=(side, side), norm=norm, threshold=THRESHOLD)

    def peer(function: Callable) -> Call:
        return lambda: function(case.weight, case.near, side, linf)

    return {
        "pykd": lambda: pykd,
        "plain": lambda: peer(plain),
        "plain, compiled": lambda: peer(compiled(plain, False)),
        "copy": lambda: lambda: case.near.copy_(case.weight),
    }


NAMES = list(implementations(Weight(16, 16, "cpu", torch.float32), VARIANTS[0]))


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_block_prox(benchmark, shape, threads, variant, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, variant, name, Weight)
    case = f"[{shape[0]}, {shape[1]}], {variant}"
    iterations = max(1, 300_000 // (shape[0] * shape[1]))
    measure_case(benchmark, call, "block_prox_", case, threads, name, block, 5, iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
def test_block_prox_on_gpu(benchmark, shape, variant, name, block, dtype):
    call = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Weight)
    measure_on_gpu(benchmark, call, "block_prox_", shape, f", {variant}", dtype, name, block)
