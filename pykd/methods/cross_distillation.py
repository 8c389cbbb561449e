"""Bai, Wu, King & Lyu 2019, "Few Shot Network Compression via Cross Distillation", arXiv 1911.09450."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.errors import PykdError
from pykd.methods import _fields
from pykd.methods.comparisons import comparisons
from pykd.ops import distillation_loss
from pykd.pruning import Prunable, prunable
from pykd.pruning.layer import Exact, Steps, largest
from pykd.pruning.masks import mask_, unmask_
from pykd.pruning.reconstruction import Reconstruction, Term
from pykd.training import Batch, Method, unwrapped

ROWS = 128  # images that go through the networks at a time


@dataclass(frozen=True)
class CrossDistillation:
    r"""A trained network is pruned layer by layer, with a few images, so that each layer still gives what it gave.

    Layer by layer in the order of execution the student's weights :math:`W^S`, which begin as the teacher's
    :math:`W^T`, lose groups, and those that stay minimise a distance of the layer's outputs. :math:`h^T` are the
    layer's inputs in the teacher, :math:`h^S` in the student, whose earlier layers are pruned already:

    .. math::
        L^c &= \lVert W^T * h^T - W^S * h^T \rVert^2 &\text{correction} \\
        L^i &= \lVert W^T * h^S - W^S * h^S \rVert^2 &\text{imitation} \\
        \tilde L &= \mu L^c + (1 - \mu) L^i &\texttt{convex} \\
        \hat L &= \lVert W^T * (\alpha h^T + (1 - \alpha) h^S) - W^S * ((1 - \beta) h^T + \beta h^S) \rVert^2
        &\texttt{soft}

    (equations 1 to 5); ``plain`` is layer-wise distillation without crossing, ``soft`` with :math:`\alpha = \beta = 1`,
    and ``magnitude`` leaves the weights as they are. Then the whole student is fine-tuned on the images; what was
    taken out stays zero, and batch normalisation keeps the teacher's statistics.

    Args:
        objective: ``"convex"``, ``"soft"``, ``"plain"`` or ``"magnitude"``.
        mu: :math:`\mu`.
        alpha: :math:`\alpha`.
        beta: :math:`\beta`.
        groups: ``"in"`` for input channels that no other layer reads, ``"weight"`` for single weights.
        keep: share of each layer's groups that stay, in (0, 1], or how many of each layer, a list.
        linear: prune linear layers, too.
        skip: names of layers that are not pruned; the first one is not in any case.
        steps: of Adam for a layer, as the authors' code; 0 solves its least squares.
        lr: Adam's.
        fine_tune: ``"labels"``, ``"kd"``, ``"features"`` (the layers' outputs, end to end) or ``"none"``.
        temperature: T of ``"kd"``.
        hard_weight: w of ``"kd"``.

    Raises:
        ValueError: a value outside these ranges.

    Example:
        >>> CrossDistillation(keep=0.1, groups="weight").label
        'student, cross distillation'
    """

    keep_epoch: ClassVar[str] = "last"

    objective: str = "convex"
    mu: float = 0.6
    alpha: float = 0.9
    beta: float = 0.5
    groups: str = "in"
    keep: Any = 0.5
    linear: bool = False
    skip: Sequence[str] = ()
    steps: int = 0
    lr: float = 5e-4
    ridge: float = 1e-4
    fine_tune: str = "labels"
    temperature: float = 4.0
    hard_weight: float = 0.1

    @property
    def terms(self) -> list[Term]:
        """The objective's, as of :class:`pykd.pruning.reconstruction.Reconstruction`."""
        return {
            "convex": [Term(self.mu, 1.0, 1.0), Term(1 - self.mu, 0.0, 0.0)],
            "soft": [Term(1.0, self.alpha, 1 - self.beta)],
            "plain": [Term(1.0, 1.0, 0.0)],
        }[self.objective]

    def compress(self, network: nn.Module, teacher: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Prunes the network's layers, in place; their masks."""
        masks = {}
        for layer, count in self.plan(teacher, inputs[:1]):
            mine, its = network.get_submodule(layer.name), teacher.get_submodule(layer.name)
            weight: Any = mine.weight.detach()
            if self.objective == "magnitude":
                keep = largest(weight, self.groups, count)
                weight = torch.where(keep, weight, 0)
            else:
                problem = Reconstruction(its, self.terms)
                for rows in inputs.split(ROWS):
                    problem.add(*(_inputs_of(each, layer.name, rows) for each in (teacher, network)))
                solver = Steps(self.steps, self.lr) if self.steps else Exact(ridge=self.ridge)
                try:
                    weight, keep = solver(problem, weight, self.groups, count)
                except PykdError as error:
                    raise PykdError(f"{layer.name}: {error}") from None
            mine.weight.data.copy_(weight)  # type: ignore[union-attr, operator]
            masks[layer.name] = keep
        return masks

    def plan(self, network: nn.Module, inputs: Tensor) -> list[tuple[Prunable, int]]:
        """The layers that are pruned, and how many groups of each stay."""
        found = []
        for layer in prunable(network, inputs):
            module: Any = network.get_submodule(layer.name)
            convolution = isinstance(module, nn.Conv2d)
            pointwise = convolution and module.kernel_size == (1, 1)
            if layer.first or layer.name in self.skip or not (convolution or self.linear):
                continue
            if self.groups == "in" and (pointwise or not layer.own.all()):
                continue
            total = module.weight.shape[1] if self.groups == "in" else module.weight.numel()
            found.append((layer, max(1, round(self.keep * total))))
        return found


@torch.no_grad()
def _inputs_of(network: nn.Module, name: str, rows: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    try:
        network(rows)
    finally:
        handle.remove()
    return found[0]
