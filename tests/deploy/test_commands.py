"""``pykd export`` and ``pykd evaluate``, and the bytes that tables show."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pykd
from pykd.cli import app
from pykd.deploy import load, onnx, read
from pykd.training import describe
from pykd.training.measure import agreement

SETTINGS = ("teacher.widths=[32]", "student.widths=[8]", "teacher.training.epochs=2", "student.training.epochs=2")


def run(*words: str | Path, code: int = 0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run on digits."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run("distill", "noisy_teacher-digits", *(f"--set={each}" for each in SETTINGS), "--out", out)
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "student.pykd.safetensors"


def table(text: str) -> list[list[str]]:
    """The cells of its lines; two spaces part them."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def summary(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "summary.json").read_bytes())["rows"]}


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int8"])
def test_export_says_bytes_and_agreement(folder, out, values):
    out.write_bytes(b"before")
    said = run("export", folder, "-o", out, "--values", values).stderr
    dense = (folder / "teacher.safetensors").stat().st_size
    size = out.stat().st_size
    assert f"{out}: {size:,} bytes, {dense / size:.1f} times smaller than the teacher's float32 file" in said
    difference = float(re.search(r"differ by (\S+) at most", said)[1])
    assert difference < (1e-5 if values == "float32" else 0.05)
    assert len(re.findall(r"\d+\.\d\d%", said)) == 2


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_export_to_onnx(folder, out, values):
    run("export", folder, "-o", out, "--values", values)
    file = out.with_name("student.onnx")
    said = run("export", folder, "-o", file, "--format", "onnx", "--values", values).stderr
    assert f"{file}: {file.stat().st_size:,} bytes" in said
    difference = float(re.search(r"differ by (\S+) at most", said)[1])
    assert difference < (1e-5 if values == "float32" else 0.05)
    assert file.read_bytes() == onnx.to_bytes(read(out), dtype="float16" if values == "float16" else "float32")


def test_export_refuses_answers_that_outgrow_float16(folder, out, monkeypatch):
    large = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    for layer in large[1::2]:
        nn.init.constant_(layer.weight, 6e4)
    monkeypatch.setattr("pykd.runs.finished_network", lambda *_: large)
    file = out.with_name("student.onnx")
    said = run("export", folder, "-o", file, "--format", "onnx", "--values", "float16", code=1).stderr
    assert "not finite: export with --values float32" in said
    assert not file.exists()
    run("export", folder, "-o", file, "--format", "onnx")


