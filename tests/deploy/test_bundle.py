"""``pykd bundle``, and ``run.sh`` in what it writes: with a stand-in for the engine, built here, and emulated."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pykd
from pykd.cli import app
from pykd.deploy import Model, export
from pykd.deploy.bundle import bundle as write_bundle
from pykd.deploy.sources import engine_sources

pytest.importorskip("pykd._runtime")

ROOT = Path(__file__).parents[2]
CROSS = ROOT / "build" / "cross"  # of `make cross`
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
QEMU = "qemu-aarch64-static -L /usr/aarch64-linux-gnu"

# In the place of pykd-run: writes down what it is asked for. CUDA says whether there is a device, DIFFERS names the one
# whose answers are wrong.
STAND_IN = r"""#!/bin/sh
echo "$*" >>asked
case " $* " in
  *" --version "*) echo "pykd-run 0.1.0" ;;
  *" --bench "*)
    [ "${BENCH:-good}" = good ] || { echo "pykd-run: out of memory" >&2; exit 1; }
    while [ $# -gt 1 ]; do
      case $1 in --json) echo '{"pykd_device_result": 1}' >"$2" ;; --samples) echo seconds,watts >"$2" ;; esac
      shift
    done
    echo "| engine |" ;;
  *" --check "*"--device ${DIFFERS:-none} "*) echo "the answers differ" >&2; exit 1 ;;
  *" --device cuda "*) [ "${CUDA:-no}" = yes ] || { echo "pykd-run: no driver of CUDA is there" >&2; exit 1; } ;;
esac
"""
# What the options of trtexec are called: TensorRT 8, 10, 11.
TRTEXEC = {"8": "--fp16 --int8 --best", "10": "--fp16 --stronglyTyped", "11": "--iterations"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file that names its data."""
    torch.manual_seed(0)
    network = pykd.models.build("mlp", in_shape=(1, 8, 8), classes=10, widths=[16])
    file = tmp_path_factory.mktemp("model") / "digits.pykd.safetensors"
    export(network, file, torch.zeros(1, 1, 8, 8), provenance={"data": "digits"})
    return file


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def bundle(model, tmp_path):
    command("bundle", model, "-o", tmp_path / "bundle", "--rows", 5)
    return tmp_path / "bundle"


@pytest.fixture
def stand_in(bundle):
    program = bundle / "bin" / platform.machine() / "pykd-run"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return bundle


def run(bundle, *options, code=0, **variables):
    environment = {**os.environ, "PATH": PATH, "PYKD_CUDA": "off", **variables}
    command = [bundle / "run.sh", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def asked(bundle):
    return (bundle / "asked").read_text().splitlines()


def test_it_holds_all_that_a_device_needs(model, bundle):
    assert {path.name for path in bundle.iterdir()} == {
        *("LICENSE", "README.txt", "answers.npy", "inputs.npy", "model.pykd.safetensors", "run.sh", "source"),
    }
    assert (bundle / "model.pykd.safetensors").read_bytes() == model.read_bytes()
    rows, answers = np.load(bundle / "inputs.npy"), np.load(bundle / "answers.npy")
    test = pykd.data.load(pykd.config.Data()).test
    np.testing.assert_array_equal(rows, np.stack([test[row][0].numpy() for row in range(5)]))
    np.testing.assert_array_equal(answers, Model(model, threads=1, measure=False)(rows))
    assert rows.dtype == answers.dtype == np.float32
    sources = {str(path.relative_to(bundle / "source")) for path in (bundle / "source").rglob("*") if path.is_file()}
    assert sources == engine_sources(ROOT).keys()
    assert os.access(bundle / "run.sh", os.X_OK)
    assert len((bundle / "README.txt").read_text().splitlines()) == 10


def test_its_rows_may_be_given_or_random(tmp_path):
    file = tmp_path / "plain.pykd.safetensors"
    export(nn.Linear(3, 2), file, torch.zeros(1, 3))
    told = command("bundle", file, "-o", tmp_path / "a").stderr
    assert "random rows are taken: nothing says which data to use" in told
    command("bundle", file, "-o", tmp_path / "b")
    random = np.load(tmp_path / "a" / "inputs.npy")
    assert random.shape == (64, 3) and random.std() > 0.5
    np.testing.assert_array_equal(random, np.load(tmp_path / "b" / "inputs.npy"))
    np.save(tmp_path / "rows.npy", np.arange(6.0).reshape(2, 3))
    command("bundle", file, "-o", tmp_path / "c", "--input", tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "c" / "inputs.npy"), np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_may_hold_the_dense_network(model, tmp_path, dtype):
    pytest.importorskip("onnx")
    command("bundle", model, "-o", tmp_path / "a", "--onnx", dtype)
    assert (b"input_float16" in (tmp_path / "a" / "dense.onnx").read_bytes()) == (dtype == "float16")


def test_what_is_there_is_not_lost(model, bundle, tmp_path):
    told = command("bundle", model, "-o", bundle, code=1).stderr
    assert "is a bundle already: add --force" in told
    (bundle / "results").mkdir()
    (bundle / "results" / "a.json").write_text("{}")
    np.save(tmp_path / "wide.npy", np.zeros((2, 3), np.float32))
    before = (bundle / "inputs.npy").read_bytes()
    told = command("bundle", model, "-o", bundle, "--force", "--input", tmp_path / "wide.npy", code=1).stderr
    assert "takes [rows, 1, 8, 8], got [2, 3]" in told
    assert (bundle / "inputs.npy").read_bytes() == before
    command("bundle", model, "-o", bundle, "--force", "--rows", 7)
    assert len(np.load(bundle / "inputs.npy")) == 7
    assert (bundle / "results" / "a.json").read_text() == "{}"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep me")
    assert "is there and no bundle" in command("bundle", model, "-o", other, "--force", code=1).stderr
    assert (other / "mine.txt").read_text() == "keep me"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "other", "wide.npy"}


