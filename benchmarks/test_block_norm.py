"""block_norm against what a user would write: the formula with autograd, its gradient by hand, and both compiled.

All implementations return the value and the gradient; those by hand write it into a given buffer, and have their sums
over rows before columns, which eager torch does up to ten times as fast as both at once.

Floor, a float32 weight: 4 bytes read and 4 written, as `copy` has; the second look at the weights is at caches.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import LARGE_NAMES, Call, bytes_of, compiled, measure_case, measure_on_gpu, prepared, runs_on_gpu
from blocks import CASES, Groups, Variant, Weight, blocks, gpu_cases, runs, suffix
from torch import Tensor

from pykd.ops import block_norm, block_norm_and_grad

TINY = torch.finfo(torch.float32).tiny  # for groups of zeros


def plain(weight: Tensor, groups: Groups, norm: str) -> Tensor:
    """The formula, as one writes it first."""
    entries = blocks(weight, groups)
    return (entries.square().sum((1, 3)).sqrt() if norm == "l1_l2" else entries.abs().amax((1, 3))).sum()


def by_hand(weight: Tensor, result: Tensor, groups: Groups, norm: str) -> Tensor:
    """Without autograd, in place, into the buffer."""
    entries, to = blocks(weight, groups), blocks(result, groups)
    if norm == "l1_l2":
        norms = torch.mul(entries, entries, out=to).sum(1, keepdim=True).sum(3, keepdim=True).sqrt_()
        value = norms.sum()
        torch.mul(entries, norms.clamp_(min=TINY).reciprocal_(), out=to)
        return value
    norms = torch.abs(entries, out=to).amax(1, keepdim=True).amax(3, keepdim=True)
    to.eq_(norms)
    to.mul_(to.sum(1, keepdim=True).sum(3, keepdim=True).reciprocal_()).copysign_(entries)
    return norms.sum()


def by_hand_to_compile(weight: Tensor, result: Tensor, groups: Groups, norm: str) -> Tensor:
    """The same for the compiler, which fuses what it is given and needs no buffers between."""
    entries = blocks(weight, groups)
    if norm == "l1_l2":
        norms = entries.square().sum((1, 3), keepdim=True).sqrt()
        blocks(result, groups).copy_(entries / norms.clamp(min=TINY))
    else:
        norms = entries.abs().amax((1, 3), keepdim=True)
        hits = (entries.abs() == norms).to(weight.dtype)
        blocks(result, groups).copy_(entries.sign() * hits / hits.sum((1, 3), keepdim=True))
    return norms.sum()


def implementations(case: Weight, variant: Variant) -> dict[str, Callable[[], Call]]:
    options = dict(zip(("groups", "norm"), variant, strict=True))

    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(case.leaf, **options), case.leaf)

    def hand(function: Callable) -> Call:
        return lambda: function(case.weight, case.result, **options)

    return {
        "pykd": lambda: lambda: block_norm_and_grad(case.weight, out=case.result, **options),
        "pykd autograd": lambda: autograd(block_norm),
        "by hand": lambda: hand(by_hand),
        "by hand, compiled": lambda: hand(compiled(by_hand_to_compile, False)),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "copy": lambda: case.renew,
    }


@pytest.mark.parametrize("shape, groups, norm, threads, name, block", runs(implementations, CASES))
def test_block_norm(benchmark, shape, groups, norm, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, (groups, norm), name, Weight)
    case, count = f"[{shape[0]}, {shape[1]}]{suffix(groups, norm)}", shape[0] * shape[1]
    rounds, iterations = 9 if count < 5e6 else 3, max(1, 1_000_000 // count)
    measure_case(benchmark, call, "block_norm", case, threads, name, block, rounds, iterations)


GPU_CASES = gpu_cases(["pykd", "pykd autograd", "plain", "copy"], lambda norm, dtype: LARGE_NAMES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_block_norm_on_gpu(benchmark, shape, variant, dtype, name, block):
    call = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Weight)
    moved = bytes_of(shape, dtype, 2)
    measure_on_gpu(benchmark, call, "block_norm", shape, suffix(*variant), dtype, name, block, bytes=moved)
