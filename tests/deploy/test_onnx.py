"""ONNX export: onnxruntime answers as the network does, for every operator, option and batch."""

import copy
import importlib
import json
import subprocess
import sys
from itertools import product

import numpy as np
import onnx
import pytest
import torch
from networks import Exact, networks, pruned
from torch import Tensor, nn

import pykd
from pykd.deploy import ModelFile, export, load, read
from pykd.deploy import model_file as files
from pykd.deploy import onnx as deployed
from pykd.deploy.graph import KINDS, Op, checked_options
from pykd.deploy.onnx_network import Float16Network, OnnxNetwork
from pykd.errors import PykdError
from pykd.sparse import SparseWeight
from pykd.testing import assert_matches

NETWORKS = networks()
BATCHES = (1, 7)


def rows(shape: tuple[int, ...], count: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def assert_same(content: bytes, network: nn.Module, shape: tuple[int, ...]) -> None:
    """onnxruntime's answers are the float64 network's, to the rounding of every sum."""
    onnx.checker.check_model(content, full_check=True)
    nodes = onnx.load_from_string(content).graph.node
    sums = sum(node.op_type in ("Gemm", "Conv", "Add", "AveragePool", "GlobalAveragePool") for node in nodes)
    found, exact = OnnxNetwork(content), copy.deepcopy(network).double()
    with torch.no_grad():
        for batch in BATCHES:
            inputs = rows(shape, batch)
            expected = exact(inputs.double())
            assert_matches(found(inputs), expected, length=4096, magnitude=sums * float(expected.abs().max()))


def assert_step(shape: tuple[int, ...], *ops: Op) -> list[str]:
    """The steps answer as they do in float64, in float16 to its rounding; returns the nodes that were made of them."""
    model = ModelFile(shape, ops)
    content = deployed.to_bytes(model)
    assert_same(content, Exact(model), shape)
    assert_float16(model)
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def rounding(value: Tensor) -> Tensor:
    """The square of the largest error of a number's rounding to float16."""
    return (2.0**-11 * value.abs() + 2.0**-25).square()


class Spread(Exact):
    """How far answers in float16 are from exact ones: standard deviations, where sums are in float32.

    Inputs, weights and every value are rounded; these errors are independent, so that a layer adds their squares. In a
    mean they may be those of one weight, and alike.
    """

    def forward(self, input: Tensor) -> Tensor:
        values, variances = [input], [rounding(input)]
        for number, op in enumerate(self.model.ops, 1):
            inputs, before = ([each[index] for index in op.inputs] for each in (values, variances))
            values.append(self._result(op, number, inputs))
            variances.append(self._variance(op, number, inputs, before, values[-1]) + 2 * rounding(values[-1]))
        return variances[-1].sqrt()

    def _variance(self, op: Op, number: int, inputs: list[Tensor], before: list[Tensor], value: Tensor) -> Tensor:
        match op.kind:
            case "linear" | "conv2d" | "affine":
                squared = copy.deepcopy(self)
                for each in squared.parameters():
                    each.square_()
                of_inputs = squared._result(op, number, before) - squared._result(op, number, [0 * before[0]])
                return of_inputs + 2.0**-22 * squared._result(op, number, [inputs[0].square()])
            case "add" | "concat" | "flatten" | "max_pool2d":
                return self._result(op, number, before)
            case "avg_pool2d" | "global_avg_pool":
                return self._result(op, number, [before[0].sqrt()]).square()
            case "leaky_relu":
                return before[0] * max(1, op.options["slope"] ** 2)
            case "softmax":
                return value * before[0].amax(1, keepdim=True)
        return before[0]


def assert_float16(model: ModelFile) -> None:
    """The float16 graph is strongly typed, and onnxruntime's answers are the exact ones to its rounding."""
    content = deployed.to_bytes(model, dtype="float16")
    onnx.checker.check_model(content, full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), strict_mode=True, data_prop=True).graph
    between = [*graph.value_info, *(each for each in graph.initializer if not each.name.endswith("_pads"))]
    types = {getattr(each, "data_type", 0) or each.type.tensor_type.elem_type for each in between}
    assert types == {onnx.TensorProto.FLOAT16}
    assert {each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert [node.op_type for node in graph.node].count("Cast") == 2
    with torch.no_grad():
        for batch in BATCHES:
            inputs = rows(model.input_shape, batch)
            expected, spread = (each(model).double()(inputs.double()) for each in (Exact, Spread))
            for network in (OnnxNetwork(content), Float16Network(model)):
                assert ((network(inputs).double() - expected).abs() <= 3 * spread).all()


def vector(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=count).astype(np.float32)


def weight(*shape: int) -> SparseWeight:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return SparseWeight(np.where(abs(values) > 1, values, 0))


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_answers_as_the_network(name, tmp_path):
    network, shape = NETWORKS[name]
    size = export(network, tmp_path / "a.onnx", rows(shape, 1), format="onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    assert len(content) == size
    assert_same(content, network, shape)
    export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1))
    assert_float16(read(tmp_path / "a.pykd.safetensors"))


