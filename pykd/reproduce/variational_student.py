"""Hegde et al. 2020: a sparse student, how small its file is and what that costs, and what it does with little data."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd import config as recipes
from pykd.config import Config
from pykd.report.figures import error_against_bytes, error_against_k
from pykd.report.tables import percent, ran_with, signed_percent, table
from pykd.reproduce._paper import (
    WHOLE,
    by_seed,
    checked,
    claims_table,
    fewer_epochs,
    network,
    networks,
    no_worse,
    opening,
    plain,
    refuse_varied,
    require_data,
    times,
    verdict,
)

PAPER = "variational_student"
SEEDS = 3
FEW = (10, 50, 100)  # rows a class that students learn from
LOW_DATA = (
    *("method.lambda_v=0.1", "data.holdout=0.05"),
    *("student.training.batch_size=25", "student.training.epochs=100"),
)
BAYESIAN = ("sparse_vd", "bayesian_compression")  # without a teacher
SMALLER = {"mnist": (64, "64 times, LeNet MLP"), "cifar10": (213, "213 times, VGGNet")}
MINIMAL_LOSS = 0.002
QUICK = ("sparse_vd", "kd_sparse_vd", "bayesian_compression")
# What the experiment sets; a user's own value would be lost.
RESERVED = ("method.name", "data.name", "data.per_class", "data.rows", "teacher.weights", "more_teachers", "seed")
READING = """\
Mean and sample standard deviation over n seeds. The networks of a run share teacher, initial weights and rows, so they
are compared in pairs: in brackets the 95 % interval (Student's t) of the mean difference, which one seed does not give;
of twenty such intervals one misses by chance. Smaller: the teacher's dense float32 file divided by the model file that
pykd export writes, with indices, biases and header; the paper's own way to count is not known. A minimal loss of
accuracy is read as 0.2 points at most. KD+SparseVD is the method without its block sparse regulariser (BSR). With few
rows a class the teacher has learnt from all."""


def runs(
    data: Iterable[str], changes: Sequence[str], *, seeds: int | None, out: Path, quick: bool = False
) -> list[tuple[str, Config]]:
    """See :meth:`pykd.reproduce.Paper.runs`; of a recipe, all runs of a seed come before those of the next.

    Example:
        >>> [folder for folder, _ in runs(["digits"], [], seeds=1, out=Path("r"), quick=True)]
        ['digits/recipe', 'digits/per_class=10']
    """
    refuse_varied(changes, RESERVED)
    known = [each.removeprefix(f"{PAPER}-") for each in recipes.recipes() if each.startswith(f"{PAPER}-")]
    variants = {
        WHOLE: (),
        **{f"per_class={k}": (*LOW_DATA, f"data.per_class={k}") for k in FEW[: 1 if quick else None]},
    }
    found = []
    for name in data:
        require_data(PAPER, name, known)
        source = f"{PAPER}-{name}"
        for number in range(seeds or (2 if quick else SEEDS)):
            for variant, own in variants.items():
                config = recipes.load(source, [*own, *changes])
                more = [f"seed={config.seed + number}"]
                if quick:
                    kept = [each for each in config.baselines if each in QUICK]
                    more += [*fewer_epochs(config), *changes, f"baselines={json.dumps(kept)}"]
                found.append((f"{name}/{variant}", recipes.load(source, [*own, *changes, *more])))
    return found


def left_out(seeds: int | None, quick: bool) -> str:
    """See :meth:`pykd.reproduce.Paper.left_out`: any number of seeds does for all."""
    return ""


def record(
    finished: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    changes: Sequence[str] = (),
    quick: bool,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """See :meth:`pykd.reproduce.Paper.record`; ``data`` holds for each data set ``rows`` and ``claims``.

    A row is a network of a variant, ``run``, as :func:`pykd.report.compared` gives it.
    """
    found = {
        name: {"recipe": f"{PAPER}-{name}", "rows": rows, "claims": claims(name, rows, quick=quick)}
        for name, rows in networks(finished).items()
    }
    made_of = {"paper": PAPER, "changes": list(changes), "quick": quick}
    return {**made_of, "environment": ran_with(environment), "data": found}


def claims(data: str, rows: Sequence[Mapping[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
    """See :meth:`pykd.reproduce.Paper.claims`."""
    found = []
    student, teacher = (network(rows, WHOLE, name) for name in ("student", "teacher"))
    if student and teacher and data in SMALLER:
        figure, published = SMALLER[data]
        if values := student["ratio"]["values"]:
            ours = times(values)
            said = verdict(ours, "times", figure, quick=quick)
            text = "the student's file is that much smaller than the teacher's"
            found.append({"claim": text, "published": published, "kind": "times", "ours": ours, "verdict": said})
        text = "with a minimal loss of accuracy, read as: 0.2 points at most"
        lost = checked(text, [by_seed(student)], [by_seed(teacher)], quick=quick, published="minimal")
        found.append({**lost, "verdict": no_worse(lost["ours"], MINIMAL_LOSS, quick=quick)})
    for k in FEW:
        student = network(rows, f"per_class={k}", "student")
        for rival in (network(rows, f"per_class={k}", name) for name in BAYESIAN):
            if student and rival:
                text = f"with {k} rows a class it errs less than {plain(rival['label'])}"
                found.append(checked(text, [by_seed(student)], [by_seed(rival)], quick=quick))
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a ``record``: its networks, its claims, and how to read them.

    >>> nothing = {"changes": [], "quick": False, "environment": {"pykd": "1.0", "torch": "2"}, "data": {}}
    >>> print(markdown(nothing).splitlines()[0])
    pykd 1.0, torch 2.
    """
    parts = opening(record, READING)
    for data, of in record["data"].items():
        lines = [[data, "network", "n", "test error, %", "above teacher, points", "file bytes", "times smaller"]]
        for row in of["rows"]:
            above, ratios = row["above_teacher"], row["ratio"]["values"]
            lines.append(
                [
                    row["run"],
                    row["label"],
                    str(row["n"]),
                    percent(row["error"]["values"]),
                    signed_percent(above["points"], above["interval"]) if above else "",
                    f"{row['file_bytes']['mean']:,.0f}" if ratios else "",
                    f"{row['ratio']['mean']:.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "",
                ]
            )
        parts.append(table(lines))
        if of["claims"]:
            parts.append(claims_table(of, data))
    return "\n\n".join(parts)


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """See :meth:`pykd.reproduce.Paper.figures`: error over bytes, and over the rows of each class."""
    found = {}
    for data, of in record["data"].items():
        whole = [row for row in of["rows"] if row["run"] == WHOLE]
        if any(row["file_bytes"]["values"] for row in whole if row["name"] != "teacher"):
            found[f"error-bytes-{data}.svg"] = error_against_bytes(whole)
        few: dict[str, dict[str, Any]] = {}
        for row in of["rows"]:
            if row["run"] != WHOLE:
                own = few.setdefault(row["name"], {"name": row["name"], "label": row["label"], "error": {}})
                own["error"][row["run"].removeprefix("per_class=")] = by_seed(row)
        if few:
            found[f"error-K-{data}.svg"] = error_against_k(list(few.values()), f"{data}, few rows a class")
    return found
