"""Reproductions: which runs they are, their paired figures and verdicts, and that they go on where they stood."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel
from test_cli import DIGITS, TINY, pykd, said

from pykd import models
from pykd.config import ConfigError
from pykd.methods import CrossDistillation
from pykd.reproduce import PAPERS, cross_distillation, noisy_teacher

QUICK = ["reproduce", "noisy_teacher", "--quick", "--jobs=1", *TINY]


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
    return noisy_teacher.runs([data], [], seeds=seeds, out=Path("out"), **options)


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
    return noisy_teacher.record(runs, quick=quick, environment={"pykd": "1", "argv": ["/secret"]})


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
        assert len(weights) == noisy_teacher.TEACHERS
        assert weights <= {f"out/mnist/clean/seed-{seed}/teacher.safetensors" for seed in range(5)}
        assert {teacher.name for teacher in config.more_teachers} == {config.teacher.name}
    assert not [config for _, config in plan(2) if config.more_teachers]


def test_quick_is_short_unless_asked_otherwise():
    (_, config), *_ = runs = plan(2, "digits", quick=True)
    assert len(runs) == 8
    assert (config.teacher.training.epochs, config.student.training.epochs) == (6, 12)
    asked = noisy_teacher.runs(["digits", "mnist"], ["student.training.epochs=3"], seeds=1, out=Path())
    assert {config.student.training.epochs for _, config in asked} == {3}


def test_intervals_are_those_of_student_s_paired_test():
    clean, ours = [0.03, 0.02, 0.04, 0.03], [0.02, 0.021, 0.031, 0.03]
    of = record({"mnist/clean": summaries(clean), f"mnist/{noisy_teacher.CELL}": summaries(ours)})
    found = row(of, noisy_teacher.CELL)["fewer_errors"]
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
    of = record({"mnist/clean": summaries([0.02]), f"mnist/{noisy_teacher.CELL}": summaries([0.01])})
    assert row(of, noisy_teacher.CELL)["fewer_errors"]["points_interval"] is None
    (claim,) = of["data"]["mnist"]["claims"]
    assert claim["verdict"] == "open: an interval needs two seeds"
    assert "+50.0 % relative" in noisy_teacher.markdown(of)


def test_no_errors_at_all_have_no_relative_reduction():
    of = record({"mnist/clean": summaries([0.0, 0.0]), f"mnist/{noisy_teacher.CELL}": summaries([0.0, 0.01])})
    found = row(of, noisy_teacher.CELL)["fewer_errors"]
    assert found["relative"] is None and found["points"] == pytest.approx(-0.005)
    assert of["data"]["mnist"]["claims"][0]["verdict"].startswith("open")
    assert noisy_teacher.CELL.split(",")[0].replace("=", " ") in noisy_teacher.markdown(of)


def test_the_best_cell_is_chosen_on_the_held_out_rows():
    of = record(
        {
            "mnist/clean": summaries([0.03, 0.03]),
            "mnist/alpha=0.4,sigma=0.1": summaries([0.01, 0.01], holdout=[0.03, 0.03]),
            f"mnist/{noisy_teacher.CELL}": summaries([0.02, 0.02], holdout=[0.02, 0.02]),
            "mnist/dropout": summaries([0.0, 0.0]),
        }
    )
    assert of["data"]["mnist"]["best"] == noisy_teacher.CELL
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
    runs = {"mnist/clean": summaries(clean), f"mnist/{noisy_teacher.CELL}": summaries([0.02 * each for each in ours])}
    (claim,) = record(runs)["data"]["mnist"]["claims"]
    assert (claim["published"], claim["verdict"]) == ("up to 11.3 % relative, read as: of the error", verdict)
    assert record(runs, quick=True)["data"]["mnist"]["claims"][0]["verdict"] == "quick: not evidence"


def test_claims_compare_the_variants_they_name_on_the_data_they_are_about():
    errors = {variant.name: [0.2, 0.21] for variant in noisy_teacher.VARIANTS}
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
    assert noisy_teacher.markdown(of) + "\n" == result.stdout
    assert len(of["data"]["digits"]["rows"]) == 6
    for variant in ("clean", noisy_teacher.CELL, "noise-on-student"):
        runs = [json.loads((out / f"digits/{variant}/seed-{seed}/summary.json").read_text()) for seed in (0, 1)]
        assert row(of, variant, "digits")["error"] == {
            str(n): 1 - run["rows"][-1]["accuracy"] for n, run in enumerate(runs)
        }


def test_a_row_is_a_run_of_the_recipe(finished):
    out, _ = finished
    of = json.loads((out / "reproduce.json").read_text())
    epochs = ["--set=teacher.training.epochs=1", "--set=student.training.epochs=1"]
    changes = [f"--set={change}" for change in row(of, noisy_teacher.CELL, "digits")["set"]]
    again = pykd("distill", DIGITS, *TINY, *epochs, *changes, "--set=baselines=[]", "--seed", "1", "--out", "again")
    assert again.exit_code == 0, again.output
    for name in ("teacher", "student"):
        file = f"{name}.safetensors"
        assert Path("again", file).read_bytes() == (out / "digits" / noisy_teacher.CELL / "seed-1" / file).read_bytes()


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
from pykd import cli, runs
numbers, distill = iter(range(8)), runs.distill
def interrupted(*arguments, **options):
    if next(numbers) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return distill(*arguments, **options)
runs.distill = interrupted
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
    for variant in ("teacher", "alone", "clean", noisy_teacher.CELL, "noise-on-student"):
        assert row(table, variant, "digits")["error"] == row(whole, variant, "digits")["error"]


def test_several_teachers_are_loaded_never_trained(monkeypatch):
    wanted = ("clean", "teachers,one-noisy", "teachers,clean")
    variants = [variant for variant in noisy_teacher.VARIANTS if variant.name in wanted]
    monkeypatch.setattr(noisy_teacher, "VARIANTS", variants)
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
    broken = noisy_teacher.Variant("broken", "diverges", ("student.training.optimizer=sgd", "student.training.lr=1e30"))
    variants = [noisy_teacher.VARIANTS[0], broken, noisy_teacher.VARIANTS[1]]
    monkeypatch.setattr(noisy_teacher, "VARIANTS", variants)
    result = pykd(
        "reproduce", "noisy_teacher", "--set=data.name=digits", "--seeds=1", "--jobs=1", *TINY, "--out", "grid"
    )
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
        (["cross_distillation"], "MNIST is not in data: set data.root or PYKD_DATA", 1),
        (["cross_distillation", "--set=method.solver=proximal"], "how much stays is the experiment's", 2),
        (["cross_distillation", "--set=method.keep=0.2"], "method.keep is what the experiment varies", 2),
        (["cross_distillation", "--set=data.name=svhn"], "data.name: no recipe of cross_distillation is for 'svhn'", 2),
        (["noisy_teacher", "--resume"], "runs holds no unfinished run of reproduce-noisy_teacher", 1),
    ],
)
def test_errors_are_one_sentence(words, sentence, code):
    assert sentence in said(pykd("reproduce", *words), code)


def test_data_without_a_recipe_is_told_by_name():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        plan(1, "digit")


SMALL = [
    f"--set={setting}"
    for setting in ("teacher.width=0.0625", "student.width=0.0625", "data.holdout=0.5", "checkpoint_seconds=1000")
]
CROSSED = ["reproduce", "cross_distillation", "--quick", "--jobs=1", "--set=data.root=/secret", *SMALL]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A quick reproduction of one seed."""
    out = tmp_path_factory.mktemp("crossed") / "grid"
    result = pykd(*CROSSED, "--seeds=1", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def few_shot(errors):
    """Summaries of runs with these errors of the student, seed by seed, and of a baseline that errs twice as much."""
    return [
        {
            "seed": seed,
            "rows": [
                {"name": name, "label": label, "accuracy": 1 - each, "bytes": 800, "file_bytes": size}
                for name, label, each, size in (
                    ("teacher", "teacher", 0.01, 900),
                    ("layerwise", "student, layer-wise", 2 * error, None),
                    ("student", "student, crossed", error, 200 + 100 * seed),
                )
            ],
        }
        for seed, error in enumerate(errors)
    ]


def crossed_record(runs, quick=False):
    return cross_distillation.record(runs, quick=quick, environment={"pykd": "1", "argv": ["/secret"]})


def test_a_grid_has_every_k_pruning_and_seed():
    runs = cross_distillation.runs(["mnist"], [], seeds=None, out=Path())
    assert len(runs) == 2 * (6 * 5 + 2 * 3)
    assert len({(folder, config.seed) for folder, config in runs}) == len(runs)
    for folder, config in runs:
        recipe, _, variant = folder.partition("/")
        pruning, _, k = variant.partition(",K=")
        assert config.data.per_class == int(k)
        assert (config.teacher.name, config.data.name) == ({"mnist": "lenet5"}.get(recipe, "vgg13"), "mnist")
        groups = {"structured": ("in", 0.5), "unstructured": ("weight", 0.1)}[pruning]
        assert (config.method["groups"], config.method["keep"]) == groups
        assert ("thinet" in config.baselines) == ("channel_pruning" in config.baselines) == (pruning == "structured")
    assert {k for folder, _ in runs if folder.startswith("mnist_vgg/") for k in [folder.partition("K=")[2]]} == {
        "1",
        "5",
    }
    assert [config.seed for _, config in runs[:12]] == [0] * 12, "a seed is done before the next"
    asked = cross_distillation.runs(["digits", "mnist"], ["student.training.lr=0.5"], seeds=1, out=Path())
    assert len(asked) == 2 * (6 + 6 + 2)
    assert {config.student.training.lr for _, config in asked} == {0.5}


def test_cifar10_has_the_authors_fine_tuning_of_each_pruning():
    def found(*changes, quick=False):
        runs = cross_distillation.runs(["cifar10"], changes, seeds=1, out=Path(), quick=quick)
        of = {"unstructured" in folder: config.student.training for folder, config in runs}
        return [(of[unstructured].lr, of[unstructured].epochs) for unstructured in (False, True)]

    assert found() == [(1e-5, 40), (1e-3, 100)]
    assert found("student.training.lr=0.5") == [(0.5, 40), (0.5, 100)]
    assert found(quick=True) == [(1e-5, 4), (1e-3, 4)]


def test_the_user_s_baselines_are_these_alone():
    def found(names):
        runs = cross_distillation.runs(["digits"], [f"baselines={names}"], seeds=1, out=Path())
        return {folder.partition("/")[2].partition(",")[0]: config.baselines for folder, config in runs}

    assert found("[]") == {"structured": [], "unstructured": []}
    assert found("[thinet, soft]") == {"structured": ["thinet", "soft"], "unstructured": ["soft"]}


@pytest.mark.parametrize("data", cross_distillation.GRIDS)
def test_every_network_of_a_grid_can_be_pruned_as_it_says(data):
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    for folder, config in cross_distillation.runs([data], [], seeds=1, out=Path()):
        if not folder.endswith("K=1"):
            continue
        fields = {name: value for name, value in config.method.items() if name != "name"}
        networks = [
            models.build(each.name, in_shape=shapes[data], classes=10, **each.arguments)
            for each in (config.student, config.teacher)
        ]
        trained = CrossDistillation(**fields).prepare(networks[0], networks[1:], torch.zeros(1, *shapes[data]))
        assert len(trained.names) == {"lenet5": 4, "vgg13": 9, "vgg16": 12}[config.student.name]


@pytest.mark.parametrize("data", cross_distillation.GRIDS)
def test_the_recipes_of_a_data_set_are_of_it(data):
    assert {config.data.name for _, config in cross_distillation.runs([data], [], seeds=1, out=Path())} == {data}


@pytest.mark.parametrize("key", cross_distillation.RESERVED)
def test_what_the_experiment_sets_is_not_the_user_s(key):
    with pytest.raises(ConfigError, match=f"--set {key}=1: {key} is what the experiment varies"):
        cross_distillation.runs(["digits"], [f"{key}=1"], seeds=1, out=Path())


def test_crossing_is_compared_with_each_baseline_for_each_k():
    ours = {"5": [0.02, 0.03, 0.01, 0.02], "1": [0.2, 0.1, 0.3], "10": [0.1]}
    runs = {f"mnist/structured,K={k}": few_shot(errors) for k, errors in ours.items()}
    of = crossed_record(runs)
    (table,) = of["data"]
    assert (table["recipe"], table["pruning"]) == ("cross_distillation-mnist", "structured")
    teacher, layerwise, student = table["rows"]
    assert list(student["error"]) == ["1", "5", "10"]
    assert "fewer_errors" not in teacher and "fewer_errors" not in student
    found = layerwise["fewer_errors"]["5"]
    expected = ttest_rel([2 * each for each in ours["5"]], ours["5"]).confidence_interval(0.95)
    assert found["ours"]["points"] == pytest.approx(0.02)
    assert found["ours"]["points_interval"] == pytest.approx(list(expected))
    verdicts = {k: each["verdict"] for k, each in layerwise["fewer_errors"].items()}
    assert verdicts == {
        "1": "no effect seen: the interval holds 0",
        "5": "reached",
        "10": "open: an interval needs two seeds",
    }
    assert {each["verdict"] for each in crossed_record(runs, True)["data"][0]["rows"][1]["fewer_errors"].values()} == {
        "quick: not evidence"
    }
    assert "/secret" not in json.dumps(of)


def test_the_tables_have_a_column_for_each_k():
    runs = {
        f"{recipe}/{pruning},K={k}": few_shot([0.02, 0.03])
        for recipe in ("mnist", "mnist_vgg")
        for pruning in ("structured", "unstructured")
        for k in (1, 50)
    }
    of = json.loads(json.dumps(crossed_record(runs)))
    text = cross_distillation.markdown(of)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[1:] for row in rows].count(["K = 1 (n = 2)", "K = 50 (n = 2)"]) == 8
    assert rows.count(["teacher", "1.00 ± 0.00", "1.00 ± 0.00"]) == 4
    assert rows.count(["student, crossed", "2.50 ± 0.71", "2.50 ± 0.71"]) == 4
    assert rows.count(["student, layer-wise", "+2.50 [-3.85, +8.85]", "+2.50 [-3.85, +8.85]"]) == 4
    claim = ["crossed errs less than layer-wise", "no effect seen: the interval holds 0 (K = 1, 50)"]
    assert rows.count(claim) == 4
    assert rows.count(["student, crossed", "250", "3.2"]) == 4
    assert rows.count(["student, layer-wise", "", ""]) == 4
    assert set(cross_distillation.figures(of)) == {
        f"error-K-{recipe}-{pruning}.svg"
        for recipe in ("mnist", "mnist_vgg")
        for pruning in ("structured", "unstructured")
    }


