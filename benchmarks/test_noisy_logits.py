"""noisy_logits against what a user would write: in one expression, by hand into buffers, and compiled.

Nothing is differentiated; all implementations draw fresh noise at every call and reuse their buffers where they can.

Floors: `copy`, of as many bytes; and `pykd generator`, the time of the noise alone, which is that of the op itself with
every row perturbed, in place on logits that stay in the second-level cache, scaled to the perturbed logits of the case.
The batch is large enough there for the call to cost less than a tenth, and the noise additive, as factors would run
away from call to call.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from alternating import (
    ALPHA,
    FLOATS,
    LARGE,
    LARGE_NAMES,
    SHAPES,
    SIGMA,
    SMALL,
    Call,
    Case,
    Shape,
    bytes_of,
    compiled,
    compiled_into_graphs,
    graphed,
    measure,
    measure_on_gpu,
    noisy_plain,
    noisy_to_compile,
    prepared,
    runs,
    runs_on_gpu,
)

from pykd.ops import noisy_logits

GENERATED = {"cpu": 128 * 1024, "cuda": 4096 * 1024}  # logits of one call of the generator
GRAPHED = ["pykd", "plain"]
SMALL_NAMES = ["pykd", "plain", "plain, compiled", *(f"{name}, CUDA graph" for name in GRAPHED)]
SMALL_NAMES += ["plain, compiled, CUDA graphs"]
GPU_CASES = [(shape, "noisy", torch.float32, SMALL_NAMES) for shape in SMALL]
GPU_CASES += [(shape, "noisy", dtype, [*LARGE_NAMES[dtype], "pykd generator"]) for shape in LARGE for dtype in FLOATS]


def implementations(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    out = case.grad

    def generator() -> Call:
        small = torch.zeros(GENERATED[out.device.type] // 1024, 1024, device=out.device, dtype=out.dtype)
        return lambda: noisy_logits(small, sigma=SIGMA, noise_kind="additive", out=small)

    def by_hand_compiled() -> Call:
        torchs_noise = not out.is_cuda  # for Inductor: on a CPU many times faster
        step = compiled(lambda teacher, out: out.copy_(noisy_to_compile(teacher)), torchs_noise)
        return lambda: step(case.teacher, out)

    return {
        "pykd": lambda: lambda: noisy_logits(case.teacher, sigma=SIGMA, alpha=ALPHA, out=out),
        "by hand": lambda: case.noisy_teacher,
        "by hand, compiled": by_hand_compiled,
        "plain": lambda: lambda: noisy_plain(case.teacher),
        "copy": lambda: case.copy(case.bytes),
        "pykd generator": generator,
    }


def implementations_on_gpu(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    calls = implementations(case, variant)
    calls["plain, compiled"] = lambda: partial(compiled(noisy_plain, False), case.teacher)
    calls["plain, compiled, CUDA graphs"] = lambda: partial(compiled_into_graphs(noisy_plain), case.teacher)
    return calls | graphed({name: calls[name] for name in GRAPHED})


def scale_generator(benchmark, shape: Shape, device: str, name: str) -> None:
    """From the generator's call to the perturbed logits of the case."""
    if name == "pykd generator":
        calls = benchmark.extra_info.get("calls", 1)
        benchmark.extra_info["calls"] = calls * GENERATED[device] / (shape[0] * shape[1] * ALPHA)


@pytest.mark.parametrize("shape, threads, variant, name, block", runs(implementations, {"noisy": SHAPES}, blocks=3))
def test_noisy_logits(benchmark, shape, threads, variant, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, variant, name)
    measure(benchmark, call, "noisy_logits", shape, "", threads, name, block)
    scale_generator(benchmark, shape, "cpu", name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_noisy_logits_on_gpu(benchmark, shape, variant, dtype, name, block):
    call, moved = prepared(implementations_on_gpu, shape, "cuda", dtype, 1, variant, name), bytes_of(shape, dtype, 2)
    measure_on_gpu(benchmark, call, "noisy_logits", shape, "", dtype, name, block, bytes=moved)
    scale_generator(benchmark, shape, "cuda", name)
