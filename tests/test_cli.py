"""The command line: what it prints, its exit codes, and that hostile input ends in one sentence."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pykd import grids
from pykd.cli import app

ROOT = Path(__file__).parents[1]
DIGITS = "noisy_teacher-digits"
TINY = [
    f"--set={setting}"
    for setting in (
        "teacher.widths=[8]",
        "teacher.training.epochs=1",
        "student.widths=[4]",
        "student.training.epochs=1",
        "student.training.batch_size=128",
        "teacher.training.batch_size=128",
    )
]


def pykd(*words: str | Path):
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result, code: int) -> str:
    """The one sentence on standard error of a command that ended with ``code``."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("pykd: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def accuracies(text: str) -> list[str]:
    return re.findall(r"\d+\.\d\d%", text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYKD_DATA", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the tiny recipe."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = pykd("distill", DIGITS, *TINY, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_names_every_command(words):
    result = pykd(*words)
    commands = "distill evaluate export run bench bundle compare reproduce sweep report recipes doctor"
    assert all(f"  {command}  " in result.output for command in commands.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"], ["distill", "nope"], ["distill", "-h"]])
def test_help_and_mistakes_need_no_torch(words):
    code = "import sys\nfrom pykd.cli import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_recipes_are_listed():
    result = pykd("recipes")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        *(f"cross_distillation-{name}" for name in ("cifar10", "digits", "mnist", "mnist_vgg")),
        *(f"factor_transfer-{name}" for name in ("cifar10", "cifar100", "digits", "mnist")),
        *(f"noisy_teacher-{name}" for name in ("cifar10", "digits", "imagefolder", "mnist", "svhn")),
        "sparse_vd-mnist",
        *(f"variational_student-{name}" for name in ("cifar10", "digits", "mnist")),
    ]


def test_version_is_the_package_s():
    assert re.fullmatch(r"pykd \d+\.\d+\.\d+\S*\n", pykd("--version").stdout)


def test_doctor_says_what_is_here():
    result = pykd("doctor")
    assert result.exit_code == 0
    assert all(topic in result.stdout for topic in ("torch", "engine", "instruction set", "CUDA", "MNIST", "threads"))


def test_doctor_says_how_to_mend_the_operators(monkeypatch):
    def load():
        raise ImportError("pykd was compiled for torch 1: rebuild it")

    monkeypatch.setattr("pykd._extension.load", load)
    result = pykd("doctor")
    assert result.exit_code == 1
    assert "rebuild it" in result.stdout


def test_a_missing_package_is_named_with_the_way_to_get_it():
    code = "import sys; sys.modules['typer'] = None; import pykd.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "pykd: typer is missing: run pip install 'pykd[train]'\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["distill", "noisy_teacher-digit"], "did you mean 'noisy_teacher-digits'?"),
        (["distill", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["distill", DIGITS, "--set", "student.training.epcohs=1"], "did you mean 'epochs'?"),
        (["distill", DIGITS, "--set", "method.sigm=1"], "unknown key 'method.sigm'; did you mean 'sigma'?"),
        (["distill", DIGITS, "--set", "method.sigma=-1"], "method: sigma should be finite and not negative, got -1"),
        (["distill", DIGITS, "--set", "method.sigma=.nan"], "method: sigma should be finite"),
        (["distill", DIGITS, "--set", "method.alpha=1.5"], "method: alpha should be in [0, 1], got 1.5"),
        (["distill", DIGITS, "--set", "method.name=noisy_techer"], "did you mean 'noisy_teacher'?"),
        (["distill", DIGITS, "--set", "student.name=mpl"], "student.name: unknown name 'mpl'; did you mean 'mlp'?"),
        (["distill", DIGITS, "--set", "student.width=[3]"], "unknown key 'student.width'; did you mean 'widths'?"),
        (["distill", DIGITS, "--set", "student.widths=[0]"], "student: widths and classes should be positive"),
        (["distill", DIGITS, "--set", "student.widths=[1000000000000]"], "student: "),
        (["distill", DIGITS, "--set", "student={name: lenet5}"], "lenet5 needs images of at least 12x12 pixels"),
        (["distill", DIGITS, "--seed", "-1"], "seed should be greater than or equal to 0, got -1"),
        (["compare", DIGITS, "--grid", "method.sigma"], "write key=value,value"),
        (["compare", DIGITS, DIGITS], "would both be called"),
        (["compare", DIGITS, "noisy_teacher-mnits"], "did you mean 'noisy_teacher-mnist'?"),
        (["compare", DIGITS, "--set", "baselines=[alon]"], "baselines: unknown name 'alon'; did you mean 'alone'?"),
    ],
)
def test_usage_errors_are_one_sentence_and_leave_nothing(words, sentence, here):
    assert sentence in said(pykd(*words), 2)
    assert not list(here.rglob("*.*"))


