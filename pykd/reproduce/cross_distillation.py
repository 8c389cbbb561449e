"""Bai et al. 2019: a network is pruned with K images of each class, in two ways, by several methods."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd import config as recipes
from pykd.config import Config, ConfigError
from pykd.report.figures import error_against_k
from pykd.report.tables import percent, ran_with, table
from pykd.reproduce._paper import (
    checked,
    effect,
    fewer_epochs,
    opening,
    paired,
    plain,
    refuse_varied,
    require_data,
    verdict,
)

PAPER = "cross_distillation"
KS = (1, 2, 3, 5, 10, 50)
FEW = (1, 5)
# For each data set its recipes, without the paper's name, with their K and how many seeds.
GRIDS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "digits": {"digits": (KS, 5)},
    "mnist": {"mnist": (KS, 5), "mnist_vgg": (FEW, 3)},
    "cifar10": {"cifar10": (KS, 5)},
}
PRUNINGS = {
    "structured": ("method.groups=in", "method.keep=0.5"),
    "unstructured": ("method.groups=weight", "method.keep=0.1"),
}
SHARES = {"structured": "50 %", "unstructured": "90 %"}  # what is taken out
OF_CHANNELS = ("thinet", "channel_pruning")  # further baselines, which know no other groups than channels
# The authors' fine-tuning, where it is another than the recipe's.
FINE_TUNING = {("cifar10", "unstructured"): ("student.training.lr=1e-3", "student.training.epochs=100")}
PLAIN = ("fine_tune", "layerwise")  # what crossing is claimed to improve on
QUICK = ("magnitude", "fine_tune", "layerwise")
# What the experiment sets; a user's own value would be lost.
RESERVED = (
    *("method.name", "method.groups", "method.keep", "method.budget", "data.name", "data.per_class", "data.rows"),
    *("teacher.weights", "more_teachers", "seed"),
)
READING = """\
K images of each class are learnt from; a larger K of a seed holds the images of the smaller ones. Structured: half of
the input channels of each pruned layer are taken out; unstructured: 90 % of its weights. Errors are those of the test
rows, mean and sample standard deviation over n seeds. The networks of a run share teacher and images, so they are
compared in pairs: in brackets the 95 % interval (Student's t) of the mean difference, which one seed does not give; of
twenty such intervals one misses by chance. The last row of a table is the recipe's method, not the best of its
variants. The paper's tables could not be established, so no claim has a published figure. Files are those that pykd
export writes; smaller is the teacher's dense float32 file divided by one."""


def runs(
    data: Iterable[str], changes: Sequence[str], *, seeds: int | None, out: Path, quick: bool = False
) -> list[tuple[str, Config]]:
    """See :meth:`pykd.reproduce.Paper.runs`; of a recipe, all runs of a seed come before those of the next.

    Every run trains its teacher, which is the same for all runs of a recipe and seed.

    Raises:
        ConfigError: also for the proximal solver, whose penalty alone says how much stays.

    Example:
        >>> [folder for folder, _ in runs(["digits"], [], seeds=1, out=Path("r"), quick=True)][:2]
        ['digits/structured,K=1', 'digits/structured,K=5']
    """
    refuse_varied(changes, RESERVED)
    found, chosen = [], any(change.partition("=")[0].strip() == "baselines" for change in changes)
    for name in data:
        require_data(PAPER, name, GRIDS)
        for recipe, (ks, count) in list(GRIDS[name].items())[: 1 if quick else None]:
            source = f"{PAPER}-{recipe}"
            first = recipes.load(source, changes)
            if first.method.get("solver") == "proximal":
                raise ConfigError(
                    "--set method.solver=proximal: how much stays is the experiment's: take exact or adam"
                )
            baselines = (*first.baselines, *(() if chosen else OF_CHANNELS))
            few = fewer_epochs(first) if quick else []
            for number in range(seeds or (2 if quick else count)):
                for pruning, groups in PRUNINGS.items():
                    refused = OF_CHANNELS if pruning == "unstructured" else ()
                    mine = [each for each in baselines if each not in refused and (each in QUICK or not quick)]
                    tuning = FINE_TUNING.get((recipe, pruning), ())
                    for k in FEW if quick else ks:
                        own = [*tuning, *few, *changes, *groups, f"baselines={json.dumps(mine)}"]
                        own += [f"data.per_class={k}", f"seed={first.seed + number}"]
                        found.append((f"{recipe}/{pruning},K={k}", recipes.load(source, own)))
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
    """See :meth:`pykd.reproduce.Paper.record`; ``data`` holds for each recipe and ``pruning`` the ``rows``.

    A row is a network: its ``error`` for each K by seed; means over the seeds of the largest K, as ``size``; and for a
    baseline, as ``fewer_errors`` for each K, by how much the student errs less on the seeds that both have, as ``ours``
    and as a ``verdict``.
    """
    grid: dict[tuple[str, str], dict[str, Sequence[Mapping[str, Any]]]] = {}
    for folder, summaries in finished.items():
        recipe, _, variant = folder.partition("/")
        pruning, _, k = variant.partition(",K=")
        grid.setdefault((recipe, pruning), {})[k] = summaries
    found = []
    for (recipe, pruning), of in grid.items():
        rows: dict[str, dict[str, Any]] = {}
        for k in sorted(of, key=int):
            for summary in of[k]:
                for own in summary["rows"]:
                    row = rows.setdefault(own["name"], {"name": own["name"], "label": own["label"], "error": {}})
                    row["error"].setdefault(k, {})[str(summary["seed"])] = 1 - own["accuracy"]
        largest = max(of, key=int)
        for name, row in rows.items():
            networks = [own for summary in of[largest] for own in summary["rows"] if own["name"] == name]
            row["size"] = {"K": int(largest), "n": len(networks)}
            for key in ("bytes", "file_bytes"):
                values = [own[key] for own in networks if own[key] is not None]
                row["size"][key] = statistics.fmean(values) if values else None
            if name not in ("teacher", "student"):
                row["fewer_errors"] = {}
                for k, errors in row["error"].items():
                    ours = paired([rows["student"]["error"][k]], [errors])
                    row["fewer_errors"][k] = {"ours": ours, "verdict": verdict(ours, quick=quick)}
        found.append({"recipe": f"{PAPER}-{recipe}", "pruning": pruning, "rows": list(rows.values())})
    made_of = {"paper": PAPER, "changes": list(changes), "quick": quick}
    return {**made_of, "environment": ran_with(environment), "data": found}


def claims(data: str, rows: Sequence[Mapping[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
    """See :meth:`pykd.reproduce.Paper.claims`: with how few images crossing beats what does without."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for rival in (by_name[name] for name in PLAIN if name in by_name):
        for k, errors in rival["error"].items():
            if int(k) <= max(FEW):
                ours = by_name["student"]
                text = f"K = {k}: {plain(ours['label'])} errs less than {plain(rival['label'])}"
                found.append(checked(text, [ours["error"][k]], [errors], quick=quick))
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a ``record``: errors, differences, claims and sizes of each recipe and pruning.

    >>> nothing = {"changes": [], "quick": False, "environment": {"pykd": "1.0", "torch": "2"}, "data": []}
    >>> print(markdown(nothing).splitlines()[0])
    pykd 1.0, torch 2.
    """
    parts = opening(record, READING)
    for of in record["data"]:
        rows = of["rows"]
        title = f"{of['recipe'].removeprefix(f'{PAPER}-')}, {of['pruning']}, {SHARES[of['pruning']]}"
        ks = {k: len(errors) for k, errors in rows[0]["error"].items()}
        head = [f"K = {k} (n = {count})" for k, count in ks.items()]
        errors = [[row["label"], *(percent(list(row["error"][k].values())) for k in ks)] for row in rows]
        parts.append(table([[f"{title}: test error, %", *head], *errors]))
        if baselines := [row for row in rows if "fewer_errors" in row]:
            ours, *its = (each["label"].removeprefix("student, ") for each in (rows[-1], *baselines))
            fewer = [[row["label"], *(effect(row["fewer_errors"][k]["ours"]) for k in ks)] for row in baselines]
            parts.append(table([[f"{title}: fewer errors of {ours}, points", *head], *fewer]))
            claims = [
                [f"{ours} errs less than {label}", _verdicts(row)] for label, row in zip(its, baselines, strict=True)
            ]
            parts.append(table([[f"claim, {title}", "verdict"], *claims]))
        size = rows[0]["size"]
        head = [f"{title}: K = {size['K']} (n = {size['n']})", "file bytes", "times smaller"]
        parts.append(table([head, *([row["label"], *_sizes(row["size"], size)] for row in rows)]))
    return "\n\n".join(parts)


def _verdicts(row: Mapping[str, Any]) -> str:
    """Each verdict with its K."""
    by_verdict: dict[str, list[str]] = {}
    for k, found in row["fewer_errors"].items():
        by_verdict.setdefault(found["verdict"], []).append(k)
    return "; ".join(f"{said} (K = {', '.join(ks)})" for said, ks in by_verdict.items())


def _sizes(own: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    if own["file_bytes"] is None:
        return ["", ""]
    return [f"{own['file_bytes']:,.0f}", f"{teacher['bytes'] / own['file_bytes']:.1f}"]


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """See :meth:`pykd.reproduce.Paper.figures`: ``error-K-<recipe>-<pruning>.svg``, test error over K."""
    found = {}
    for of in record["data"]:
        recipe = of["recipe"].removeprefix(f"{PAPER}-")
        title = f"{recipe}, {of['pruning']}, {SHARES[of['pruning']]}"
        found[f"error-K-{recipe}-{of['pruning']}.svg"] = error_against_k(of["rows"], title)
    return found
