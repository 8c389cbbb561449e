"""A network as a graph of its layers, with the shape of every tensor."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pykd.errors import PykdError


class _Tracer(fx.Tracer):
    """Gives ``forward`` its first argument alone, so that the others are their defaults; remembers what failed."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor as ``node.meta["shape"]``, None for anything else."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


def traced(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """A copy of the network in eval mode, as torch.fx sees it; a part that cannot be traced stays one layer.

    Raises:
        PykdError: the network's own ``forward`` cannot be traced, the trace does something else, or it does not run on
            the example.
    """
    model = copy.deepcopy(model).eval()
    name, shape = type(model).__name__, list(example_input.shape)
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model)
            break
        except Exception as error:
            if tracer.failed is None or tracer.failed in opaque:
                where = f"{tracer.failed} in {name}" if tracer.failed else name
                raise PykdError(
                    f"the forward of {where} cannot be traced by torch.fx ({error}): let no if, loop or index depend "
                    "on a tensor"
                ) from error
            opaque.add(tracer.failed)
    network = fx.GraphModule(model, graph, name).eval()
    with torch.no_grad():
        try:
            expected = model(example_input.clone())
        except Exception as error:
            raise PykdError(f"{name} does not run on an example of shape {shape}: give a batch of inputs") from error
        outputs = _Shapes(network).run(example_input.clone())
    try:
        torch.testing.assert_close(outputs, expected, equal_nan=True)
    except AssertionError as error:
        raise PykdError(
            f"torch.fx sees another network than {name} in its forward: let it work on nothing in place and at random"
        ) from error
    return network
