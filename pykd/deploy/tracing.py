"""From a torch module to the graph of a model file."""

import copy
import importlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pykd.deploy.container import FormatError
from pykd.deploy.graph import KINDS, Op, Shape, checked_options
from pykd.deploy.model_file import VALUES, ModelFile, from_bytes, to_bytes, write
from pykd.deploy.network import FileNetwork
from pykd.errors import PykdError
from pykd.pruning.remove_dead import remove_dead
from pykd.sparse import SparseWeight

CHECKED_ROWS = 3  # a batch of an odd size shows which side of a shape is the batch
FORMATS = ("pykd", "onnx")
LARGEST_DIFFERENCE = 1e-3  # of the largest answer; folding batch norm moves the last bits


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor,
    *,
    format: str = "pykd",
    values: str = "float32",
    block: tuple[int, int] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, str | int] | None = None,
    licence: str = "not stated",
) -> int:
    """Writes a network as a file, in place of one that is there; its dead units are left out.

    Args:
        model: made of ``pykd.deploy.graph.KINDS``; torch.fx must be able to trace it. It is not changed.
        path: of the file, by custom ``*.pykd.safetensors`` or ``*.onnx``.
        example_input: ``[rows, ...]``, of which the first row counts.
        format: pykd, the model file; or onnx, the same network as a dense graph (see :mod:`pykd.deploy.onnx`), in
            float16 where ``values`` is float16 and in float32 otherwise.
        values: how weights are stored: float32; float16 or bfloat16, rounded to the nearest; or int8 with a float32
            scale for every output.
        block: (rows, columns) in which weights are stored; None for single entries.
        normalization: mean and standard deviation of each channel, for pixels in [0, 1].
        class_names: one for each answer.
        provenance: where the network comes from: words and whole numbers, e.g. method, seed, recipe, data.
        licence: one line.

    Returns:
        The file's bytes.

    Raises:
        PykdError: a module or function that a model file cannot hold, by its name; a network that cannot be traced;
            weights that are not finite or do not fit ``values``; a file that cannot be written.
        ImportError: the package onnx is missing.

    Cost: a few passes over the weights and three rows through the network.

    Example:
        >>> import tempfile
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(network, f"{folder}/a.pykd.safetensors", torch.zeros(1, 4)) < 1200
        True
    """
    about: dict[str, Any] = {"class_names": class_names, "provenance": provenance, "licence": licence}
    about["normalization"] = normalization
    if format not in FORMATS:
        raise PykdError(f"format should be one of {', '.join(FORMATS)}, got {format!r}")
    network = described(model, example_input, values=values, block=block, **about)
    if format == "pykd":
        return write(network, path)
    from pykd.deploy import onnx

    return onnx.write(from_bytes(to_bytes(network)), path, dtype=onnx.dtype_of(values))


def described(
    model: nn.Module,
    example_input: Tensor,
    *,
    values: str = "float32",
    block: tuple[int, int] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, str | int] | None = None,
    licence: str = "not stated",
) -> ModelFile:
    """The model file that :func:`export` writes; the arguments are the same."""
    if values not in VALUES:
        raise PykdError(f"values should be one of {', '.join(VALUES)}, got {values!r}")
    shape, ops = trace(model, example_input, block)
    origin = {"pykd": importlib.import_module("pykd").__version__, **(provenance or {})}
    return ModelFile(shape, ops, normalization, tuple(class_names or ()), origin, licence, values)