def test_a_bundle_survives_an_interruption(model, bundle, monkeypatch):
    (bundle / "results").mkdir()
    (bundle / "results" / "latest.json").symlink_to("gone.json")
    rename, moves = Path.rename, []

    def interrupted(path, target):
        moves.append(path)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(model, bundle, np.zeros((1, 1, 8, 8), np.float32), force=True)
    assert len(np.load(bundle / "inputs.npy")) == 5
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}
    command("bundle", model, "-o", bundle, "--force")
    assert (bundle / "results" / "latest.json").is_symlink()


def test_the_folder_that_one_is_in_stays(model, bundle, monkeypatch):
    (bundle / "results").mkdir()
    monkeypatch.chdir(bundle / "results")
    assert "go out of it first, or give another -o" in command("bundle", model, "-o", "..", "--force", code=1).stderr
    empty = bundle.parent / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert "go out of it first" in command("bundle", model, "-o", ".", code=1).stderr
    assert not list(empty.iterdir())


@pytest.mark.parametrize("name", ["bundle", "a b", "-r", "it's", "link"])
def test_the_next_command_is_right(model, tmp_path, name):
    (tmp_path / "link").symlink_to("where it leads")
    said = command("bundle", model, "-o", tmp_path / name, "--rows", 1).stderr.splitlines()[-1]
    copied, started = said.removeprefix("next: ").split(" && ")
    _, _, source, _ = shlex.split(copied)
    _, _, remote = shlex.split(started)
    assert Path(source) == (tmp_path / name).resolve()
    device = tmp_path / "device"
    shutil.copytree(source, device / Path(source).name)
    done = subprocess.run(["sh", "-c", f"{remote} --help"], cwd=device, check=True, capture_output=True, text=True)
    assert "usage: ./run.sh" in done.stdout


def test_mistakes_are_told(model, tmp_path):
    np.save(tmp_path / "pixels.npy", np.zeros((1, 1, 8, 8), np.uint8))
    np.save(tmp_path / "nan.npy", np.full((1, 1, 8, 8), np.nan, np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 8, 8), np.float32))
    (tmp_path / "pykd-run").write_text("#!/bin/sh\n")
    out = ["-o", tmp_path / "out"]
    for words, code, sentence in [
        ([tmp_path, *out], 2, "is a folder: run pykd export"),
        ([tmp_path / "pykd-run", *out], 1, "is no model file of pykd"),
        ([tmp_path / "nothing", *out], 1, "cannot read"),
        ([model, *out, "--rows", 2, "--input", tmp_path / "nan.npy"], 2, "either --input or --rows"),
        ([model, *out, "--rows", 0], 2, "'--rows'"),
        (
            [model, *out, "--input", tmp_path / "pixels.npy"],
            1,
            "finite floats, at least one, got [1, 1, 8, 8] of uint8",
        ),
        ([model, *out, "--input", tmp_path / "nan.npy"], 1, "finite floats"),
        ([model, *out, "--input", tmp_path / "none.npy"], 1, "at least one"),
        ([model, *out, "--binaries", tmp_path], 1, "is no program for x86_64 or aarch64"),
        ([model, *out, "--binaries", tmp_path / "nowhere"], 1, "run make cross first"),
        ([model, *out, "--set", "data.name=mnist", "--set", "data.root=/nowhere"], 1, "/nowhere"),
        ([model, "-o", tmp_path / "no" / "out"], 1, "cannot write"),
        ([model, "-o", model], 1, "is there and no bundle"),
    ]:
        assert sentence in command("bundle", *words, code=code).stderr, words
    assert {path.name for path in tmp_path.iterdir()} == {"pixels.npy", "nan.npy", "none.npy", "pykd-run"}