def test_a_quick_cross_distillation_says_what_its_runs_found(crossed):
    out, result = crossed
    assert result.stdout == (out / "reproduce.md").read_text()
    assert "quick: not evidence" in result.stdout
    of = json.loads((out / "reproduce.json").read_text())
    assert [(each["recipe"], each["pruning"]) for each in of["data"]] == [
        ("cross_distillation-digits", "structured"),
        ("cross_distillation-digits", "unstructured"),
    ]
    for table in of["data"]:
        assert [row["name"] for row in table["rows"]] == ["teacher", "magnitude", "fine_tune", "layerwise", "student"]
        for k in (1, 5):
            summary = json.loads((out / f"digits/{table['pruning']},K={k}/seed-0/summary.json").read_text())
            found = [row["error"][str(k)] for row in table["rows"]]
            assert found == [{"0": 1 - row["accuracy"]} for row in summary["rows"]]
        assert (out / f"error-K-digits-{table['pruning']}.svg").read_bytes().startswith(b"<?xml")


def test_one_teacher_a_seed_is_trained(crossed):
    out, _ = crossed
    stages = {
        str(file.parent.relative_to(out)): {json.loads(line)["stage"] for line in file.read_text().splitlines()}
        for file in out.rglob("metrics.jsonl")
    }
    assert len(stages) == 4
    assert [run for run, of in stages.items() if "teacher" in of] == ["digits/structured,K=1/seed-0"]
    assert len({file.read_bytes() for file in out.rglob("teacher.safetensors")}) == 1


