"""The engine answers as PyTorch does, for every network, weight, batch and number of threads."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import Exact, networks
from torch import nn

import pykd
from pykd.deploy import Model, export, load, read
from pykd.deploy.model_file import VALUES
from pykd.errors import PykdError
from pykd.testing import assert_matches

pytest.importorskip("pykd._runtime")

STUDENTS = {
    "mlp": ({"widths": [60, 30]}, (1, 28, 28)),
    "lenet300100": ({}, (1, 28, 28)),
    "lenet5": ({}, (1, 28, 28)),
    "lenet5_caffe": ({}, (1, 28, 28)),
    "vgg": ({"width": 0.25}, (3, 32, 32)),
    "resnet20": ({}, (3, 32, 32)),
}
PIXELS = ((0.5, 0.4, 0.3), (0.25, 0.5, 0.125))


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setenv("PYKD_CACHE", "off")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A file with every operator, for colour images."""
    network, shape = networks()["everything"]
    file = tmp_path_factory.mktemp("file") / "a.pykd.safetensors"
    names = ["a", "b", "c", "d", "e"]
    about = {"class_names": names, "provenance": {"seed": 7, "data": "none"}, "licence": "CC0-1.0"}
    export(network, file, torch.zeros(1, *shape), normalization=PIXELS, **about)
    return file


def rows(shape, count):
    return np.random.default_rng(count).normal(size=(count, *shape)).astype(np.float32)


def pruned_by_magnitude(network, share=0.9):
    with torch.no_grad():
        for weight in (module.weight for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))):
            weight *= weight.abs() > weight.abs().flatten().quantile(share)
    return network.eval()


def assert_answers(model, file, batches=(1, 7, 33)):
    """Those of the file's network in float64, to the rounding of every sum."""
    exact = Exact(read(file)).double()
    sums = sum(op.kind in ("linear", "conv2d", "add", "avg_pool2d", "global_avg_pool") for op in exact.model.ops)
    for batch in batches:
        inputs = rows(model.input_shape, batch)
        with torch.no_grad():
            expected = exact(torch.from_numpy(inputs).double())
        answers = torch.from_numpy(model(inputs))
        assert_matches(answers, expected, length=4096, magnitude=sums * float(expected.abs().max()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [None, (16, 16)])
@pytest.mark.parametrize("name", STUDENTS)
def test_students_answer_as_in_torch(name, block, threads, tmp_path):
    arguments, shape = STUDENTS[name]
    torch.manual_seed(0)
    network = pruned_by_magnitude(pykd.models.build(name, in_shape=shape, classes=10, **arguments))
    export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, *shape), block=block)
    assert_answers(
        Model(tmp_path / "a.pykd.safetensors", threads=threads, measure=False), tmp_path / "a.pykd.safetensors"
    )


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", networks())
def test_networks_answer_as_in_torch(name, measure, tmp_path):
    network, shape = networks()[name]
    export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, *shape), block=(4, 4))
    assert_answers(Model(tmp_path / "a.pykd.safetensors", measure=measure), tmp_path / "a.pykd.safetensors", (1, 20))


@pytest.mark.parametrize("block", [None, (1, 16), (8, 8), (16, 16), (5, 3)])
@pytest.mark.parametrize("values", VALUES)
def test_every_kind_of_value(values, block, tmp_path):
    network, shape = networks()["everything"]
    export(network, tmp_path / "a.pykd.safetensors", torch.zeros(1, *shape), values=values, block=block)
    assert_answers(Model(tmp_path / "a.pykd.safetensors", measure=False), tmp_path / "a.pykd.safetensors")


def test_pixels_are_normalised(everything):
    model = Model(everything, measure=False)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 17, 16), np.uint8)
    with torch.no_grad():
        expected = load(everything)(torch.from_numpy(pixels))
    answers = torch.from_numpy(model(pixels))
    assert_matches(answers, expected, length=4096, magnitude=20)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_other_floats_are_rounded(everything, dtype):
    model = Model(everything, measure=False)
    inputs = rows(model.input_shape, 3).astype(dtype)
    assert np.array_equal(model(inputs), model(inputs.astype(np.float32)))


def test_any_memory_layout(everything):
    model = Model(everything, measure=False)
    inputs = rows(model.input_shape, 6)
    expected = model(inputs)
    frozen = inputs.copy()
    frozen.flags.writeable = False
    odd = np.frombuffer(b"x" + inputs.tobytes(), np.uint8)[1:].view(np.float32).reshape(inputs.shape)
    for same in (np.asfortranarray(inputs), inputs.tolist(), frozen, odd, torch.from_numpy(inputs)):
        same = np.asarray(same, np.float32) if isinstance(same, list) else same
        assert np.array_equal(model(same), expected)
    assert np.array_equal(model(inputs[::-2]), model(inputs[::-2].copy()))


def test_any_number_of_rows(everything):
    model = Model(everything, measure=False)
    many = rows(model.input_shape, 600)
    assert model(many[:0]).shape == (0, 5)
    answers = model(many)
    assert answers.shape == (600, 5)
    assert answers.dtype == np.float32
    parts = np.concatenate([model(many[at : at + 256]) for at in (0, 256, 512)])
    assert np.array_equal(answers, parts)
    for count in (1, 2, 3, 4, 5, 6, 1):  # more sizes than are kept
        np.testing.assert_allclose(model(many[:count]), answers[:count], rtol=1e-4, atol=1e-6)


