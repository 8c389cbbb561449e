"""linear_distillation_loss against the layers and the loss one after the other: pykd's own, plain torch, compiled.

Clean logits at temperature 2. All return the loss and the gradients of the student's hidden states and weight. The
teacher has twice the student's features. `Liger fused JSD, beta 0` is the divergence of all the others, at the
temperature's square less, which is a factor.

Floor: four matrix products, of rows x classes x features multiplications each and as many of the teacher's features,
and 6 bytes a logit in bfloat16, 12 in float32, between them. The gradients are the least that a call takes of memory.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import Call, compiled, in_turns, measure_case, measure_on_gpu, measure_peak_on_gpu, prepared
from peers import package
from torch import Tensor
from torch.nn import functional as F

from pykd.ops import distillation_loss, linear_distillation_loss, linear_distillation_loss_and_grad

OP, T = "linear_distillation_loss", 2.0
# rows, classes, features of the student and of the teacher
SHAPES = [(256, 1000, 256, 512), (1024, 8000, 256, 512)]
GPU_SHAPES = [(8192, 32_000, 2048, 4096), (4096, 128_000, 4096, 8192)]


class Layers:
    """One shape's hidden states and weights, of logits with a standard deviation of 1."""

    def __init__(self, rows: int, classes: int, features: int, more: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(rows + classes)

        def normal(n: int, inputs: int, scale: float) -> Tensor:
            return torch.randn(n, inputs, generator=generator, device=device, dtype=dtype) * scale

        self.teacher = normal(rows, more, 1.0), normal(classes, more, more**-0.5)
        self.student = normal(rows, features, 1.0), normal(classes, features, features**-0.5)
        self.leaves = [x.clone().requires_grad_() for x in self.student]


def unfused(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    return distillation_loss(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), temperature=T)


def plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The formula, as one writes it first."""
    log_q = F.log_softmax(F.linear(hidden, weight) / T, 1)
    p = F.softmax(F.linear(teacher_hidden, teacher_weight) / T, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * T**2


def implementations(case: Layers, _: str) -> dict[str, Callable[[], Call]]:
    def autograd(function: Callable) -> Call:
        return lambda: torch.autograd.grad(function(*case.leaves, *case.teacher), case.leaves)

    def liger() -> Call:
        loss = package("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0, temperature=T)
        return autograd(lambda *tensors: loss(*tensors, None))

    return {
        "pykd": lambda: lambda: linear_distillation_loss_and_grad(*case.student, *case.teacher, temperature=T),
        "pykd autograd": lambda: autograd(lambda *tensors: linear_distillation_loss(*tensors, temperature=T)),
        "pykd, unfused": lambda: autograd(unfused),
        "plain": lambda: autograd(plain),
        "plain, compiled": lambda: autograd(compiled(plain, False)),
        "Liger fused JSD, beta 0": liger,
    }


NAMES = list(implementations(Layers(1, 2, 1, 1, "cpu", torch.float32), ""))


def suffix(features: int, more: int) -> str:
    return f", {features} and {more} features"


@pytest.mark.parametrize("block, name", in_turns(NAMES[:-1], 3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_distillation_loss(benchmark, shape, threads, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, "", name, Layers)
    case = f"[{shape[0]}, {shape[1]}]{suffix(*shape[2:])}"
    measure_case(benchmark, call, OP, case, threads, name, block, 5, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("block, name", [*in_turns(NAMES, 3), *(("peak", name) for name in NAMES)])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_linear_distillation_loss_on_gpu(benchmark, shape, name, block):
    call = prepared(implementations, shape, "cuda", torch.bfloat16, 1, "", name, Layers)
    if block == "peak":
        measure_peak_on_gpu(benchmark, call, OP, shape[:2], suffix(*shape[2:]), torch.bfloat16, name)
    else:
        measure_on_gpu(benchmark, call, OP, shape[:2], suffix(*shape[2:]), torch.bfloat16, name, block)
