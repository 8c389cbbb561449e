"""factor_loss against what a user would write: the formula with autograd, its gradient by hand, and both compiled.

All implementations return the value and the student's gradient, the teacher's factor being fixed, but for `pykd`, whose
one call gives both gradients.

Floor, a float32 entry: 8 bytes read and 4 written, or 8 with both gradients; 4 instructions for the norms, 8 for the
distance with its inner product, 8 to 11 for the gradients, each for 8 values with AVX2.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import (
    FLOATS,
    LARGE_NAMES,
    Call,
    bytes_of,
    compiled,
    in_turns,
    measure_case,
    measure_on_gpu,
    prepared,
    runs_on_gpu,
)
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import factor_loss, factor_loss_and_grad

# rows, channels, height, width: CIFAR's ResNets with a paraphrase rate of 1/2, ImageNet's
SHAPES = [(128, 32, 8, 8), (32, 256, 7, 7)]
LARGE = (8192, 256, 7, 7)  # well past a GPU's caches


class Factors:
    """One shape's factors and buffers."""

    def __init__(self, *arguments: object) -> None:
        *shape, device, dtype = arguments
        generator = torch.Generator(device).manual_seed(sum(shape))
        self.student, self.teacher = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        self.leaf = self.student.clone().requires_grad_()
        self.grad = torch.empty_like(self.student)


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula, as the authors' code has it."""
    return F.l1_loss(F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1)))


def by_hand(student: Tensor, teacher: Tensor, grad: Tensor) -> Tensor:
    """Without autograd, for the compiler to fuse; two buffers of a factor's size between."""
    x, y = student.flatten(1), teacher.flatten(1)
    norm = x.norm(dim=1, keepdim=True)
    a = x / norm
    difference = a - y / y.norm(dim=1, keepdim=True)
    sign = difference.sign()
    inner = (sign * a).sum(1, keepdim=True)
    grad.view_as(x).copy_((sign - a * inner) / (norm * x.numel()))
    return difference.abs().mean()


def implementations(case: Factors, _: str) -> dict[str, Callable[[], Call]]:
    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(case.leaf, case.teacher), case.leaf)

    def hand(function: Callable) -> Call:
        return lambda: function(case.student, case.teacher, case.grad)

    def copy() -> Call:
        half = case.student.numel() // 2  # 12 bytes an entry, read and written
        parts = [case.student.flatten(), case.teacher.flatten()[:half]]
        copies = [torch.zeros_like(part) for part in parts]
        return lambda: [to.copy_(part) for to, part in zip(copies, parts, strict=True)]

    return {
        "pykd": lambda: lambda: factor_loss_and_grad(case.student, case.teacher),
        "pykd autograd": lambda: autograd(factor_loss),
        "by hand": lambda: hand(by_hand),
        "by hand, compiled": lambda: hand(compiled(by_hand, False)),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "copy": copy,
    }


NAMES = list(implementations(Factors(1, 1, 1, 1, "cpu", torch.float32), ""))


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_factor_loss(benchmark, shape, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, "", name, Factors)
    measure_case(benchmark, call, "factor_loss", str(list(shape)), threads, name, block, 9, 5)


GPU_CASES = [(shape, "", torch.float32, ["pykd", "pykd autograd", "plain", "plain, compiled"]) for shape in SHAPES]
GPU_CASES += [(LARGE, "", dtype, ["pykd autograd", *LARGE_NAMES[dtype]]) for dtype in FLOATS]


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_factor_loss_on_gpu(benchmark, shape, variant, dtype, name, block):
    call = prepared(implementations, shape, "cuda", dtype, 1, variant, name, Factors)
    moved = bytes_of(shape, dtype, 4 if name == "pykd" else 3)
    measure_on_gpu(benchmark, call, "factor_loss", shape, "", dtype, name, block, bytes=moved)
