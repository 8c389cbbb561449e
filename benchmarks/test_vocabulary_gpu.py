"""distillation_loss over vocabularies of language models: time and peak memory of the loss and its gradient.

Clean logits in bfloat16. Liger-Kernel's losses take log-probabilities, so that torch's log_softmax of student and
teacher belongs to them. With beta 0 its JSD is the divergence of all the others; with its own default, 1/2, it is not.
All allocate the gradient, which is the least that a call takes beyond its inputs.

Floor: 6 bytes a logit, two read and one written.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import (
    Call,
    bytes_of,
    compiled,
    in_turns,
    measure_on_gpu,
    measure_peak_on_gpu,
    prepared,
)
from peers import package
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import distillation_loss, distillation_loss_and_grad

OP, DTYPE = "distillation_loss", torch.bfloat16
SHAPES = [(8192, 32_000), (4096, 128_000)]
TEMPERATURES = [1.0, 2.0]


class Logits:
    """The student's, which have a gradient, and the teacher's."""

    def __init__(self, rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows + classes)
        self.student, self.teacher = (
            torch.randn(rows, classes, generator=generator, device=device, dtype=dtype) for _ in range(2)
        )
        self.student.requires_grad_()


def plain(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The formula, as one writes it first."""
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def liger(name: str, **options: object) -> Callable[[Tensor, Tensor, float], Tensor]:
    """One of Liger-Kernel's losses of log-probabilities."""
    loss = getattr(package("liger_kernel.transformers"), name)(**options)

    def of_logits(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        logs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
        return loss(*logs) * temperature**2

    return of_logits


def implementations(case: Logits, temperature: float) -> dict[str, Callable[[], Call]]:
    student, teacher = case.student, case.teacher

    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(student, teacher, temperature), student)

    def copy() -> Call:
        parts = [student.detach(), teacher[: len(teacher) // 2]]  # 6 bytes a logit, read and written
        copies = [torch.zeros_like(part) for part in parts]
        return lambda: [to.copy_(part) for to, part in zip(copies, parts, strict=True)]

    return {
        "pykd": lambda: lambda: distillation_loss_and_grad(student.detach(), teacher, temperature=temperature),
        "pykd autograd": lambda: autograd(lambda s, t, by: distillation_loss(s, t, temperature=by)),
        "Liger KL": lambda: autograd(liger("LigerKLDIVLoss", reduction="batchmean", log_target=True)),
        "Liger JSD, beta 0": lambda: autograd(liger("LigerJSD", beta=0.0)),
        "Liger JSD": lambda: autograd(liger("LigerJSD")),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "copy": copy,
    }


NAMES = list(implementations(Logits(1, 2, "cpu", DTYPE), 1.0))
# Of each case the times of all blocks, then the peaks, while the compiler still has it.
RUNS = [
    pytest.param(shape, temperature, name, block, id=f"{list(shape)}-T={temperature:g}-{name}-{block}")
    for shape in SHAPES
    for temperature in TEMPERATURES
    for block, name in [*in_turns(NAMES, 3), *(("peak", name) for name in NAMES if name != "copy")]
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape, temperature, name, block", RUNS)
def test_vocabulary_on_gpu(benchmark, shape, temperature, name, block):
    call = prepared(implementations, shape, "cuda", DTYPE, 1, temperature, name, Logits)
    suffix = f", no noise, T = {temperature:g}"
    if block == "peak":
        measure_peak_on_gpu(benchmark, call, OP, shape, suffix, DTYPE, name)
    else:
        measure_on_gpu(benchmark, call, OP, shape, suffix, DTYPE, name, block, bytes=bytes_of(shape, DTYPE, 3))
