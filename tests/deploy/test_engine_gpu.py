"""The engine on a CUDA device: what its C++ tests, which emulate one, cannot see.

Every operator, form of the weights and number of lanes is tested under emulation in csrc/runtime/engine_cuda_test.cpp.
"""

import threading

import numpy as np
import pytest
import torch
from networks import Exact, networks
from test_engine import STUDENTS, assert_answers, pruned_by_magnitude, rows

import pykd
from pykd.deploy import Model, export, read
from pykd.testing import DEVICES, assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setenv("PYKD_CACHE", "off")


def student(name, folder, block=None):
    arguments, shape = STUDENTS[name]
    torch.manual_seed(0)
    network = pruned_by_magnitude(pykd.models.build(name, in_shape=shape, classes=10, **arguments))
    file = folder / "a.pykd.safetensors"
    export(network, file, torch.zeros(1, *shape), block=block)
    return file


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("block", [None, (16, 16)])
@pytest.mark.parametrize("name", STUDENTS)
def test_students_answer_as_in_torch(name, block, measure, tmp_path):
    file = student(name, tmp_path, block)
    assert_answers(Model(file, device="cuda", measure=measure), file, (1, 7, 33, 256))


@pytest.mark.parametrize("name", networks())
def test_networks_answer_as_in_torch(name, tmp_path):
    network, shape = networks()[name]
    export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, *shape))
    assert_answers(Model(tmp_path / "a.pykd.safetensors", device="cuda"), tmp_path / "a.pykd.safetensors")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8, 100])
@pytest.mark.parametrize("name", ["lenet300100", "vgg"])
def test_tensor_cores_answer_as_in_torch(name, batch, precision, tmp_path):
    file = student(name, tmp_path, (16, 16))
    model = Model(file, device="cuda", precision=precision, measure=False)
    assert any(choice.form.endswith(precision) for choice in model.choices(batch))
    exact = Exact(read(file)).double()
    inputs = rows(model.input_shape, batch)
    with torch.no_grad():
        expected = exact(torch.from_numpy(inputs).double())
    # Each layer rounds its weights and its input: two units of a product, in as many layers one after another.
    layers = sum(op.weight is not None for op in exact.model.ops)
    unit = torch.finfo(getattr(torch, precision)).eps / 2
    error = np.abs(model(inputs) - expected.numpy()).max() / float(expected.abs().max())
    assert error <= 2 * unit * layers * 4


def test_the_same_bits_again(tmp_path):
    model = Model(student("lenet5", tmp_path), device="cuda", measure=False)
    inputs = rows(model.input_shape, 64)
    first = model(inputs)
    assert all(np.array_equal(model(inputs), first) for _ in range(20))


def test_threads_call_one_model(tmp_path):
    model = Model(student("lenet300100", tmp_path), device="cuda", measure=False)
    inputs = [rows(model.input_shape, count) for count in (1, 5, 64, 5)]
    expected = [model(each) for each in inputs]
    wrong = []

    def call(each, answers):
        for _ in range(50):
            if not np.array_equal(model(each), answers):
                wrong.append(len(each))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_beside_torch(tmp_path):
    """Both have CUDA's runtime, each its own: neither disturbs the other's device."""
    file = student("lenet5", tmp_path)
    model = Model(file, device="cuda", measure=False)
    inputs = rows(model.input_shape, 8)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work = torch.ones(1000, device="cuda").cumsum(0)
        answers = model(inputs)
    with torch.no_grad():
        expected = Exact(read(file)).double()(torch.from_numpy(inputs).double())
    assert_matches(torch.from_numpy(answers), expected, length=4096, magnitude=20 * float(expected.abs().max()))
    assert work[-1].item() == 1000