def test_export_to_onnx_without_its_packages(folder, out, monkeypatch):
    file = out.with_name("student.onnx")
    for module, package in (("onnx", "onnx"), ("onnx_network", "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, f"pykd.deploy.{module}", raising=False)
            patch.delattr(pykd.deploy, module, raising=False)
            said = run("export", folder, "-o", file, "--format", "onnx", code=1).stderr
        assert f"{package}: run pip install 'pykd[onnx]'\n" in said
        assert said.count("\n") == 1
        assert not file.exists()


def test_export_writes_what_the_run_knows(folder, out):
    run("export", folder, "-o", out, "--block", "2x4", "--licence", "CC0-1.0")
    model = read(out)
    assert model.input_shape == (1, 8, 8)
    assert model.normalization == ((0.3054,), (0.3753,))
    assert model.class_names == tuple("0123456789")
    assert model.licence == "CC0-1.0"
    origin = dict(model.provenance)
    assert len(origin.pop("recipe")) == 16
    assert origin == {"pykd": pykd.__version__, "method": "noisy_teacher", "seed": 0, "data": "digits"}
    assert all(op.weight.block == (2, 4) for op in model.ops if op.weight)
    pixels = pykd.data.load(pykd.config.Data()).test.images
    assert load(out)(pixels).shape == (len(pixels), 10)


def test_a_recipe_is_the_same_wherever_its_data_lie(folder, out):
    recipes = []
    for change in ("data.root=null", "data.root=elsewhere", "data.holdout=0.2"):
        run("export", folder, "-o", out, "--set", change)
        recipes.append(read(out).provenance["recipe"])
    assert recipes[0] == recipes[1] != recipes[2]


def test_export_takes_one_network_of_a_run(folder, out):
    run("export", folder / "teacher.safetensors", "-o", out)
    assert next(op for op in read(out).ops if op.weight).weight.shape == (32, 64)


def test_tables_hold_the_bytes_that_export_writes(folder, out):
    for name, row in summary(folder).items():
        run("export", folder / f"{name}.safetensors", "-o", out)
        assert row["file_bytes"] == out.stat().st_size


def test_evaluate_shows_bytes_and_ratios(folder):
    titles, *rows = table(run("evaluate", folder).stdout)
    assert titles == [
        "test accuracy",
        *["parameters", "non-zeros", "bytes", "smaller", "file", "smaller", "latency (ms)"],
    ]
    dense = (folder / "teacher.safetensors").stat().st_size
    for cells, row in zip(rows, summary(folder).values(), strict=True):
        assert cells[1] == f"{row['accuracy']:.2%}"
        numbers = [int(cell.replace(",", "")) for cell in (*cells[2:5], cells[6])]
        assert numbers == [row[key] for key in ("parameters", "nonzeros", "bytes", "file_bytes")]
        assert (cells[5], cells[7]) == (f"{dense / row['bytes']:.1f}x", f"{dense / row['file_bytes']:.1f}x")
    assert max(map(len, run("evaluate", folder).stdout.splitlines())) <= 120


def test_evaluate_takes_a_model_file(folder, out):
    run("export", folder, "-o", out)
    expected = f"{summary(folder)['student']['accuracy']:.2%}"
    cells = table(run("evaluate", out).stdout)[1]
    assert cells[:2] == [out.name, expected]
    assert f"{out.stat().st_size:,}" in cells
    beside = folder / out.name
    beside.write_bytes(out.read_bytes())
    titles, cells = table(run("evaluate", beside).stdout)
    assert cells[:2] == [out.name, expected]
    assert titles.count("smaller") == 2


def test_evaluate_asks_for_the_data_of_a_file_that_names_none(out):
    pykd.deploy.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), out, torch.zeros(1, 1, 8, 8))
    assert "add --set data.name=NAME" in run("evaluate", out, code=2).stderr
    assert "%" in run("evaluate", out, "--set", "data.name=digits").stdout
    assert "unknown key 'data.nam'" in run("evaluate", out, "--set", "data.nam=digits", code=2).stderr
    assert "unknown key 'dta'" in run("evaluate", out, "--set", "dta.name=digits", code=2).stderr


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["export", "RUN", "-o", "a.safetensors"], "the name of a model file ends in .pykd.safetensors", 2),
        (["export", "RUN", "-o", "a.onnx"], "the name of a model file ends in .pykd.safetensors", 2),
        (["export", "RUN", "-o", "OUT", "--format", "onnx"], "the name of an ONNX file ends in .onnx", 2),
        (["export", "RUN", "-o", "/proc/nowhere.onnx", "--format", "onnx"], "cannot write /proc/nowhere.onnx", 1),
        (["export", "RUN", "-o", "OUT", "--block", "4"], "write rows and columns, e.g. 4x4", 2),
        (["export", "RUN", "-o", "OUT", "--block", "0x4"], "write rows and columns, e.g. 4x4", 2),
        (["export", "RUN/config.yaml", "-o", "OUT"], "is none of a run's weights", 2),
        (["export", "nowhere", "-o", "OUT"], "nowhere is not a run folder", 1),
        (["export", "RUN", "-o", "/proc/nowhere.pykd.safetensors"], "cannot write /proc/nowhere.pykd", 1),
        (["evaluate", "RUN/none.pykd.safetensors"], "No such file", 1),
        (["evaluate", "OUT", "--set", "data.name=digits"], "is no model file of pykd", 1),
    ],
)
def test_mistakes_are_one_sentence(folder, out, words, sentence, code):
    out.write_bytes(b"before, and long enough for a header")
    words = [word.replace("RUN", str(folder)).replace("OUT", str(out)) for word in words]
    said = run(*words, code=code).stderr
    assert sentence in said
    assert said.count("\n") == 1
    assert out.read_bytes().startswith(b"before")


def test_export_of_an_unfinished_run(folder, tmp_path, out):
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    assert "holds no weights of student: finish the run" in run("export", tmp_path, "-o", out, code=1).stderr


def test_describe_says_why_there_is_no_file():
    found = describe(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), torch.zeros(1, 3))
    assert found["file_bytes"] is None
    assert "1 (Sigmoid) cannot be exported" in found["file_reason"]


def test_agreement_is_that_of_the_rows():
    data = torch.utils.data.TensorDataset(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([1, 1]))
    found = agreement(nn.Identity(), nn.Threshold(2.5, 0.5), data)
    assert found == {"rows": 2, "difference": 1.5, "largest": 3.0, "accuracies": [0.5, 0.5]}
