"""The model file ``*.pykd.safetensors``: written from a graph, and read without trust. Needs numpy alone.

``docs/model_file.md`` is its description.
"""

import hashlib
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykd._files import write_atomically
from pykd.deploy.container import FormatError, Tensor, brief, compact, join, parse, split
from pykd.deploy.graph import (
    KINDS,
    LARGEST_SIDE,
    MOST_ENTRIES,
    WEIGHTED,
    Op,
    Shape,
    Vector,
    check_shape,
    checked_options,
    result_shape,
)
from pykd.errors import PykdError
from pykd.sparse import SparseWeight, gaps

VERSION = 1
VALUES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
LARGEST_INT8 = 127
MOST_STEPS = 65_536
LARGEST_FILE_BYTES = 4 << 30
TENSORS = ("vectors", "values", "indices")


@dataclass(frozen=True)
class ModelFile:
    """What a model file says.

    Attributes:
        input_shape: of one row, without the batch.
        ops: the steps; the last one's result is the answer. Weights are float32, whatever the file stores.
        normalization: mean and standard deviation of each channel, for pixels in [0, 1]; None where none is known.
        class_names: of the answers, or none.
        provenance: where it comes from: words and whole numbers.
        licence: one line.
        values: how the file stores the weights: float32, float16, bfloat16 or int8.
    """

    input_shape: Shape
    ops: Sequence[Op]
    normalization: tuple[Sequence[float], Sequence[float]] | None = None
    class_names: Sequence[str] = ()
    provenance: Mapping[str, str | int] = field(default_factory=dict)
    licence: str = "not stated"
    values: str = "float32"

    @property
    def output_shape(self) -> Shape:
        """Of one row's answer."""
        shapes = [self.input_shape]
        for op in self.ops:
            shapes.append(result_shape(op, shapes))
        return shapes[-1]


