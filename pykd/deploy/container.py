"""The container of a model file: safetensors, read without trust and written without padding. Needs numpy alone."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_HEADER_BYTES = 16 << 20
MOST_TENSORS = 65_536
HIGHEST_RANK = 8
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
LENGTH_BYTES = 8


class FormatError(ValueError):
    """The content breaks a rule of the format, which the message names."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: its dtype in safetensors' words, its shape and its bytes (little-endian, row by row)."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def array(self) -> NDArray[Any]:
        """Its values; bfloat16 becomes float32, which holds them exactly.

        >>> Tensor("BF16", (2,), b"\\x80\\x3f\\x00\\xc0").array()
        array([ 1., -2.], dtype=float32)
        """
        if self.dtype == "BF16":
            return (np.frombuffer(self.content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        kind = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}[self.dtype]
        return np.frombuffer(self.content, kind).reshape(self.shape)


def join(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The tensors of the longest items come first, so that each is aligned.

    Example:
        >>> content = join({"a": Tensor("U8", (2,), b"ab")}, {"name": "x"})
        >>> split(content)[0]["a"].content, split(content)[1]
        (b'ab', {'name': 'x'})
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0])):
        offsets = [len(data), len(data) + len(tensor.content)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.content
    text = compact(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def split(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FormatError: a rule of the format that it breaks.
    """
    if len(content) < LENGTH_BYTES:
        raise FormatError(f"it has {len(content)} bytes, too few for a safetensors file")
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > LARGEST_HEADER_BYTES:
        raise FormatError(f"its header should have at most {LARGEST_HEADER_BYTES} bytes, got {length}")
    if length > len(content) - LENGTH_BYTES:
        raise FormatError(f"its header should have {length} bytes, and only {len(content) - LENGTH_BYTES} follow")
    header = parse(content[LENGTH_BYTES : LENGTH_BYTES + length], "the header")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise FormatError("__metadata__ should map words to words")
    if len(header) > MOST_TENSORS:
        raise FormatError(f"it should hold at most {MOST_TENSORS} tensors, got {len(header)}")
    data = memoryview(content)[LENGTH_BYTES + length :]
    places = {name: _place(name, entry) for name, entry in header.items()}
    tensors = {}
    end = 0
    for name, (dtype, shape, begin, after) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise FormatError(f"tensor {brief(name)} should begin where the one before ends, {end}, got {begin}")
        if after > len(data):
            raise FormatError(f"tensor {brief(name)} ends at byte {after}, and the data after {len(data)}")
        tensors[name] = Tensor(dtype, shape, bytes(data[begin:after]))
        end = after
    if end != len(data):
        raise FormatError(f"its tensors end at byte {end}, and the data after {len(data)}")
    return tensors, metadata


def _place(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte after the last, checked against one another."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {brief(name)} should have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"tensor {brief(name)} should be of {', '.join(ITEM_BYTES)}, got {brief(dtype)}")
    if not _naturals(shape) or len(shape) > HIGHEST_RANK:
        raise FormatError(f"tensor {brief(name)} should have at most {HIGHEST_RANK} sides, got {brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {brief(name)} should have two offsets, got {brief(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise FormatError(f"tensor {brief(name)} of shape {brief(shape)} does not fill the bytes {brief(offsets)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def compact(value: Any) -> str:
    """JSON in the fewest characters.

    >>> compact({"a": [1, "é"]})
    '{"a":[1,"é"]}'
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parse(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice and every number is one.

    Raises:
        FormatError: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{what} has the key {brief(key)} twice")
            found[key] = value
        return found

    def no_number(word: str) -> Any:
        raise FormatError(f"{what} holds {word}, which is no number")

    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {re.split('[:(]', str(error))[0].strip()}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} should be a JSON object")
    return value


def brief(value: Any) -> str:
    """A value out of a file, short enough for a sentence and without control characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