def broken_off(out):
    """A copy, called grid, that lacks a run."""
    shutil.copytree(out, "grid")
    for file in Path("grid").rglob("config.yaml"):  # which name the teacher of the first grid
        file.write_text(file.read_text().replace(str(out), str(Path("grid").resolve())))
    shutil.rmtree("grid/digits/unstructured,K=5")


def test_a_broken_off_cross_distillation_goes_on(crossed):
    out, _ = crossed
    broken_off(out)
    (Path("grid/reproduce.json")).unlink()
    again = pykd(*CROSSED, "--seeds=1", "--out", "grid", "--resume")
    assert again.exit_code == 0, again.output
    errors = [
        [row["error"] for table in json.loads((folder / "reproduce.json").read_text())["data"] for row in table["rows"]]
        for folder in (out, Path("grid"))
    ]
    assert errors[0] == errors[1]


def test_a_grid_does_not_go_on_with_other_settings(crossed):
    broken_off(crossed[0])
    before = Path("grid/reproduce.md").read_text()
    words = [*CROSSED, "--seeds=1", "--out", "grid", "--resume"]
    sentence = said(pykd(*words, "--set=teacher.training.lr=0.5"), 1)
    assert "teacher.training.lr = 0.0" in sentence and "not 0.5" in sentence
    assert not Path("grid/digits/unstructured,K=5").exists()
    assert Path("grid/reproduce.md").read_text() == before


def test_without_a_teacher_its_students_are_left_out():
    words = ["--seeds=1", "--set=teacher.training.lr=1e30", "--set=teacher.training.optimizer=sgd", "--out", "grid"]
    result = pykd(*CROSSED, *words)
    assert result.exit_code == 1
    first, *rest = [line for line in result.stderr.splitlines() if line.startswith("pykd: ")]
    assert "the loss is not finite" in first or "the weights are not finite" in first
    source = Path("grid/digits/structured,K=1/seed-0").resolve()
    assert len(rest) == 4 and "4 of 4 runs failed" in rest[-1]
    assert all(line.endswith(f"is left out: {source} has not trained its teacher") for line in rest[:-1])


def test_where_the_data_lie_is_not_in_the_table(crossed):
    out, result = crossed
    said_and_written = result.stdout + (out / "reproduce.json").read_text()
    assert "data.root" not in said_and_written and "/secret" not in said_and_written
    assert "`data.holdout=0.5`" in result.stdout


def test_papers_are_named_in_the_help():
    said_by_help = pykd("reproduce", "--help").output
    assert all(paper in said_by_help for paper in PAPERS)
