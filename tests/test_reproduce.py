"""Reproductions: which runs they are, their paired figures and verdicts, and that they go on where they stood."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from test_cli import DIGITS, TINY, pykd, said

from pykd import reproduce
from pykd.config import ConfigError

QUICK = ["reproduce", "noisy_teacher", "--quick", *TINY]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYKD_DATA", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick reproduction."""
    out = tmp_path_factory.mktemp("finished") / "grid"
    result = pykd(*QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def plan(seeds, data="mnist", **options):
    return reproduce.runs("noisy_teacher", [data], [], seeds=seeds, out=Path("out"), **options)


def summaries(test, holdout=None):
    """Those of runs whose student has these errors, seed by seed."""
    return [
        {
            "seed": seed,
            "rows": [
                {"name": name, "accuracy": 1 - error, "holdout_accuracy": 1 - (holdout or test)[seed], "seconds": 1.0}
                for name in ("teacher", "alone", "student")
            ],
        }
        for seed, error in enumerate(test)
    ]


def record(runs, quick=False):
    return reproduce.record("noisy_teacher", runs, quick=quick, environment={"pykd": "1", "argv": ["/secret"]})


def row(of, name, data="mnist"):
    (found,) = [row for row in of["data"][data]["rows"] if row["name"] == name]
    return found


def test_every_variant_learns_from_its_seed_s_teacher_and_differs_by_what_its_row_says():
    runs = plan(5)
    assert len({folder for folder, _ in runs}) * 5 == len(runs) == 105
    assert {folder for folder, _ in runs[:5]} == {"mnist/clean"}, "teachers are trained first"
    for folder, config in runs:
        if folder == "mnist/clean":
            assert config.teacher.weights is None and config.baselines == ["alone"]
        else:
            assert config.teacher.weights == f"out/mnist/clean/seed-{config.seed}/teacher.safetensors"
            assert config.baselines == []
    recipe = runs[0][1]
    kept = ("data", "student", "checkpoint_seconds", "cache_logits")
    changed = [folder for folder, each in runs if any(getattr(each, key) != getattr(recipe, key) for key in kept)]
    assert set(changed) == {"mnist/dropout"}
    methods = {json.dumps(config.method) + str(config.student) + str(len(config.more_teachers)) for _, config in runs}
    assert len(methods) == 21, "no two variants are the same run"


def test_several_teachers_are_other_seeds_and_stay_when_seeds_are_added():
    several = {seeds: [c for folder, c in plan(seeds) if folder.endswith("teachers,all-noisy")] for seeds in (3, 5)}
    assert [config.more_teachers for config in several[3]] == [config.more_teachers for config in several[5][:3]]
    for config in several[5]:
        weights = {config.teacher.weights, *(teacher.weights for teacher in config.more_teachers)}
        assert len(weights) == reproduce.TEACHERS
        assert weights <= {f"out/mnist/clean/seed-{seed}/teacher.safetensors" for seed in range(5)}
        assert {teacher.name for teacher in config.more_teachers} == {config.teacher.name}
    assert not [config for _, config in plan(2) if config.more_teachers]


def test_quick_is_short_unless_asked_otherwise():
    (_, config), *_ = runs = plan(2, "digits", quick=True)
    assert len(runs) == 8
    assert (config.teacher.training.epochs, config.student.training.epochs) == (6, 12)
    asked = reproduce.runs("noisy_teacher", ["digits", "mnist"], ["student.training.epochs=3"], seeds=1, out=Path())
    assert {config.student.training.epochs for _, config in asked} == {3}


def test_intervals_are_those_of_student_s_paired_test():
    clean, ours = [0.03, 0.02, 0.04, 0.03], [0.02, 0.021, 0.031, 0.03]
    of = record({"mnist/clean": summaries(clean), f"mnist/{reproduce.CELL}": summaries(ours)})
    found = row(of, reproduce.CELL)["fewer_errors"]
    expected = ttest_rel(clean, ours).confidence_interval(0.95)
    mean = statistics.fmean(clean)
    assert found["seeds"] == 4
    assert found["points"] == pytest.approx(mean - statistics.fmean(ours))
    assert found["points_interval"] == pytest.approx(list(expected))
    assert found["relative"] == pytest.approx(found["points"] / mean)
    assert found["relative_interval"] == pytest.approx([each / mean for each in expected])
    assert "/secret" not in json.dumps(of)


def test_only_seeds_that_both_have_are_compared():
    of = record({"mnist/clean": summaries([0.02, 0.04]), "mnist/dropout": summaries([0.01, 0.02, 0.9])})
    found = row(of, "dropout")["fewer_errors"]
    assert (found["seeds"], found["points"]) == (2, pytest.approx(0.015))


def test_one_seed_gives_no_interval_and_no_verdict():
    of = record({"mnist/clean": summaries([0.02]), f"mnist/{reproduce.CELL}": summaries([0.01])})
    assert row(of, reproduce.CELL)["fewer_errors"]["points_interval"] is None
    (claim,) = of["data"]["mnist"]["claims"]
    assert claim["verdict"] == "open: an interval needs two seeds"
    assert "+50.0 % relative" in reproduce.markdown(of)


def test_no_errors_at_all_have_no_relative_reduction():
    of = record({"mnist/clean": summaries([0.0, 0.0]), f"mnist/{reproduce.CELL}": summaries([0.0, 0.01])})
    found = row(of, reproduce.CELL)["fewer_errors"]
    assert found["relative"] is None and found["points"] == pytest.approx(-0.005)
    assert of["data"]["mnist"]["claims"][0]["verdict"].startswith("open")
    assert reproduce.CELL.split(",")[0].replace("=", " ") in reproduce.markdown(of)


def test_the_best_cell_is_chosen_on_the_held_out_rows():
    of = record(
        {
            "mnist/clean": summaries([0.03, 0.03]),
            "mnist/alpha=0.4,sigma=0.1": summaries([0.01, 0.01], holdout=[0.03, 0.03]),
            f"mnist/{reproduce.CELL}": summaries([0.02, 0.02], holdout=[0.02, 0.02]),
            "mnist/dropout": summaries([0.0, 0.0]),
        }
    )
    assert of["data"]["mnist"]["best"] == reproduce.CELL
    assert of["data"]["mnist"]["claims"][0]["ours"]["points"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.80, 0.81, 0.79], "reached"),
        ([0.95, 0.949, 0.951], "not reached: less is seen"),
        ([0.90, 0.87, 0.93], "not reached: less is seen, but the interval holds the figure"),
        ([1.01, 0.99, 1.0], "no effect seen: the interval holds 0"),
        ([0.7, 1.0, 1.1], "no effect seen: the interval holds 0 and the published figure"),
        ([1.2, 1.21, 1.19], "not reached: the opposite is seen"),
    ],
)
def test_verdicts_on_a_published_figure(ours, verdict):
    clean = [0.02, 0.02, 0.02]
    runs = {"mnist/clean": summaries(clean), f"mnist/{reproduce.CELL}": summaries([0.02 * each for each in ours])}
    (claim,) = record(runs)["data"]["mnist"]["claims"]
    assert (claim["published"], claim["verdict"]) == ("up to 11.3 % relative, read as: of the error", verdict)
    assert record(runs, quick=True)["data"]["mnist"]["claims"][0]["verdict"] == "quick: not evidence"


