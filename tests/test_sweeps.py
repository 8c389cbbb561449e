"""Sweeps: who chooses what, that held-out rows decide, and that they go on as if nothing had happened."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
from test_cli import DIGITS, TINY, pykd, said

from pykd import runs, sweeps
from pykd.config import ConfigError
from pykd.errors import Interrupted

OVER = ["--over=method.alpha=0.1:0.9", "--over=method.sigma=0.01:2:log"]
SWEEP = ["sweep", DIGITS, *TINY, *OVER, "--set=student.training.lr=0.05", "--trials=4", "--jobs=1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYKD_DATA", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of four trials."""
    out = tmp_path_factory.mktemp("finished") / "sweep"
    result = pykd(*SWEEP, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def record(out):
    return json.loads(Path(out, "sweep.json").read_text())


def chosen(out):
    return [(each["values"], each["objective"]) for each in record(out)["trials"]]


def test_the_record_says_what_the_runs_found(finished):
    out, result = finished
    found = record(out)
    assert found["space"] == {
        "method.alpha": {"low": 0.1, "high": 0.9, "log": False, "int": False},
        "method.sigma": {"low": 0.01, "high": 2.0, "log": True, "int": False},
    }
    assert [each["number"] for each in found["trials"]] == [0, 1, 2, 3]
    for each in found["trials"]:
        config = runs.stored(out / each["run"])
        assert {f"method.{key}": config.method[key] for key in ("alpha", "sigma")} == each["values"]
        assert config.baselines == [] and config.seed == 0
        *_, student = json.loads((out / each["run"] / "summary.json").read_text())["rows"]
        assert each["objective"] == each["holdout_accuracy"] == student["holdout_accuracy"]
    best = max(each["objective"] for each in found["trials"])
    assert found["trials"][found["best"]]["objective"] == best
    assert result.stdout == (out / "sweep.md").read_text() == f"{sweeps.markdown(found)}\n"
    assert "(best)" in result.stdout.splitlines()[4]
    assert (out / "sweep.svg").read_bytes().startswith(b"<?xml")
    stages = [
        {json.loads(line)["stage"] for line in (out / each["run"] / "metrics.jsonl").read_text().splitlines()}
        for each in found["trials"]
    ]
    assert stages == [{"teacher", "student"}, *([{"student"}] * 3)], "one teacher is trained"


def test_a_sweep_that_is_broken_off_goes_on_as_one_that_is_not(finished, monkeypatch):
    numbers, distill = itertools.count(), runs.distill

    def interrupted(config, folder, **options):
        if next(numbers) == 2:
            raise Interrupted(15, folder)
        return distill(config, folder, **options)

    monkeypatch.setattr(runs, "distill", interrupted)
    assert "is saved: continue with --resume" in said(pykd(*SWEEP, "--out=sweep"), 143)
    assert [each["objective"] is None for each in record("sweep")["trials"]] == [False, False, True]
    assert "unfinished" in Path("sweep/sweep.md").read_text()
    again = pykd(*SWEEP, "--out=sweep", "--resume")
    assert again.exit_code == 0, again.output
    assert next(numbers) == 5, "no trial was done twice"
    assert chosen("sweep") == chosen(finished[0])


def test_a_finished_sweep_goes_on_with_more_trials(finished):
    shutil.copytree(finished[0], "sweep")
    summary = Path("sweep/trial-0000/seed-0/summary.json")
    before = summary.stat().st_mtime_ns
    result = pykd(*SWEEP, "--out=sweep", "--resume", "--trials=5")
    assert result.exit_code == 0, result.output
    assert chosen("sweep")[:4] == chosen(finished[0]) and len(chosen("sweep")) == 5
    assert summary.stat().st_mtime_ns == before
    assert set(record("sweep")["importance"]) == {"method.alpha", "method.sigma"}


def test_a_folder_of_another_sweep_is_refused(finished):
    shutil.copytree(finished[0], "sweep")
    before = Path("sweep/sweep.json").read_text()
    words = [*SWEEP, "--out=sweep", "--resume"]
    assert "sampler = 'tpe', not 'random'" in said(pykd(*words, "--sampler=random"), 1)
    assert "settings.student.training.lr = 0.05, not 0.5" in said(pykd(*words, "--set=student.training.lr=0.5"), 1)
    assert "objective.key = 'holdout_accuracy', not 'nonzeros'" in said(pykd(*words, "--minimize=nonzeros"), 1)
    assert "sweep is not empty: continue it with --resume" in said(pykd(*SWEEP, "--out=sweep"), 1)
    assert Path("sweep/sweep.json").read_text() == before
    trials = record("sweep")["trials"]
    forged = [
        before[:100],
        "[" * 100_000,
        *(
            json.dumps({**json.loads(before), "trials": [{**trials[0], **change}, *trials[1:]]})
            for change in (
                {"values": {**trials[0]["values"], "method.alpha": 7}},
                {"values": {}},
                {"objective": float("nan")},
                {"holdout_accuracy": None},
                {"number": 1},
                {"run": "../elsewhere/seed-0"},
            )
        ),
    ]
    for text in forged:
        Path("sweep/sweep.json").write_text(text)
        assert "sweep.json cannot be read" in said(pykd(*words), 1), text[-300:]
    Path("sweep/sweep.json").unlink()
    assert "holds no sweep: leave --resume out" in said(pykd(*words), 1)


def test_a_grid_tries_all_and_the_smallest_that_is_good_enough_is_best():
    tiny = [word for word in TINY if "student.widths" not in word]
    tiny.append("--set=method={name: student_alone}")
    words = ["sweep", DIGITS, *tiny, "--over=student.widths=[4],[16, 4],[16]", "--over=student.training.lr=0.001,0.1"]
    result = pykd(*words, "--sampler=grid", "--minimize=file_bytes", "--min-accuracy=0.3", "--jobs=1", "--out=sweep")
    assert result.exit_code == 0, result.output
    found = record("sweep")
    assert [list(each["values"].values()) for each in found["trials"]] == [
        [widths, lr] for widths in ([4], [16, 4], [16]) for lr in (0.001, 0.1)
    ]
    good = [each for each in found["trials"] if each["holdout_accuracy"] >= 0.3]
    assert 0 < len(good) < 6
    assert found["best"] == min(good, key=lambda each: each["objective"])["number"]
    row = json.loads(Path("sweep", found["trials"][0]["run"], "summary.json").read_text())["rows"][-1]
    assert found["trials"][0]["objective"] == row["file_bytes"]


def test_settings_that_do_not_go_together_fail_their_trial_alone(monkeypatch):
    distill = runs.distill

    def refused(config, folder, **options):
        if config.method["alpha"] == 0.1:
            raise ConfigError("not with this alpha")
        return distill(config, folder, **options)

    monkeypatch.setattr(runs, "distill", refused)
    words = ["sweep", DIGITS, *TINY, "--over=method.alpha=0.1,0.5,0.9", "--sampler=grid", "--jobs=1", "--out=sweep"]
    result = pykd(*words)
    assert result.exit_code == 0, result.output
    assert "1 of 3 trials failed, the first: not with this alpha; --resume tries them again" in result.stderr
    assert [each["failed"] for each in record("sweep")["trials"]] == ["not with this alpha", None, None]
    assert Path("sweep/trial-0001/seed-0/teacher.safetensors").exists(), "the next one trains the teacher"
    monkeypatch.setattr(runs, "distill", distill)
    assert pykd(*words, "--resume").exit_code == 0


def test_a_trial_that_fails_is_told_and_tried_again_and_cannot_be_the_best():
    words = ["sweep", DIGITS, *TINY, "--set=student.training.optimizer=sgd", "--over=student.training.lr=1e30,0.01"]
    words += ["--sampler=grid", "--jobs=1", "--out=sweep"]
    for more in ([], ["--resume"]):
        result = pykd(*words, *more)
        assert result.exit_code == 0, result.output
        assert "1 of 2 trials failed, the first: student: the loss is not finite" in result.stderr
        found = record("sweep")
        assert found["best"] == 1 and found["trials"][0]["objective"] is None
        assert "failed" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["--over=method.alhpa=0.1:0.9"], "unknown key 'method.alhpa'; did you mean 'alpha'?", 2),
        (["--over=student.wdths=[4],[8]"], "unknown key 'student.wdths'; did you mean 'widths'?", 2),
        (["--over=student.training.epcohs=1:5:int"], "did you mean 'epochs'?", 2),
        (["--over=method.alpha=0.9:0.1"], "--over method.alpha=0.9:0.1: the first number should be below", 2),
        (["--over=method.alpha=0:inf"], "write LOW:HIGH", 2),
        (["--over=method.alpha=0.1:0.9:lgo"], "write LOW:HIGH, and behind it :log or :int or both", 2),
        (["--over=method.sigma=0:2:log"], "a logarithmic range begins above 0", 2),
        (["--over=student.training.epochs=1.5:5:int"], "a range of whole numbers has whole ends", 2),
        (["--over=student.training.epochs=1:5"], "student.training.epochs", 2),
        (["--over=method.alpha=0.5:1.5"], "alpha", 2),
        (["--over=method.noise_kind=a,b"], "noise_kind", 2),
        (["--over=method.alpha"], "write KEY=LOW:HIGH or KEY=VALUE,VALUE", 2),
        (["--over=method.alpha="], "--over method.alpha", 2),
        (["--over==1:2"], "write KEY=LOW:HIGH or KEY=VALUE,VALUE", 2),
        (["--over=student.training.lr=0.1,1,1.0"], "a value stands there twice", 2),
        ([*OVER, OVER[0]], "method.alpha is varied already", 2),
        ([*OVER, "--over=method={name: kd},{name: fitnet}"], "method.alpha is varied already", 2),
        (["--over=seed=0:9:int"], "--over seed=0:9:int: seed says which rows are held out", 2),
        (["--over=data.holdout=0.1:0.5"], "data.holdout says which rows are held out", 2),
        (["--over=data.root=a,b"], "data.root decides nothing about a student", 2),
        (["--over=method={name: kd},{name: fitnet}", "--set=method.alpha=1"], "--set method.alpha: it is what the", 2),
        ([*OVER, "--set=method.alpha=0.5"], "--set method.alpha: it is what the sweep varies", 2),
        ([*OVER, "--sampler=grid"], "a grid takes choices, e.g. method.alpha=0.1,0.5", 2),
        ([*OVER, "--maximize=accuracy"], "test rows are for no choice; did you mean 'holdout_accuracy'?", 2),
        ([*OVER, "--minimize=file_byte"], "did you mean 'file_bytes'?", 2),
        ([*OVER, "--maximize=bytes", "--minimize=bytes"], "give either --maximize or --minimize", 2),
        ([*OVER, "--resume"], "runs holds no unfinished run of sweep-noisy_teacher-digits", 1),
        ([*OVER, "--set=data.name=mnist"], "MNIST is not in data: set data.root or PYKD_DATA", 1),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(words, sentence, code):
    assert sentence in said(pykd("sweep", DIGITS, *words), code)
    assert not Path("runs").exists()


