"""What the benchmarks of sparse layers share: pruned weights, and how a call is checked, calibrated and measured."""

from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from alternating import Call, in_turns, measure_case
from torch import Tensor

from pykd.testing import tolerance

SECONDS, SLOW = 3e-3, 2e-2  # of a round, about; of a call that is measured once a block

Block = tuple[int, int]
Row = tuple  # what makes a case
Implementations = dict[str, Callable[[Any, int], Call]]  # of a case and a number of threads


class Case(Protocol):
    """The tensors of a row."""

    def expected(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The result in float64 in an implementation's layout, and the sum of magnitudes; None if it has another."""


class Prepared(NamedTuple):
    call: Call
    rounds: int
    iterations: int


def pruned(shape: tuple[int, ...], block: Block, sparsity: float) -> Tensor:
    """A normal weight of which a share of the blocks, over the weight as a matrix, is zero, at random."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    matrix = weight.view(shape[0], -1)
    grid = [-(-length // side) for length, side in zip(matrix.shape, block, strict=True)]
    mask = torch.zeros(grid[0] * grid[1])
    mask[torch.randperm(len(mask), generator=generator)[: round(len(mask) * (1 - sparsity))]] = 1
    mask = mask.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    matrix *= mask[: matrix.shape[0], : matrix.shape[1]]
    return weight


def of_pattern(block: Block, sparsity: float) -> str:
    """As a row of the table names it."""
    return f"{'unstructured' if block == (1, 1) else f'{block[0]}x{block[1]}'} {100 * sparsity:.0f} %"


def runs(rows: list[tuple[Row, int]], names: Callable[..., list[str]]) -> list:
    """Row, threads, name and block of every measurement, in order; ``names`` gives a row's implementations."""
    order = []
    for row, threads in rows:
        label = "-".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in row)
        for block, name in in_turns(names(*row), 3):
            order.append(pytest.param(row, threads, name, block, id=f"{label}-{threads}T-{name}-{block}"))
    return order


@lru_cache(maxsize=1)
def calls_of(make: Callable[..., Case], row: Row, threads: int) -> tuple[Case, dict[str, Prepared]]:
    """A row's case and its calls so far, one row at a time."""
    torch._dynamo.reset()
    return make(*row), {}


def prepare(implementation: Callable[[Any, int], Call], case: Case, threads: int, name: str) -> Prepared:
    """The call: compared with float64 once, warmed up, and timed for the number of its iterations."""
    call, expected = implementation(case, threads), case.expected(name)
    actual = torch.as_tensor(call())
    if expected is not None:
        halves = next((each for each in ("bfloat16", "float16") if each in name), None)
        error = 3 * torch.finfo(getattr(torch, halves)).eps if halves else tolerance(torch.float32, length=10**6)
        assert actual.shape == expected[0].shape, f"{name} gives {list(actual.shape)}"
        worst = ((actual.double() - expected[0]).abs() - error * expected[1]).max().item()
        assert worst <= 0, f"{name} is off by {worst} more than its arithmetic allows"
    seconds = 0.0
    for _ in range(3):
        if seconds < SLOW:
            begin = perf_counter()
            call()
            seconds = perf_counter() - begin
    return Prepared(call, 3 if seconds < SLOW else 1, max(1, round(SECONDS / seconds)))


@torch.no_grad()
def measure(
    benchmark,
    make: Callable[..., Case],
    row: Row,
    implementations: Implementations,
    op: str,
    title: str,
    threads: int,
    name: str,
    block: int,
    calls: int = 1,
    device: str = "cpu",
) -> None:
    """One block of one implementation, of whose calls each does as much as ``calls``."""
    torch.set_num_threads(threads)
    case, prepared = calls_of(make, row, threads)
    if name not in prepared:
        prepared[name] = prepare(implementations[name], case, threads, name)
    call, rounds, iterations = prepared[name]
    benchmark.extra_info["calls"] = calls
    measure_case(benchmark, call, op, title, threads, name, block, rounds, iterations, device=device)