def test_run_checks_and_measures_what_is_there(stand_in):
    done = run(stand_in, "--results", "nano")
    assert "no CUDA: pykd-run: no driver of CUDA is there" in done.stderr
    *_, checked, measured = asked(stand_in)
    assert checked == "model.pykd.safetensors --input inputs.npy --check answers.npy --device cpu"
    threads = f"1,{os.cpu_count()}" if os.cpu_count() > 1 else "1"
    assert re.sub(r"--threads \S+", f"--threads {threads}", measured) == (
        "model.pykd.safetensors --bench --input inputs.npy --check answers.npy --device cpu --batch 1,8,64 "
        f"--threads {threads} --power --dense --samples results/nano.csv --json results/nano.json"
    )
    assert {path.name for path in (stand_in / "results").iterdir()} == {"nano.json", "nano.md", "nano.csv"}
    assert (stand_in / "results" / "nano.md").read_text() == "```\n| engine |\n```\n"
    assert "\n| engine |\n" in done.stdout
    assert "give another --results" in run(stand_in, "--results", "nano", code=2).stderr

    run(
        stand_in,
        "--batch",
        "4",
        "--threads",
        "2",
        "--precision",
        "float16",
        "--seconds",
        "0.5",
        "--no-power",
        CUDA="yes",
    )
    cpu, cuda, measured = asked(stand_in)[-3:]
    assert cpu.endswith("--device cpu") and cuda.endswith("--check answers.npy --device cuda")
    assert "--device cpu,cuda --batch 4 --threads 2 --precision float16 --seconds 0.5 --dense --samples" in measured


def test_run_goes_on_where_a_part_fails(stand_in):
    done = run(stand_in, "--results", "a", code=1, CUDA="yes", DIFFERS="cuda")
    assert "cuda does not give the recorded answers" in done.stderr
    assert "--device cpu --batch" in asked(stand_in)[-1]
    run(stand_in, "--results", "b", code=1, DIFFERS="cpu")
    assert "--check" in asked(stand_in)[-1] and "--bench" not in asked(stand_in)[-1]
    done = run(stand_in, "--results", "c", code=1, BENCH="bad")
    assert "out of memory" in done.stderr and "the measurement failed" in done.stderr
    run(stand_in, "--results", "d", "--device", "cuda", code=1)
    assert {path.name for path in (stand_in / "results").iterdir()} == {"a.json", "a.md", "a.csv"}


@pytest.mark.parametrize(
    ("version", "dtype", "flags"),
    [
        ("8", "float16", ["--fp16"]),
        ("8", "float32", []),
        ("10", "float16", ["--stronglyTyped"]),
        ("10", "float32", ["--stronglyTyped"]),
        ("11", "float16", []),
    ],
)
def test_run_puts_trtexec_beside_it(stand_in, tmp_path, version, dtype, flags):
    (stand_in / "dense.onnx").write_bytes(b"..input_float16.." if dtype == "float16" else b"..input..")
    (tmp_path / "tools").mkdir()
    program = tmp_path / "tools" / "trtexec"
    program.write_text(
        f'#!/bin/sh\n[ "$1" != --help ] || {{ echo "{TRTEXEC[version]}"; exit; }}\necho "$@" >>trtexec-asked\n'
        'case "$*" in *input:8x*) echo "out of memory"; exit 1 ;; *) echo "Throughput: 1 qps" ;; esac\n'
    )
    program.chmod(0o755)
    done = run(stand_in, "--trtexec", "--results", "a", code=1, PATH=f"{program.parent}:{PATH}")
    assert "trtexec failed for batch 8: results/a-trtexec" in done.stderr
    given = [line.split() for line in (stand_in / "trtexec-asked").read_text().splitlines()]
    assert given == [["--onnx=dense.onnx", f"--shapes=input:{batch}x1x8x8", *flags] for batch in (1, 8, 64)]
    logs = [f"results/a-trtexec-{dtype}-{batch}.log" for batch in (1, 64)]
    assert f"--trtexec {','.join(logs)} " in asked(stand_in)[-1]
    assert all((stand_in / log).read_text() == "Throughput: 1 qps\n" for log in logs)