def test_without_optuna_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert said(pykd(*SWEEP), 1) == "pykd: optuna is missing: run pip install 'pykd[sweep]'"


def test_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "a sweep is one process" in said(pykd(*SWEEP), 2)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("0.1:0.9", [0.1, 0.9]),
        ("1e-4:.1:log", [1e-4, 0.1]),
        ("8:512:int:log", [8, 512]),
        ("-1:1", [-1.0, 1.0]),
        ("true,false", [True, False]),
        ("[8],[8, 8]", [[8], [8, 8]]),
        ("adam,sgd", ["adam", "sgd"]),
    ],
)
def test_axes(text, ends):
    axis = sweeps.Axis.read("key", text)
    assert list(axis.ends) == ends
    assert [axis.value(axis.parameter(each)) for each in ends] == ends


def test_values_have_six_digits_and_stay_within_their_range():
    axis = sweeps.Axis.read("key", "0.12345678:0.12345679")
    assert axis.value(0.123456785) == pytest.approx(0.12345678, abs=1e-8)
    assert axis.low <= axis.value(0.123456785) <= axis.high
    assert sweeps.Axis.read("key", "0:1").value(1 / 3) == 0.333333
    with pytest.raises(ConfigError, match="write key=value,value"):
        sweeps.Axis.read("key", "")
