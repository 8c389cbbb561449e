"""block_norm against what a user would write: the formula with autograd, its gradient by hand, and both compiled.

All implementations return the value and the gradient; those by hand write it into a given buffer. Floor: 4 bytes read
and 4 written a float32 weight, the `copy`.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import Call, compiled, in_turns, measure_case, measure_on_gpu, prepared
from torch import Tensor

from pykd.ops import block_norm, block_norm_and_grad

SHAPES = [(240, 400), (960, 1024), (3200, 3200)]  # about 1e5, 1e6 and 1e7 weights, all of whole blocks
GPU_SHAPES = [(960, 1024), (9600, 10240)]
VARIANTS = [f"{norm}, {side}x{side}" for norm in ("l1_l2", "l1_linf") for side in (4, 16)]


class Weight:
    """One weight and its buffer."""

    def __init__(self, rows: int, columns: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows + columns)
        self.weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
        self.leaf = self.weight.clone().requires_grad_()
        self.grad = torch.empty_like(self.weight)


def blocks(weight: Tensor, side: int) -> Tensor:
    rows, columns = weight.shape
    return weight.view(rows // side, side, columns // side, side)


def plain(weight: Tensor, side: int, linf: bool) -> Tensor:
    """The formula, as one writes it first."""
    inside = blocks(weight, side)
    return inside.abs().amax((1, 3)).sum() if linf else inside.square().sum((1, 3)).sqrt().sum()


def by_hand(weight: Tensor, grad: Tensor, side: int, linf: bool) -> Tensor:
    """Without autograd, for the compiler to fuse."""
    inside, out = blocks(weight, side), blocks(grad, side)
    if linf:
        norms = inside.abs().amax((1, 3), keepdim=True)
        largest = inside.abs() == norms
        out.copy_(torch.where(largest, inside.sign() / largest.sum((1, 3), keepdim=True), 0))
    else:
        norms = inside.square().sum((1, 3), keepdim=True).sqrt()
        out.copy_(inside / norms)
    return norms.sum()


def implementations(case: Weight, variant: str) -> dict[str, Callable[[], Call]]:
    norm, shape = variant.split(", ")
    side, linf = int(shape.split("x")[0]), norm == "l1_linf"

    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(case.leaf, side, linf), case.leaf)

    def hand(function: Callable) -> Call:
        return lambda: function(case.weight, case.grad, side, linf)

    groups = (side, side)
    return {
        "pykd": lambda: lambda: block_norm_and_grad(case.weight, groups=groups, norm=norm, out=case.grad),
        "pykd autograd": lambda: (
            lambda: torch.autograd.grad(block_norm(case.leaf, groups=groups, norm=norm), case.leaf)
        ),
        "by hand": lambda: hand(by_hand),
        "by hand, compiled": lambda: hand(compiled(by_hand, False)),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "copy": lambda: lambda: case.grad.copy_(case.weight),
    }


NAMES = list(implementations(Weight(16, 16, "cpu", torch.float32), VARIANTS[0]))


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_block_norm(benchmark, shape, threads, variant, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, variant, name, Weight)
    case = f"[{shape[0]}, {shape[1]}], {variant}"
    iterations = max(1, 300_000 // (shape[0] * shape[1]))
    measure_case(benchmark, call, "block_norm", case, threads, name, block, 5, iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
def test_block_norm_on_gpu(benchmark, shape, variant, name, block, dtype):
    call = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Weight)
    measure_on_gpu(benchmark, call, "block_norm", shape, f", {variant}", dtype, name, block)
