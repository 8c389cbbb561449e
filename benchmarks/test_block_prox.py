"""block_prox_ against what a user would write: the formulas and faster ways to the same, in eager torch and compiled.

pykd works in place, on weights that are renewed outside of the measured time: before each call on a CPU, before eight
calls, each with a weight of its own, on a GPU. The peers write into a given buffer. The threshold takes half off a
group's Euclidean norm.

Floor, a float32 weight: 4 bytes read and 4 written, as `copy` has.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from alternating import LARGE_NAMES, Call, bytes_of, compiled, measure_case, measure_on_gpu, prepared, runs_on_gpu
from blocks import CASES, Groups, Variant, Weight, blocks, gpu_cases, runs, suffix
from torch import Tensor

from pykd.ops import block_prox_

STEPS = 8  # of Michelot's iteration, after which no level of the cases changes
WEIGHTS = 8  # of a round on a GPU


def plain(weight: Tensor, result: Tensor, groups: Groups, norm: str, threshold: float) -> None:
    """The formulas, as one writes them first; the level by sorting: Duchi et al. 2008, figure 1."""
    entries, to = blocks(weight, groups), blocks(result, groups)
    if norm == "l1_l2":
        to.copy_(entries * (1 - threshold / entries.square().sum((1, 3), keepdim=True).sqrt()).clamp(min=0))
        return
    ordered = entries.abs().transpose(1, 2).flatten(2).sort(descending=True).values
    levels = (ordered.cumsum(-1) - threshold) / torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
    support = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
    level = levels.gather(-1, support - 1).clamp(min=0)[:, None]
    to.copy_(entries.clamp(-level, level))


def by_hand(weight: Tensor, result: Tensor, groups: Groups, norm: str, threshold: float) -> None:
    """In place, into the buffer, with sums over rows before columns, and without sorting: Michelot 1986."""

    def sums(of: Tensor) -> Tensor:
        return of.sum(1, keepdim=True).sum(3, keepdim=True)

    entries, to = blocks(weight, groups), blocks(result, groups)
    if norm == "l1_l2":
        norms = sums(torch.mul(entries, entries, out=to)).sqrt_()
        torch.mul(entries, (1 - threshold / norms).clamp_(min=0), out=to)
        return
    size = entries.abs()
    level = ((sums(size) - threshold) / (size.shape[1] * size.shape[3])).clamp_(min=0)
    while True:
        count = sums(torch.gt(size, level, out=to)).clamp_(min=1)
        higher = ((sums(to.mul_(size)) - threshold) / count).maximum(level)
        if higher.equal(level):
            break
        level = higher
    torch.clamp(entries, -level, level, out=to)


def without_sorting_to_compile(weight: Tensor, result: Tensor, groups: Groups, norm: str, threshold: float) -> None:
    """The same for the compiler, which fuses what it is given, in a fixed number of steps."""
    entries = blocks(weight, groups)
    size = entries.abs()
    level = ((size.sum((1, 3), keepdim=True) - threshold) / (size.shape[1] * size.shape[3])).clamp(min=0)
    for _ in range(STEPS):
        above = (size > level).to(size.dtype)
        count = above.sum((1, 3), keepdim=True).clamp(min=1)
        level = (((above * size).sum((1, 3), keepdim=True) - threshold) / count).maximum(level)
    blocks(result, groups).copy_(entries.clamp(-level, level))


def options_of(case: Weight, variant: Variant) -> dict[str, Any]:
    groups, norm = variant
    entries = blocks(case.weight, groups)
    return {"groups": groups, "norm": norm, "threshold": 0.05 * (entries.shape[1] * entries.shape[3]) ** 0.5}


def implementations(case: Weight, variant: Variant) -> dict[str, Callable[[], Call]]:
    options, norm = options_of(case, variant), variant[1]

    def in_place() -> None:
        block_prox_(case.result, **options)

    def peer(function: Callable) -> Call:
        return lambda: function(case.weight, case.result, **options)

    calls: dict[str, Callable[[], Call]] = {
        "pykd": lambda: in_place,
        "by hand": lambda: peer(by_hand),
        "plain": lambda: peer(plain),
        "plain, compiled": lambda: peer(compiled(plain, False)),
        "copy": lambda: case.renew,
    }
    if norm == "l1_linf":
        calls["by hand, compiled"] = lambda: peer(compiled(without_sorting_to_compile, False))
    return calls


class InPlace:
    """A round's weights, of which each call shrinks another."""

    def __init__(self, case: Weight, variant: Variant) -> None:
        self.case, self.options = case, options_of(case, variant)
        self.weights = [case.weight.clone() for _ in range(WEIGHTS)]
        self.turns = cycle(self.weights)

    def renew(self) -> None:
        for weight in self.weights:
            weight.copy_(self.case.weight)

    def __call__(self) -> None:
        block_prox_(next(self.turns), **self.options)


def implementations_on_gpu(case: Weight, variant: Variant) -> dict[str, Callable[[], Call]]:
    return implementations(case, variant) | {"pykd": lambda: InPlace(case, variant)}


def sorts_millions(shape, groups, norm, threads, name, block) -> bool:
    """Which takes seconds a call."""
    return norm == "l1_linf" and name.startswith("plain") and shape[0] * shape[1] > 5e6


RUNS = [run for run in runs(implementations, CASES) if not sorts_millions(*run.values)]


@pytest.mark.parametrize("shape, groups, norm, threads, name, block", RUNS)
def test_block_prox(benchmark, shape, groups, norm, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, (groups, norm), name, Weight)
    renew = prepared(implementations, shape, "cpu", torch.float32, threads, (groups, norm), "copy", Weight)
    case, count = f"[{shape[0]}, {shape[1]}]{suffix(groups, norm)}", shape[0] * shape[1]
    rounds = 30 if count < 5e5 else 5 if count < 5e6 else 3
    measure_case(benchmark, call, "block_prox_", case, threads, name, block, rounds, 1, renew)


def on_large(norm: str, dtype: torch.dtype) -> list[str]:
    """Without what sorts, and with the compiled form that a norm has."""
    if norm == "l1_linf":
        return [name for name in LARGE_NAMES[dtype] if name != "plain"]
    return [name.replace("by hand", "plain") for name in LARGE_NAMES[dtype]]


GPU_CASES = gpu_cases(["pykd", "by hand", "plain", "copy"], on_large)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_block_prox_on_gpu(benchmark, shape, variant, dtype, name, block):
    call = prepared(implementations_on_gpu, shape, "cuda", dtype, 1, variant, name, Weight)
    rounds = {"calls": WEIGHTS, "setup": call.renew} if isinstance(call, InPlace) else {}
    moved = bytes_of(shape, dtype, 2)
    measure_on_gpu(benchmark, call, "block_prox_", shape, suffix(*variant), dtype, name, block, bytes=moved, **rounds)