@pytest.mark.parametrize(
    "name",  # of those that differ in their depth alone the smallest ones
    sorted(set(pykd.models.NETWORKS) - {f"resnet{depth}" for depth in (32, 34, 44, 50, 56, 101, 110, 152)} - {"vgg16"}),
)
def test_every_packaged_network(name, tmp_path):
    side = 32 if name in ("vgg", "nin", "shallow_cnn") else 28
    shape = (3 if side == 32 else 1, side, side)
    arguments = {"mlp": {"widths": [20]}, "lenet300100": {}}.get(name, {})
    torch.manual_seed(0)
    network = pruned(pykd.models.build(name, in_shape=shape, classes=10, **arguments))
    export(network, tmp_path / "a.onnx", rows(shape, 1), format="onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    assert_same(content, network, shape)


@pytest.mark.parametrize("kind", ["relu", "tanh", "softmax", "leaky_relu", "flatten"])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 5, 4)])
def test_of_any_shape(kind, shape):
    assert_step(shape, Op(kind, (0,), checked_options(kind, {})))


def test_slope():
    assert_step((3, 5), Op("leaky_relu", (0,), {"slope": -1.5}))


@pytest.mark.parametrize("bias", [None, vector(6)])
def test_linear(bias):
    assert assert_step((9,), Op("linear", (0,), {}, weight(6, 9), bias)) == ["Gemm"]


