"""Bai, Wu, King & Lyu 2019, "Few Shot Network Compression via Cross Distillation", arXiv 1911.09450."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.config import nearest
from pykd.deploy.model_file import to_bytes
from pykd.deploy.tracing import described
from pykd.errors import PykdError
from pykd.methods import _fields, _maps
from pykd.methods._layers import layers
from pykd.methods.comparisons import HintonDistillation, comparisons
from pykd.nn.features import features
from pykd.pruning import Prunable, mask_, prunable, unmask_, within
from pykd.pruning.budget import COSTS, Cost, checked
from pykd.pruning.following import activations
from pykd.pruning.layer import Exact, Proximal, Steps, largest
from pykd.pruning.reconstruction import Activated, Reconstruction, Term
from pykd.pruning.rounding import rounded
from pykd.training import Batch, Method, label_loss, unwrapped

ROWS = 128  # images that go through the networks at a time, or fewer
NUMBERS = 1 << 19  # of the images that go through them at a time


@dataclass(frozen=True)
class CrossDistillation:
    r"""A trained network is pruned layer by layer, with a few images, so that each layer still gives what it gave.

    In the order of execution each layer's weights :math:`W^S`, which begin as the teacher's :math:`W^T`, lose groups,
    and those that stay minimise a distance of the layer's outputs. :math:`h^T` are the layer's inputs in the teacher,
    :math:`h^S` those in the student, whose earlier layers are pruned already:

    .. math::
        L^c &= \lVert W^T * h^T - W^S * h^T \rVert^2 && \text{correction} \\
        L^i &= \lVert W^T * h^S - W^S * h^S \rVert^2 && \text{imitation} \\
        \tilde L &= \mu L^c + (1 - \mu) L^i && \texttt{convex} \\
        \hat L &= \lVert W^T * (\alpha h^T + (1 - \alpha) h^S) - W^S * ((1 - \beta) h^T + \beta h^S) \rVert^2
        && \texttt{soft}

    ``plain`` is layer-wise distillation without crossing, ``soft`` with :math:`\alpha = \beta = 1`; ``none`` leaves the
    weights that stay as they are. Then the whole student is fine-tuned on the images: what was taken out stays zero,
    and batch normalisation keeps the teacher's statistics. ``pykd export`` takes the zeros out physically.

    The student's network is the teacher's. The paper prunes by a penalty and its authors' code by keeping the largest
    groups on a schedule, without one; both are here. It has the activation in the plain distance, its code nowhere.
    Which :math:`\alpha` and :math:`\beta` it used is not found anywhere, nor are its tables: these are ours.

    Args:
        objective: ``"convex"``, ``"soft"``, ``"plain"`` or ``"none"``.
        mu: :math:`\mu`.
        alpha: :math:`\alpha`.
        beta: :math:`\beta`.
        groups: ``"in"`` for input channels, of layers that alone read theirs (a linear layer behind a flattening has
            the flattened maps' channels) and are no 1x1 convolutions; ``"weight"`` for single weights.
        keep: how much of each layer stays: a share in (0, 1]; or for each layer in the order of execution, in a list,
            or for named layers, in a mapping, a share or a whole number of groups: 1 is one of them, 1.0 all.
        budget: ``{"parameters": x}``, ``{"flops": x}`` or ``{"bytes": x}``, as of :func:`pykd.pruning.budget.within`:
            what stays of the whole network instead, by the norms of all layers' groups in the teacher; bytes are
            those of a model file, of int8 values with ``int8``.
        linear: prune linear layers, too.
        skip: names of layers that are not pruned; the network's first is not in any case.
        select: ``"norm"``, or for input channels ``"thinet"`` (Luo et al. 2017) or ``"lasso"`` (He et al. 2017).
        solver: ``"exact"`` for least squares; ``"adam"`` for the authors' steps; ``"proximal"`` for the penalty, which
            alone says then what stays of layers whose ``keep`` is not all of them.
        steps: of Adam, for each layer.
        lr: Adam's.
        penalty: :math:`\lambda` of ``"proximal"``.
        ridge: keeps the weights of ``"exact"`` near the teacher's, as of
            :meth:`pykd.pruning.reconstruction.Reconstruction.solve`.
        activation: the distance is that of the outputs after batch normalisation and activation; needs ``"adam"``.
        int8: the weights of all linear layers and ungrouped convolutions that :func:`pykd.pruning.prunable` lists
            become int8 levels times a scale for each output, chosen under the same distance, with the ridge; ``pykd
            export --values int8`` stores these very levels, unless an output's largest weight reads a constant.
            Fine-tuning then leaves these weights alone.
        fine_tune: ``"labels"``, ``"kd"`` (as of :class:`pykd.methods.HintonDistillation`), ``"features"`` (the outputs
            of all pruned layers and of the network follow the teacher's, each mean squared distance divided by the mean
            square) or ``"none"``.
        temperature: T of ``"kd"``.
        hard_weight: w of ``"kd"``.

    Raises:
        ValueError: a value outside these ranges, or two that exclude each other.

    Cost: for every layer two forward passes of the images and the layer's problem, see
    :class:`pykd.pruning.reconstruction.Reconstruction`; the images do not count in the solution.

    Example:
        >>> CrossDistillation(keep=0.1, groups="weight").label
        'student, cross distillation'
    """

    keep_epoch: ClassVar[str] = "last"

    objective: str = "convex"
    mu: float = 0.6
    alpha: float = 0.9
    beta: float = 0.7
    groups: str = "in"
    keep: Any = 0.5
    budget: Mapping[str, float] | None = None
    linear: bool = False
    skip: Sequence[str] = ()
    select: str = "norm"
    solver: str = "exact"
    steps: int = 3000
    lr: float = 5e-4
    penalty: float = 1e-3
    ridge: float = 1e-2
    activation: bool = False
    int8: bool = False
    fine_tune: str = "kd"
    temperature: float = 4.0
    hard_weight: float = 0.1

    def __post_init__(self) -> None:
        _fields.word("objective", self.objective, "convex", "soft", "plain", "none")
        _fields.word("groups", self.groups, "in", "weight")
        _fields.word("select", self.select, "norm", "thinet", "lasso")
        _fields.word("solver", self.solver, "exact", "adam", "proximal")
        _fields.word("fine_tune", self.fine_tune, "labels", "kd", "features", "none")
        for name in ("mu", "alpha", "beta", "hard_weight"):
            _fields.share(name, getattr(self, name))
        for name in ("lr", "penalty", "temperature"):
            _fields.positive(name, getattr(self, name))
        for name in ("linear", "activation", "int8"):
            _fields.switch(name, getattr(self, name))
        _fields.count("steps", self.steps)
        _fields.deviation("ridge", self.ridge)
        _fields.names("skip", self.skip)
        _check_keep(self.keep)
        if self.budget is not None:
            checked(self.budget, self._costs)
            if not isinstance(self.keep, (int, float)):
                raise ValueError("budget says what stays of all layers: leave keep out")
            if self.solver == "proximal":
                raise ValueError("budget says what stays, and so does the penalty of solver=proximal: give one of them")
        if self.select != "norm" and (self.groups != "in" or self.solver != "exact" or self.objective == "none"):
            raise ValueError(f"select={self.select} is for input channels, with an objective and the exact solver")
        if self.activation and self.solver != "adam":
            raise ValueError("activation makes the distance no quadratic: take solver=adam")
        if self.int8 and (self.objective == "none" or self.activation):
            raise ValueError("int8 chooses levels under a quadratic distance: give an objective, without activation")

    @property
    def label(self) -> str:
        """The student's row in the table."""
        crossed = {"convex": {1.0: "correction", 0.0: "imitation"}.get(self.mu, "cross distillation")}
        crossed |= {"soft": "soft cross distillation", "plain": "layer-wise distillation", "none": "magnitude"}
        words, select = crossed[self.objective], {"thinet": "ThiNet", "lasso": "channel pruning"}.get(self.select)
        if select:
            words = select if self.objective == "plain" else f"{words} by {select}"
        if self.objective == "none" and self.trains:
            words += ", layer matching" if self.fine_tune == "features" else ", fine-tuned"
        return f"student, {words}"

    @property
    def trains(self) -> bool:
        """Whether the student is fine-tuned."""
        return self.fine_tune != "none"

    @property
    def _costs(self) -> dict[str, Cost]:
        values = "int8" if self.int8 else "float32"
        return {**COSTS, "bytes": lambda network, inputs: len(to_bytes(described(network, inputs, values=values)))}

    @property
    def terms(self) -> list[Term]:
        """The objective's, as of :class:`pykd.pruning.reconstruction.Reconstruction`."""
        if self.objective == "convex":
            return [Term(self.mu, 1.0, 1.0), Term(1 - self.mu, 0.0, 0.0)]
        if self.objective == "soft":
            return [Term(1.0, self.alpha, 1 - self.beta)]
        return [Term(1.0, 1.0, 0.0)]

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor) -> nn.Module:
        """The student with the teacher's weights, and masks that keep all of them.

        Raises:
            PykdError: another network than the teacher's, a layer that cannot be pruned, none that can, a list of
                another length, outputs that cannot be matched, or nothing that is left to be fine-tuned.
        """
        network = copy.deepcopy(student)
        its, mine = (
            {name: (value.shape, value.dtype) for name, value in each.state_dict().items()}
            for each in (teachers[0], network)
        )
        if its != mine:
            raise PykdError("cross distillation prunes the teacher: give the student the teacher's network")
        network.load_state_dict(teachers[0].state_dict())
        within_budget = self.budget is not None  # which depends on weights that may not be there yet
        whole = dataclasses.replace(self, budget=None, keep=1.0) if within_budget else self
        names = list(whole._plan(network, inputs))
        layers: dict[str, Any] = {name: network.get_submodule(name) for name in names}
        mask_(network, {name: torch.ones_like(each.weight, dtype=torch.bool) for name, each in layers.items()})
        for layer in layers.values() if self.int8 and self.trains else ():
            layer.parametrizations.weight.original.requires_grad_(False)
        if self.int8 and self.trains and not any(each.requires_grad for each in network.parameters()):
            raise PykdError("int8 leaves nothing to be fine-tuned, as no layer has a bias: take fine_tune=none")
        if self.fine_tune == "features":
            try:
                features(network.eval(), inputs.clone(), names)
            except PykdError as error:
                raise PykdError(
                    "fine_tune=features needs all pruned layers' outputs, and other layers write over them: build the "
                    "network with inplace=False, or take another fine_tune"
                ) from error
        return _Pruned(network, names)

    def start(
        self, trained: nn.Module, teachers: Sequence[nn.Module], inputs: Tensor, done: int
    ) -> Iterator[tuple[int, int]]:
        """Prunes layer by layer, in place.

        Raises:
            PykdError: a layer whose least squares have many solutions, of which the penalty leaves nothing, or whose
                weights or inputs are not finite; a budget that cannot be kept.
        """
        assert isinstance(trained, _Pruned)
        network, teacher = trained.network.eval(), teachers[0].eval()
        plan = self._plan(teacher, inputs[:1])
        after = activations(teacher, inputs[:1], list(plan)) if self.activation else {}
        for number, (name, (count, shape)) in enumerate(plan.items(), 1):
            if number <= done:
                continue
            layer: Any = network.get_submodule(name)
            weight = layer.weight.detach().contiguous().view(shape)
            try:
                weight, keep = self._pruned(name, count, weight, network, teacher, inputs, after.get(name))
            except PykdError as error:
                raise PykdError(f"layer {name}: {error}") from None
            original = layer.parametrizations.weight.original
            original.data.copy_(weight.view_as(original))
            mask_(network, {name: keep.view_as(original)})
            yield number, len(plan)

    def _pruned(
        self, name: str, count: int, weight: Tensor, network: nn.Module, teacher: nn.Module, inputs: Tensor, after: Any
    ) -> tuple[Tensor, Tensor]:
        """A layer's weight, and its mask."""
        if not weight.isfinite().all():
            raise PykdError("its weights are not finite: take another teacher")
        if self.objective == "none":
            keep = largest(weight, self.groups, count)
            return torch.where(keep, weight, 0), keep
        layer = teacher.get_submodule(name)
        problem: Any = Reconstruction(layer, self.terms) if after is None else Activated(layer, self.terms, after)
        for rows in torch.split(inputs, min(ROWS, max(1, NUMBERS // inputs[0].numel()))):
            problem.add(_inputs(teacher, name, rows), _inputs(network, name, rows))
        total = weight.shape[1] if self.groups == "in" else weight.numel()
        solver: Any = {
            "exact": Exact(ridge=self.ridge, select=self.select),
            "adam": Steps(self.steps, self.lr),
            "proximal": Proximal(self.penalty, ridge=self.ridge),
        }[self.solver]
        keep = torch.ones_like(weight, dtype=torch.bool)
        if count < total:
            weight, keep = solver(problem, weight, self.groups, count)
        elif self.solver != "adam":
            weight = problem.solve(keep, self.ridge)
        return (rounded(problem, weight, self.ridge) if self.int8 else weight), keep

    def _plan(self, network: nn.Module, inputs: Tensor) -> dict[str, tuple[int, torch.Size]]:
        """How many groups stay of each layer, in the order of execution, and its weight's shape by input channels."""
        layers = {each.name: each for each in prunable(network, inputs)}
        for field, names in (("keep", self.keep if isinstance(self.keep, Mapping) else ()), ("skip", self.skip)):
            for name in names:
                if name not in layers:
                    raise PykdError(_unknown(field, network, name))
        modules: dict[str, Any] = {name: network.get_submodule(name) for name in layers}
        weights = {name: each.by_channel(modules[name].weight) for name, each in layers.items()}
        totals = {name: each.shape[1] if self.groups == "in" else each.numel() for name, each in weights.items()}
        why = {name: self._why_not(each, modules[name]) for name, each in layers.items()}
        chosen = [name for name in layers if not why[name]]
        keep: dict[str, Any]
        if isinstance(self.keep, Mapping):
            keep = dict(self.keep)
            for name in keep:
                if why[name]:
                    raise PykdError(f"keep: layer {name} cannot be pruned: {why[name]}")
        elif not chosen and (not self.int8 or self.budget is not None):
            raise PykdError("the network has no layer to prune: linear=true takes linear layers, too")
        elif isinstance(self.keep, Sequence):
            if len(self.keep) != len(chosen):
                raise PykdError(
                    f"keep has {len(self.keep)} entries for {len(chosen)} layers: give one for each of "
                    f"{', '.join(chosen)}"
                )
            keep = dict(zip(chosen, self.keep, strict=True))
        else:
            keep = dict.fromkeys(chosen, float(self.keep))
        if self.budget is not None:
            keep = dict(within(network, inputs, dict.fromkeys(chosen, self.groups), self.budget, self._costs))
        counts = {name: _count(name, each, totals[name]) for name, each in keep.items()}
        return {
            name: (counts.get(name, totals[name]), weights[name].shape)
            for name in layers
            if self.int8 or name in counts
        }

    def _why_not(self, layer: Prunable, module: nn.Module) -> str | None:
        """Why a layer is not pruned; None of one that is."""
        if layer.first:
            return "it is the network's first"
        if layer.name in self.skip:
            return "skip names it"
        if isinstance(module, nn.Linear) and not self.linear:
            return "it is linear; linear=true takes such layers, too"
        if self.groups == "in":
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                return "it is a 1x1 convolution"
            if not layer.own.all():
                return "its inputs have to stay, for other layers or because it is not known what becomes of them"
        return None

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """That of fine-tuning, mean over the rows."""
        if self.fine_tune == "labels":
            return label_loss(student, batch)
        if self.fine_tune == "kd":
            return HintonDistillation(self.temperature, self.hard_weight).loss(student, batch)
        trained = unwrapped(student)
        assert isinstance(trained, _Pruned)
        taught, its = _maps.of_teacher(batch, trained.names)
        logits, mine = student(batch.inputs, True)
        pairs = [(logits, taught), *zip(mine, its, strict=True)]
        return torch.stack([F.mse_loss(a, b) / b.square().mean().clamp_min(1e-12) for a, b in pairs]).sum()

    def finish(self, trained: nn.Module, student: nn.Module) -> dict[str, Any]:
        """The student takes over the weights, zeros among them; the facts tell what is left of each layer."""
        assert isinstance(trained, _Pruned)
        network = copy.deepcopy(trained.network)
        unmask_(network)
        student.load_state_dict(network.state_dict())
        return {"layers": layers(student)}

    def comparisons(self) -> dict[str, Method]:
        """Pruning by size alone, without and with training, layer-wise distillation without crossing, and the crossed
        variants; for input channels also ThiNet and channel pruning, whose weights are solved like all others; and the
        plain ways to train such a network anew."""
        trained = self.fine_tune if self.trains else "kd"
        alone = dataclasses.replace(
            self, objective="none", select="norm", solver="exact", activation=False, int8=False, fine_tune="none"
        )
        crossed = dataclasses.replace(self, objective="convex")
        found: dict[str, Method] = {
            **comparisons(),
            "magnitude": alone,
            "fine_tune": dataclasses.replace(alone, fine_tune=trained),
            "features": dataclasses.replace(alone, fine_tune="features"),
            "layerwise": dataclasses.replace(self, objective="plain", select="norm"),
            "convex": crossed,
            "correction": dataclasses.replace(crossed, mu=1.0),
            "imitation": dataclasses.replace(crossed, mu=0.0),
            "soft": dataclasses.replace(self, objective="soft"),
        }
        if self.groups == "in":
            plain = dataclasses.replace(self, objective="plain", solver="exact", activation=False)
            found["thinet"] = dataclasses.replace(plain, select="thinet")
            found["channel_pruning"] = dataclasses.replace(plain, select="lasso")
        return found


class _Pruned(nn.Module):
    """The masked student; batch normalisation stays as the teacher has it, whatever the mode."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, inputs: Tensor, matched: bool = False) -> Any:
        """The logits; with ``matched`` also the outputs of the pruned layers."""
        return features(self.network, inputs, self.names) if matched else self.network(inputs)

    def train(self, mode: bool = True) -> "_Pruned":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class _Reached(Exception):  # noqa: N818  # it is no error
    """The pass came to the layer, with what that reads."""


@torch.no_grad()
def _inputs(network: nn.Module, name: str, rows: Tensor) -> Tensor:
    """What the layer reads when the network is given these rows; the pass ends there."""

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].isfinite().all():
            raise PykdError("its inputs are not finite: take another teacher, or other images")
        raise _Reached(inputs[0])

    hook = network.get_submodule(name).register_forward_pre_hook(stop)
    try:
        network(rows.clone())  # which it may change
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise PykdError("the network does not call it")


def _check_keep(keep: object) -> None:
    if isinstance(keep, (int, float)) and not isinstance(keep, bool) and 0 < keep <= 1:
        return
    if not isinstance(keep, (list, tuple, Mapping)) or not keep:
        raise ValueError(f"keep should be a share in (0, 1], a list or a mapping of layers, got {keep!r}")
    each = keep.items() if isinstance(keep, Mapping) else enumerate(keep)
    for name, value in each:
        if isinstance(keep, Mapping) and not isinstance(name, str):
            raise ValueError(f"keep: names of layers should be words, got {name!r}: write it in quotes")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (isinstance(value, float) and 0 < value <= 1):
            raise ValueError(f"keep: {name} should have a share in (0, 1] or a whole number, got {value!r}")


def _count(name: str, keep: float, total: int) -> int:
    """How many of a layer's groups stay."""
    if isinstance(keep, int) and keep > total:
        raise PykdError(f"keep: layer {name} has {total} groups, not {keep}: ask for fewer")
    return keep if isinstance(keep, int) else max(1, round(keep * total))


def _unknown(field: str, network: nn.Module, name: str) -> str:
    found = {each: module for each, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    if name not in found:
        return f"{field}: there is no layer {name!r}; {nearest(name, found)}"
    return f"{field}: layer {name} cannot be pruned: it is grouped, is used in several places, or cannot be traced"
