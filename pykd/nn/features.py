"""What a network computes on its way, by the names of its modules."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pykd.config import nearest
from pykd.errors import PykdError


def features(network: Callable[..., Any], inputs: Any, names: Sequence[str], *, of: nn.Module | None = None) -> Any:
    """What the network answers, and what its modules of these names answer on the way, in the same pass.

    Nothing stays behind in the network: the hooks live as long as the call, and what they see is returned.

    Args:
        network: a module, or a function that calls one; it is called with ``inputs``, and the values keep their
            gradients.
        inputs: of ``network``, one argument of any type.
        names: of modules, as ``named_modules()`` has them.
        of: the module whose submodules are named, where ``network`` is not that module: a function, or a wrapper such
            as DistributedDataParallel.

    Returns:
        (output, [value of each name]).

    Raises:
        PykdError: a function without ``of``; an unknown name (with the nearest known one) or one given twice; a
            module that the pass does not call, calls twice, whose value is no tensor, or whose value a later module
            writes over.

    Cost: the pass itself; a microsecond or two for each name.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> output, (hidden,) = features(network, torch.ones(4, 2), ["1"])
        >>> hidden.shape, output.equal(network[2](hidden))
        (torch.Size([4, 3]), True)
    """
    named = network if of is None else of
    if not isinstance(named, nn.Module):
        raise PykdError("network is a function: give the module that it calls, whose submodules are named, as of=")
    found: dict[str, tuple[Tensor, int | None]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, value: Any) -> None:
            if name in found:
                raise PykdError(f"the module {name!r} is called twice in a pass: name one that is called once")
            if not isinstance(value, Tensor):
                raise PykdError(f"the module {name!r} gives a {type(value).__name__}, not a tensor: name another")
            found[name] = value, None if value.is_inference() else value._version

        return hook

    handles = [
        module.register_forward_hook(keep(name)) for name, module in zip(names, modules(named, names), strict=True)
    ]
    try:
        output = network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in found:
            raise PykdError(f"the module {name!r} is not called in a pass: name another")
        value, version = found[name]
        if version is not None and value._version != version:
            raise PykdError(f"what the module {name!r} gives is written over by a later one: name that one")
    return output, [found[name][0] for name in names]


def modules(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names.

    Raises:
        PykdError: an unknown name, with the nearest known one, or one given twice.

    Example:
        >>> modules(nn.Sequential(nn.ReLU()), ["0"])
        [ReLU()]
    """
    found = []
    for position, name in enumerate(names):
        try:
            module = network.get_submodule(name)
        except AttributeError:
            module = network
        if module is network:
            known = [each for each, _ in network.named_modules() if each]
            raise PykdError(f"there is no module {name!r}: {nearest(name, known)}")
        if name in names[:position]:
            raise PykdError(f"the module {name!r} is named twice")
        found.append(module)
    return found
