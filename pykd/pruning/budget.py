"""A budget for the whole network, shared out among its layers."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.ops import block_norms
from pykd.pruning.flops import flops
from pykd.pruning.layer import whole_channels
from pykd.pruning.remove_dead import Prunable, prunable, remove_dead

Cost = Callable[[nn.Module, Tensor], float]


def _parameters(network: nn.Module, example_input: Tensor) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in network.parameters())


def _flops(network: nn.Module, example_input: Tensor) -> int:
    zeros = 0

    def count(layer: nn.Module, _: object, outputs: Tensor) -> None:
        nonlocal zeros
        weight: Tensor = layer.weight  # type: ignore[assignment]
        zeros += int((weight == 0).sum()) * outputs.numel() // len(weight)

    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        return flops(network, example_input[:1]) - zeros
    finally:
        for handle in handles:
            handle.remove()


COSTS: Mapping[str, Cost] = {"parameters": _parameters, "flops": _flops}


def checked(budget: Mapping[str, float], costs: Mapping[str, Cost] = COSTS) -> tuple[str, float]:
    """What the budget counts, and its number.

    Args:
        budget: as of :func:`within`.
        costs: as there.

    Raises:
        ValueError: it is of another form.

    Example:
        >>> checked({"flops": 0.5})
        ('flops', 0.5)
    """
    if isinstance(budget, Mapping) and len(budget) == 1:
        ((what, number),) = budget.items()
        known = what in costs and isinstance(number, (int, float)) and not isinstance(number, bool)
        if known and 0 < number < math.inf:
            return what, number
    raise ValueError(
        f"budget should be one of {', '.join(costs)} with a share in (0, 1] or a number above 1, "
        f"such as {{'parameters': 0.5}}, got {budget!r}"
    )


@torch.no_grad()
def within(
    model: nn.Module,
    example_input: Tensor,
    layers: Mapping[str, str],
    budget: Mapping[str, float],
    costs: Mapping[str, Cost] = COSTS,
) -> dict[str, int]:
    r"""How many groups of each layer stay, so that the whole network keeps within a budget.

    Group g of layer l has the score :math:`s_{lg} = \lVert W_{lg} \rVert_2 / \sqrt{\frac{1}{G_l} \sum_h \lVert W_{lh}
    \rVert_2^2}`: layers differ in scale, so a norm says something only beside those of its own layer. The groups of the
    largest scores stay, over all layers, as many as the budget holds; the largest of each layer stays in any case.

    What counts is the network after :func:`pykd.pruning.remove_dead`:

    * ``parameters``: those that are not zero;
    * ``flops``: its :func:`pykd.pruning.flops` for one row, without those of zero weights of linear layers and
      convolutions: where whole units went and no zeros are left, simply its flops.

    Args:
        model: as of :func:`pykd.pruning.remove_dead`.
        example_input: as there.
        layers: what is pruned of each layer, by its name: ``"in"``, input channels by their l2 norm, where no other
            layer reads them, or ``"weight"``, single weights by their size.
        budget: one of ``costs`` and a number above 0: up to 1 the share of what the network as it is costs, above 1
            the cost itself.
        costs: what a budget may count: by name, a function of a network without dead units and the example input.

    Returns:
        By the layer's name, the count for :func:`pykd.pruning.layer.largest` of its weight
        :meth:`pykd.pruning.Prunable.by_channel`. With the next group in the order of
        scores the network would exceed the budget. Where a cost does not grow with every group, as the bytes of a
        file, a larger count may fit again.

    Raises:
        PykdError: a layer that is not there or cannot lose such groups, or whose weights are not finite; a budget
            below the cost with one group in each layer, or that leaves no way from the inputs to the answers; and as
            :func:`pykd.pruning.remove_dead`.
        ValueError: a budget or groups of another form, or no layers.

    Cost: a sort of all groups' scores, and for each bisection of their number one physical removal and one cost.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> for layer, value in zip(network[::2], ([[1.0, 2.0]] * 3, [[1.0, 9.0, 5.0]] * 2)):
        ...     _ = layer.weight.data.copy_(torch.tensor(value))
        >>> within(network, torch.zeros(1, 2), {"2": "in"}, {"flops": 0.7})
        {'2': 2}
    """
    what, number = checked(budget, costs)
    found = _found(model, example_input, layers)
    network = copy.deepcopy(model)
    wholes, weights = (
        {name: each.by_channel(its.get_submodule(name).weight) for name, each in found.items()}  # type: ignore[arg-type]
        for its in (model, network)
    )
    scores = [_scores(name, weight, layers[name]) for name, weight in wholes.items()]
    order = torch.cat(scores).argsort(descending=True, stable=True)
    parts = torch.split(order.argsort(), [len(each) for each in scores])
    ranks = dict(zip(wholes, parts, strict=True))

    def cost(count: int) -> float:
        for name, whole in wholes.items():
            keep = ranks[name] < count
            keep = whole_channels(keep, whole) if layers[name] == "in" else keep.view_as(whole)
            weights[name].copy_(torch.where(keep, whole, 0))
        return costs[what](remove_dead(network, example_input), example_input)

    least, most = len(ranks), len(order)
    limit = number if number > 1 else number * cost(most)
    count = bisect_right(range(least, most + 1), limit, key=cost) + least - 1
    lowest = cost(max(least, count))  # leaves the answer's weights in network
    if count < least:
        raise PykdError(
            f"a budget of {limit:,.0f} {what} cannot be kept: with one group in each layer the network has "
            f"{lowest:,.0f}; ask for that or more, or let more layers be pruned"
        )
    small = remove_dead(network, example_input)
    first = [small.get_submodule(each.name) for each in prunable(small, example_input) if each.first]
    if first and not any(bool(layer.weight.any()) for layer in first):  # type: ignore[operator]
        raise PykdError(
            f"with a budget of {limit:,.0f} {what} nothing of the network's inputs reaches its answers: ask for more"
        )
    return {name: int((rank < count).sum()) for name, rank in ranks.items()}


def _found(model: nn.Module, example_input: Tensor, layers: Mapping[str, str]) -> dict[str, Prunable]:
    """The layers, which can lose such groups."""
    if not layers:
        raise ValueError("layers should name at least one layer to be pruned")
    names = dict(model.named_modules(remove_duplicate=False))
    found = {each.name: each for each in prunable(model, example_input)}
    for name, groups in layers.items():
        if groups not in ("in", "weight"):
            raise ValueError(f"groups of {name!r} should be in or weight, got {groups!r}")
        if name not in names:
            raise PykdError(f"there is no module {name!r} to be pruned")
        if name not in found:
            raise PykdError(
                f"{name!r} cannot be pruned: that is for linear layers and ungrouped convolutions that are used once"
            )
        if groups == "in" and not found[name].own.all():
            raise PykdError(
                f"{name!r} cannot lose input channels, as something else needs them too: prune its weights or none"
            )
    return {name: found[name] for name in layers}


def _scores(name: str, weight: Tensor, groups: str) -> Tensor:
    """Of a layer's groups, float64; infinite for the largest, which has to stay."""
    if not weight.isfinite().all():
        raise PykdError(f"the weights of {name!r} are not finite: prune a network that is")
    norms = (block_norms(weight, groups="in") if groups == "in" else weight.abs().flatten()).double()
    scores = (norms / norms.square().mean().sqrt()).nan_to_num(0)  # of zeros alone
    scores[norms.argmax()] = math.inf
    return scores