def test_calls_from_many_threads(everything):
    model = Model(everything, threads=2, measure=False)
    inputs = rows(model.input_shape, 5)
    expected = model(inputs)
    ready = threading.Barrier(4)

    def ask(_):
        ready.wait()
        return [model(inputs).tobytes() for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = {answer for answers in pool.map(ask, range(4)) for answer in answers}
    assert found == {expected.tobytes()}


def test_a_forked_process_answers(everything):
    """Its plans are its own: the parent's threads are not there."""
    model, inputs = Model(everything, threads=2, measure=False), rows((3, 17, 16), 64)
    answers = model(inputs)
    if (child := os.fork()) == 0:
        signal.alarm(60)
        os._exit(not np.array_equal(model(inputs), answers))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(model(inputs), answers)


def test_the_end_of_the_process_interrupts_calls(everything):
    program = (
        "import threading, time, numpy; from pykd.deploy import Model;"
        f"model = Model({str(everything)!r}, threads=2, measure=False); x = numpy.zeros((64, 3, 17, 16), numpy.uint8)\n"
        "def loop():\n  while True: model(x)\n"
        "for _ in range(3): threading.Thread(target=loop, daemon=True).start()\n"
        "time.sleep(0.3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_same_file_gives_the_same_bits(everything):
    inputs = rows((3, 17, 16), 4)
    first, second = (Model(everything, measure=False)(inputs) for _ in range(2))
    assert np.array_equal(first, second)


def test_what_a_file_says(everything):
    model = Model(everything, threads=1, measure=False)
    assert model.input_shape == (3, 17, 16)
    assert model.output_shape == (5,)
    assert model.classes == ("a", "b", "c", "d", "e")
    assert model.licence == "CC0-1.0"
    assert model.provenance["seed"] == "7"
    assert model.provenance["pykd"] == pykd.__version__
    assert model.file_bytes == everything.stat().st_size
    assert model.takes_pixels
    assert model.ends_in_softmax
    steps = read(everything).ops
    assert [(each.step, each.op) for each in model.choices(2)] == [
        (number, op.kind) for number, op in enumerate(steps, 1) if op.weight
    ]
    assert all(each.us > 0 and each.form for each in model.choices(2))
    assert min(model.memory(2)) > 0
    assert model.memory(40).workspace > model.memory(2).workspace


def test_latencies_ascend(everything):
    found = Model(everything, threads=1, measure=False).latencies(2, 0.01)
    assert len(found) >= 20
    assert found[0] > 0
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (np.zeros((2, 3, 16, 17), np.float32), r"takes \[rows, 3, 17, 16\], got \[2, 3, 16, 17\]"),
        (np.zeros((3, 17, 16), np.float32), r"got \[3, 17, 16\]"),
        (np.float32(1), r"got \[\]"),
        (np.zeros((1, 3, 17, 16), np.int64), "takes floats, or pixels as uint8, got int64"),
        (np.zeros((1, 3, 17, 16), object), "takes floats, or pixels as uint8, got object"),
    ],
)
def test_wrong_inputs(everything, inputs, sentence):
    with pytest.raises(PykdError, match=sentence):
        Model(everything, measure=False)(inputs)


def test_pixels_without_a_rule(tmp_path):
    export(nn.Linear(4, 2), tmp_path / "a.pykd.safetensors", torch.zeros(1, 4))
    with pytest.raises(PykdError, match="does not say how pixels are normalised: give float32"):
        Model(tmp_path / "a.pykd.safetensors")(np.zeros((1, 4), np.uint8))


@pytest.mark.parametrize("threads", [0, -1, 257, 1.5, "2"])
def test_threads_out_of_range(everything, threads):
    with pytest.raises(PykdError, match=f"threads should be 1 to 256, got {threads}"):
        Model(everything, threads=threads)


def test_broken_files(everything, tmp_path):
    with pytest.raises(PykdError, match=r"cannot read .*nowhere.*: No such file or directory"):
        Model(tmp_path / "nowhere")
    with pytest.raises(PykdError, match="a path has no null characters"):
        Model(f"{everything}\0")
    with pytest.raises(PykdError, match="is no model file"):
        Model(tmp_path)
    broken = tmp_path / "a.pykd.safetensors"
    content = bytearray(everything.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.raises(PykdError, match=r"is no model file of pykd, or was damaged.*export it anew"):
        Model(broken)


def test_what_was_measured_is_remembered(everything, tmp_path, monkeypatch):
    monkeypatch.delenv("PYKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inputs = rows((3, 17, 16), 4)
    file = tmp_path / "cache" / "pykd" / "plans.json"
    answers = Model(everything, threads=1)(inputs)
    remembered = file.read_bytes()
    assert remembered
    again = Model(everything, threads=1)
    assert np.array_equal(again(inputs), answers)
    assert file.read_bytes() == remembered
    for content in (b"", b"\xff" * 1000, b'{"', remembered[: len(remembered) // 2], b"[" * 100_000):
        file.write_bytes(content)
        np.testing.assert_allclose(Model(everything, threads=1)(inputs), answers, rtol=1e-4)


def test_nothing_is_remembered_where_nothing_can_be_written(everything, tmp_path, monkeypatch):
    monkeypatch.delenv("PYKD_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Model(everything)(rows((3, 17, 16), 1)).shape == (1, 5)


def test_it_needs_no_torch(everything):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'safetensors', 'pydantic', 'typer', 'rich')));"
        "import numpy; from pykd.deploy import Model;"
        f"print(Model({str(everything)!r}, threads=1)(numpy.zeros((2, 3, 17, 16), numpy.uint8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(2, 5)\n", "")


def test_without_the_engine(everything, monkeypatch):
    monkeypatch.setitem(sys.modules, "pykd._runtime", None)
    monkeypatch.delattr(pykd, "_runtime", raising=False)
    with pytest.raises(ImportError, match="engine is not compiled here"):
        Model(everything)
