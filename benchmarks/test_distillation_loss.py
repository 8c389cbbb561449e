"""distillation_loss against what a user would write: plain torch with autograd, by hand without it, and both compiled.

At temperature 4, forward: the divergence alone, with noise and without, and with a tenth of hard labels. All
implementations return the loss and the gradient, draw fresh noise at every call and reuse their buffers where they can.

Floor, a logit: 12 bytes (two read, one written), two exponentials of 13 vector instructions, three with hard labels,
and where its row is perturbed the noise of logit_regression.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from alternating import (
    ALPHA,
    GRAPHED,
    MIDDLE,
    MIDDLE_NAMES,
    SHAPES,
    SIGMA,
    Call,
    Case,
    autograd,
    bytes_of,
    compiled,
    compiled_into_graphs,
    graphed,
    logit_cases,
    measure,
    measure_on_gpu,
    noisy_plain,
    noisy_to_compile,
    prepared,
    runs,
    runs_on_gpu,
)
from torch import Tensor

from pykd.ops import distillation_loss, distillation_loss_and_grad

T, WEIGHT = 4.0, 0.1
SUFFIX = {"noisy": "", "clean": ", no noise", "hard": ", no noise, hard labels"}
VARIANTS = {"noisy": SHAPES, "clean": SHAPES, "hard": [(128, 100), (1024, 1000)]}
GPU_CASES = [*logit_cases(["noisy", "clean"]), (MIDDLE, "hard", torch.float32, MIDDLE_NAMES)]

# ---- the peers -------------------------------------------------------------------------------------------------------


def plain(student: Tensor, teacher: Tensor, target: Tensor, variant: str) -> Tensor:
    """The formula, as one writes it first."""
    teacher = noisy_plain(teacher) if variant == "noisy" else teacher
    log_q, p = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
    loss = F.kl_div(log_q, p, reduction="batchmean") * T**2
    return (1 - WEIGHT) * loss + WEIGHT * F.cross_entropy(student, target) if variant == "hard" else loss


class ByHand:
    """Without autograd, in place, into buffers."""

    def __init__(self, case: Case, variant: str) -> None:
        self.case, self.variant = case, variant
        self.a, self.b, self.p = (torch.empty_like(case.student) for _ in range(3))
        self.labels = case.target.unsqueeze(1)
        self.at_label = torch.full_like(case.student[:, :1], -WEIGHT / case.rows)

    def __call__(self) -> tuple[Tensor, Tensor]:
        case, hard = self.case, self.variant == "hard"
        teacher = case.noisy_teacher() if self.variant == "noisy" else case.teacher
        weight = 1 - WEIGHT if hard else 1.0
        whole = case.classes < 50 or teacher.is_cuda  # where the calls cost more than the exponentials
        divergence = (self.of_softmax if whole else self.of_parts)(teacher)
        loss = divergence.mul_(weight * T**2 / case.rows)
        case.grad.sub_(self.p).mul_(weight * T / case.rows)
        if hard:
            log_q = torch.log_softmax(case.student, 1, out=self.a)
            loss.add_(F.nll_loss(log_q, case.target), alpha=WEIGHT)
            case.grad.add_(log_q.exp_(), alpha=WEIGHT / case.rows).scatter_add_(1, self.labels, self.at_label)
        return loss, case.grad

    def of_softmax(self, teacher: Tensor) -> Tensor:
        """The divergence; leaves the teacher's softmax in p and the student's in grad."""
        log_p = torch.log_softmax(torch.mul(teacher, 1 / T, out=self.a), 1, out=self.b)
        log_q = torch.log_softmax(torch.mul(self.case.student, 1 / T, out=self.a), 1, out=self.case.grad)
        torch.exp(log_p, out=self.p)
        divergence = torch.dot(self.p.view(-1), log_p.sub_(log_q).view(-1))
        log_q.exp_()
        return divergence

    def of_parts(self, teacher: Tensor) -> Tensor:
        """The same with each exponential taken once."""
        totals = []
        for logits, scaled, e in ((teacher, self.a, self.p), (self.case.student, self.b, self.case.grad)):
            torch.mul(logits, 1 / T, out=scaled)
            torch.exp(scaled.sub_(scaled.amax(1, keepdim=True)), out=e)
            totals.append(e.sum(1, keepdim=True))
            e.div_(totals[-1])
        divergence = torch.dot(self.p.view(-1), self.a.sub_(self.b).view(-1))
        return divergence.add_(totals[1].div_(totals[0]).log_().sum())


def by_hand_to_compile(student: Tensor, teacher: Tensor, target: Tensor, grad: Tensor, variant: str) -> Tensor:
    """The same for the compiler, which fuses what it is given and needs no buffers between."""
    teacher = noisy_to_compile(teacher) if variant == "noisy" else teacher
    log_p, log_q = F.log_softmax(teacher / T, 1), F.log_softmax(student / T, 1)
    p, weight = log_p.exp(), 1 - WEIGHT if variant == "hard" else 1.0
    loss = weight * T**2 / len(student) * (p * (log_p - log_q)).sum()
    slope = weight * T / len(student) * (log_q.exp() - p)
    if variant == "hard":
        log_q = F.log_softmax(student, 1)
        loss = loss + WEIGHT * F.nll_loss(log_q, target)
        one_hot = target.unsqueeze(1) == torch.arange(student.shape[1], device=target.device)
        slope = slope + WEIGHT / len(student) * (log_q.exp() - one_hot.to(student.dtype))
    grad.copy_(slope)
    return loss


def implementations(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    options = {"temperature": T} | {
        "noisy": {"sigma": SIGMA, "alpha": ALPHA},
        "clean": {},
        "hard": {"hard_weight": WEIGHT},
    }[variant]
    inputs = case.teacher, case.target

    torchs_noise = variant == "noisy" and not case.student.is_cuda  # for Inductor: on a CPU many times faster

    def hand_compiled() -> Call:
        step = compiled(by_hand_to_compile, torchs_noise)
        return lambda: step(case.student, *inputs, case.grad, variant)

    return {
        "pykd": lambda: lambda: distillation_loss_and_grad(case.student, *inputs, out=case.grad, **options),
        "pykd autograd": lambda: autograd(lambda s, *i: distillation_loss(s, *i, **options), case, *inputs),
        "by hand": lambda: ByHand(case, variant),
        "by hand, compiled": hand_compiled,
        "plain": lambda: autograd(plain, case, *inputs, variant),
        "plain, compiled": lambda: autograd(compiled(plain, torchs_noise), case, *inputs, variant),
        "copy": lambda: case.copy(case.bytes * 3 // 2),
    }


def implementations_on_gpu(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    calls = implementations(case, variant)
    inputs = case.teacher, case.target, variant
    calls["plain, compiled, CUDA graphs"] = lambda: autograd(compiled_into_graphs(plain), case, *inputs)
    return calls | graphed({name: calls[name] for name in GRAPHED})


# ---- the runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, threads, variant, name, block", runs(implementations, VARIANTS, blocks=3))
def test_distillation_loss(benchmark, shape, threads, variant, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, variant, name)
    measure(benchmark, call, "distillation_loss", shape, SUFFIX[variant], threads, name, block)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(GPU_CASES))
def test_distillation_loss_on_gpu(benchmark, shape, variant, dtype, name, block):
    call, moved = prepared(implementations_on_gpu, shape, "cuda", dtype, 1, variant, name), bytes_of(shape, dtype, 3)
    measure_on_gpu(benchmark, call, "distillation_loss", shape, SUFFIX[variant], dtype, name, block, bytes=moved)
