"""The coding of positions by gaps."""

import numpy as np
import pytest

from pykd.sparse import gaps


@pytest.mark.parametrize("density", [0.0, 1e-5, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.7, 1.0])
def test_positions_come_back(density):
    places = 70_000
    positions = np.flatnonzero(np.random.RandomState(0).rand(places) < density)
    bits, codes, content = gaps.encode(positions)
    assert gaps.decode(bits, codes, content, places).tolist() == positions.tolist()


def test_every_width_comes_back():
    for bits in range(1, gaps.LARGEST_BITS + 1):
        positions = np.arange(0, 3 * 2**bits, max(1, 2**bits * 2 // 3))  # gaps for which this width is good
        width, codes, content = gaps.encode(positions)
        assert gaps.decode(width, codes, content, positions[-1] + 1).tolist() == positions.tolist()


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 510, 65534, 65535, 65536, 200_000])
def test_gaps_around_the_largest_code(gap):
    positions = np.array([gap, 2 * gap + 1, 3 * gap + 2])
    width, codes, content = gaps.encode(positions)
    assert gaps.decode(width, codes, content, 3 * gap + 3).tolist() == positions.tolist()


@pytest.mark.parametrize("columns", [100, 255, 256, 784, 20_000])
@pytest.mark.parametrize("density", [0.002, 0.01, 0.05, 0.2, 0.6])
def test_never_more_bytes_than_rows_and_columns(columns, density):
    """Against counts of the rows and column numbers, each in the fewest whole bytes, and a bitmap."""
    mask = np.random.RandomState(1).rand(200, columns) < density
    positions = np.flatnonzero(mask)
    width = np.min_scalar_type(columns - 1).itemsize
    rows = mask.shape[0] * np.min_scalar_type(mask.sum(1).max()).itemsize + len(positions) * width
    assert len(gaps.encode(positions)[2]) <= min(rows, -(-mask.size // 8))


@pytest.mark.parametrize(
    ("bits", "codes", "content", "sentence"),
    [
        (0, 1, b"\0", "1 to 16 bits"),
        (17, 1, b"\0\0\0", "1 to 16 bits"),
        (4, -1, b"", "at most as many codes"),
        (4, 21, b"\0" * 11, "at most as many codes"),
        (4, 3, b"\0", "are 2 bytes, got 1"),
        (4, 3, b"\0\0\0", "are 2 bytes, got 3"),
        (4, 3, b"\0\x10", "filled up with zeros"),
        (4, 2, b"\xf0", "leads to no position"),
        (4, 3, b"\xff\x01", "below 20, got 31"),
        (4, 2, b"\xaa", "below 20, got 21"),
    ],
)
def test_what_is_no_such_stream_is_refused(bits, codes, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        gaps.decode(bits, codes, content, 20)
