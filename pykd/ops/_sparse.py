"""What the sparse ops share: a weight as the kernels read it, kept beside it, and the arguments' rules."""

from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from pykd import _C
from pykd.sparse import SparseWeight
from pykd.sparse.weight import matrix_shape

_RELU = {None: False, "relu": True}


class Tiles(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        packed: the buffer, on a device.
        host: the same on the CPU.
        head: the numbers it begins with.
    """

    packed: Tensor
    host: Tensor
    head: list[int]


def pack(weight: SparseWeight, groups: int, device: torch.device, dtype: torch.dtype) -> Tiles:
    """Makes the tiles for inputs of a dtype and keeps them as ``weight.tiles[groups, device, dtype]``.

    Raises:
        ValueError: a float64 weight with values that float32 does not hold.

    Cost: a pass over the stored values, rounded to float32, and a copy to the device.
    """
    if weight.values.itemsize > 4 and not np.isfinite(weight.values.astype(np.float32)).all():
        raise ValueError("a weight's values must be within float32, whose largest is 3.4e38")
    multiplied = device.type == "cuda" or (dtype == torch.bfloat16 and _C.bfloat16())  # by the processor itself
    shape, halves = matrix_shape(weight.shape), dtype if multiplied else torch.float32
    weight.tiles[groups, device, dtype] = tiles = Tiles(
        *_C.sparse_pack(weight.positions, weight.values, *shape, groups, device, halves)
    )
    return tiles


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _packed(weight: SparseWeight, groups: int, device: torch.device, dtype: torch.dtype) -> bool:
    """For torch.compile, which cannot trace :func:`pack` but runs this, and then finds the tiles in their place."""
    return (groups, device, dtype) in weight.tiles or bool(pack(weight, groups, device, dtype))


def tiles_of(op: str, input: Tensor, weight: SparseWeight, dims: int, groups: int) -> Tiles:
    """The weight on the input's device, as the kernels read it for the input's dtype.

    Raises:
        ValueError, TypeError: there is no such weight, or no input.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"{op}: weight must be a pykd.sparse.SparseWeight, got {type(weight).__name__}")
    if len(weight.shape) != dims:
        sides = "[out, in]" if dims == 2 else "[out, in / groups, height, width]"
        raise ValueError(f"{op}: weight must be {sides}, got {list(weight.shape)}")
    if type(groups) is not int or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {weight.shape[0]} outputs, got {groups!r}")
    wanted = groups, input.device, input.dtype
    if torch.compiler.is_compiling():
        _packed(weight, *wanted)
    return weight.tiles.get(wanted) or pack(weight, *wanted)


def relu_of(op: str, activation: str | None) -> bool:
    """Whether a layer ends with a ReLU.

    Raises:
        ValueError: it would end with something else.
    """
    try:
        return _RELU[activation]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: activation must be None or 'relu', got {activation!r}") from None


def explain(op: str, error: TypeError, bias: Tensor | None) -> NoReturn:
    """Raises what is wrong with the type of the only argument that is not yet checked; else ``error`` itself."""
    if "incompatible function arguments" in str(error):
        raise TypeError(f"{op}: bias must be a Tensor or None, got {type(bias).__name__}") from None
    raise error
