"""A weight whose zero blocks are not stored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykd.sparse import gaps


@dataclass(frozen=True)
class Packed:
    """A weight as the model file stores it.

    Attributes:
        values: of the stored blocks, ``[stored * rows * columns]``; of a dense weight all of them, in its own order.
        bits: of an index code, 1 to 16; 0 for a dense weight.
        codes: how many there are.
        indices: the codes, see :mod:`pykd.sparse.gaps`.
    """

    values: NDArray[Any]
    bits: int
    codes: int
    indices: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return self.values.nbytes + len(self.indices)


class SparseWeight:
    r"""The weight of a linear layer or a convolution as compressed rows of blocks.

    A weight [out, in] or [out, in, kh, kw] is a matrix [out, in*kh*kw]. Blocks of ``block`` = (rows, columns) entries
    cover it from its first entry on; those at its edges are filled up with zeros. Blocks without an entry of
    :math:`|w| > threshold` are not stored; entries up to the threshold are zero in those that are. Later changes of
    ``dense`` do not change it.

    Args:
        dense: array or tensor [out, in] or [out, in, kh, kw] of float16, bfloat16 (kept as float32), float32, float64
            or int8.
        block: (rows, columns), cut to the matrix where that is smaller; None is (1, 1), unstructured.
        threshold: not negative.

    Attributes:
        shape: of the weight.
        block: (rows, columns) of a stored block.
        grid: (rows, columns) of blocks.
        values: ``[stored, rows, columns]``, row by row of the grid.
        columns: ``[stored]``, the block column of each, in the smallest unsigned type that fits.
        row_pointers: ``[grid rows + 1]``, unsigned: the blocks of grid row i are ``row_pointers[i]`` to
            ``row_pointers[i + 1] - 1``.
        nnz: entries that are not zero.
        nbytes: bytes of values and indices in a model file.
        tiles: the weight as the kernels read it, by (groups, device, dtype of the input): made by the ops, never copied
            or saved.

    Raises:
        ValueError: another shape or dtype, no entry, a value that is not finite, block or threshold out of range.

    Cost: a few passes over the dense weight.

    Example:
        >>> weight = SparseWeight(np.diag([1.0, 2.0, 0.0, 3.0]).astype(np.float32), block=(2, 2))
        >>> weight.values.shape, weight.columns, weight.row_pointers, weight.nnz
        ((2, 2, 2), array([0, 1], dtype=uint8), array([0, 1, 2], dtype=uint8), 3)
        >>> weight.dense()[3]
        array([0., 0., 0., 3.], dtype=float32)
    """

    def __init__(self, dense: Any, *, block: tuple[int, int] | None = None, threshold: float = 0.0) -> None:
        weight = _array(dense)
        if not (isinstance(threshold, (int, float)) and 0 <= threshold < math.inf):
            raise ValueError(f"threshold should be finite and not negative, got {threshold!r}")
        if not np.isfinite(weight).all():
            raise ValueError("a sparse weight should be finite: it holds NaN or infinity")
        self._lay_out(weight.shape, block or (1, 1))
        out, entries = matrix_shape(self.shape)
        (rows, columns), (high, wide) = self.grid, self.block
        padded = np.zeros((rows * high, columns * wide), weight.dtype)
        kept = (weight > threshold) | (weight < -threshold)  # the int8 -128 has no absolute value of its own type
        padded[:out, :entries] = np.where(kept, weight, 0).reshape(out, entries)
        blocks = padded.reshape(rows, high, columns, wide).swapaxes(1, 2).reshape(-1, high, wide)
        positions = np.flatnonzero(blocks.any((1, 2)))
        self._hold(positions, blocks[positions])

    @classmethod
    def from_blocks(
        cls, shape: Sequence[int], block: tuple[int, int], positions: NDArray[np.int64], values: NDArray[Any]
    ) -> "SparseWeight":
        """The weight that stores ``values`` [stored, rows, columns] at these places of the grid, row by row.

        Args:
            shape: of the weight.
            block: (rows, columns).
            positions: ascending: block row times the grid's columns plus block column.
            values: zero where a block reaches over the edge.

        Raises:
            ValueError: positions or values that fit no such weight, values that are not finite, or not zero over the
                edge.

        Example:
            >>> SparseWeight.from_blocks((1, 3), (1, 2), np.array([1]), np.ones((1, 1, 1)) * [[[5.0, 0.0]]]).dense()
            array([[0., 0., 5.]])
        """
        weight = cls.__new__(cls)
        weight._lay_out(shape, block)
        if values.shape != (len(positions), *weight.block):
            raise ValueError(f"values should be {[len(positions), *weight.block]}, got {list(values.shape)}")
        if (np.diff(positions, prepend=-1, append=math.prod(weight.grid)) < 1).any():
            raise ValueError(f"positions should ascend from 0 on, below {math.prod(weight.grid)}")
        if not np.isfinite(values).all():
            raise ValueError("a sparse weight should be finite: it holds NaN or infinity")
        weight._hold(positions, values)
        for axis, (side, length) in enumerate(zip(weight.block, matrix_shape(weight.shape), strict=True)):
            at_edge = positions // weight.grid[1] if axis == 0 else positions % weight.grid[1]
            over = side * weight.grid[axis] - length
            if over and values[at_edge == weight.grid[axis] - 1].swapaxes(1, axis + 1)[:, side - over :].any():
                raise ValueError("blocks should be zero where they reach over the weight's edge")
        return weight

    def _lay_out(self, shape: Sequence[int], block: tuple[int, int]) -> None:
        """Takes shape and block and finds the grid."""
        self.tiles: dict[Any, Any] = {}
        if not (isinstance(block, tuple | list) and len(block) == 2 and all(type(n) is int and n >= 1 for n in block)):
            raise ValueError(f"block should be (rows, columns), both at least 1, got {block!r}")
        self.shape = tuple(shape)
        if len(self.shape) not in (2, 4) or min(self.shape) < 1:
            raise ValueError(f"a weight should be [out, in] or [out, in, kh, kw] with entries, got {list(shape)}")
        matrix = matrix_shape(self.shape)
        self.block = (min(block[0], matrix[0]), min(block[1], matrix[1]))
        self.grid = (-(-matrix[0] // self.block[0]), -(-matrix[1] // self.block[1]))

    def _hold(self, positions: NDArray[np.int64], values: NDArray[Any]) -> None:
        rows, columns = self.grid
        self.values = values
        self.columns = (positions % columns).astype(np.min_scalar_type(columns - 1))
        pointers = np.searchsorted(positions, np.arange(rows + 1) * columns)
        self.row_pointers = pointers.astype(np.min_scalar_type(len(positions)))

    @property
    def positions(self) -> NDArray[np.int64]:
        """Places of the stored blocks in the grid, counted row by row; ascending."""
        pointers = self.row_pointers.astype(np.int64)
        rows = np.repeat(np.arange(self.grid[0]), pointers[1:] - pointers[:-1])
        return rows * self.grid[1] + self.columns

    @property
    def nnz(self) -> int:
        """Entries that are not zero."""
        return int(np.count_nonzero(self.values))

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices in a model file."""
        return self.pack().nbytes

    def dense(self) -> NDArray[Any]:
        """The weight, ``shape``, with zeros where no block is stored."""
        (rows, columns), (high, wide) = self.grid, self.block
        blocks = np.zeros((rows * columns, high, wide), self.values.dtype)
        blocks[self.positions] = self.values
        out, entries = matrix_shape(self.shape)
        padded = blocks.reshape(rows, columns, high, wide).swapaxes(1, 2).reshape(rows * high, columns * wide)
        return padded[:out, :entries].reshape(self.shape)

    def pack(self, item_bytes: int | None = None) -> Packed:
        """The smallest form: values with coded indices, or the dense weight where that takes no more bytes.

        Args:
            item_bytes: of a value as it will be stored; those it has here by default.
        """
        item_bytes = item_bytes or self.values.itemsize
        spare = (math.prod(self.shape) - self.values.size) * item_bytes
        if spare > 0:
            bits, codes, indices = gaps.encode(self.positions)
            if len(indices) < spare:
                return Packed(self.values.ravel(), bits, codes, indices)
        return Packed(self.dense().ravel(), 0, 0, b"")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tiles": {}}

    def __repr__(self) -> str:
        return f"SparseWeight(shape={self.shape}, block={self.block}, nnz={self.nnz}, nbytes={self.nbytes})"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a weight [out, in] or [out, in, kh, kw] as a matrix [out, in*kh*kw]."""
    return shape[0], math.prod(shape[1:])


def _array(dense: Any) -> NDArray[Any]:
    """``dense``, an array or a tensor, as an array whose values can be stored."""
    if hasattr(dense, "detach"):
        dense = dense.detach().cpu()
        dense = (dense.float() if str(dense.dtype) == "torch.bfloat16" else dense).numpy()
    weight = np.asarray(dense)
    if weight.ndim not in (2, 4) or not weight.size:
        raise ValueError(f"a weight should be [out, in] or [out, in, kh, kw] with entries, got {list(weight.shape)}")
    if weight.dtype not in (np.float16, np.float32, np.float64, np.int8):
        raise ValueError(f"a weight should be float16, bfloat16, float32, float64 or int8, got {weight.dtype}")
    return weight
