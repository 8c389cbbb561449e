"""The experiments of the variational student and of factor transfer, and all papers at once."""

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from test_cli import TINY, pykd

from pykd import runs
from pykd.config import ConfigError
from pykd.errors import PykdError
from pykd.reproduce import PAPERS, factor_transfer, variational_student


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYKD_DATA", raising=False)


def summaries_of(**errors):
    """Summaries of runs with these errors of networks, seed by seed; a student's file is an 80th of the teacher's."""
    return [
        {
            "seed": seed,
            "rows": [
                {"name": name, "label": f"student, {name}", "accuracy": 1 - error, "bytes": 6400, "file_bytes": size}
                for (name, error), size in zip(each.items(), (6500, *[80] * len(each)), strict=False)
            ],
        }
        for seed, each in enumerate({name: of[n] for name, of in errors.items()} for n in range(len(errors["teacher"])))
    ]


def found_by(paper, finished, quick=False):
    of = paper.record(finished, quick=quick, environment={"pykd": "1", "argv": ["/secret"]})
    assert json.loads(json.dumps(of)) == of
    assert paper.markdown(of)
    return of


def test_the_sparse_student_is_judged_by_its_file_and_by_rivals_with_few_rows():
    whole = summaries_of(teacher=[0.01, 0.012, 0.011], sparse_vd=[0.03] * 3, student=[0.0105, 0.0122, 0.0115])
    few = summaries_of(
        teacher=[0.01] * 3,
        sparse_vd=[0.3, 0.31, 0.32],
        bayesian_compression=[0.2, 0.2, 0.21],
        student=[0.2, 0.21, 0.2],
    )
    finished = {"mnist/recipe": whole, "mnist/per_class=10": few}
    of = found_by(variational_student, finished)
    size, lost, *rivals = of["data"]["mnist"]["claims"]
    assert (size["ours"]["times"], size["published"], size["verdict"]) == (80, "64 times, LeNet MLP", "reached")
    expected = ttest_rel([0.01, 0.012, 0.011], [0.0105, 0.0122, 0.0115]).confidence_interval(0.95)
    assert lost["ours"]["points_interval"] == pytest.approx(list(expected))
    assert lost["verdict"] == "reached", "0.04 points, 0.08 at most"
    assert [(each["claim"], each["verdict"]) for each in rivals] == [
        ("with 10 rows a class it errs less than sparse_vd", "reached"),
        ("with 10 rows a class it errs less than bayesian_compression", "no effect seen: the interval holds 0"),
    ]
    assert set(variational_student.figures(of)) == {"error-bytes-mnist.svg", "error-K-mnist.svg"}
    quick = found_by(variational_student, finished, quick=True)["data"]["mnist"]["claims"]
    assert {each["verdict"] for each in quick} == {"quick: not evidence"}
    assert [
        each["published"]
        for each in found_by(variational_student, {"cifar10/recipe": whole})["data"]["cifar10"]["claims"]
    ] == [
        "213 times, VGGNet",
        "minimal",
    ]


def test_factor_transfer_is_compared_with_each_rival_and_with_other_rates():
    whole = summaries_of(
        teacher=[0.01] * 3, alone=[0.03, 0.04, 0.05], kd=[0.02, 0.03, 0.02], student=[0.02, 0.03, 0.04]
    )
    half = summaries_of(teacher=[0.01] * 3, student=[0.03, 0.04, 0.06])
    of = found_by(factor_transfer, {"mnist/recipe": whole, "mnist/rate=0.25": half})["data"]["mnist"]
    assert [(each["claim"], each["verdict"]) for each in of["claims"]] == [
        ("factor transfer errs less than alone", "reached"),
        ("factor transfer errs less than kd", "no effect seen: the interval holds 0"),
    ]
    assert of["rows"][3]["fewer_errors"] is None
    assert of["rows"][-1]["fewer_errors"]["points"] == pytest.approx(0.04 / 3)