@pytest.mark.parametrize("bias", [None, vector(6)])
@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, 4),
        ({"stride": (2, 3), "padding": (3, 1)}, 4),
        ({"dilation": (1, 2), "padding": (0, 2)}, 4),
        ({"groups": 2, "stride": (1, 2)}, 4),
        ({"groups": 3, "padding": (1, 1)}, 3),
    ],
)
def test_conv2d(options, channels, bias):
    options = checked_options("conv2d", options)
    op = Op("conv2d", (0,), options, weight(6, channels // options["groups"], 3, 2), bias)
    assert assert_step((channels, 9, 8), op) == ["Conv"]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
def test_affine(shape):
    assert assert_step(shape, Op("affine", (0,), {}, None, vector(5), vector(5) + 1)) == ["Mul", "Add"]


def test_global_avg_pool_add_and_concat():
    relu, tanh = Op("relu", (0,)), Op("tanh", (0,))
    assert_step((3, 4, 5), relu, tanh, Op("add", (2, 1)), Op("concat", (3, 0, 2, 3)), Op("global_avg_pool", (4,)))
    assert_step((3,), Op("concat", (0,)))
    assert_step((3,), relu, Op("concat", (1, 0)), Op("add", (2, 2)))


WINDOWS = [
    (sides, kernel, stride, padding)
    for sides in [(7, 8), (6, 11)]
    for kernel, stride, padding in product([(2, 2), (3, 2)], [(2, 2), (3, 1), ()], [(0, 0), (1, 1), (0, 1)])
] + [((5, 5), (5, 4), (4, 3), (2, 2)), ((9, 9), (1, 1), (2, 3), (0, 0)), ((4, 4), (4, 4), (3, 3), (2, 2))]


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(("sides", "kernel", "stride", "padding"), WINDOWS)
def test_pools(sides, kernel, stride, padding, ceil):
    options = {"kernel": kernel, "stride": stride, "padding": padding, "ceil": ceil}
    for kind, more in [("max_pool2d", {"dilation": (1, 1)}), ("max_pool2d", {"dilation": (2, 1)})]:
        if padding[0] + sides[0] > more["dilation"][0] * kernel[0]:
            assert_step((2, *sides), Op("tanh", (0,)), Op(kind, (1,), {**options, **more}))
    for counted in (True, False):
        assert_step((2, *sides), Op("avg_pool2d", (0,), {**options, "count_padding": counted}))


@pytest.mark.parametrize(
    ("ceil", "padding", "nodes"),
    [(False, 1, ["AveragePool"]), (True, 0, ["AveragePool"]), (True, 1, ["Pad", "AveragePool"])],
)
def test_padding_counts_as_image_where_a_window_reaches_beyond_it(ceil, padding, nodes):
    options = {"kernel": (3, 3), "stride": (2, 2), "padding": (padding, 0), "ceil": ceil, "count_padding": True}
    assert assert_step((2, 6, 6), Op("avg_pool2d", (0,), options)) == nodes


def test_a_last_window_far_behind_the_image():
    options = {"kernel": (2, 2), "stride": (7, 7), "padding": (1, 1), "dilation": (3, 3), "ceil": True}
    assert assert_step((2, 7, 7), Op("max_pool2d", (0,), options)) == ["Pad", "MaxPool"]


def test_a_network_without_steps():
    assert assert_step((3, 2)) == ["Identity"]


def test_every_operator_is_written():
    options = {"kernel": (2, 2)}
    made = set()
    for kind in KINDS:
        values = checked_options(kind, options if "pool2d" in kind else {})
        tensors = {"linear": (weight(2, 3),), "conv2d": (weight(2, 3, 1, 1),), "affine": (None, vector(3), vector(3))}
        shape = (3,) if kind == "linear" else (3, 4, 4)
        made.add(tuple(assert_step(shape, Op(kind, (0,) * (KINDS[kind].inputs or 1), values, *tensors.get(kind, ())))))
    assert len(made) == len(KINDS)


@pytest.mark.parametrize("values", files.VALUES)
def test_a_model_file_becomes_onnx_with_the_values_it_stores(values, tmp_path):
    network, shape = NETWORKS["everything"]
    export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1), values=values, block=(2, 3))
    model = read(tmp_path / "a.pykd.safetensors")
    size = deployed.write(model, tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    assert size == len(content)
    assert_same(content, Exact(model), shape)
    export(network, tmp_path / "b.onnx", rows(shape, 1), format="onnx", values=values)
    expected = deployed.to_bytes(model, dtype="float16") if values == "float16" else content
    assert (tmp_path / "b.onnx").read_bytes() == expected
    stored = [each for name, each in load(tmp_path / "a.pykd.safetensors").state_dict().items() if "weight" in name]
    found = onnx.load_from_string(content).graph.initializer
    written = [onnx.numpy_helper.to_array(each) for each in found if each.name.endswith("weight")]
    assert all(each.dtype == np.float32 for each in written)
    assert all(np.array_equal(*pair) for pair in zip(written, stored, strict=True))


def test_what_the_file_says(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    export(
        network,
        tmp_path / "a.onnx",
        torch.zeros(1, 2, 2, 2),
        format="onnx",
        normalization=([0.5, 0.25], [1.0, 2.0]),
        class_names=["a", "ü", "c"],
        provenance={"method": "noisy_teacher", "seed": 3},
        licence="CC0-1.0",
    )
    model = onnx.load(tmp_path / "a.onnx")
    assert (model.ir_version, [(each.domain, each.version) for each in model.opset_import]) == (8, [("", 17)])
    assert model.doc_string == f"pykd {pykd.__version__}, method noisy_teacher, seed 3"
    assert {each.key: json.loads(each.value) for each in model.metadata_props} == {
        "mean": [0.5, 0.25],
        "std": [1.0, 2.0],
        "classes": ["a", "ü", "c"],
        "licence": "CC0-1.0",
    }
    for ends, name, sides in ((model.graph.input, "input", [2, 2, 2]), (model.graph.output, "output", [3])):
        (end,) = ends
        batch, *found = end.type.tensor_type.shape.dim
        assert (end.name, batch.dim_param, [each.dim_value for each in found]) == (name, "batch", sides)
        assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_what_float16_cannot_hold_is_told(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"before")
    relu, large = Op("relu", (0,)), np.full(2, 65520, np.float32)
    ones, layer = np.ones(2, np.float32), SparseWeight(np.full((2, 2), 65519, np.float32))
    for op, name in [
        (Op("linear", (1,), {}, SparseWeight(np.diag(large))), "linear in step 2 has a weight"),
        (Op("linear", (1,), {}, layer, -large), "linear in step 2 has a bias"),
        (Op("affine", (1,), {}, None, ones, large), "affine in step 2 has a scale"),
    ]:
        with pytest.raises(PykdError, match=f"^{name} above 65504, which float16 cannot hold: export float32$"):
            deployed.write(ModelFile((2,), [relu, op]), tmp_path / "a.onnx", dtype="float16")
    with pytest.raises(PykdError, match="dtype should be one of float32, float16, got 'int8'"):
        deployed.write(ModelFile((2,), [relu]), tmp_path / "a.onnx", dtype="int8")
    assert (tmp_path / "a.onnx").read_bytes() == b"before"
    network = OnnxNetwork(deployed.to_bytes(ModelFile((2,), [Op("linear", (0,), {}, layer)]), dtype="float16"))
    assert (network(torch.tensor([[0.5, 0.0]])) == 32752).all()


def test_dead_units_are_left_out(tmp_path):
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        network[2].weight[:, 2:7] = 0
    export(network, tmp_path / "a.onnx", torch.zeros(1, 6), format="onnx")
    found = onnx.load(tmp_path / "a.onnx").graph.initializer
    assert [list(each.dims) for each in found if each.name.endswith("weight")] == [[3, 6], [3, 3]]


def test_mistakes_are_told(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"before")

    def said(network: nn.Module, **options: str) -> str:
        with pytest.raises(PykdError) as caught:
            export(network, tmp_path / "a.onnx", torch.zeros(1, 4), **options)
        assert (tmp_path / "a.onnx").read_bytes() == b"before"
        return str(caught.value)

    assert said(nn.Linear(4, 2), format="tflite") == "format should be one of pykd, onnx, got 'tflite'"
    assert "1 (Sigmoid) cannot be exported" in said(nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()), format="onnx")
    monkeypatch.setattr(deployed, "MOST_WEIGHT_BYTES", 39)
    assert said(nn.Linear(4, 2), format="onnx").startswith("an ONNX file holds 39 bytes of dense weights at most")
    monkeypatch.setattr(deployed, "MOST_WEIGHT_BYTES", 40)
    assert export(nn.Linear(4, 2), tmp_path / "a.onnx", torch.zeros(1, 4), format="onnx") > 40


@pytest.mark.parametrize(("module", "package"), [("onnx", "onnx"), ("onnx_network", "onnxruntime")])
def test_a_missing_package_is_told(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"pykd.deploy.{module}")
    with pytest.raises(ImportError, match=f"need.* {package}: run pip install 'pykd\\[onnx\\]'"):
        importlib.import_module(f"pykd.deploy.{module}")


PROGRAM = """
import sys
sys.modules["torch"] = None
from pykd.deploy import onnx, read
onnx.write(read(sys.argv[1]), sys.argv[2])
"""


def test_the_same_file_gives_the_same_bytes_without_torch(tmp_path):
    network, shape = NETWORKS["everything"]
    export(network, tmp_path / "a.pykd.safetensors", rows(shape, 1), normalization=([0.1] * 3, [0.3] * 3))
    expected = deployed.to_bytes(read(tmp_path / "a.pykd.safetensors"))
    for seed in "12":
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a.pykd.safetensors"), str(tmp_path / "a.onnx")]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed})
        assert (tmp_path / "a.onnx").read_bytes() == expected
