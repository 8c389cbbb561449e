"""What the benchmarks share: one shape's tensors, the peers' compilers, and the order of measurement.

Every case is measured alternately: the implementations follow each other in blocks, each block in another order, so
that a slow moment of the machine falls on all of them. `benchmarks/table.py` takes the medians over the blocks.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from turns import Call, in_turns, measure_case

SIGMA, ALPHA = 0.5, 0.5
# rows, classes: digits and MNIST, CIFAR-100, ImageNet at two batch sizes, a language model's vocabulary
SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 1000), (64, 32000)]
GPU_SHAPES = [(128, 10), (128, 100), (1024, 1000), (64, 32000), (8192, 32000)]
Shape = tuple[int, int]


class Case:
    """One shape's tensors and buffers; every implementation works on the same."""

    def __init__(self, rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows + classes)
        self.rows, self.classes = rows, classes
        self.student, self.teacher = (
            torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(2)
        )
        self.target = torch.randint(classes, (rows,), generator=generator).to(device)
        self.leaf = self.student.clone().requires_grad_()
        self.grad, self.noise = torch.empty_like(self.student), torch.empty_like(self.student)
        self.mask = torch.empty(rows, 1, device=device, dtype=dtype)

    @property
    def bytes(self) -> int:
        """Of one tensor of logits."""
        return self.student.numel() * self.student.element_size()

    def noisy_teacher(self) -> torch.Tensor:
        """As one draws it without autograd: in place, into buffers."""
        noise = self.noise.normal_(0, SIGMA).mul_(self.mask.bernoulli_(ALPHA))
        return noise.mul_(self.teacher).add_(self.teacher)

    def copy(self, size: int) -> Call:
        """As many bytes read and written as an op has: ``size`` each."""
        student, teacher = (x.view(torch.uint8).view(-1) for x in (self.student, self.teacher))
        parts = [part for part in (student[:size], teacher[: max(0, size - self.bytes)]) if len(part)]
        copies = [torch.zeros_like(part) for part in parts]

        def call() -> None:
            for to, part in zip(copies, parts, strict=True):
                to.copy_(part)

        return call


Implementations = Callable[[Case, str], dict[str, Callable[[], Call]]]  # of a case and a variant, by name


def noisy_to_compile(teacher: torch.Tensor) -> torch.Tensor:
    """The teacher with noise for the compiler, which fuses what it is given and needs no buffers between."""
    mask = torch.rand(len(teacher), 1, device=teacher.device) < ALPHA
    return torch.where(mask, teacher * (1 + SIGMA * torch.randn_like(teacher)), teacher)


def noisy_plain(teacher: torch.Tensor) -> torch.Tensor:
    """The formula, as one writes it first."""
    mask = torch.empty(len(teacher), 1, device=teacher.device, dtype=teacher.dtype).bernoulli_(ALPHA)
    return teacher * (1 + SIGMA * mask * torch.randn_like(teacher))


def compiled(function: Callable, fallback_random: bool) -> Callable:
    """With `fallback_random`, Inductor calls torch's own generators; its own are slower than eager on a CPU."""
    options = {"fallback_random": True} if fallback_random else None
    return torch.compile(function, options=options, dynamic=False)


def autograd(function: Callable, case: Case, *arguments: object) -> Call:
    return lambda: torch.autograd.grad(function(case.leaf, *arguments), case.leaf)


@cache
def case_of(make: Callable, shape: tuple, device: str, dtype: torch.dtype) -> Any:
    return make(*shape, device, dtype)


@lru_cache(maxsize=64)
def prepared(
    implementations: Callable,
    shape: tuple,
    device: str,
    dtype: torch.dtype,
    threads: int,
    variant: str,
    name: str,
    make: Callable = Case,
) -> Call:
    """The callable, compiled for this many threads and warmed up; ``make`` gives a shape's tensors."""
    case = case_of(make, shape, device, dtype)
    torch._dynamo.reset()
    call = implementations(case, variant)[name]()
    for _ in range(5):
        call()
    return call


def runs(
    implementations: Implementations, variants: dict[str, list[Shape]], blocks: int, once: str | None = None
) -> list:
    """All parameters in the order of measurement: the blocks of a case side by side, each in another order.

    ``variants`` has the shapes of each; ``once`` names an implementation that is measured at the first shape alone.
    """
    order, smallest = [], Case(1, 2, "cpu", torch.float32)
    for threads in (1, 2):
        for variant, shapes in variants.items():
            for shape in shapes:
                all_names = [n for n in implementations(smallest, variant) if n != once or shape == SHAPES[0]]
                label = f"{shape[0]}x{shape[1]}-{threads}T-{variant}"
                for block, name in in_turns(all_names, blocks):
                    order.append(pytest.param(shape, threads, variant, name, block, id=f"{label}-{name}-{block}"))
    return order


def measure(benchmark, call: Call, op: str, shape: Shape, suffix: str, threads: int, name: str, block: int) -> None:
    """One block of one implementation on the CPU; `suffix` names the variant in the table's row."""
    iterations = max(1, min(200, 400_000 // (shape[0] * shape[1])))
    measure_case(benchmark, call, op, f"[{shape[0]}, {shape[1]}]{suffix}", threads, name, block, 9, iterations)


def measure_on_gpu(
    benchmark, call: Call, op: str, shape: Shape, suffix: str, dtype: torch.dtype, name: str, block: int
) -> None:
    case = f"[{shape[0]}, {shape[1]}]{suffix}"
    benchmark.group = f"{op} {case} {dtype}"
    benchmark.extra_info.update(
        op=op, case=case, implementation=name, device=torch.cuda.get_device_name(),
        dtype=str(dtype).removeprefix("torch."), threads=1, block=block,
    )  # fmt: skip
    iterations = 100 if shape[0] * shape[1] < 1e7 else 10

    def timed() -> None:
        for _ in range(iterations):
            call()
        torch.cuda.synchronize()

    benchmark.extra_info["calls"] = iterations
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)
