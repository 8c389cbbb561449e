"""What a network does with a layer's outputs before anything else sees them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from pykd.pruning._trace import traced
from pykd.pruning.remove_dead import DROPOUTS, NORMS, POINTWISE


def activations(model: nn.Module, example_input: Tensor, names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """The batch normalisation and the activation that follow each layer, as they are in eval mode.

    A layer whose outputs go elsewhere before an activation has the identity.

    Args:
        model: as of :func:`pykd.pruning.remove_dead`.
        example_input: as there.
        names: of the layers.

    Raises:
        PykdError: as there.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> found = activations(network, torch.zeros(1, 2), ["0", "2"])
        >>> found["0"](torch.tensor([[-1.0, 1.0]])), found["2"](torch.tensor([[-1.0]]))
        (tensor([[0., 1.]]), tensor([[-1.]]))
    """
    network = traced(model, example_input)
    nodes = {node.target: node for node in network.graph.nodes if node.op == "call_module"}
    return {name: _follow(network, nodes[name]) for name in names}


def _follow(network: fx.GraphModule, node: fx.Node) -> Callable[[Tensor], Tensor]:
    steps: list[Callable[[Tensor], Tensor]] = []
    while len(node.users) == 1:
        (user,) = node.users
        module: Any = network.get_submodule(str(user.target)) if user.op == "call_module" else None
        kind: Any = user.target if module is None else type(module)
        if user.all_input_nodes != [node] or user.args[:1] != (node,) or kind not in POINTWISE | NORMS:
            break
        node = user
        if kind in DROPOUTS or kind is nn.Identity or kind in ("contiguous", "clone", "detach"):
            continue
        steps.append(module or partial(_call, kind, user.args[1:], user.kwargs))
        if kind not in NORMS:
            return partial(_in_turn, steps)
    return partial(_in_turn, [])


def _in_turn(steps: Sequence[Callable[[Tensor], Tensor]], value: Tensor) -> Tensor:
    for step in steps:
        value = step(value)
    return value


def _call(function: Any, arguments: Any, options: Any, value: Tensor) -> Any:
    """A function of the graph, or a method by its name."""
    return (getattr(Tensor, function) if isinstance(function, str) else function)(value, *arguments, **options)
