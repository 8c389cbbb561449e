"""A model file's network as ONNX: dense, float32 or float16, for engines that do not know pykd. Needs numpy and onnx.

The graph's ``input`` is float32 ``[batch, *input_shape]``, its ``output`` ``[batch, *output_shape]``, of any batch. In
float16 the weights, biases and all values between the two are float16, by their types in the graph: so TensorRT takes
it where it is strongly typed (``--stronglyTyped``, all that there is from TensorRT 11 on). A Cast stands at each end:
who calls the network need not know in what it computes, and both graphs are fed and compared alike.
Pixels are normalised before it: the metadata have ``mean`` and ``std`` beside ``classes`` and ``licence``, each as
JSON. The model's doc_string tells where the network comes from.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykd._files import write_atomically
from pykd.deploy.graph import KINDS, Op, Shape, result_shape
from pykd.deploy.model_file import ModelFile
from pykd.errors import PykdError

try:
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError as error:
    raise ImportError("ONNX files need the package onnx: run pip install 'pykd[onnx]'") from error

OPSET, IR_VERSION = 17, 8  # onnxruntime 1.12 and TensorRT 8.6 read them, and all that came after
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
MOST_WEIGHT_BYTES = 2_000_000_000  # protobuf ends at 2 GiB; the rest is for the graph


def write(model: ModelFile, path: str | Path, *, dtype: str = "float32") -> int:
    """Writes a network as an ONNX file, in place of one that is there; returns its bytes.

    The same network gives the same bytes.

    Args:
        model: as :func:`pykd.deploy.read` returns it; weights are written as the numbers that they stand for.
        path: of the file, by custom ``*.onnx``.
        dtype: float32, or float16: weights are rounded to the nearest, and values above 65504 between the layers
            become infinite.

    Raises:
        PykdError: the dense weights are too large for ONNX, a layer's do not fit float16, another dtype, or the file
            cannot be written.

    Cost: a few copies of the dense weights.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = write(ModelFile((3,), [Op("relu", (0,))]), f"{folder}/a.onnx")
        >>> size < 200
        True
    """
    content = to_bytes(model, dtype=dtype)
    write_atomically(Path(path), content, then="export again")
    return len(content)


def to_bytes(model: ModelFile, *, dtype: str = "float32") -> bytes:
    """The ONNX file of ``model``; see :func:`write`."""
    if dtype not in DTYPES:
        raise PykdError(f"dtype should be one of {', '.join(DTYPES)}, got {dtype!r}")
    graph = _Graph(np.dtype(dtype))
    shapes = [model.input_shape]
    first, last = ("input", "output") if dtype == "float32" else (f"input_{dtype}", f"output_{dtype}")
    if first != "input":
        graph.node("Cast", ["input"], first, to=DTYPES[dtype])
    values = [first, *(f"value_{number}" for number in range(1, len(model.ops))), last]
    for number, op in enumerate(model.ops, 1):
        shapes.append(result_shape(op, shapes))
        graph.step(number, op, [values[each] for each in op.inputs], values[number], shapes[op.inputs[0]])
    if not model.ops:
        graph.node("Identity", [first], last)
    if last != "output":
        graph.node("Cast", [last], "output", to=TensorProto.FLOAT)
    if sum(len(each.raw_data) for each in graph.weights) > MOST_WEIGHT_BYTES:
        raise PykdError(f"an ONNX file holds {MOST_WEIGHT_BYTES:,} bytes of dense weights at most: keep the model file")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("input", shapes[0]), ("output", shapes[-1]))
    ]
    network = helper.make_model(
        helper.make_graph(graph.nodes, "pykd", ends[:1], ends[1:], graph.weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pykd",
        doc_string=", ".join(f"{name} {value}" for name, value in model.provenance.items()),
    )
    about: dict[str, Any] = {"classes": model.class_names, "licence": model.licence}
    if model.normalization:
        about |= zip(("mean", "std"), model.normalization, strict=True)
    helper.set_model_props(network, {name: json.dumps(value) for name, value in about.items()})
    return network.SerializeToString()


def dtype_of(values: str) -> str:
    """The dtype of the graph for weights that are stored so: what ``pykd export --format onnx`` takes."""
    return "float16" if values == "float16" else "float32"


class _Graph:
    """The nodes so far, and the weights that they read."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def node(self, kind: str, inputs: Sequence[str], result: str, **options: Any) -> str:
        """Appends a node; returns the name of its result."""
        self.nodes.append(helper.make_node(kind, inputs, [result], name=f"{kind}_{result}", **options))
        return result

    def constant(self, values: Any, name: str) -> str:
        """Appends a tensor that nodes read; returns its name."""
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def step(self, number: int, op: Op, inputs: list[str], result: str, shape: Shape) -> None:
        """Appends the nodes of an operator, which reads values of these names, the first of this shape."""
        options = op.options

        def constant(values: NDArray[Any], name: str) -> str:
            with np.errstate(over="ignore"):
                rounded = values.astype(self.dtype)
            if not np.isfinite(rounded).all():
                what = f"{op.kind} in step {number} has a {name} above 65504, which {self.dtype} cannot hold"
                raise PykdError(f"{what}: export float32")
            return self.constant(rounded, f"{result}_{name}")

        if op.weight is not None:
            inputs.append(constant(op.weight.dense(), "weight"))
            if op.bias is not None:
                inputs.append(constant(op.bias, "bias"))
        match op.kind:
            case "linear":
                self.node("Gemm", inputs, result, transB=1)
            case "conv2d":
                geometry = {"strides": options["stride"], "dilations": options["dilation"], "group": options["groups"]}
                self.node("Conv", inputs, result, pads=options["padding"] * 2, **geometry)
            case "leaky_relu":
                self.node("LeakyRelu", inputs, result, alpha=options["slope"])
            case "max_pool2d" | "avg_pool2d":
                self.pool(op, inputs[0], result, shape)
            case "affine":
                assert op.scale is not None and op.bias is not None
                sides = (-1, *[1] * (len(shape) - 1))
                scale = constant(op.scale.reshape(sides), "scale")
                shift = constant(op.bias.reshape(sides), "bias")
                self.node("Add", [self.node("Mul", [*inputs, scale], f"{result}_scaled"), shift], result)
            case "concat" | "flatten" | "softmax":
                self.node(op.kind.capitalize(), inputs, result, axis=1)
            case _:
                plain = {"relu": "Relu", "tanh": "Tanh", "add": "Add", "global_avg_pool": "GlobalAveragePool"}
                self.node(plain[op.kind], inputs, result)

    def pool(self, op: Op, image: str, result: str, shape: Shape) -> None:
        """Appends a pool, padded behind the image to the end of its last window: engines differ in ONNX's ceil_mode."""
        options = op.options
        kernel, padding = options["kernel"], options["padding"]
        stride, dilation = options["stride"] or kernel, options.get("dilation", (1, 1))
        geometry = zip(shape[1:], KINDS[op.kind].shape(op, [shape])[1:], kernel, stride, dilation, padding, strict=True)
        behind = tuple(
            max(before, (count - 1) * step + spread * (length - 1) + 1 - side - before)
            for side, count, length, step, spread, before in geometry
        )
        windows: dict[str, Any] = {"kernel_shape": kernel, "strides": stride}
        if op.kind == "max_pool2d":
            if any(pad >= length for pad, length in zip(behind, kernel, strict=True)):  # more than engines take
                image, padding, behind = self.padded(image, result, (*padding, *behind), -math.inf), (0, 0), (0, 0)
            self.node("MaxPool", [image], result, pads=padding + behind, dilations=dilation, **windows)
            return
        counted = options["count_padding"]
        if counted and behind != padding:  # what lies behind the padding does not count
            image = self.padded(image, result, padding * 2, 0.0)
            behind = tuple(after - before for after, before in zip(behind, padding, strict=True))
            padding, counted = (0, 0), False
        self.node("AveragePool", [image], result, pads=padding + behind, count_include_pad=int(counted), **windows)

    def padded(self, image: str, result: str, pads: Sequence[int], value: float) -> str:
        """Appends padding by (top, left, bottom, right), if there is any; returns the name of the image."""
        if not any(pads):
            return image
        sides = self.constant(np.array([0, 0, *pads[:2], 0, 0, *pads[2:]]), f"{result}_pads")
        fill = self.constant(np.array(value, self.dtype), f"{result}_fill")
        return self.node("Pad", [image, sides, fill], f"{result}_padded")