def trace(model: nn.Module, example_input: Tensor, block: tuple[int, int] | None = None) -> tuple[Shape, list[Op]]:
    """Shape of one row, and the steps that the network takes in eval mode, without its dead units.

    The steps are run, and must give the network's answers.

    Raises:
        PykdError: see :func:`export`.

    Example:
        >>> [op.kind for op in trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 2, 2))[1]]
        ['flatten', 'linear']
    """
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or not len(example_input):
        raise PykdError("example_input should be a tensor [rows, ...] with at least one row")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("pykd.nn."):
            what = f"{name or 'the network'} ({type(module).__name__})"
            if type(module).__module__ == "pykd.nn.sparse":
                raise PykdError(f"{what} is sparse already: export the dense network that pykd.nn.sparsify was given")
            raise PykdError(f"{what} cannot be exported as it is: make plain layers of such ones by pykd.nn.plain")
    model = copy.deepcopy(model).cpu().float().eval()
    if type(model).__module__.startswith("torch.nn."):  # a single layer is not to be looked into
        model = nn.Sequential(model)
    noise = torch.randn(CHECKED_ROWS, *example_input.shape[1:], generator=torch.Generator().manual_seed(0))
    rows = example_input[:1].detach().cpu().float() + noise * (torch.arange(CHECKED_ROWS) > 0).view(
        -1, *[1] * (noise.dim() - 1)
    )
    steps = _Translator(remove_dead(model, rows.clone()), rows.clone()).steps()  # it may change its input in place
    shape = tuple(rows.shape[1:])
    ops = _numbered(_folded(steps), block)
    with torch.no_grad():
        answers = model(rows.clone())
        difference = (FileNetwork(ModelFile(shape, ops))(rows) - answers).abs().max()
    if not difference <= LARGEST_DIFFERENCE * answers.abs().max():
        raise PykdError(
            f"the traced network answers {difference:.3g} beside the network itself: "
            "leave out hooks and whatever else changes values unseen"
        )
    return shape, ops