def test_run_says_what_trtexec_lacks(stand_in, tmp_path):
    done = run(stand_in, "--trtexec", code=1)
    assert "no trtexec on the PATH" in done.stderr
    assert "--bench" in asked(stand_in)[-1] and "--trtexec" not in asked(stand_in)[-1]
    program = tmp_path / "trtexec"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = run(stand_in, "--trtexec", "--results", "b", code=1, PATH=f"{tmp_path}:{PATH}")
    assert "dense.onnx is missing: make the bundle with --onnx float16" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--colour"],
        ["model"],
        ["--results"],
        ["--results", ""],
        ["--results", "../a"],
        ["--results", ".a"],
        ["--results", "--build"],
        ["--results", "a,b"],
        ["--batch", "1;touch hacked"],
        ["--batch", "$(touch hacked)"],
        ["--batch", "one"],
        ["--batch", "1,,8"],
        ["--threads", "1,"],
        ["--device", "tpu"],
        ["--seconds", "`touch hacked`"],
    ],
)
def test_run_refuses_other_words(stand_in, options):
    assert "see ./run.sh --help" in run(stand_in, *options, code=2).stderr
    assert not (stand_in / "asked").exists() and not (stand_in / "hacked").exists()
    assert not (stand_in / "results").exists()


@pytest.mark.parametrize("name", ["model.pykd.safetensors", "inputs.npy", "answers.npy"])
def test_run_names_a_missing_file(stand_in, name):
    (stand_in / name).unlink()
    assert f"holds no {name}: copy the bundle again" in run(stand_in, code=1).stderr
    assert not (stand_in / "asked").exists() and not (stand_in / "results").exists()


def test_run_works_in_its_own_folder(stand_in, tmp_path):
    (tmp_path / "decoy" / "bundle").mkdir(parents=True)
    environment = {**os.environ, "PATH": PATH, "PYKD_CUDA": "off", "CDPATH": str(tmp_path / "decoy")}
    command = ["sh", "bundle/run.sh", "--results", "a"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (stand_in / "results" / "a.json").exists()
    assert not list((tmp_path / "decoy" / "bundle").iterdir())


def test_run_says_what_to_install(bundle, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "uname", "date", "tr", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    done = run(bundle, code=1, PATH=str(tools))
    assert "not found" not in done.stderr
    assert "cmake is missing, and source/ cannot be built: run sudo apt-get install cmake g++" in done.stderr
    assert "usage: ./run.sh" in run(bundle, "--help").stdout


def checked(bundle, name):
    record = json.loads((bundle / "results" / f"{name}.json").read_text())
    assert record["pykd_device_result"] == 1 and record["check"]["equal"] is True
    assert {(each["form"], each["batch"]) for each in record["runs"]} == {("sparse", 1), ("dense", 1)}
    assert (bundle / "results" / f"{name}.md").read_text()
    return record


QUICK = ["--batch", "1", "--threads", "1", "--seconds", "0.05", "--no-power"]


def test_run_builds_the_sources(bundle):
    if not shutil.which("cmake", path=PATH):
        pytest.skip("cmake is not installed")
    done = run(bundle, "--results", "here", *QUICK, CMAKE_BUILD_TYPE="None")  # without optimisation, for speed
    assert "building source/" in done.stderr and "the engine has no CUDA: PYKD_CUDA=off was asked for" in done.stderr
    assert checked(bundle, "here")["machine"]["emulated"] is False
    answers = np.load(bundle / "answers.npy")
    np.save(bundle / "answers.npy", answers + 1)
    assert "cpu does not give the recorded answers" in run(bundle, "--results", "b", *QUICK, code=1).stderr


@pytest.mark.parametrize("processor", ["cortex-a76", "max"])
def test_cross_built_answers_are_the_hosts(model, tmp_path, processor):
    if not (CROSS / "pykd-run").is_file() or not shutil.which("qemu-aarch64-static"):
        pytest.skip("no cross-built pykd-run: run make cross")
    command("bundle", model, "-o", tmp_path / "a", "--binaries", CROSS)
    done = run(tmp_path / "a", "--results", "arm", *QUICK, PYKD_EMULATOR=QEMU, QEMU_CPU=processor)
    assert "bin/aarch64/pykd-run" in done.stderr
    assert checked(tmp_path / "a", "arm")["machine"]["isa"] == "neon"


@pytest.mark.parametrize("name", ["pykd-run", "libpykd.so"])
def test_cross_built_files_fit_jetpack_6(name):
    if not (CROSS / name).is_file():
        pytest.skip(f"no cross-built {name}: run make cross")
    listed = subprocess.run(
        ["readelf", "-W", "--version-info", CROSS / name], check=True, capture_output=True, text=True
    )
    needed = re.findall(r"Name: (GLIBC|GLIBCXX)_([\d.]+)", listed.stdout)
    most = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30)}  # of Ubuntu 22.04
    assert {library for library, _ in needed} == most.keys()
    assert [each for each in needed if tuple(map(int, each[1].split("."))) > most[each[0]]] == []
