"""Physical removal of dead units and channels: a smaller network with the same outputs."""

import functools
import itertools
import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pykd.pruning._trace import traced

FUNCTIONS = ("call_function", "call_method")
# A layer's class, a function or a method's name, by what it does with channels.
DROPOUTS = {nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d}
POINTWISE = DROPOUTS | {
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.softplus, F.hardtanh, F.hardswish),
    *(torch.relu, torch.tanh, torch.sigmoid, "relu", "relu_", "tanh", "sigmoid", "contiguous", "clone", "detach"),
}
POOLS: set[Any] = {nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d}
POOLS |= {F.max_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d}
AVERAGES = {nn.AvgPool2d, F.avg_pool2d}
MEANS = {torch.mean, "mean"}
FLATTENINGS = {nn.Flatten, torch.flatten, torch.reshape, "flatten", "reshape", "view"}
NORMS = {nn.BatchNorm1d, nn.BatchNorm2d}
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
CONCATENATIONS = {torch.cat, torch.concat}


def remove_dead(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    r"""A smaller network with the same outputs: without the units and channels that zeroes have made useless.

    A unit or channel i is taken out with its weights, its batch normalisation and all weights that read it, where

    * nobody reads it: all weights that would are zero; or
    * it is a constant c, as its own weights are zero or read constants alone: then each reader's bias becomes
      :math:`b_o + c \sum_{u,v} w_{oiuv}`. Where a convolution that pads with zeroes is a reader, c has to be 0.

    This is repeated until nothing is left to remove. The terms of an addition have their channels in common: one is
    removed where it is dead for all of them. Channels are followed through pointwise activations, dropout, batch
    normalisation, pooling, means over places, flattening, concatenation, addition and depthwise convolutions. Those
    that enter or leave anything else stay as they are: a layer of another kind, a grouped convolution, a layer that is
    used in two places or has a hook, a part of the network that cannot be traced; so do the network's inputs and
    outputs. A layer keeps at least one unit.

    Args:
        model: a network whose ``forward`` takes one tensor and can be traced by torch.fx; it is not changed.
        example_input: a batch of inputs, ``[N, ...]``; only its shape matters, and N does not.

    Returns:
        A copy in eval mode whose layers have the names that they have in ``model``, so that its ``state_dict`` has
        them too; a layer without bias may have got one. Outputs are equal in eval mode to the rounding of the weights'
        dtype, for finite values. Functions that depend on the mode, such as ``F.dropout``, stay in eval mode.

    Raises:
        PykdError: the network cannot be traced, or does not run on the example.

    Cost: a copy of the network, a forward pass, and some passes over the weights.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> _ = nn.init.zeros_(network[0].weight[2:])
        >>> remove_dead(network, torch.zeros(1, 3, 4, 4)).get_submodule("4")
        Linear(in_features=8, out_features=10, bias=True)
    """
    network = _followable(model, example_input)
    while _Channels(network).remove():
        pass
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _followable(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """The network as torch.fx sees it, without the sizes of views that flatten."""
    network = traced(model, example_input)
    for node in network.graph.nodes:  # a view may have been written with sizes that will change
        if node.op in FUNCTIONS and node.target in FLATTENINGS and _flattens(node):
            with network.graph.inserting_before(node):
                flat = network.graph.call_function(torch.flatten, (node.args[0], 1))
            flat.meta = node.meta
            node.replace_all_uses_with(flat)
            network.graph.erase_node(node)
    # Sizes that nothing needs any more; what makes tensors may be there for what it does in place.
    network.graph.eliminate_dead_code(lambda node: node.op not in FUNCTIONS or node.meta["shape"] is not None)
    return network


def _flattens(node: fx.Node) -> bool:
    """Whether the node keeps the first dimension and makes one of all others."""
    if not node.args:
        return False
    inside, outside = node.args[0].meta["shape"], node.meta["shape"]  # type: ignore[union-attr]
    return inside is not None and len(inside) >= 2 and outside == (inside[0], math.prod(inside[1:]))


@dataclass
class _Value:
    """What is known of a tensor's channels, its dimension 1.

    Args:
        wires: [channels] int64; equal numbers are removed together.
        constant: [channels] float64; what the channel holds at every place, NaN where that is not known.
        memory: equal numbers may share memory, so that writing to one changes the others.
    """

    wires: Tensor
    constant: Tensor
    memory: int = field(default_factory=functools.partial(next, itertools.count()))


@dataclass
class _Layer:
    """A layer with weights: the wires that go in and out, and what it reads, NaN where a bias cannot stand for it."""

    module: Any
    inputs: Tensor
    outputs: Tensor
    constant: Tensor


class _Channels:
    """Follows every channel of a network from layer to layer, once, in the order of execution."""

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._parents: list[int] = []  # of wires that go together, a forest
        self._pinned: list[Tensor] = []
        self._values: dict[fx.Node, _Value] = {}
        self._layers: list[_Layer] = []
        self._places = Counter(id(tensor) for node in network.graph.nodes for tensor in _tensors(network, node))
        for node in network.graph.nodes:
            value = self._known(node)
            if value is None:
                for each in node.all_input_nodes:
                    if each in self._values:
                        self._pinned.append(self._values[each].wires)
                        self._forget(each)
                shape = node.meta["shape"]
                if shape is not None and len(shape) >= 2:
                    value = self._fresh(torch.full((shape[1],), math.nan, dtype=torch.float64))
                    self._pinned.append(value.wires)
            if value is not None:
                self._values[node] = value

    def remove(self) -> bool:
        """Takes out what is dead; whether there was anything."""
        roots = torch.tensor([self._root(wire) for wire in range(len(self._parents))])
        pinned, read, silent = (torch.zeros(len(roots), dtype=torch.bool) for _ in range(3))
        for wires in self._pinned:
            pinned[roots[wires]] = True
        for layer in self._layers:
            if _dense(layer.module):
                reads = _reads(layer.module).any(0)
                read[roots[layer.inputs[reads]]] = True
                pinned[roots[layer.inputs[reads & layer.constant.isnan()]]] = True
        gone = ~pinned
        for value in self._values.values():
            wires = roots[value.wires]
            if gone[wires].all():  # one has to stay; where nobody reads it, it need not read either
                gone[wires[0]] = False
                silent[wires[0]] = not read[wires[0]]
        changes = [_shrink(layer, gone[roots], silent[roots]) for layer in self._layers]
        return any(changes)

    def _root(self, wire: int) -> int:
        while self._parents[wire] != wire:
            self._parents[wire] = wire = self._parents[self._parents[wire]]
        return wire

    def _fresh(self, constant: Tensor) -> _Value:
        first = len(self._parents)
        self._parents.extend(range(first, first + len(constant)))
        return _Value(torch.arange(first, len(self._parents)), constant)

    def _forget(self, node: fx.Node) -> None:
        """What the node's memory holds from now on is not known."""
        for value in self._values.values():
            if value.memory == self._values[node].memory:
                value.constant = torch.full_like(value.constant, math.nan)

    def _known(self, node: fx.Node) -> _Value | None:
        """The node's channels; None where it is not known what it does with those of its inputs."""
        if not node.op.startswith("call_") or not all(each in self._values for each in node.all_input_nodes):
            return None
        layer: Any = self._network.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind: Any = node.target if layer is None else type(layer)
        shape = node.meta["shape"]
        if kind in ADDITIONS:
            return self._added(node)
        if kind in CONCATENATIONS:
            return self._concatenated(node)
        if shape is None or len(node.all_input_nodes) != 1 or not node.args:
            return None
        if node.all_input_nodes[0] is not node.args[0]:
            return None
        if layer is not None and (layer._forward_hooks or layer._forward_pre_hooks or self._shared(layer)):
            return None
        value, rank = self._values[node.args[0]], len(node.args[0].meta["shape"])
        if kind in POINTWISE:
            return self._pointwise(node, layer)
        if kind in FLATTENINGS and _flattens(node):
            times = math.prod(node.args[0].meta["shape"][2:])
            return _Value(value.wires.repeat_interleave(times), value.constant.repeat_interleave(times), value.memory)
        if rank == 4 and (kind in POOLS or (kind in MEANS and _over_places(node))):
            return _Value(value.wires, value.constant)
        if rank == 4 and kind in AVERAGES:
            exact = _keeps_constants(layer.__dict__ if layer else _average_arguments(*node.args, **node.kwargs))
            return _Value(value.wires, _where(exact | (value.constant == 0), value.constant))
        if kind in NORMS:
            self._layers.append(_Layer(layer, value.wires, value.wires, value.constant))
            return _Value(value.wires, _normalised(layer, value.constant))
        if (kind is nn.Linear and rank == 2) or (kind is nn.Conv2d and rank == 4):
            return self._weighted(layer, value)
        return None

    def _shared(self, layer: nn.Module) -> bool:
        return any(self._places[id(tensor)] > 1 for tensor in itertools.chain(layer.parameters(), layer.buffers()))

    def _added(self, node: fx.Node) -> _Value | None:
        shapes = {term.meta["shape"] if isinstance(term, fx.Node) else None for term in node.args}
        if len(node.args) != 2 or node.kwargs or len(shapes) != 1:
            return None
        one, other = (self._values[term] for term in node.args if isinstance(term, fx.Node))
        for a, b in zip(one.wires.tolist(), other.wires.tolist(), strict=True):
            self._parents[self._root(a)] = self._root(b)
        return self._written(node, one.constant + other.constant)

    def _concatenated(self, node: fx.Node) -> _Value | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        shape = node.meta["shape"]
        if not node.args or shape is None or not isinstance(dim, int) or dim % len(shape) != 1:
            return None
        parts = [self._values[part] for part in node.args[0]]  # type: ignore[union-attr, index]
        return _Value(torch.cat([part.wires for part in parts]), torch.cat([part.constant for part in parts]))

    def _pointwise(self, node: fx.Node, layer: Any) -> _Value | None:
        constant = self._values[node.args[0]].constant.clone()  # type: ignore[index]
        if (type(layer) if layer else node.target) in DROPOUTS:
            if layer.training if layer else node.kwargs.get("training", True):
                return None
        elif layer is not None:
            constant = layer(constant)
        else:
            function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
            constant = function(constant, *node.args[1:], **node.kwargs)
        return self._written(node, constant, inplace=getattr(layer, "inplace", node.kwargs.get("inplace")))

    def _written(self, node: fx.Node, constant: Tensor, inplace: Any = False) -> _Value:
        """The node's value, whose memory may be that of its first input, and is where it works in place."""
        value = self._values[node.args[0]]  # type: ignore[index]
        if inplace or node.target is operator.iadd or str(node.target).endswith("_"):
            self._forget(node.args[0])  # type: ignore[arg-type]
        return _Value(value.wires, constant, value.memory)

    def _weighted(self, layer: Any, value: _Value) -> _Value | None:
        """The outputs of a linear layer or a convolution: fresh wires, or those of its inputs where it is depthwise."""
        known = value.constant.isfinite() & (_unpadded(layer) | (value.constant == 0))
        constant = _where(known, value.constant)
        taps, reads = _taps(layer), _reads(layer)
        if _dense(layer):
            lost = (reads & constant.isnan()).any(1)
            result = taps @ constant.nan_to_num()
        elif layer.groups == layer.in_channels:
            times = layer.out_channels // layer.in_channels
            wires, constant = value.wires.repeat_interleave(times), constant.repeat_interleave(times)
            lost = reads[:, 0] & constant.isnan()
            result = taps[:, 0] * constant.nan_to_num()
        else:
            return None
        result = _where(~lost, _biased(layer, result))
        output = self._fresh(result) if _dense(layer) else _Value(wires, result)
        self._layers.append(_Layer(layer, value.wires, output.wires, constant))
        return output


def _tensors(network: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    """The parameters and buffers that the node uses."""
    if node.op == "call_module":
        layer = network.get_submodule(str(node.target))
        return [*layer.parameters(), *layer.buffers()]
    if node.op == "get_attr":
        found: Any = functools.reduce(getattr, str(node.target).split("."), network)
        return [found] if isinstance(found, Tensor) else []
    return []


def _where(known: Tensor, constant: Tensor) -> Tensor:
    return torch.where(known, constant, math.nan)


def _over_places(node: fx.Node) -> bool:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (list, tuple)) and {dim % 4 for dim in dims} == {2, 3}


def _average_arguments(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> dict[str, Any]:
    """Those of ``F.avg_pool2d``, by name."""
    return locals()


def _keeps_constants(average: dict[str, Any]) -> bool:
    """Whether the mean over every window of a constant is the constant."""
    padded = average["padding"] not in (0, (0, 0)) and average["count_include_pad"]
    return not padded and average["divisor_override"] is None


def _normalised(layer: Any, constant: Tensor) -> Tensor:
    result = torch.full_like(constant, math.nan)
    if layer.running_mean is not None:
        mean, variance = (each.double().cpu() for each in (layer.running_mean, layer.running_var))
        result = (constant - mean) / (variance + layer.eps).sqrt()
    if layer.weight is not None:
        weight = layer.weight.detach().double().cpu()
        result = torch.where(weight == 0, 0, result * weight)
    return _biased(layer, result)


def _biased(layer: Any, constant: Tensor) -> Tensor:
    return constant if layer.bias is None else constant + layer.bias.detach().double().cpu()


def _dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _unpadded(layer: Any) -> bool:
    """Whether nothing but the layer's inputs enters its sums."""
    return isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding in ("valid", (0, 0))


def _taps(layer: Any) -> Tensor:
    """[outputs, inputs], the sums over the kernel."""
    return layer.weight.detach().cpu().reshape(*layer.weight.shape[:2], -1).sum(-1, dtype=torch.float64)


def _reads(layer: Any) -> Tensor:
    """[outputs, inputs], whether a weight between the two is not zero."""
    return layer.weight.detach().cpu().reshape(*layer.weight.shape[:2], -1).any(-1)


@torch.no_grad()
def _shrink(layer: _Layer, gone: Tensor, silent: Tensor) -> bool:
    """Takes out the wires in ``gone`` and zeroes the weights of those in ``silent``; whether that changes anything."""
    module, inputs, outputs = layer.module, ~gone[layer.inputs], ~gone[layer.outputs]
    silent = silent[layer.outputs]
    silenced = _dense(module) and bool(_reads(module)[silent].any())
    if inputs.all() and outputs.all() and not silenced:
        return False
    if type(module) in NORMS:
        _keep(module, outputs, "weight", "bias", "running_mean", "running_var")
        module.num_features = int(outputs.sum())
        return True
    if _dense(module):
        module.weight[silent.to(module.weight.device)] = 0
        shift = (_taps(module)[:, ~inputs] @ layer.constant[~inputs].nan_to_num()).to(module.weight.device)
        if shift.any():
            bias = shift if module.bias is None else module.bias.double() + shift
            module.bias = nn.Parameter(bias.to(module.weight.dtype), module.weight.requires_grad)
        weight = module.weight[:, inputs.to(module.weight.device)]
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
    _keep(module, outputs, "weight", "bias")
    sizes = int(inputs.sum()), int(outputs.sum())
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = sizes
    else:
        module.groups = 1 if _dense(module) else sizes[0]
        module.in_channels, module.out_channels = sizes
    return True


def _keep(module: nn.Module, mask: Tensor, *names: str) -> None:
    for name in names:
        old = getattr(module, name)
        if old is not None:
            new = old[mask.to(old.device)]
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


@dataclass(frozen=True)
class Prunable:
    """A layer whose weights can be pruned.

    Args:
        name: of the layer in the network.
        own: bool ``[inputs]``; whether nobody but this layer reads the input unit or channel, so that without this
            layer's weights it could be taken out of the network.
        channels: how many channels the layer reads; a linear layer behind a flattening reads all places of each.
        first: whether the layer reads the network's inputs, and nothing that another layer with weights made.
    """

    name: str
    own: Tensor
    channels: int
    first: bool

    def by_channel(self, weight: Tensor) -> Tensor:
        """A view of the layer's weight, ``[outputs, channels, ...]``.

        >>> Prunable("0", torch.ones(6, dtype=torch.bool), channels=2, first=False).by_channel(torch.zeros(4, 6)).shape
        torch.Size([4, 2, 3, 1])
        """
        return weight if self.channels == weight.shape[1] else weight.view(len(weight), self.channels, -1, 1)


def prunable(model: nn.Module, example_input: Tensor) -> list[Prunable]:
    """The layers whose channels can be followed, in the order of execution.

    These are the linear layers of vectors and the two-dimensional ungrouped convolutions that are used in one place,
    share no weights and have no hook.

    Args:
        model: as of :func:`remove_dead`.
        example_input: as there.

    Raises:
        PykdError: as there.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> [(each.name, each.own.all().item(), each.first) for each in prunable(network, torch.zeros(1, 3, 4, 4))]
        [('0', False, True), ('3', True, False)]
        >>> prunable(network, torch.zeros(1, 3, 4, 4))[1].channels
        8
    """
    network = _followable(model, example_input)
    channels = _Channels(network)
    names = {id(module): name for name, module in network.named_modules()}
    dense = [layer for layer in channels._layers if _dense(layer.module)]
    roots = [torch.tensor([channels._root(wire) for wire in layer.inputs.tolist()]) for layer in dense]
    readers = Counter(root for each in roots for root in set(each.tolist()))
    pinned = {channels._root(wire) for wires in channels._pinned for wire in wires.tolist()}
    raw: set[fx.Node] = set()  # what no layer with weights is ahead of
    first = set()
    for node in network.graph.nodes:
        if raw.issuperset(node.all_input_nodes):
            if not any(isinstance(each, nn.Parameter) and each.dim() > 1 for each in _tensors(network, node)):
                raw.add(node)
            elif node.op == "call_module":
                first.add(str(node.target))
    found = []
    for layer, each in zip(dense, roots, strict=True):
        name = names[id(layer.module)]
        own = torch.tensor([readers[root] == 1 and root not in pinned for root in each.tolist()])
        runs = torch.unique_consecutive(each, return_counts=True)[1]
        count = len(runs) if bool((runs == runs[0]).all()) else len(each)
        found.append(Prunable(name, own, count, name in first))
    return found