@dataclass(eq=False)
class _Step:
    """An operator before it is numbered; ``inputs`` are other steps, None for the network's input."""

    kind: str
    inputs: "list[_Step | None]"
    options: dict[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None


class _Translator(fx.Interpreter):
    """Runs a traced network on ``rows`` and turns its nodes into steps."""

    def __init__(self, network: fx.GraphModule, rows: Tensor) -> None:
        super().__init__(network)
        self.extra_traceback = False  # it would go into the sentences
        self._rows = rows
        self._shapes: dict[fx.Node, Shape] = {}
        self._values: dict[fx.Node, _Step | None] = {}
        self._last: _Step | None = None

    @torch.no_grad()
    def steps(self) -> list[_Step]:
        """Those that the answer needs, each after what it reads."""
        self.run(self._rows)
        ordered: dict[_Step, None] = {}
        waiting = [self._last]
        while waiting:
            step = waiting[-1]
            unread = [] if step is None else [each for each in step.inputs if each is not None and each not in ordered]
            if step is None or not unread:
                waiting.pop()
            if step is not None and not unread:
                ordered[step] = None
            waiting += unread
        return list(ordered)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            self._last = self._value(n.args[0], n)
        elif isinstance(result, Tensor):
            self._shapes[n] = tuple(result.shape)
            if n.op == "placeholder":
                self._values[n] = None
            elif n.op != "get_attr":
                self._translate(n)
        return result

    def _value(self, node: Any, reader: fx.Node) -> "_Step | None":
        if not isinstance(node, fx.Node) or node not in self._values:
            raise self._refused(reader, "it reads or gives something else than one layer's result")
        return self._values[node]

    def _translate(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            known = MODULES.get(type(module).forward)
            name, given = ("", {}) if known is None else (known[0], known[1](module))
        else:
            module = None
            name, parameters = FUNCTIONS.get(node.target, ("", ()))
            given = {**dict(zip(parameters, node.args[1:], strict=False)), **node.kwargs}
        if not name:
            raise self._refused(node, "it is none of a model file's operators")
        first: Any = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
        nodes = list(first) if isinstance(first, (list, tuple)) else [first]
        if name == "add":
            nodes.append(given.pop("other", None))
        inputs = [self._value(each, node) for each in nodes]
        shapes = [self._shapes[each] for each in nodes]
        try:
            steps = _steps(name, inputs, given, shapes, self._shapes[node], module)
        except FormatError as error:
            raise self._refused(node, str(error)) from None
        if self._shapes[node][0] != CHECKED_ROWS:
            raise self._refused(node, "it mixes the rows of a batch")
        self._values[node] = steps[-1] if steps else inputs[0]
        if given.get("inplace") or str(node.target).endswith("_") or node.target is operator.iadd:
            self._values[nodes[0]] = self._values[node]  # whoever reads it later reads what was written over it

    def _refused(self, node: fx.Node, why: str) -> PykdError:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            what = f"{node.target} ({type(module).__name__})"
        else:
            owners = [name for name in node.meta.get("nn_module_stack", {}) if name]
            called = getattr(node.target, "__name__", str(node.target))
            what = f"{called} in {owners[-1] if owners else 'the network'}"
        return PykdError(f"{what} cannot be exported: {why}; a model file holds {', '.join(KINDS)}")


def _steps(
    name: str,
    inputs: "list[_Step | None]",
    given: dict[str, Any],
    shapes: list[Shape],
    result: Shape,
    module: nn.Module | None,
) -> list[_Step]:
    """The steps of one layer or function; none where it changes nothing.

    Raises:
        FormatError: it does something that no operator does.
    """

    def step(kind: str, **options: Any) -> list[_Step]:
        return [_Step(kind, inputs, options)]

    shape = shapes[0]
    match name:
        case "identity":
            return []
        case "relu" | "tanh" | "add":
            if given.get("alpha", 1) != 1:
                raise FormatError("it scales what it adds")
            return step(name)
        case "leaky_relu":
            return step(name, slope=float(given.get("negative_slope", 0.01)))
        case "softmax" | "concat":
            if given.get("dim", 0) not in (1, 1 - len(shape)):
                raise FormatError("it works on another side than the first after the batch")
            return step(name)
        case "shape":
            if result == shape:
                return []
            if result != (shape[0], math.prod(shape[1:])):
                raise FormatError("it gives rows another shape than a flat one")
            return step("flatten")
        case "mean":
            dims = given.get("dim", given.get("axis"))
            if len(shape) != 4 or not isinstance(dims, (list, tuple)) or {each % 4 for each in dims} != {2, 3}:
                raise FormatError("it is no mean over the places of an image")
            steps = step("global_avg_pool")
            return steps if given.get("keepdim") else [*steps, _Step("flatten", [steps[0]])]
        case "adaptive_avg_pool2d":
            sides, wanted = shape[2:], result[2:]
            if sides == wanted:
                return []
            if wanted == (1, 1):
                return step("global_avg_pool")
            if any(side % count for side, count in zip(sides, wanted, strict=True)):
                raise FormatError(f"its windows are unequal on an image of {list(sides)}")
            kernel = tuple(side // count for side, count in zip(sides, wanted, strict=True))
            return step("avg_pool2d", **checked_options("avg_pool2d", {"kernel": kernel}))
        case "max_pool2d" | "avg_pool2d":
            if given.get("return_indices") or given.get("divisor_override"):
                raise FormatError("a pool that returns indices or divides by a number of its own is not among them")
            words = {"kernel": "kernel_size", "stride": "stride", "padding": "padding", "dilation": "dilation"}
            words |= {"ceil": "ceil_mode", "count_padding": "count_include_pad"}
            found = {word: given[theirs] for word, theirs in words.items() if given.get(theirs) is not None}
            found = {word: value if isinstance(value, bool) else _pair(value) for word, value in found.items()}
            return step(name, **checked_options(name, found))
    assert module is not None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return [_affine(module, inputs)]
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    if len(shape) != (2 if name == "linear" else 4):
        raise FormatError(f"it works on {list(shape[1:])}, not on {'features' if name == 'linear' else 'an image'}")
    options = _geometry(module) if isinstance(module, nn.Conv2d) else {}
    bias = None if module.bias is None else module.bias.double()
    return [_Step(name, inputs, options, module.weight.double(), bias)]


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d, inputs: "list[_Step | None]") -> _Step:
    """Batch normalisation by its running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        raise FormatError("it has no running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return _Step("affine", inputs, bias=shift, scale=scale)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    padding = conv.padding
    if isinstance(padding, str):
        spread = [each * (side - 1) for each, side in zip(conv.dilation, conv.kernel_size, strict=True)]
        if padding == "same" and any(each % 2 for each in spread):
            raise FormatError("it pads one side more than the other")
        padding = (spread[0] // 2, spread[1] // 2) if padding == "same" else (0, 0)
    if conv.padding_mode != "zeros" and padding != (0, 0):
        raise FormatError(f"it pads with {conv.padding_mode}")
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _folded(steps: list[_Step]) -> list[_Step]:
    """Batch normalisation goes into the layer whose result it alone reads."""
    kept: list[_Step] = []
    for step in steps:
        layer = step.inputs[0]
        readers = [each for each in steps if layer in each.inputs]
        if step.scale is None or layer is None or layer.weight is None or len(readers) > 1:
            kept.append(step)
            continue
        assert step.bias is not None
        layer.weight = layer.weight * step.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias = step.bias if layer.bias is None else layer.bias * step.scale + step.bias
        for each in steps:
            each.inputs = [layer if value is step else value for value in each.inputs]
    return kept


def _numbered(steps: list[_Step], block: tuple[int, int] | None) -> list[Op]:
    numbers: dict[_Step | None, int] = {None: 0}
    ops = []
    for number, step in enumerate(steps, 1):
        numbers[step] = number
        try:
            weight = None if step.weight is None else SparseWeight(step.weight.float(), block=block)
        except ValueError as error:
            raise PykdError(f"{step.kind} in step {number} cannot be exported: {error}") from error
        vectors = (None if each is None else each.float().numpy() for each in (step.bias, step.scale))
        inputs = tuple(numbers[each] for each in step.inputs)
        ops.append(Op(step.kind, inputs, step.options, weight, *vectors))
    return ops


def _of(*names: str) -> Any:
    """The attributes of a module as a function's arguments."""
    return lambda module: {name: getattr(module, name) for name in names}


# What a layer or a function is called here, and how its arguments are found. A subclass with a forward of its own is
# another layer.
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MODULES: dict[Any, tuple[str, Any]] = {
    nn.Linear.forward: ("linear", _of()),
    nn.Conv2d.forward: ("conv2d", _of()),
    nn.BatchNorm1d.forward: ("affine", _of()),
    nn.BatchNorm2d.forward: ("affine", _of()),
    nn.ReLU.forward: ("relu", _of("inplace")),
    nn.LeakyReLU.forward: ("leaky_relu", _of("negative_slope", "inplace")),
    nn.Tanh.forward: ("tanh", _of()),
    nn.Softmax.forward: ("softmax", _of("dim")),
    nn.MaxPool2d.forward: ("max_pool2d", _of(*_MAX_POOL)),
    nn.AvgPool2d.forward: ("avg_pool2d", _of(*_AVG_POOL)),
    nn.AdaptiveAvgPool2d.forward: ("adaptive_avg_pool2d", _of()),
    nn.Flatten.forward: ("shape", _of()),
    **{
        layer.forward: ("identity", _of())
        for layer in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    },
}
FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), ("relu", ("inplace",))),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", "tanh_"), ("tanh", ())),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), ("softmax", ("dim",))),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), ("max_pool2d", _MAX_POOL)),
    F.avg_pool2d: ("avg_pool2d", _AVG_POOL),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", ()),
    **dict.fromkeys((torch.mean, "mean"), ("mean", ("dim", "keepdim"))),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), ("add", ("other",))),
    **dict.fromkeys((torch.cat, torch.concat), ("concat", ("dim",))),
    **dict.fromkeys((torch.flatten, torch.reshape, "flatten", "reshape", "view"), ("shape", ())),
    **dict.fromkeys(("contiguous", "clone", "detach"), ("identity", ())),
    **dict.fromkeys((F.dropout, F.dropout2d), ("identity", ())),
}