@pytest.mark.parametrize(
    "words",
    [["dstil"], ["distill"], ["distill", DIGITS, "--sed", "1"], ["distill", DIGITS, "--device", "tpu"],
     ["compare", DIGITS, "--seeds", "0"], ["distill", DIGITS, "--seed", "x"], ["evaluate"]],
)  # fmt: skip
def test_wrong_words_are_usage_errors(words, here):
    result = pykd(*words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["distill", "noisy_teacher-mnist"], "MNIST is not in data: set data.root or PYKD_DATA"),
        (["distill", DIGITS, "--set", "data.name=imagefolder"], "data/train is missing: set data.root or PYKD_DATA"),
        (["distill", DIGITS, "--resume"], "runs holds no unfinished run of noisy_teacher-digits"),
        (["distill", DIGITS, *TINY, "--set", "teacher.weights=no.safetensors"], "cannot read no.safetensors"),
        (["distill", DIGITS, *TINY, "--set", "baselines=[alon]"], "did you mean 'alone'?"),
        (["distill", DIGITS, *TINY, "--out", "/proc/nowhere/run"], "cannot write /proc/nowhere/run"),
        (["evaluate", "."], ". is not a run folder: it holds no config.yaml"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["compare", DIGITS, "--resume"], "runs holds no unfinished run of compare-noisy_teacher-digits"),
    ],
)
def test_failed_work_is_one_sentence(words, sentence, here):
    assert sentence in said(pykd(*words), 1)


def test_an_unforeseen_failure_is_one_sentence_too(monkeypatch):
    def recipes():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("pykd.config.recipes", recipes)
    assert said(pykd("recipes"), 1) == "pykd: RuntimeError: first line; run again with --debug for the traceback"


def test_debug_shows_the_traceback_before_and_after_the_command(here):
    for words in (["--debug", "evaluate", "nowhere"], ["evaluate", "nowhere", "--debug"]):
        result = pykd(*words)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert "pykd: nowhere is not a run folder" in result.stderr


def test_distill_fills_the_run_folder_and_prints_the_table(finished):
    out, result = finished
    files = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    files |= {f"{name}.safetensors" for name in ("teacher", "alone", "clean", "student")}
    assert files <= {path.name for path in out.iterdir()}
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert accuracies(result.stdout) == [f"{row['accuracy']:.2%}" for row in rows]
    assert len(rows) == 4
    assert result.stdout.count("\n") == 5


def test_evaluate_finds_the_same_accuracies(finished):
    out, result = finished
    again = pykd("evaluate", out)
    assert again.exit_code == 0, again.output
    assert accuracies(again.stdout) == accuracies(result.stdout)
    one = pykd("evaluate", out / "clean.safetensors")
    assert accuracies(one.stdout) == accuracies(result.stdout)[2:3]