def test_claims_compare_the_variants_they_name_on_the_data_they_are_about():
    errors = {variant.name: [0.2, 0.21] for variant in reproduce.NOISY_TEACHER}
    errors |= {f"alpha=0.8,sigma={sigma}": [0.1 + sigma / 10, 0.11] for sigma in (0.1, 0.3, 0.9)}
    for data, about in {"mnist": 5, "svhn": 5, "cifar10": 7, "imagefolder": 7, "digits": 4}.items():
        of = record({f"{data}/{name}": summaries(each) for name, each in errors.items()})["data"][data]
        assert len(of["claims"]) == about
    of = record({f"cifar10/{name}": summaries(each) for name, each in errors.items()})["data"]["cifar10"]
    (alpha,) = [claim for claim in of["claims"] if "higher alpha" in claim["claim"]]
    assert alpha["ours"]["points"] == pytest.approx(statistics.fmean([0.2 - 0.1 - 0.13 / 3, 0.1]))
    (thesis,) = [claim for claim in of["claims"] if "thesis" in claim["claim"]]
    assert thesis["ours"]["points"] == pytest.approx(0.095)
    assert thesis["verdict"] == "reached"


def test_the_tables_say_what_the_runs_found(finished):
    out, result = finished
    assert result.stdout == (out / "reproduce.md").read_text()
    assert "quick: not evidence" in result.stdout
    of = json.loads((out / "reproduce.json").read_text())
    assert reproduce.markdown(of) + "\n" == result.stdout
    assert len(of["data"]["digits"]["rows"]) == 6
    for variant in ("clean", reproduce.CELL, "noise-on-student"):
        runs = [json.loads((out / f"digits/{variant}/seed-{seed}/summary.json").read_text()) for seed in (0, 1)]
        assert row(of, variant, "digits")["error"] == {
            str(n): 1 - run["rows"][-1]["accuracy"] for n, run in enumerate(runs)
        }


