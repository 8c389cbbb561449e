"""What the benchmarks share: one shape's tensors, the peers' compilers, and the order of measurement.

Every case is measured alternately: the implementations follow each other in blocks, each block in another order, so
that a slow moment of the machine falls on all of them. `benchmarks/table.py` takes the medians over the blocks.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from math import prod
from time import perf_counter
from typing import Any

import pytest
import torch
from turns import Call, in_turns, measure_case

SIGMA, ALPHA = 0.5, 0.5
# rows, classes: digits and MNIST, CIFAR-100, ImageNet at two batch sizes, a language model's vocabulary
SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 1000), (64, 32000)]
# On a GPU: the batches of CIFAR, one of ImageNet, and 10^8 logits in rows of two lengths, well past its caches.
SMALL, MIDDLE, LARGE = [(128, 10), (128, 100)], (1024, 1000), [(100_000, 1000), (3200, 32_000)]
GRAPHED = ["pykd", "pykd autograd", "plain"]
SMALL_NAMES = [*GRAPHED, "plain, compiled", *(f"{name}, CUDA graph" for name in GRAPHED)]
SMALL_NAMES += ["plain, compiled, CUDA graphs"]
MIDDLE_NAMES = ["pykd", "pykd autograd", "plain", "plain, compiled", "copy"]
# To compile takes longer than to measure: float32 stands for both.
LARGE_NAMES = {torch.float32: ["pykd", "by hand, compiled", "plain", "copy"], torch.bfloat16: ["pykd", "plain", "copy"]}
FLOATS = list(LARGE_NAMES)
ROUND, ROUNDS, WARMUP = 5e-3, 5, 3  # of a measurement on a GPU: seconds of a round, about; rounds measured, and before
Shape = tuple[int, int]


class Case:
    """One shape's tensors and buffers; every implementation works on the same."""

    def __init__(self, rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows + classes)
        self.rows, self.classes = rows, classes
        self.student, self.teacher = (
            torch.randn(rows, classes, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        self.target = torch.randint(classes, (rows,), generator=generator, device=device)
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


def compiled_into_graphs(function: Callable) -> Callable:
    """With CUDA graphs of the compiler's own, which copy what they are given to where they read it."""
    return torch.compile(function, mode="reduce-overhead", dynamic=False)


def graphed(calls: dict[str, Callable[[], Call]]) -> dict[str, Callable[[], Call]]:
    """The same calls, each recorded into a CUDA graph of its own, which reads and writes the same memory every time."""

    def recorded(prepare: Callable[[], Call]) -> Call:
        call, stream = prepare(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    return {f"{name}, CUDA graph": lambda prepare=prepare: recorded(prepare) for name, prepare in calls.items()}


def autograd(function: Callable, case: Case, *arguments: object) -> Call:
    return lambda: torch.autograd.grad(function(case.leaf, *arguments), case.leaf)


@lru_cache(maxsize=1)
def calls_of(make: Callable, shape: tuple, device: str, dtype: torch.dtype, *rest: object) -> tuple[Any, dict]:
    """A case's tensors and its calls so far, one case at a time: the compiler forgets those of another."""
    torch._dynamo.reset()
    return make(*shape, device, dtype), {}


def prepared(
    implementations: Callable,
    shape: tuple,
    device: str,
    dtype: torch.dtype,
    threads: int,
    variant: Any,
    name: str,
    make: Callable = Case,
) -> Call:
    """The callable, compiled for this many threads and warmed up; ``make`` gives a shape's tensors."""
    case, calls = calls_of(make, shape, device, dtype, implementations, threads, variant)
    if name not in calls:
        calls[name] = implementations(case, variant)[name]()
        for _ in range(5):
            calls[name]()
    return calls[name]


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


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def runs_on_gpu(cases: Iterable[tuple[tuple, Any, torch.dtype, list[str]]]) -> list:
    """Shape, variant, dtype, name and block of every measurement in order, of cases with their implementations."""
    return [
        pytest.param(shape, variant, dtype, name, block, id=f"{list(shape)}-{variant}-{dtype}-{name}-{block}")
        for shape, variant, dtype, names in cases
        for block, name in in_turns(names, 3)
    ]


def logit_cases(variants: Iterable[str]) -> list[tuple[tuple, Any, torch.dtype, list[str]]]:
    """Those of a loss on logits."""
    cases = []
    for variant in variants:
        cases += [(shape, variant, torch.float32, SMALL_NAMES) for shape in SMALL]
        cases += [(MIDDLE, variant, torch.float32, MIDDLE_NAMES)]
        cases += [(shape, variant, dtype, LARGE_NAMES[dtype]) for shape in LARGE for dtype in FLOATS]
    return cases


def bytes_of(shape: tuple, dtype: torch.dtype, tensors: int) -> int:
    """Of so many tensors of a shape."""
    return prod(shape) * dtype.itemsize * tensors


def calls_in_a_round(call: Call) -> int:
    torch.cuda.synchronize()
    begin = perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return max(1, min(1000, round(3 * ROUND / (perf_counter() - begin))))


def sensors() -> dict[str, int]:
    """The clock of the multiprocessors and the temperature, where the driver tells them."""
    try:
        return {"sm_mhz": torch.cuda.clock_rate(), "celsius": torch.cuda.temperature()}
    except Exception:  # no NVML for Python, no right to ask, no such sensor: each has its own error
        return {}


def measure_on_gpu(
    benchmark,
    call: Call,
    op: str,
    shape: tuple,
    suffix: str,
    dtype: torch.dtype,
    name: str,
    block: int,
    *,
    bytes: int | None = None,
    calls: int | None = None,
    setup: Call | None = None,
) -> None:
    """One block of one implementation: rounds of many calls, each of which ends when the device is through with them.

    The calls follow each other on the same tensors, and so find in L2 what fits into it. ``bytes`` is what the op
    cannot but move, for the share of the copy's bandwidth. ``setup`` goes before each round, unmeasured; then ``calls``
    says how many it is for.
    """
    calls = calls or calls_in_a_round(call)

    def begin() -> None:
        if setup:
            setup()
        torch.cuda.synchronize()

    def timed() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    benchmark.extra_info.update(calls=calls)
    if bytes is not None:
        fits = bytes <= torch.cuda.get_device_properties().L2_cache_size
        benchmark.extra_info.update(bytes=bytes, l2="hot" if fits else "passed through")
    device, words = torch.cuda.get_device_name(), str(dtype).removeprefix("torch.")
    case = f"{list(shape)}{suffix}"
    measure_case(benchmark, timed, op, case, 1, name, block, ROUNDS, 1, begin, WARMUP, device, words)
    benchmark.extra_info.update(sensors())


def measure_peak_on_gpu(benchmark, call: Call, op: str, shape: tuple, suffix: str, dtype: torch.dtype, name: str):
    """The most memory that one call takes beyond what is there before it."""

    def peak() -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        benchmark.extra_info["value"] = (torch.cuda.max_memory_allocated() - before) / 1e6

    benchmark.extra_info["unit"] = "peak MB"
    device, words = torch.cuda.get_device_name(), str(dtype).removeprefix("torch.")
    measure_case(benchmark, peak, op, f"{list(shape)}{suffix}", 1, name, 0, 1, 1, None, 0, device, words)