def test_the_runs_of_the_two_papers_are_what_their_rows_say():
    runs = variational_student.runs(["mnist"], ["student.training.lr=0.5"], seeds=None, out=Path())
    assert [folder for folder, _ in runs[:4]] == [
        f"mnist/{each}" for each in ("recipe", *(f"per_class={k}" for k in (10, 50, 100)))
    ]
    assert [config.seed for _, config in runs] == [seed for seed in range(3) for _ in range(4)]
    assert [config.data.per_class for _, config in runs[:4]] == [None, 10, 50, 100]
    assert {config.student.training.lr for _, config in runs} == {0.5}
    assert [config.method.get("lambda_v") for _, config in runs[:4]] == [None, 0.1, 0.1, 0.1]
    quick = variational_student.runs(["mnist"], [], seeds=None, out=Path(), quick=True)
    assert [(folder, config.student.training.epochs) for folder, config in quick] == [
        ("mnist/recipe", 4),
        ("mnist/per_class=10", 10),
    ] * 2
    assert all(config.baselines == ["sparse_vd", "kd_sparse_vd", "bayesian_compression"] for _, config in quick)

    runs = factor_transfer.runs(["mnist"], [], seeds=1, out=Path())
    assert [(config.method.get("rate"), config.method["beta"]) for _, config in runs] == [
        (None, 380.0),
        (0.25, 190.0),
        (0.75, 570.0),
        (1.0, 760.0),
    ]
    assert [bool(config.baselines) for _, config in runs] == [True, False, False, False]
    [(_, quick)] = factor_transfer.runs(["mnist"], ["teacher.depth=14"], seeds=1, out=Path(), quick=True)
    assert (quick.teacher.name, quick.teacher.arguments, quick.method["paraphraser"]["epochs"]) == (
        "resnet",
        {"depth": 14},
        1,
    )


@pytest.mark.parametrize("paper", [variational_student, factor_transfer])
def test_a_quick_run_of_the_other_papers_says_what_it_found(paper):
    words = ["reproduce", paper.PAPER, "--quick", "--seeds=1", "--out=grid", "--jobs=1"]
    words += ["--set=student.training.epochs=1", "--set=teacher.training.epochs=1", "--set=data.holdout=0.3"]
    if paper is variational_student:
        words += ["--set=teacher.widths=[8]", "--set=student.widths=[4]"]
    result = pykd(*words)
    assert result.exit_code == 0, result.output
    of = json.loads(Path("grid/reproduce.json").read_text())
    assert result.stdout == Path("grid/reproduce.md").read_text() == paper.markdown(of) + "\n"
    rows = json.loads(Path("grid/digits/recipe/seed-0/summary.json").read_text())["rows"]
    found = [each["error"]["values"] for each in of["data"]["digits"]["rows"][: len(rows)]]
    assert found == [[1 - each["accuracy"]] for each in rows]
    assert {each.name for each in Path("grid").glob("*.svg")} == set(paper.figures(of))


@pytest.mark.parametrize("paper", [variational_student, factor_transfer])
def test_what_the_other_papers_set_is_not_the_user_s(paper):
    for key in paper.RESERVED:
        with pytest.raises(ConfigError, match=f"--set {key}=1: {key} is what the experiment varies"):
            paper.runs(["digits"], [f"{key}=1"], seeds=1, out=Path())


def test_all_papers_make_one_page(monkeypatch):
    for paper in ("factor_transfer", "cross_distillation"):
        monkeypatch.delitem(PAPERS, paper)
    words = ["reproduce", "all", "--quick", "--seeds=1", "--jobs=1", *TINY, "--out=grid"]
    for more in ([], ["--resume"]):
        result = pykd(*words, *more)
        assert result.exit_code == 0, result.output
        page = Path("grid/claims.md").read_text()
        assert "From `noisy_teacher/reproduce.json`" in page and "From `variational_student/reproduce.json`" in page
        assert page.count("quick: not evidence") == 3
        Path("grid/claims.md").unlink()

    def refused(config, folder, **options):
        raise PykdError("no")

    monkeypatch.setattr(runs, "distill", refused)
    result = pykd(*words[:-1], "--out=failed")
    assert result.exit_code == 1
    *_, sentence = result.stderr.splitlines()
    assert sentence == "pykd: 4 of 4 runs failed, the first: no; 2 of 2 runs failed, the first: no"