def test_a_row_is_a_run_of_the_recipe(finished):
    out, _ = finished
    of = json.loads((out / "reproduce.json").read_text())
    epochs = ["--set=teacher.training.epochs=1", "--set=student.training.epochs=1"]
    changes = [f"--set={change}" for change in row(of, reproduce.CELL, "digits")["set"]]
    again = pykd("distill", DIGITS, *TINY, *epochs, *changes, "--set=baselines=[]", "--seed", "1", "--out", "again")
    assert again.exit_code == 0, again.output
    for name in ("teacher", "student"):
        file = f"{name}.safetensors"
        assert Path("again", file).read_bytes() == (out / "digits" / reproduce.CELL / "seed-1" / file).read_bytes()


def test_finished_runs_are_not_repeated(finished):
    out, result = finished
    assert "continue it with --resume" in said(pykd(*QUICK, "--out", out), 1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    again = pykd(*QUICK, "--out", out, "--resume")
    assert again.stdout == result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}


def test_an_interrupted_grid_goes_on_to_the_same_figures(finished):
    code = f"""
import os, signal
from pykd import cli
runs, distill = iter(range(8)), cli._distill
def interrupted(*arguments, **options):
    if next(runs) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return distill(*arguments, **options)
cli._distill = interrupted
cli.app({[*QUICK, "--out", "grid"]})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr
    table = json.loads(Path("grid/reproduce.json").read_text())
    assert len(row(table, "clean", "digits")["error"]) == 2
    again = pykd(*QUICK, "--out", "grid", "--resume")
    assert again.exit_code == 0, again.output
    whole = json.loads((finished[0] / "reproduce.json").read_text())
    table = json.loads(Path("grid/reproduce.json").read_text())
    for variant in ("teacher", "alone", "clean", reproduce.CELL, "noise-on-student"):
        assert row(table, variant, "digits")["error"] == row(whole, variant, "digits")["error"]


def test_several_teachers_are_loaded_never_trained(monkeypatch):
    wanted = ("clean", "teachers,one-noisy", "teachers,clean")
    variants = [variant for variant in reproduce.NOISY_TEACHER if variant.name in wanted]
    monkeypatch.setitem(reproduce.PAPERS, "noisy_teacher", (variants, reproduce.NOISY_TEACHER_CLAIMS))
    words = ["reproduce", "noisy_teacher", "--set=data.name=digits", "--seeds", "3", *TINY, "--out", "grid"]
    result = pykd(*words)
    assert result.exit_code == 0, result.output
    run = Path("grid/digits/teachers,one-noisy/seed-2")
    stages = {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"student"}
    rows = json.loads((run / "summary.json").read_text())["rows"]
    assert [each["name"] for each in rows] == ["teacher", "teacher-2", "teacher-3", "student"]
    for file, seed in {"teacher": 2, "teacher-2": 1, "teacher-3": 0}.items():
        trained = Path(f"grid/digits/clean/seed-{seed}/teacher.safetensors")
        assert (run / f"{file}.safetensors").read_bytes() == trained.read_bytes()
    (claim,) = json.loads(Path("grid/reproduce.json").read_text())["data"]["digits"]["claims"]
    assert claim["ours"]["seeds"] == 3


def test_a_variant_that_fails_does_not_end_the_grid(monkeypatch):
    broken = reproduce.Variant("broken", "diverges", ("student.training.optimizer=sgd", "student.training.lr=1e30"))
    variants = [reproduce.NOISY_TEACHER[0], broken, reproduce.NOISY_TEACHER[1]]
    monkeypatch.setitem(reproduce.PAPERS, "noisy_teacher", (variants, []))
    result = pykd("reproduce", "noisy_teacher", "--set=data.name=digits", "--seeds=1", *TINY, "--out", "grid")
    assert result.exit_code == 1
    assert "1 of 3 runs failed" in result.stderr
    rows = json.loads(Path("grid/reproduce.json").read_text())["data"]["digits"]["rows"]
    assert [each["name"] for each in rows] == ["teacher", "alone", "clean", "alpha=0.4,sigma=0.1"]


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["noisy_techer"], "paper: unknown name 'noisy_techer'; did you mean 'noisy_teacher'?", 2),
        (["noisy_teacher", "--set=data.name=cifar100"], "data.name: no recipe of noisy_teacher is for 'cifar100'", 2),
        (["noisy_teacher", "--set=student.training.epcohs=1"], "did you mean 'epochs'?", 2),
        (["noisy_teacher"], "MNIST is not in data: set data.root or PYKD_DATA", 1),
        (["noisy_teacher", "--resume"], "runs holds no unfinished run of reproduce-noisy_teacher", 1),
    ],
)
def test_errors_are_one_sentence(words, sentence, code):
    assert sentence in said(pykd("reproduce", *words), code)


def test_data_without_a_recipe_is_told_by_name():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        plan(1, "digit")