def test_evaluate_refuses_what_is_no_run_s_weights(finished, tmp_path):
    out, _ = finished
    (tmp_path / "config.yaml").write_text((out / "config.yaml").read_text())
    assert "holds no weights yet" in said(pykd("evaluate", tmp_path), 1)
    (tmp_path / "student.safetensors").write_bytes((out / "student.safetensors").read_bytes()[:-9])
    assert "student.safetensors" in said(pykd("evaluate", tmp_path), 1)
    (tmp_path / "student.safetensors").write_bytes((out / "teacher.safetensors").read_bytes())
    assert "belongs to another network" in said(pykd("evaluate", tmp_path), 1)
    assert "is none of a run's weights" in said(pykd("evaluate", tmp_path / "config.yaml"), 2)
    (tmp_path / "config.yaml").write_bytes(b"\x00\xff")
    assert "not valid YAML" in said(pykd("evaluate", tmp_path), 2)


def test_a_finished_run_is_kept(finished):
    out, result = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert "continue it with --resume or give another --out" in said(pykd("distill", DIGITS, "--out", out), 1)
    resumed = pykd("distill", DIGITS, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout == result.stdout
    words = ["distill", DIGITS, "--out", out, "--resume", "--set", "method.sigma=0.25"]
    assert "method.sigma" in said(pykd(*words), 1)
    assert "data.name digits, not mnist" in said(pykd("distill", "noisy_teacher-mnist", "--out", out, "--resume"), 1)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_teacher_can_be_loaded(finished, here):
    out, result = finished
    weights = here / "weights.safetensors"
    weights.write_bytes((out / "teacher.safetensors").read_bytes())
    loaded = pykd("distill", DIGITS, *TINY, f"--set=teacher.weights={weights}", "--set=baselines=[]", "--out", "run")
    assert loaded.exit_code == 0, loaded.output
    assert accuracies(loaded.stdout)[0] == accuracies(result.stdout)[0]
    assert len(accuracies(loaded.stdout)) == 2
    weights.unlink()
    assert accuracies(pykd("evaluate", "run").stdout) == accuracies(loaded.stdout)


def test_compare_makes_one_table_and_goes_on_where_it_stood(here):
    words = ["compare", DIGITS, *TINY, "--grid", "method.sigma=0.5,0", "--out", "grid"]
    first = pykd(*words, "--seeds", "2")
    assert first.exit_code == 0, first.output
    record = json.loads(Path("grid/table.json").read_text())
    rows = record["rows"]
    assert (record["recipes"], record["grid"]) == ([DIGITS], ["method.sigma=0.5,0"])
    assert record["changes"] == [word.removeprefix("--set=") for word in TINY]
    assert [row["n"] for row in rows] == [2] * 8
    student = rows[3]
    runs = [json.loads(Path(f"grid/{student['run']}/seed-{seed}/summary.json").read_text()) for seed in (0, 1)]
    values = [run["rows"][3]["accuracy"] for run in runs]
    assert student["accuracy"]["values"] == values
    assert student["accuracy"]["mean"] == pytest.approx(statistics.fmean(values))
    assert student["accuracy"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert first.stdout == Path("grid/table.md").read_text()
    noise_free = {row["name"]: row for row in rows if row["run"].endswith("sigma=0")}
    assert noise_free["student"]["accuracy"]["values"] == noise_free["clean"]["accuracy"]["values"]

    assert "continue it with --resume" in said(pykd(*words), 1)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("summary.json")}
    Path(f"grid/{student['run']}/seed-1/summary.json").unlink()
    again = pykd(*words, "--seeds", "3", "--resume")
    assert again.exit_code == 0, again.output
    grown = json.loads(Path("grid/table.json").read_text())["rows"]
    assert [row["seeds"] for row in grown] == [[0, 1, 2]] * 8
    assert grown[3]["accuracy"]["values"][:2] == values
    changed = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert [path.parent.name for path in changed] == ["seed-1"]


def stages(run: str) -> set[str]:
    return {json.loads(line)["stage"] for line in Path(run, "metrics.jsonl").read_text().splitlines()}


def test_equal_teachers_are_trained_once(here):
    words = ["compare", DIGITS, *TINY, "--set=baselines=[]", "--seeds=1", "--out=grid", "--set=data.root=/secret"]
    first = pykd(*words, "--grid", "data.per_class=3,5")
    assert first.exit_code == 0, first.output
    run = f"grid/{DIGITS}+data.per_class={{}}/seed-0"
    assert [stages(run.format(rows)) for rows in (3, 5)] == [{"teacher", "student"}, {"student"}]
    files = [Path(run.format(rows), "teacher.safetensors").read_bytes() for rows in (3, 5)]
    assert files[0] == files[1]
    assert "/secret" not in Path("grid/table.json").read_text() + first.stdout

    before = {path: path.stat().st_mtime_ns for path in here.rglob("summary.json")}
    again = pykd(*words, "--grid", "data.per_class=7,5,3", "--resume")
    assert again.exit_code == 0, again.output
    assert stages(run.format(7)) == {"student"}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_different_teachers_are_not_shared(here):
    grid = grids.plan([DIGITS], ["teacher.widths=[8],[9]", "data.holdout=0.1,0.2", "method.sigma=0,1"], [], 2)
    weights = [config.teacher.weights for _, config in grids.with_shared_teachers(grid, here)]
    own = [None, None]
    expected = []
    for variant, _ in grid[::4]:
        expected += [*own, *(str(here / variant / f"seed-{seed}" / "teacher.safetensors") for seed in (0, 1))]
    assert weights == expected


def test_compare_draws_what_the_runs_found(here, monkeypatch):
    words = ["compare", "variational_student-digits", *TINY, "--set=baselines=[kd]", "--seeds=1", "--out=grid"]
    result = pykd(*words)
    assert result.exit_code == 0, result.output
    student = "variational_student-digits-student.svg"
    figures = {"error-bytes.svg": "64x", f"log-alpha-{student}": "threshold", f"sparsity-{student}": "kept, %"}
    assert {path.name for path in Path("grid").glob("*.svg")} <= figures.keys()
    for name in ("error-bytes.svg", f"log-alpha-{student}"):
        assert figures[name] in Path("grid", name).read_text()
    assert "times smaller" in result.stdout

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = pykd(*words, "--resume")
    assert without.exit_code == 0
    assert "figures need matplotlib: run pip install 'pykd[report]'" in without.stderr.splitlines()
    assert without.stdout == result.stdout


def test_a_failed_run_does_not_end_the_grid(here):
    words = ["--set=student.training.optimizer=sgd", "--grid=student.training.lr=1e30,1e-3", "--seeds=1"]
    result = pykd("compare", DIGITS, *TINY, *words, "--out", "grid")
    assert result.exit_code == 1
    assert "1 of 2 runs failed" in result.stderr
    assert {row["run"] for row in json.loads(Path("grid/table.json").read_text())["rows"]} == {
        "noisy_teacher-digits+student.training.lr=0.001"
    }


def test_an_interrupted_run_is_saved_and_found_again(here):
    command = [sys.executable, "-m", "pykd", "distill", DIGITS]
    options = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    last = 0
    for number, words in (
        (signal.SIGINT, [*TINY, "--set=teacher.training.epochs=100000"]),
        (signal.SIGTERM, ["--resume"]),
    ):
        with subprocess.Popen([*command, *words], **options) as process:
            for line in process.stderr:
                if epoch := re.match(r"teacher: epoch (\d+)/100000", line):
                    break
            process.send_signal(number)
            rest = process.stderr.read()
        assert process.returncode == 128 + number, rest
        assert "continue with --resume" in rest.splitlines()[-1]
        assert int(epoch[1]) > last
        last = int(epoch[1])
    (run,) = Path("runs").iterdir()
    assert run.name.startswith(f"{DIGITS}-")


def test_several_processes_must_share_a_folder(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert "give --out" in said(pykd("distill", DIGITS), 2)


def test_output_may_be_cut_off():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; sys.argv[1:] = ['recipes']; from pykd.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
