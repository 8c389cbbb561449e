"""The closed set of operators of a model file, and what each makes of the shapes it is given. Needs numpy alone."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykd.deploy.container import FormatError, brief
from pykd.sparse import SparseWeight

Shape = tuple[int, ...]
Vector = NDArray[np.float32]

LARGEST_SIDE = 1 << 24
MOST_ENTRIES = 1 << 28  # of all dense weights together, and of all values of one row together: 1 GiB of float32 each


@dataclass(frozen=True)
class Op:
    """One step of the graph.

    Attributes:
        kind: a key of ``KINDS``.
        inputs: the values it reads: 0 is the network's input, k the result of step k.
        options: see ``KINDS``; all of them.
        weight: of ``linear`` and ``conv2d``.
        bias: ``[out]`` of these, where there is one; the shift of ``affine``.
        scale: ``[channels]``, of ``affine``.
    """

    kind: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: SparseWeight | None = None
    bias: Vector | None = None
    scale: Vector | None = None


@dataclass(frozen=True)
class Kind:
    """What the operators of one name have: how many inputs (None: one or more), options with defaults, the shape."""

    shape: Callable[[Op, list[Shape]], Shape]
    inputs: int | None = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def _same(op: Op, shapes: list[Shape]) -> Shape:
    if any(shape != shapes[0] for shape in shapes):
        raise FormatError(f"{op.kind} needs inputs of one shape, got {brief(shapes)}")
    return shapes[0]


def _image(op: Op, shapes: list[Shape]) -> Shape:
    if len(shapes[0]) != 3:
        raise FormatError(f"{op.kind} needs an image [channels, height, width], got {brief(list(shapes[0]))}")
    return shapes[0]


def _linear(op: Op, shapes: list[Shape]) -> Shape:
    assert op.weight is not None
    if len(op.weight.shape) != 2 or shapes[0] != op.weight.shape[1:]:
        raise FormatError(f"linear of a weight {list(op.weight.shape)} does not take {brief(list(shapes[0]))}")
    return op.weight.shape[:1]


def _conv2d(op: Op, shapes: list[Shape]) -> Shape:
    assert op.weight is not None
    channels, *sides = _image(op, shapes)
    groups = op.options["groups"]
    if len(op.weight.shape) != 4 or channels != op.weight.shape[1] * groups or op.weight.shape[0] % groups:
        raise FormatError(
            f"conv2d of a weight {list(op.weight.shape)} in {groups} groups does not take {brief(list(shapes[0]))}"
        )
    kernel = op.weight.shape[2:]
    return (op.weight.shape[0], *_windows(op, sides, kernel, op.options["stride"], op.options["dilation"]))


def _pool(op: Op, shapes: list[Shape]) -> Shape:
    channels, *sides = _image(op, shapes)
    kernel = op.options["kernel"]
    if any(2 * padding > side for padding, side in zip(op.options["padding"], kernel, strict=True)):
        raise FormatError(f"{op.kind} should be padded by half its kernel at most")
    stride = op.options["stride"] or kernel
    return (channels, *_windows(op, sides, kernel, stride, op.options.get("dilation", (1, 1))))


def _windows(
    op: Op, sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """How often a kernel fits each side; with ``ceil``, a last window that begins within the image counts."""
    counts = []
    for side, length, step, spread, padding in zip(sides, kernel, stride, dilation, op.options["padding"], strict=True):
        room = side + 2 * padding - spread * (length - 1) - 1
        if room < 0:
            raise FormatError(f"{op.kind}'s kernel is larger than its image {brief(list(sides))}")
        count = room // step + 1
        if op.options.get("ceil") and room % step and count * step < side + padding:
            count += 1
        counts.append(count)
    return counts


def _global(op: Op, shapes: list[Shape]) -> Shape:
    return (_image(op, shapes)[0], 1, 1)


def _concat(op: Op, shapes: list[Shape]) -> Shape:
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise FormatError(f"concat needs inputs that differ in their first side alone, got {brief(shapes)}")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _flatten(op: Op, shapes: list[Shape]) -> Shape:
    return (math.prod(shapes[0]),)


def _affine(op: Op, shapes: list[Shape]) -> Shape:
    assert op.scale is not None
    if len(op.scale) != shapes[0][0]:
        raise FormatError(f"affine of {len(op.scale)} channels does not take {brief(list(shapes[0]))}")
    return shapes[0]


# Options: None is a pair (rows, columns) that must be given; a pair of ones must be positive, of zeros not negative.
# A pool's stride is its kernel where none is given.
KINDS = {
    "linear": Kind(_linear),
    "conv2d": Kind(_conv2d, options={"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}),
    "relu": Kind(_same),
    "leaky_relu": Kind(_same, options={"slope": 0.01}),
    "tanh": Kind(_same),
    "max_pool2d": Kind(
        _pool, options={"kernel": None, "stride": (), "padding": (0, 0), "dilation": (1, 1), "ceil": False}
    ),
    "avg_pool2d": Kind(
        _pool, options={"kernel": None, "stride": (), "padding": (0, 0), "ceil": False, "count_padding": True}
    ),
    "global_avg_pool": Kind(_global),
    "add": Kind(_same, inputs=2),
    "concat": Kind(_concat, inputs=None),
    "flatten": Kind(_flatten),
    "softmax": Kind(_same),
    "affine": Kind(_affine),
}
WEIGHTED = ("linear", "conv2d")


def checked_options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an operator: those given, checked, and the defaults of the others.

    Raises:
        FormatError: an unknown option, a missing one, or a value that it cannot have.
    """
    known = KINDS[kind].options
    if unknown := [name for name in given if name not in known]:
        raise FormatError(f"{kind} has no option {brief(unknown[0])}")
    options = {}
    for name, default in known.items():
        value = given.get(name, default)
        if isinstance(default, bool):
            fits, should = type(value) is bool, "true or false"
        elif isinstance(default, int):
            fits, should = _natural(value, 1), "a positive whole number"
        elif isinstance(default, float):
            fits, should = type(value) in (int, float) and abs(value) <= sys.float_info.max, "a number"
        else:
            lowest = 0 if default == (0, 0) else 1
            fits = isinstance(value, (list, tuple)) and all(_natural(each, lowest) for each in value)
            fits = (fits and len(value) == 2) or (name not in given and default == ())
            should = f"two whole numbers from {lowest} to {LARGEST_SIDE}"
        if not fits:
            raise FormatError(f"{kind} should have as {name} {should}, got {brief(value)}")
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


def _natural(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value <= LARGEST_SIDE


def check_shape(shape: Any, what: str) -> Shape:
    """A list of sides out of a file as a shape.

    Raises:
        FormatError: it is none, or too large.
    """
    if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and all(_natural(side, 1) for side in shape)):
        raise FormatError(f"{what} should have as shape 1 to 4 sides from 1 to {LARGEST_SIDE}, got {brief(shape)}")
    return tuple(shape)


def result_shape(op: Op, shapes: Sequence[Shape]) -> Shape:
    """The shape of an operator's result, ``shapes`` being those of all earlier values.

    Raises:
        FormatError: inputs that are not earlier values, or shapes that do not fit.
    """
    number = len(shapes)
    if not op.inputs or KINDS[op.kind].inputs not in (None, len(op.inputs)):
        raise FormatError(f"{op.kind} in step {number} has {len(op.inputs)} inputs")
    if not all(type(value) is int and 0 <= value < number for value in op.inputs):
        raise FormatError(f"{op.kind} in step {number} should read earlier values, got {brief(list(op.inputs))}")
    try:
        return KINDS[op.kind].shape(op, [shapes[value] for value in op.inputs])
    except FormatError as error:
        raise FormatError(f"{error} in step {number}") from None
