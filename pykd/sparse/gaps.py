"""Ascending positions as a stream of short codes: the gaps between them.

A code of k bits (k from 1 to 16) below its largest value :math:`E = 2^k - 1` says how many places lie between the last
position and the next one; E itself says that E places without a position are passed, and no more. One bit a code is
thus a bitmap (0 for a position, 1 for none), 8 or 16 bits are bytes or words. The codes follow one another without a
break, each from its lowest bit on, in bytes that fill up from their lowest bit; the last byte is filled up with zeros,
and the last code is no E.

Row pointers and column numbers need at least a byte a position and one a row; this never needs more (k = 8 passes a row
of 255 places in a code) and at the densities of pruned networks about two thirds.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_BITS = 16


def encode(positions: NDArray[Any]) -> tuple[int, int, bytes]:
    """Bits a code, number of codes, and the codes themselves: the width that takes the fewest bytes.

    Args:
        positions: ascending, int64.

    Cost: one pass for each width, and one for the codes.

    Example:
        >>> encode(np.array([0, 3, 4]))
        (1, 5, b'\\x06')
    """
    gaps = np.diff(positions, prepend=-1) - 1
    counts = {bits: len(gaps) + int((gaps // (2**bits - 1)).sum()) for bits in range(1, LARGEST_BITS + 1)}
    bits = min(counts, key=lambda bits: _bytes(bits, counts[bits]))
    passes, rest = np.divmod(gaps, 2**bits - 1)
    codes = np.full(counts[bits], 2**bits - 1, np.uint16)
    codes[np.cumsum(passes + 1) - 1] = rest
    each_bit = (codes[:, None] >> np.arange(bits, dtype=np.uint16) & 1).astype(np.uint8)
    return bits, counts[bits], np.packbits(each_bit, bitorder="little").tobytes()


def decode(bits: int, codes: int, content: bytes, places: int) -> NDArray[np.int64]:
    """The positions that ``content`` holds, ascending and below ``places``.

    Raises:
        ValueError: ``content`` is no such stream.

    Example:
        >>> decode(1, 5, b"\\x06", places=9)
        array([0, 3, 4])
    """
    if not 1 <= bits <= LARGEST_BITS:
        raise ValueError(f"a code should have 1 to {LARGEST_BITS} bits, got {bits}")
    if not 0 <= codes <= places:  # before anything is allocated: a code passes at least one place
        raise ValueError(f"{places} places have at most as many codes, got {codes}")
    if len(content) != _bytes(bits, codes):
        raise ValueError(f"{codes} codes of {bits} bits are {_bytes(bits, codes)} bytes, got {len(content)}")
    each_bit = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    if each_bit[bits * codes :].any():
        raise ValueError("the last byte is not filled up with zeros")
    values = each_bit[: bits * codes].reshape(codes, bits) @ (1 << np.arange(bits, dtype=np.int32))
    last = 2**bits - 1
    found = values != last
    if codes and not found[-1]:
        raise ValueError("the last code leads to no position")
    positions: NDArray[np.int64] = np.cumsum(values + found, dtype=np.int64)[found] - 1
    if codes and positions[-1] >= places:
        raise ValueError(f"a position should be below {places}, got {positions[-1]}")
    return positions


def _bytes(bits: int, codes: int) -> int:
    return -(-bits * codes // 8)
