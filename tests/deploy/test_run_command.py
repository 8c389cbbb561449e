"""``pykd run`` and ``pykd bench``, and the program ``pykd-run``, which says the same without Python."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import pykd
from pykd.cli import app
from pykd.deploy import Model, export

pytest.importorskip("pykd._runtime")

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engine"  # of `make engine`
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=PATH)
DIGITS = pykd.data.load(pykd.config.Data()).test
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)  # height, width, channels


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setenv("PYKD_CACHE", "off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks for digits, for colours, and one without classes or a rule for pixels; and what to ask them."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = pykd.models.build("mlp", in_shape=(1, 8, 8), classes=10, widths=[16])
    about = {"class_names": list("0123456789"), "provenance": {"data": "digits"}, "normalization": DIGITS.normalize}
    export(network, folder / "digits.pykd.safetensors", torch.zeros(1, 1, 8, 8), **about)
    colours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3), nn.Softmax(1))
    pixels = ((0.5, 0.4, 0.3), (0.25, 0.5, 0.125))
    export(colours, folder / "colours.pykd.safetensors", torch.zeros(1, 3, 6, 5), normalization=pixels)
    export(nn.Conv2d(1, 2, 3), folder / "maps.pykd.safetensors", torch.zeros(1, 1, 8, 8))
    few = pykd.models.build("mlp", in_shape=(1, 8, 8), classes=3, widths=[4])
    export(few, folder / "few.pykd.safetensors", torch.zeros(1, 1, 8, 8), provenance={"data": "digits"})
    np.save(folder / "pixels.npy", DIGITS.images[:5].numpy())
    np.save(folder / "floats.npy", _floats(70))
    np.save(folder / "one.npy", _floats(1)[0])
    np.save(folder / "doubles.npy", _floats(2).astype(np.float64))
    np.save(folder / "words.npy", np.array(["a"]))
    digit = Image.fromarray(DIGITS.images[3, 0].numpy())
    for ending in ("pgm", "png"):
        digit.save(folder / f"digit.{ending}")
    digit.convert("RGB").save(folder / "digit.ppm")
    digit.resize((20, 20), Image.Resampling.NEAREST).save(folder / "large.png")
    for ending in ("ppm", "png"):
        Image.fromarray(COLOURS).save(folder / f"colours.{ending}")
    (folder / "text.png").write_text("no image")
    return folder


def _floats(count):
    return np.stack([DIGITS[row][0].numpy() for row in range(count)])


@pytest.fixture(scope="module")
def program():
    """pykd-run, compiled as released."""
    if not CMAKE:
        pytest.skip("cmake is not installed")
    archs = f"-DPYKD_CUDA_ARCHS={os.environ.get('PYKD_CUDA_ARCHS', '')}"
    subprocess.run([CMAKE, "-S", ROOT, "-B", BUILD, "-DPYKD_RUNTIME=ON", archs], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", BUILD, "-j", "--target", "pykd-run"], check=True, capture_output=True)
    return BUILD / "pykd-run"


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def answered(program, *words, code=0):
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def lines(text):
    """Of each row, its classes and their shares."""
    rows = [line.partition(":") for line in text.splitlines()]
    assert [number for number, *_ in rows] == [str(row) for row in range(len(rows))]
    return [[(name, float(share)) for name, share in re.findall(r"(\S+) ([\d.]+)%", rest)] for *_, rest in rows]


def expected(file, inputs, top):
    model = Model(file, measure=False)
    answers = torch.from_numpy(model(inputs)).double()
    shares = answers if model.ends_in_softmax else answers.softmax(1)
    best = shares.topk(top, 1)
    names = model.classes or [str(number) for number in range(model.output_shape[0])]
    return [
        [(names[each], 100 * share) for each, share in zip(order, row, strict=True)]
        for order, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def assert_same(found, wanted):
    assert [[name for name, _ in row] for row in found] == [[name for name, _ in row] for row in wanted]
    shares = np.array([[share for _, share in row] for row in found])
    np.testing.assert_allclose(shares, [[share for _, share in row] for row in wanted], atol=0.00501)


ASKED = [
    ("digits", "pixels.npy", lambda: DIGITS.images[:5].numpy()),
    ("digits", "floats.npy", lambda: _floats(70)),
    ("digits", "one.npy", lambda: _floats(1)),
    ("digits", "digit.pgm", lambda: DIGITS.images[3:4].numpy()),
    ("digits", "digit.ppm", lambda: DIGITS.images[3:4].numpy()),
    ("colours", "colours.ppm", lambda: COLOURS.transpose(2, 0, 1)[None]),
]


@pytest.mark.parametrize(("network", "asked", "inputs"), [*ASKED, ("colours", "colours.png", ASKED[-1][2])])
def test_classes_and_shares(folder, network, asked, inputs):
    file = folder / f"{network}.pykd.safetensors"
    said = command("run", file, "--input", folder / asked, "--top", 3).stdout
    assert_same(lines(said), expected(file, inputs(), 3))


@pytest.mark.parametrize(("network", "asked", "inputs"), ASKED)
def test_the_program_says_the_same(folder, program, network, asked, inputs):
    file = folder / f"{network}.pykd.safetensors"
    wanted = expected(file, inputs(), 3)
    for batch in ((), ("--batch", "32"), ("--threads", "2")):
        said = answered(program, file, "--input", folder / asked, "--top", "3", *batch).stdout
        assert_same(lines(said), wanted)
    said = answered(program, file, "--input", folder / asked, "--top", "3", "--json").stdout
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["row"] for row in rows] == list(range(len(wanted)))
    found = [[(each["class"], 100 * each["probability"]) for each in row["answers"]] for row in rows]
    assert_same(found, wanted)


def test_answers_as_they_are(folder, program, tmp_path):
    file = folder / "maps.pykd.safetensors"
    answers = Model(file)(_floats(70))
    command("run", file, "--input", folder / "floats.npy", "--output", tmp_path / "a.npy")
    answered(program, file, "--input", folder / "floats.npy", "--output", tmp_path / "b.npy")
    for name in ("a.npy", "b.npy"):
        found = np.load(tmp_path / name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, answers, rtol=1e-5, atol=1e-5)


def test_images_are_resized_if_asked(folder):
    file = folder / "digits.pykd.safetensors"
    said = command("run", file, "--input", folder / "large.png", "--resize", "--top", 1).stdout
    pixels = np.asarray(Image.open(folder / "large.png").convert("L").resize((8, 8), Image.Resampling.BILINEAR))
    assert_same(lines(said), expected(file, pixels[None, None], 1))


def test_rows_of_the_test_data(folder):
    file = folder / "digits.pykd.safetensors"
    result = command("run", file, "--rows", 40, "--top", 2)
    shown = result.stdout.splitlines()
    truths = [re.search(r"\(it is (\d)\)$", line)[1] for line in shown]
    assert truths == [str(label) for label in DIGITS.labels[:40].tolist()]
    first = [row[0][0] for row in lines(result.stdout)]
    right = sum(answer == truth for answer, truth in zip(first, truths, strict=True))
    assert result.stderr == f"{right} of 40 right\n"
    assert len(command("run", file, "--rows", 10**6).stdout.splitlines()) == len(DIGITS)


def assert_measured(record, file, batches, threads):
    assert record["pykd_device_result"] == 1
    assert record["pykd"] == pykd.__version__
    model = record["model"]
    assert (model["file"], model["bytes"]) == (file.name, file.stat().st_size)
    assert model["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (model["weights"], model["dense_bytes"]) == (64 * 16 + 160, 4 * (64 * 16 + 160 + 26))
    assert [(run["batch"], run["threads"]) for run in record["runs"]] == [(b, t) for t in threads for b in batches]
    for run in record["runs"]:
        us = run["latency_us"]
        assert 0 < us["min"] <= us["p50"] <= us["p90"] <= us["p95"] <= us["p99"] <= us["max"]
        assert us["min"] <= us["mean"] <= us["max"]
        assert us["runs"] >= 3 * 20
        assert len(run["repeats_p50_us"]) == 3
        assert us["min"] <= min(run["repeats_p50_us"]) <= us["p50"] <= max(run["repeats_p50_us"])
        assert 0 < run["rows_per_second"] <= 1e6 * run["batch"] / us["min"]
        assert [layer["op"] for layer in run["layers"]] == ["linear", "linear"]
        assert run["peak_memory_bytes"] > run["weight_bytes"] + run["workspace_bytes"] > 0


def test_bench(folder, tmp_path):
    file = folder / "digits.pykd.safetensors"
    said = command("bench", file, "--batch", 3, "--seconds", 0.05, "--json", tmp_path / "a.json").stdout
    record = json.loads((tmp_path / "a.json").read_bytes())
    assert_measured(record, file, [3], [1])
    for word in ("linear", f"{record['runs'][0]['latency_us']['p50']:,.2f}", f"{file.stat().st_size:,}"):
        assert word in said
    command("bench", file, "--batch", "1,8", "--threads", "1,2", "--seconds", 0.01, "--json", tmp_path / "a.json")
    assert_measured(json.loads((tmp_path / "a.json").read_bytes()), file, [1, 8], [1, 2])


def test_bench_says_first_where_it_cannot_write(folder, tmp_path):
    file = folder / "digits.pykd.safetensors"
    for where, code, sentence in ((tmp_path / "no" / "a.json", 1, "cannot write"), (tmp_path, 2, "is a directory")):
        said = command("bench", file, "--seconds", 0.01, "--json", where, code=code)
        assert sentence in " ".join(said.stderr.split()) and not said.stdout
    assert not [*tmp_path.iterdir()]


def test_the_program_measures(folder, program, tmp_path):
    file = folder / "digits.pykd.safetensors"
    options = ("--seconds", "0.02", "--json", tmp_path / "a.json")
    said = answered(program, file, "--bench", "--batch", "2,70", "--threads", "2", *options)
    assert_measured(json.loads((tmp_path / "a.json").read_bytes()), file, [2, 70], [2])
    assert "threads 2, batch 70: measuring" in said.stderr
    said = answered(program, file, "--bench", "--input", folder / "pixels.npy", *options).stdout
    assert_measured(json.loads((tmp_path / "a.json").read_bytes()), file, [1], [1])
    assert f"{file.stat().st_size} bytes" in said
    assert said.count("linear") == 2
    said = answered(program, file, "--bench", "--dense", *options).stdout
    record = json.loads((tmp_path / "a.json").read_bytes())
    assert [run["form"] for run in record["runs"]] == ["sparse", "dense"]
    assert {layer["form"] for layer in record["runs"][1]["layers"]} == {"dense"}


@pytest.mark.parametrize("mode", [(), ("--bench", "--seconds", "0.01")])
def test_the_program_compares_answers(folder, program, tmp_path, mode):
    file, inputs = folder / "digits.pykd.safetensors", folder / "floats.npy"
    answers = Model(file)(_floats(70))
    np.save(tmp_path / "same.npy", answers)
    answers[69, 9] += 0.01 * np.abs(answers).max()
    np.save(tmp_path / "other.npy", answers)
    np.save(tmp_path / "few.npy", answers[:69])
    said = answered(program, file, "--input", inputs, "--check", tmp_path / "same.npy", *mode).stdout
    assert re.search(r"70 rows: largest difference \S+ of the largest answer, tolerance 0.0001: equal\n", said)
    said = answered(program, file, "--input", inputs, "--check", tmp_path / "other.npy", *mode, code=1).stdout
    assert re.search(r"largest difference 0\.0(1|09)\d* .*: NOT EQUAL\n", said)
    said = answered(program, file, "--input", inputs, "--check", tmp_path / "few.npy", *mode, code=1).stderr
    assert re.search(r"few.npy: its shape is \[69, 10\], the answers to the input are float32 \[70, 10\]", said)


def test_the_program_says_what_is_here(program):
    said = answered(program, "--devices").stdout
    assert re.search(r"^processor +\S", said, re.MULTILINE)
    assert re.search(r"^CUDA +\S", said, re.MULTILINE)


def test_the_program_helps(program):
    assert answered(program, "--help").stdout.startswith("usage: pykd-run FILE")
    assert answered(program, "--version").stdout == f"pykd-run {pykd.__version__}\n"
    assert answered(program, code=2).stderr.startswith("usage: pykd-run FILE")


def test_the_header_is_c(tmp_path):
    """Its own example, as a compiler of C reads it."""
    header = ROOT / "csrc" / "runtime" / "pykd.h"
    example = "\n".join(re.findall(r"^ \*   (.+)$", header.read_text(), re.MULTILINE)).replace("//", "; //")
    code = "int main(void) {{\n  static float image[1], answer[1];\n  size_t inputs = 1, outputs = 1;\n{}\nreturn 0; }}"
    (tmp_path / "a.c").write_text(f'#include <stdio.h>\n#include "{header}"\n' + code.format(example))
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler is installed")
    subprocess.run([compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", tmp_path / "a.c"], check=True)


def test_the_program_needs_system_libraries_alone(program):
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    found = {line.split()[0].rpartition("/")[2].partition(".so")[0] for line in listed.splitlines()}
    assert found <= {"linux-vdso", "libstdc++", "libm", "libgcc_s", "libc", "libpthread"} | {
        name for name in found if name.startswith("ld-linux")
    }


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["run", "digits"], "give either --input or --rows", 2),
        (["run", "digits", "--rows", "2", "--input", "digit.png"], "give either --input or --rows", 2),
        (["run", "nowhere", "--input", "digit.png"], "cannot read .*nowhere", 1),
        (["run", "digits", "--input", "nowhere.png"], "cannot read .*nowhere.png: No such file", 1),
        (["run", "digits", "--input", "text.png"], "neither an image of some size nor an .npy file", 1),
        (["run", "digits", "--input", "words.npy"], "takes .rows, 1, 8, 8., got .1.", 1),
        (["run", "digits", "--input", "large.png"], "is 20x20, the network takes 8x8 .* --resize", 1),
        (["run", "maps", "--input", "digit.png"], "does not say how pixels are normalised", 1),
        (["run", "maps", "--input", "floats.npy"], "answers with .2, 6, 6., not with classes: give --output", 1),
        (["run", "maps", "--rows", "2"], "nothing says which data to use: add --set data.name=NAME", 2),
        (["run", "digits", "--input", "one.npy", "--output", "/proc/a.npy"], "cannot write /proc/a.npy", 1),
        (["run", "digits", "--input", "one.npy", "--threads", "1000"], "threads should be 1 to 256", 1),
        (["run", "few", "--rows", "9"], "has 3 classes, the data has the label [3-9]: give the data it was", 1),
        (["bench", "digits", "--batch", "70000"], "nothing could be measured: .*batch should be 1 to 65536", 1),
        (["bench", "digits", "--batch", "1,x"], "--batch 1,x: give a whole number from 1 on, or a list", 2),
        (["bench", "digits", "--precision", "float16"], "nothing could be measured: .*leave precision at float32", 1),
        (["bench", "nowhere"], "cannot read .*nowhere", 1),
        (["bench", "digits", "--samples", "/proc/a.csv"], "cannot write /proc/a.csv", 1),
    ],
)
def test_errors_are_one_sentence(folder, words, sentence, code):
    result = command(*_located(folder, words), code=code)
    said = [line for line in result.stderr.splitlines() if line.startswith("pykd: ")]
    assert len(said) == 1
    assert re.search(sentence, said[0])


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["digits"], "give --input, or --bench", 2),
        (["digits", "--input"], "--input needs a value", 2),
        (["digits", "--loud"], "--loud is not known", 2),
        (["digits", "digits", "--bench"], "is not known", 2),
        (["digits", "--bench", "--output", "a.npy"], "leave out --output", 2),
        (["digits", "--bench", "--batch", "0"], "--batch 0: give a whole number from 1 to 65536", 2),
        (["digits", "--bench", "--threads", "1,2x"], "--threads 2x: give a whole number from 1 to 256", 2),
        (["digits", "--bench", "--device", "gpu"], "--device gpu: give one of cpu, cuda", 2),
        (["digits", "--bench", "--precision", ""], "--precision : give one of float32, float16, bfloat16", 2),
        (["digits", "--bench", "--seconds", "0"], "--seconds 0: give a number from 0.001 to 86400", 2),
        (["digits", "--bench", "--json"], "--json needs a value", 2),
        (["digits", "--bench", "--check", "one.npy"], "--check needs the --input", 2),
        (["digits", "--bench", "--json", "/proc/a.json"], "cannot write /proc/a.json", 1),
        (["digits", "--bench", "--samples", "/proc/a.csv"], "cannot write /proc/a.csv", 1),
        (["digits", "--input", "one.npy", "--batch", "1,2"], "lists are for --bench", 2),
        (["digits", "--input", "one.npy", "--power"], "to measure, add --bench", 2),
        (["digits", "--input", "one.npy", "--precision", "float16"], "leave precision at float32", 1),
        (["nowhere", "--bench"], "cannot read .*nowhere", 1),
        (["digits", "--input", "nowhere.pgm"], "cannot read .*nowhere.pgm", 1),
        (["digits", "--input", "digit.png"], "digit.png: it is no PPM or PGM image", 1),
        (["digits", "--input", "colours.ppm"], "is an image .3, 6, 5., the network takes .1, 8, 8.", 1),
        (["digits", "--input", "doubles.npy"], "neither float32 nor uint8", 1),
        (["colours", "--input", "floats.npy"], "its shape is .70, 1, 8, 8., the network takes .3, 6, 5.", 1),
        (["maps", "--input", "pixels.npy", "--output", "a.npy"], "does not say what pixels mean", 1),
        (["maps", "--input", "floats.npy"], "not with classes: give --output", 1),
        (["digits", "--input", "one.npy", "--output", "/proc/a.npy"], "cannot write /proc/a.npy", 1),
    ],
)
def test_the_program_fails_in_one_sentence(folder, program, words, sentence, code):
    said = answered(program, *_located(folder, words), code=code).stderr
    assert said.startswith("pykd-run: ")
    assert said.count("\n") == 1
    assert re.search(sentence, said)


def _located(folder, words):
    """The words, files among them by their paths."""
    names = {"digits", "colours", "few", "maps"}
    files = [f"{word}.pykd.safetensors" if word in names else word for word in words]
    return [folder / word if ("." in word and "/" not in word) or word == "nowhere" else word for word in files]
