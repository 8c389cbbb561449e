"""Sau & Balasubramanian 2016: noise on the teacher, in the forms and against the rivals that the paper has."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykd import config as recipes
from pykd.config import Config
from pykd.report.tables import percent, ran_with, table
from pykd.reproduce._paper import (
    checked,
    claims_table,
    effect,
    fewer_epochs,
    opening,
    paired,
    refuse_varied,
    require_data,
)

PAPER = "noisy_teacher"
CLEAN = "clean"  # the runs that train the teachers, the student alone, and the student by clean regression
BEST = "best"  # stands for the cell with the best held-out accuracy
NOISE = ("method.alpha=0.8", "method.sigma=0.3")
CELL = "alpha=0.8,sigma=0.3"  # the one of the grid whose noise the other variants have
TEACHERS = 3
SEEDS = 5
READING = """\
Mean and sample standard deviation over n seeds. The runs of a seed share teacher, initial weights, batches and held-out
rows, so they are compared in pairs: in brackets the 95 % interval (Student's t) of the mean difference, which one seed
does not give; of twenty such intervals one misses by chance. A relative interval takes the mean error it divides by as
exact. The best noisy teacher is chosen on the held-out rows; its interval does not know that it was chosen.
Several teachers are a seed's own and those of two other seeds. Those were trained on rows that this seed holds out, so
that together they have seen more data than one teacher, and the held-out errors of these rows are too low; and as
seeds share them, the intervals of these rows are too narrow."""
# What the variants set; a user's own value would be lost, or change what a row says it is.
RESERVED = ("method", "baselines", "teacher.weights", "more_teachers", "student.dropout", "data.name", "seed")


@dataclass(frozen=True)
class Variant:
    """One way to train the student from its seed's teacher.

    Args:
        name: of its folder.
        label: of its row.
        changes: assignments that make it out of the recipe.
        cell: belongs to the grid whose best cell is chosen on the held-out rows.
        teachers: how many it learns from.
    """

    name: str
    label: str
    changes: tuple[str, ...]
    cell: bool = False
    teachers: int = 1


@dataclass(frozen=True)
class Claim:
    """A paper's statement that the variants ``ours`` err less, on average, than the variants ``than``.

    Args:
        text: in our words.
        ours: names of variants, or ``BEST``.
        than: names of variants.
        published: the figure in words.
        figure: its value: a relative reduction of the error, or a difference of errors where ``points``.
        points: see ``figure``.
        data: the data sets it is about; all if empty.
    """

    text: str
    ours: tuple[str, ...]
    than: tuple[str, ...] = (CLEAN,)
    published: str = "without a figure"
    figure: float | None = None
    points: bool = False
    data: tuple[str, ...] = ()


def _cell(alpha: float, sigma: float, shape: str) -> Variant:
    return Variant(
        f"alpha={alpha},sigma={sigma}" + (",sample" if shape == "sample" else ""),
        f"noisy teacher, alpha {alpha}, sigma {sigma}, a draw a {shape}",
        (f"method.alpha={alpha}", f"method.sigma={sigma}", f"method.noise_shape={shape}"),
        cell=True,
    )


ALPHAS, SIGMAS = (0.4, 0.8), (0.1, 0.3, 0.9)
REGRESSION = "method={name: logit_regression}"
VARIANTS = [
    Variant(CLEAN, "clean regression", (REGRESSION, "baselines=[alone]")),
    *(_cell(alpha, sigma, shape) for shape in ("logit", "sample") for alpha in ALPHAS for sigma in SIGMAS),
    Variant(
        "additive",
        "noisy teacher, additive, alpha 0.8, sigma 1.5",
        ("method.alpha=0.8", "method.sigma=1.5", "method.noise_kind=additive"),
    ),
    Variant("noise-on-student", "noise on the student, alpha 0.8, sigma 0.3", (*NOISE, "method.noise_on=student")),
    Variant("dropout", "clean regression, dropout 0.2 in the student", (REGRESSION, "student.dropout=0.2")),
    Variant("hinton", "Hinton distillation", ("method={name: kd}",)),
    Variant(
        "hinton,noisy", "Hinton distillation, noisy, alpha 0.8, sigma 0.3", (*NOISE, "method.objective=distillation")
    ),
    Variant("teachers,clean", f"{TEACHERS} teachers, clean regression", (REGRESSION,), teachers=TEACHERS),
    Variant(
        "teachers,one-noisy",
        f"{TEACHERS} teachers, one of them noisy, alpha 0.8, sigma 0.3",
        (*NOISE, "method.noisy_teachers=one"),
        teachers=TEACHERS,
    ),
    Variant("teachers,all-noisy", f"{TEACHERS} teachers, all noisy, alpha 0.8, sigma 0.3", NOISE, teachers=TEACHERS),
]
_LESS_ERROR = "the best noisy teacher makes fewer errors than clean regression"
CIFAR10 = ("cifar10", "imagefolder")  # a folder of images is taken for CIFAR-10, as the recipe is
CLAIMS = [
    Claim(
        _LESS_ERROR, (BEST,), published="up to 11.3 % relative, read as: of the error", figure=0.113, data=("mnist",)
    ),
    Claim(_LESS_ERROR, (BEST,), published="about 3.3 % relative, read as: of the error", figure=0.033, data=("svhn",)),
    Claim(_LESS_ERROR, (BEST,), published="up to 12.7 % relative, read as: of the error", figure=0.127, data=CIFAR10),
    Claim(
        "a 3-layer shallow student gains over the baseline (thesis)",
        (BEST,),
        published="3.26 points",
        figure=0.0326,
        points=True,
        data=CIFAR10,
    ),
    Claim(
        "a higher alpha usually helps: 0.8 against 0.4, all sigmas",
        tuple(_cell(0.8, sigma, "logit").name for sigma in SIGMAS),
        tuple(_cell(0.4, sigma, "logit").name for sigma in SIGMAS),
        data=CIFAR10,
    ),
    Claim("noise on the teacher beats noise on the student, both alpha 0.8, sigma 0.3", (CELL,), ("noise-on-student",)),
    Claim("noise on the teacher, alpha 0.8, sigma 0.3, beats dropout in the student", (CELL,), ("dropout",)),
    Claim(f"{TEACHERS} teachers, one of them noisy, beat one noisy teacher", ("teachers,one-noisy",), (CELL,)),
    Claim(
        f"{TEACHERS} teachers, one of them noisy, beat {TEACHERS} clean ones",
        ("teachers,one-noisy",),
        ("teachers,clean",),
    ),
]
QUICK = {CLEAN, CELL, f"{CELL},sample", "noise-on-student"}


def runs(
    data: Iterable[str], changes: Sequence[str], *, seeds: int | None, out: Path, quick: bool = False
) -> list[tuple[str, Config]]:
    """See :meth:`pykd.reproduce.Paper.runs`; the runs that train teachers come first.

    The others read the teachers' weights from the folders of the first.

    Example:
        >>> [folder for folder, _ in runs(["digits"], [], seeds=1, out=Path("r"), quick=True)][:2]
        ['digits/clean', 'digits/alpha=0.8,sigma=0.3']
    """
    refuse_varied(changes, RESERVED)
    seeds = seeds or (2 if quick else SEEDS)
    found = []
    for name in data:
        known = [each.removeprefix(f"{PAPER}-") for each in recipes.recipes() if each.startswith(f"{PAPER}-")]
        require_data(PAPER, name, known)
        source = f"{PAPER}-{name}"
        first = recipes.load(source, changes)
        few = fewer_epochs(first) if quick else []
        teacher = first.teacher.model_dump(mode="json", exclude={"weights", "training"})
        for variant in VARIANTS:
            if variant.name not in QUICK if quick else variant.teachers > seeds:
                continue
            for number in range(seeds):
                own = [*few, *changes, *variant.changes, f"seed={first.seed + number}"]
                if variant.name != CLEAN:
                    folders = [out / name / CLEAN / f"seed-{first.seed + each}" for each in _teachers(number)]
                    file, *more = [str(folder / "teacher.safetensors") for folder in folders[: variant.teachers]]
                    own += ["baselines=[]", f"teacher.weights={json.dumps(file)}"]
                    if more:
                        own.append(f"more_teachers={json.dumps([{**teacher, 'weights': file} for file in more])}")
                found.append((f"{name}/{variant.name}", recipes.load(source, own)))
    return sorted(found, key=lambda run: not run[0].endswith(f"/{CLEAN}"))


def left_out(seeds: int | None, quick: bool) -> str:
    """See :meth:`pykd.reproduce.Paper.left_out`."""
    few = not quick and (seeds or SEEDS) < TEACHERS
    return f"variants with several teachers are left out: they need {TEACHERS} seeds" if few else ""


def _teachers(number: int) -> list[int]:
    """The teachers of a seed: its own and two neighbours, the same ones however many seeds there are, from three on."""
    return [number, *([number - 1, number - 2] if number >= 2 else [1 - number, 2])]


def record(
    finished: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    changes: Sequence[str] = (),
    quick: bool,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """See :meth:`pykd.reproduce.Paper.record`; ``data`` holds for each data set the ``rows`` and ``claims``.

    A variant is compared with clean regression on the seeds that both have, and so are two variants of a claim:
    the difference of a seed's two errors has a mean, and an interval by Student's t. A relative reduction is both
    divided by the mean error of what is compared with.
    """
    found: dict[str, Any] = {}
    for data in dict.fromkeys(folder.partition("/")[0] for folder in finished):
        rows = []
        for variant in VARIANTS:
            if summaries := finished.get(f"{data}/{variant.name}"):
                if variant.name == CLEAN:
                    rows.append(_row("teacher", "teacher", variant.changes, summaries, "teacher"))
                    rows.append(_row("alone", "student alone", variant.changes, summaries, "alone"))
                rows.append(_row(variant.name, variant.label, variant.changes, summaries, "student"))
        by_name = _by_name(rows)
        for row in rows:
            row["fewer_errors"] = (
                paired([row["error"]], [by_name[CLEAN]["error"]]) if row["name"] not in (CLEAN, "teacher") else None
            )
        best = by_name[BEST]["name"] if BEST in by_name else None
        found[data] = {
            "recipe": f"{PAPER}-{data}",
            "rows": rows,
            "best": best,
            "claims": claims(data, rows, quick=quick),
        }
    made_of = {"paper": PAPER, "changes": list(changes), "quick": quick}
    return {**made_of, "environment": ran_with(environment), "data": found}


def _by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The rows, and the best cell of the grid among them as ``BEST``."""
    found = {row["name"]: row for row in rows}
    if cells := [found[each.name] for each in VARIANTS if each.cell and each.name in found]:
        found[BEST] = min(cells, key=lambda row: statistics.fmean(row["holdout_error"].values()))
    return found


def claims(data: str, rows: Iterable[Mapping[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
    """See :meth:`pykd.reproduce.Paper.claims`."""
    by_name = _by_name(rows)
    found = []
    for claim in CLAIMS:
        sides = [[by_name[name] for name in side if name in by_name] for side in (claim.ours, claim.than)]
        if (claim.data and data not in claim.data) or list(map(len, sides)) != [len(claim.ours), len(claim.than)]:
            continue
        published = claim.published + (", if the images are CIFAR-10's" if data == "imagefolder" else "")
        kind = "points" if claim.points else "relative"
        errors = ([row["error"] for row in side] for side in sides)
        found.append(checked(claim.text, *errors, quick=quick, published=published, kind=kind, figure=claim.figure))
    return found


def _row(
    name: str, label: str, changes: Sequence[str], summaries: Sequence[Mapping[str, Any]], network: str
) -> dict[str, Any]:
    own = {str(each["seed"]): row for each in summaries for row in each["rows"] if row["name"] == network}
    return {
        "name": name,
        "label": label,
        "set": list(changes),
        "holdout_error": {seed: 1 - row["holdout_accuracy"] for seed, row in own.items()},
        "error": {seed: 1 - row["accuracy"] for seed, row in own.items()},
        "seconds": {seed: row["seconds"] for seed, row in own.items()},
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a ``record``: its rows, its claims, and how to read them.

    >>> nothing = {"changes": [], "quick": False, "environment": {"pykd": "1.0", "torch": "2"}, "data": {}}
    >>> print(markdown(nothing).splitlines()[0])
    pykd 1.0, torch 2.
    """
    parts = opening(record, READING)
    for data, of in record["data"].items():
        lines = [
            [data, "n", "held-out error, %", "test error, %", "fewer test errors than clean, points", "relative, %"]
        ]
        for row in of["rows"]:
            fewer = row["fewer_errors"]
            label = f"**{row['label']}** (best)" if row["name"] == of["best"] else row["label"]
            errors = [percent(list(row[key].values())) for key in ("holdout_error", "error")]
            lines.append([label, str(len(row["error"])), *errors, effect(fewer, "points"), effect(fewer, "relative")])
        parts.append(table(lines))
        if of["claims"]:
            parts.append(claims_table(of, data))
    return "\n\n".join(parts)


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """See :meth:`pykd.reproduce.Paper.figures`: the tables say it all."""
    return {}
