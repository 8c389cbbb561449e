"""Kim et al. 2018: factor transfer beside the other ways to transfer knowledge, and paraphrasers of several rates."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd import config as recipes
from pykd.config import Config
from pykd.report.tables import percent, ran_with, table
from pykd.reproduce._paper import (
    WHOLE,
    by_seed,
    checked,
    claims_table,
    effect,
    fewer_epochs,
    network,
    networks,
    opening,
    paired,
    plain,
    refuse_varied,
    require_data,
)

PAPER = "factor_transfer"
SEEDS = 3
RATES = (0.25, 0.75, 1.0)  # of paraphrasers, beside the recipe's
RIVALS = ("alone", "kd", "attention_transfer", "fitnet")
# A teacher of a quick run; the recipes' own takes minutes an epoch on images of 28 x 28.
SMALL_TEACHER = ("teacher.name=resnet", "teacher.depth=8")
# What the experiment sets; a user's own value would be lost.
RESERVED = ("method.name", "method.rate", "data.name", "teacher.weights", "more_teachers", "seed")
READING = """\
Mean and sample standard deviation over n seeds. The networks of a run share teacher, initial weights and rows, and the
runs of a seed the teacher, so factor transfer (FT) is compared in pairs: in brackets the 95 % interval (Student's t) of
the mean difference, which one seed does not give; of twenty such intervals one misses by chance. A factor has rate
k times the channels of the teacher's maps; beta grows with k, so that each entry of a factor keeps its weight. Nothing
was tuned for one of the rows. The paper's tables could not be established, so no claim has a published figure."""


def runs(
    data: Iterable[str], changes: Sequence[str], *, seeds: int | None, out: Path, quick: bool = False
) -> list[tuple[str, Config]]:
    """See :meth:`pykd.reproduce.Paper.runs`; of a recipe, all runs of a seed come before those of the next.

    Example:
        >>> [folder for folder, _ in runs(["digits"], [], seeds=1, out=Path("r"))]
        ['digits/recipe', 'digits/rate=0.25', 'digits/rate=0.75', 'digits/rate=1.0']
    """
    from pykd.methods import FactorTransfer

    refuse_varied(changes, RESERVED)
    known = [each.removeprefix(f"{PAPER}-") for each in recipes.recipes() if each.startswith(f"{PAPER}-")]
    found = []
    for name in data:
        require_data(PAPER, name, known)
        source = f"{PAPER}-{name}"
        first = recipes.load(source, changes)
        own = [*SMALL_TEACHER, *fewer_epochs(first), "method.paraphraser.epochs=1"] if quick else []
        rate = first.method.get("rate", FactorTransfer.rate)
        beta = first.method.get("beta", FactorTransfer.beta)
        variants: dict[str, list[str]] = {WHOLE: []}
        for each in RATES[: 0 if quick else None]:
            scaled = json.dumps(beta * each / rate)
            variants[f"rate={each}"] = [f"method.rate={each}", f"method.beta={scaled}", "baselines=[]"]
        for number in range(seeds or (2 if quick else SEEDS)):
            for variant, more in variants.items():
                settings = [*own, *changes, *more, f"seed={first.seed + number}"]
                found.append((f"{name}/{variant}", recipes.load(source, settings)))
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

    A row is a network of a variant, ``run``, as :func:`pykd.report.compared` gives it, with ``fewer_errors``: by how
    much the recipe's student errs less.
    """
    found = {}
    for name, rows in networks(finished).items():
        student = network(rows, WHOLE, "student")
        for row in rows:
            row["fewer_errors"] = paired([by_seed(student)], [by_seed(row)]) if student and row != student else None
        found[name] = {"recipe": f"{PAPER}-{name}", "rows": rows, "claims": claims(name, rows, quick=quick)}
    made_of = {"paper": PAPER, "changes": list(changes), "quick": quick}
    return {**made_of, "environment": ran_with(environment), "data": found}


def claims(data: str, rows: Sequence[Mapping[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
    """See :meth:`pykd.reproduce.Paper.claims`."""
    found = []
    student = network(rows, WHOLE, "student")
    for rival in (network(rows, WHOLE, name) for name in RIVALS):
        if student and rival:
            text = f"factor transfer errs less than {plain(rival['label'])}"
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
        lines = [[data, "network", "n", "test error, %", "fewer test errors of FT, points"]]
        for row in of["rows"]:
            fewer = effect(row["fewer_errors"])
            lines.append([row["run"], row["label"], str(row["n"]), percent(row["error"]["values"]), fewer])
        parts.append(table(lines))
        if of["claims"]:
            parts.append(claims_table(of, data))
    return "\n\n".join(parts)


def figures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """See :meth:`pykd.reproduce.Paper.figures`: the tables say it all."""
    return {}