def to_bytes(model: ModelFile) -> bytes:
    """The model file of ``model``; the same model gives the same bytes.

    Raises:
        PykdError: the weights do not fit the type ``model.values``, or something breaks a rule of the format.
    """
    vectors: list[Vector] = []
    values: list[bytes] = []
    indices = b""
    steps = []
    for number, op in enumerate(model.ops, 1):
        step: dict[str, Any] = {"op": op.kind}
        if op.inputs != (number - 1,):
            step["in"] = op.inputs
        defaults = KINDS[op.kind].options
        step |= {name: value for name, value in op.options.items() if value != defaults[name]}
        if op.weight is not None:
            weight, scales = _stored(op.weight, model.values, number)
            packed = weight.pack(np.dtype(_numpy(model.values)).itemsize)
            step["shape"] = op.weight.shape
            if op.weight.block != (1, 1):
                step["block"] = op.weight.block
            if packed.bits:
                step |= {"bits": packed.bits, "codes": packed.codes}
            if op.bias is None:
                step["bias"] = False
            values.append(_raw(packed.values, model.values))
            indices += packed.indices
            vectors += scales
        vectors += [vector for vector in (op.scale, op.bias) if vector is not None]
        steps.append(step)
    joined = np.concatenate([*vectors, np.zeros(0)]).astype("<f4").tobytes()
    data = b"".join(values)
    stored = {
        "vectors": Tensor("F32", (len(joined) // 4,), joined),
        "values": Tensor(VALUES[model.values], (len(data) // np.dtype(_numpy(model.values)).itemsize,), data),
        "indices": Tensor("U8", (len(indices),), indices),
    }
    tensors = {name: tensor for name, tensor in stored.items() if tensor.content}
    specification: dict[str, Any] = {"shape": model.input_shape, "dtype": "float32"}
    if model.normalization:
        specification |= dict(zip(("mean", "std"), map(list, model.normalization), strict=True))
    text = compact(
        {
            "version": VERSION,
            "input": specification,
            "values": model.values,
            "ops": steps,
            "classes": list(model.class_names),
            "sha256": {name: _hash(tensor.content) for name, tensor in tensors.items()},
            "provenance": dict(model.provenance),
            "licence": model.licence,
        }
    )
    content = join(tensors, {"pykd": text, "sha256": _hash(text.encode())})
    try:
        from_bytes(content)
    except FormatError as error:
        raise PykdError(f"a model file cannot hold this network: {error}") from error
    return content


def _numpy(values: str) -> str:
    return {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "i1"}[values]


def _stored(weight: SparseWeight, values: str, number: int) -> tuple[SparseWeight, list[Vector]]:
    """The weight rounded to what is stored, without the blocks that become zero, and its scales."""
    if values == "float32":
        return weight, []
    dense = weight.dense()
    if values == "int8":
        rows = dense.reshape(len(dense), -1)
        scales = (abs(rows).max(1) / LARGEST_INT8).astype(np.float32)
        with np.errstate(invalid="ignore"):
            rounded = np.where(scales[:, None] > 0, np.rint(rows / scales[:, None]), 0)
        dense = rounded.clip(-LARGEST_INT8, LARGEST_INT8).astype(np.int8).reshape(dense.shape)
        return SparseWeight(dense, block=weight.block), [scales]
    if values == "float16":
        with np.errstate(over="ignore"):
            dense = dense.astype(np.float16)
        if not np.isfinite(dense).all():
            raise PykdError(
                f"step {number} has weights above 65504, which float16 cannot hold: export values=float32 or bfloat16"
            )
    else:
        bits = dense.view(np.uint32)
        bits = bits + (0x7FFF + (bits >> 16 & 1))  # to the nearest, ties to even; finite numbers do not overflow it
        dense = (bits & np.uint32(0xFFFF0000)).view(np.float32)
        if not np.isfinite(dense).all():
            raise PykdError(f"step {number} has weights that bfloat16 cannot hold: export values=float32")
    return SparseWeight(dense, block=weight.block), []


def _raw(packed: NDArray[Any], values: str) -> bytes:
    if values == "bfloat16":
        packed = packed.view(np.uint32) >> 16
    return packed.astype(_numpy(values)).tobytes()


def from_bytes(content: bytes) -> ModelFile:
    """What the bytes of a model file say.

    Raises:
        FormatError: they break a rule of the format.
    """
    tensors, metadata = split(content)
    if metadata.keys() != {"pykd", "sha256"}:
        raise FormatError(f"its metadata should have the keys 'pykd' and 'sha256', got {brief(list(metadata))}")
    if metadata["sha256"] != _hash(metadata["pykd"].encode(errors="replace")):
        raise FormatError("its description was changed: its SHA-256 is another")
    if unknown := [name for name in tensors if name not in TENSORS]:
        raise FormatError(f"its tensors should be {', '.join(TENSORS)}, got {brief(unknown[0])}")
    text = parse(metadata["pykd"], "its description")
    if (version := text.get("version")) != VERSION or type(version) is not int:
        raise FormatError(f"its format should have version {VERSION}, got {brief(version)}; another pykd may read it")
    _keys(
        text, ("version", "input", "values", "ops", "classes", "sha256", "provenance", "licence"), (), "its description"
    )
    _check_hashes(text["sha256"], tensors)
    stream = _Stream(tensors, text["values"])
    shape, normalization = _input(text["input"])
    if not isinstance(text["ops"], list) or len(text["ops"]) > MOST_STEPS:
        raise FormatError(f"ops should be a list of at most {MOST_STEPS} steps")
    ops: list[Op] = []
    shapes = [shape]
    entries, weights = _counted(0, shape), 0
    for step in text["ops"]:
        op = _step(step, shapes, stream, MOST_ENTRIES - weights)
        shapes.append(result_shape(op, shapes))
        ops.append(op)
        entries = _counted(entries, shapes[-1])
        weights += math.prod(op.weight.shape) if op.weight else 0
    stream.check_end()
    classes, provenance = text["classes"], text["provenance"]
    if not isinstance(classes, list) or not all(map(_is_text, classes)) or len(classes) not in (0, shapes[-1][0]):
        raise FormatError(f"classes should be words, none or one for each of {shapes[-1][0]} answers")
    if not isinstance(provenance, dict) or not all(
        _is_text(key) and (_is_text(value) or type(value) is int) for key, value in provenance.items()
    ):
        raise FormatError("provenance should map words to words and whole numbers")
    if not _is_text(text["licence"]):
        raise FormatError("licence should be a line of text")
    return ModelFile(shape, tuple(ops), normalization, tuple(classes), provenance, text["licence"], stream.stored_as)


def _counted(entries: int, shape: Shape) -> int:
    """The entries of a row's values when one of this shape is added."""
    entries += math.prod(shape)
    if entries > MOST_ENTRIES:
        raise FormatError(f"the values of one row should have at most {MOST_ENTRIES} entries in all")
    return entries


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Stream:
    """The three tensors, of which every step takes its part from where the step before ended."""

    def __init__(self, tensors: Mapping[str, Tensor], stored_as: Any) -> None:
        if not isinstance(stored_as, str) or stored_as not in VALUES:
            raise FormatError(f"values should be one of {', '.join(VALUES)}, got {brief(stored_as)}")
        self.stored_as = stored_as
        dtypes = {"vectors": "F32", "values": VALUES[stored_as], "indices": "U8"}
        for name, tensor in tensors.items():
            if tensor.dtype != dtypes[name] or len(tensor.shape) != 1:
                raise FormatError(f"tensor '{name}' should be one row of {dtypes[name]}")
        empty = Tensor("U8", (0,), b"")
        self._left = {name: tensors.get(name, empty).array() for name in TENSORS}
        for name in ("vectors", "values"):
            if not np.isfinite(self._left[name]).all():
                raise FormatError(f"tensor '{name}' holds NaN or infinity")

    def take(self, name: str, count: int) -> NDArray[Any]:
        """The next ``count`` entries of a tensor."""
        left = self._left[name]
        if count > len(left):
            raise FormatError(f"tensor '{name}' ends too early: a step needs {count} entries, {len(left)} are left")
        taken, self._left[name] = left[:count], left[count:]
        return taken

    def check_end(self) -> None:
        """Raises where entries are left."""
        for name, left in self._left.items():
            if len(left):
                raise FormatError(f"tensor '{name}' has {len(left)} entries that no step takes")


def _check_hashes(hashes: Any, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(hashes, dict) or hashes.keys() != tensors.keys():
        raise FormatError("sha256 should have an entry for each tensor and no other")
    for name, tensor in tensors.items():
        if _hash(tensor.content) != hashes[name]:
            raise FormatError(f"tensor '{name}' was changed: its SHA-256 is another")


def _input(given: Any) -> tuple[Shape, tuple[Sequence[float], Sequence[float]] | None]:
    _keys(given, ("shape", "dtype"), ("mean", "std"), "input")
    shape = check_shape(given["shape"], "input")
    if given["dtype"] != "float32":
        raise FormatError(f"input should be of dtype float32, got {brief(given['dtype'])}")
    if len(given) == 2:
        return shape, None
    mean, std = given.get("mean"), given.get("std")
    if not (_are_numbers(mean, shape[0]) and _are_numbers(std, shape[0]) and min(std) > 0):
        raise FormatError(f"input should have a mean and a positive std for each of {shape[0]} channels")
    return shape, (tuple(mean), tuple(std))


def _step(step: Any, shapes: Sequence[Shape], stream: _Stream, most: int) -> Op:
    """The operator of a step, which takes its part of the stream; its weight has at most ``most`` entries."""
    number = len(shapes)
    if not isinstance(step, dict) or not isinstance(step.get("op"), str) or step["op"] not in KINDS:
        what = step.get("op") if isinstance(step, dict) else step
        raise FormatError(f"step {number} should be one of {', '.join(KINDS)}, got {brief(what)}")
    kind = step["op"]
    inputs = step.get("in", [number - 1])
    if not isinstance(inputs, list) or not all(type(value) is int and 0 <= value < number for value in inputs):
        raise FormatError(f"{kind} in step {number} should read earlier values, got {brief(inputs)}")
    own = ("op", "in", *(("shape", "block", "bits", "codes", "bias") if kind in WEIGHTED else ()))
    try:
        options = checked_options(kind, {name: value for name, value in step.items() if name not in own})
        weight = bias = scale = None
        if kind in WEIGHTED:
            weight = _weight(step, stream, most)
            if type(has_bias := step.get("bias", True)) is not bool:
                raise FormatError(f"bias should be true or false, got {brief(has_bias)}")
            bias = stream.take("vectors", weight.shape[0]) if has_bias else None
        elif kind == "affine" and inputs:
            scale, bias = (stream.take("vectors", shapes[inputs[0]][0]) for _ in range(2))
    except ValueError as error:
        raise FormatError(f"{error} in step {number}") from None
    return Op(kind, tuple(inputs), options, weight, bias, scale)


def _weight(step: Mapping[str, Any], stream: _Stream, most: int) -> SparseWeight:
    shape = check_shape(step.get("shape"), step["op"])
    if len(shape) != (2 if step["op"] == "linear" else 4):
        raise FormatError(f"{step['op']} has a weight of {len(shape)} sides")
    if math.prod(shape) > most:
        raise FormatError(f"all weights together should have at most {MOST_ENTRIES} entries")
    block = step.get("block", [1, 1])
    if not (_are_numbers(block, 2) and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in block)):
        raise FormatError(f"block should be two whole numbers from 1 to {LARGEST_SIDE}, got {brief(block)}")
    rows, columns = shape[0], math.prod(shape[1:])
    high, wide = min(block[0], rows), min(block[1], columns)
    scales = stream.take("vectors", rows) if stream.stored_as == "int8" else None
    if "bits" not in step and "codes" not in step:
        dense = stream.take("values", rows * columns).astype(np.float32).reshape(shape)
        return SparseWeight(_scaled(dense, scales), block=(high, wide))
    bits, codes = step.get("bits"), step.get("codes")
    places = -(-rows // high) * -(-columns // wide)
    if type(bits) is not int or type(codes) is not int or not (0 <= codes <= places and 1 <= bits <= gaps.LARGEST_BITS):
        raise FormatError(f"bits and codes should be those of {places} places, got {brief([bits, codes])}")
    positions = gaps.decode(bits, codes, stream.take("indices", -(-bits * codes // 8)).tobytes(), places)
    values = stream.take("values", len(positions) * high * wide).astype(np.float32).reshape(-1, high, wide)
    weight = SparseWeight.from_blocks(shape, (high, wide), positions, values)
    return weight if scales is None else SparseWeight(_scaled(weight.dense(), scales), block=(high, wide))


def _scaled(dense: NDArray[Any], scales: Vector | None) -> NDArray[Any]:
    if scales is None:
        return dense
    with np.errstate(over="ignore"):  # infinity is refused later
        return dense * scales.reshape(-1, *[1] * (dense.ndim - 1))


def _keys(given: Any, needed: Sequence[str], optional: Sequence[str], what: str) -> None:
    if not isinstance(given, dict):
        raise FormatError(f"{what} should be a JSON object, got {brief(given)}")
    for name in needed:
        if name not in given:
            raise FormatError(f"{what} lacks the key '{name}'")
    for name in given:
        if name not in (*needed, *optional):
            raise FormatError(f"{what} has the unknown key {brief(name)}")


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(each) in (int, float) and abs(each) < 1e30 for each in value)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def write(model: ModelFile, path: str | Path) -> int:
    """Writes a model file, in place of one that is there; returns its bytes.

    Raises:
        PykdError: the model cannot be stored, or the file cannot be written.
    """
    content = to_bytes(model)
    write_atomically(Path(path), content, then="export again")
    return len(content)


def read(path: str | Path) -> ModelFile:
    """What a model file says, every rule of the format checked.

    Args:
        path: of a file; anyone may have written it.

    Raises:
        PykdError: it cannot be read, or breaks a rule, which the sentence names.

    Cost: the file's bytes, and the dense form of weights that are stored as int8.

    Example:
        >>> import tempfile
        >>> from pykd.deploy.graph import Op
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write(ModelFile((3,), [Op("relu", (0,))]), f"{folder}/a.pykd.safetensors")
        ...     read(f"{folder}/a.pykd.safetensors").output_shape
        (3,)
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # a pipe would wait for its writer
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE_BYTES:
                raise PykdError(f"{path} is no model file: give a file of at most {LARGEST_FILE_BYTES} bytes")
            content = stream.read(LARGEST_FILE_BYTES)
    except OSError as error:
        raise PykdError(f"cannot read {path}: {error.strerror}") from error
    try:
        return from_bytes(content)
    except FormatError as error:
        raise PykdError(f"{path} is no model file of pykd, or was damaged: {error}; export it anew") from error
