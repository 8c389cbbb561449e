"""What a paper's experiment is, and what the papers' experiments share."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pykd.config import Config, ConfigError, lies_in, nearest
from pykd.report.comparison import compared
from pykd.report.tables import interval, signed_percent, table

QUICK = "quick: not evidence"
WHOLE = "recipe"  # the variant that is the recipe as it stands, with its baselines


class Paper(Protocol):
    """A module with the experiment of one paper."""

    def runs(
        self, data: Iterable[str], changes: Sequence[str], *, seeds: int | None, out: Path, quick: bool = False
    ) -> list[tuple[str, Config]]:
        """Every run's folder below ``out``, without the seed, and settings.

        Args:
            data: names of data sets; each has recipes of the paper.
            changes: assignments for the recipes.
            seeds: runs of each variant, with the recipe's seed, the next, ...; None for the paper's number.
            out: folder of all runs.
            quick: few variants with a tenth of the epochs.

        Raises:
            ConfigError: a data set without a recipe, an unknown key or value; a key that the experiment varies.
        """
        ...

    def left_out(self, seeds: int | None, quick: bool) -> str:
        """What so few seeds leave out, as a sentence; empty if nothing."""
        ...

    def record(
        self,
        finished: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        changes: Sequence[str] = (),
        quick: bool,
        environment: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What the finished runs say, as plain data.

        Args:
            finished: for a folder of ``runs``, the summary of every seed that is finished, with its ``seed``.
            changes: what the user changed in the recipes.
            quick: these are quick runs.
            environment: what they ran with, as in a run folder's ``environment.json``.

        Returns:
            ``paper``, ``changes``, ``quick``, ``environment``, and what the paper's own module says.
        """
        ...

    def claims(self, data: str, rows: Sequence[Mapping[str, Any]], *, quick: bool) -> list[dict[str, Any]]:
        """What the ``rows`` of a record on one data set say to the paper's claims; see :func:`checked`."""
        ...

    def markdown(self, record: Mapping[str, Any]) -> str:
        """The tables of a ``record``, and how to read them."""
        ...

    def figures(self, record: Mapping[str, Any]) -> dict[str, bytes]:
        """The figures of a ``record``, by the names of their files."""
        ...


def refuse_varied(changes: Iterable[str], varied: Iterable[str]) -> None:
    """Raises a ``ConfigError`` for an assignment to a key that the experiment itself sets."""
    for change in changes:
        key = change.partition("=")[0].strip()
        if taken := [own for own in varied if lies_in(key, own) or lies_in(own, key)]:
            raise ConfigError(
                f"--set {change}: {taken[0]} is what the experiment varies: leave it out, or use pykd compare"
            )


def require_data(paper: str, name: str, known: Iterable[str]) -> None:
    """Raises a ``ConfigError`` where no recipe of the paper is for the data set ``name``."""
    known = list(known)
    if name not in known:
        raise ConfigError(f"data.name: no recipe of {paper} is for {name!r}; {nearest(name, known)}")


def fewer_epochs(config: Config) -> list[str]:
    """A tenth of the epochs, as assignments.

    >>> from pykd.config import load
    >>> fewer_epochs(load("noisy_teacher-digits"))
    ['teacher.training.epochs=6', 'student.training.epochs=12']
    """
    networks = {"teacher": config.teacher, "student": config.student}
    return [f"{role}.training.epochs={max(1, each.training.epochs // 10)}" for role, each in networks.items()]


def paired(ours: Sequence[Mapping[str, float]], than: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """By how much ``ours`` err less than ``than``, over the seeds that all have; None where there is no such seed.

    Args:
        ours: errors by seed; of several the mean counts.
        than: the same.

    Returns:
        ``seeds`` (how many); ``points``, the mean of the differences, and ``relative``, it divided by the mean error
        of ``than``; ``points_interval`` and ``relative_interval``, their 95 % intervals by Student's t.

    Example:
        >>> found = paired([{"0": 0.25, "1": 0.5}], [{"0": 0.5, "1": 0.75, "2": 1.0}])
        >>> found["seeds"], found["points"], found["relative"]
        (2, 0.25, 0.4)
    """
    seeds = [seed for seed in ours[0] if all(seed in errors for errors in (*ours, *than))]
    if not seeds:
        return None
    error = [statistics.fmean(errors[seed] for errors in than) for seed in seeds]
    less = [each - statistics.fmean(errors[seed] for errors in ours) for seed, each in zip(seeds, error, strict=True)]
    scale = statistics.fmean(error)
    mean, low_high = interval(less)
    return {
        "seeds": len(seeds),
        "points": mean,
        "points_interval": low_high,
        "relative": mean / scale if scale else None,
        "relative_interval": [each / scale for each in low_high] if scale and low_high else None,
    }


def verdict(
    ours: Mapping[str, Any] | None, kind: str = "points", figure: float | None = None, *, quick: bool = False
) -> str:
    """What a difference of :func:`paired` says about a claim.

    Args:
        ours: the difference, or the mean of :func:`times`.
        kind: ``"points"``, ``"relative"`` or ``"times"``.
        figure: the published one, if there is one.
        quick: it comes from quick runs.

    Example:
        >>> verdict({"points": 0.02, "points_interval": [0.01, 0.03]})
        'reached'
    """
    if quick:
        return QUICK
    if ours is not None and ours[kind] is None:
        return "open: there are no errors to reduce"
    if ours is None or ours[f"{kind}_interval"] is None:
        return "open: an interval needs two seeds"
    (low, high), mean = ours[f"{kind}_interval"], ours[kind]
    holds = figure is not None and high >= figure
    if low <= 0 <= high:
        return f"no effect seen: the interval holds 0{' and the published figure' if holds else ''}"
    if high < 0:
        return "not reached: the opposite is seen"
    if figure is None or mean >= figure:
        return "reached"
    return f"not reached: less is seen{', but the interval holds the figure' if holds else ''}"


def no_worse(ours: Mapping[str, Any] | None, allowed: float, *, quick: bool = False) -> str:
    """What a difference of :func:`paired` says about a claim to err at most ``allowed`` more.

    Example:
        >>> no_worse({"points": -0.001, "points_interval": [-0.003, 0.001]}, 0.002)
        'open: the interval holds a loss of 0.20 points'
    """
    if quick:
        return QUICK
    if ours is None or ours["points_interval"] is None:
        return "open: an interval needs two seeds"
    low, high = ours["points_interval"]
    if high < -allowed:
        return "not reached: more is lost"
    return "reached" if low >= -allowed else f"open: the interval holds a loss of {100 * allowed:.2f} points"


def effect(found: Mapping[str, Any] | None, kind: str = "points") -> str:
    """A difference of :func:`paired` or a mean of :func:`times` as a cell; empty where there is none.

    >>> effect({"points": 0.02, "points_interval": [0.01, 0.03]})
    '+2.00 [+1.00, +3.00]'
    >>> effect({"times": 64.0, "times_interval": [62.0, 66.0]}, "times")
    '64.0 [62.0, 66.0]'
    """
    if found is None or found[kind] is None:
        return ""
    if kind == "times":
        ends = [f"{each:.1f}" for each in found["times_interval"] or []]
        return f"{found['times']:.1f}" + (f" [{', '.join(ends)}]" if ends else "")
    return signed_percent(found[kind], found[f"{kind}_interval"], digits=2 if kind == "points" else 1)


def times(values: Sequence[float]) -> dict[str, Any]:
    """How many ``times`` smaller, on average over the seeds, with the mean's 95 % interval by Student's t.

    >>> times([64.0, 66.0])["times"]
    65.0
    """
    mean, low_high = interval(values)
    return {"seeds": len(values), "times": mean, "times_interval": low_high}


def by_seed(row: Mapping[str, Any]) -> dict[str, float]:
    """The errors of a row of :func:`pykd.report.compared`, as :func:`paired` takes them."""
    return dict(zip(map(str, row["seeds"]), row["error"]["values"], strict=True))


def networks(
    finished: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """For each data set the rows of :func:`pykd.report.compared`, whose ``run`` is the variant alone.

    Args:
        finished: see :meth:`Paper.record`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in compared(finished):
        data, _, variant = row["run"].partition("/")
        found.setdefault(data, []).append({**row, "run": variant})
    return found


def network(rows: Sequence[Mapping[str, Any]], run: str, name: str) -> Mapping[str, Any] | None:
    """The row of one network of a variant."""
    return next((row for row in rows if (row["run"], row["name"]) == (run, name)), None)


def plain(label: str) -> str:
    """What a network is called in a sentence.

    >>> plain("student, KD"), plain("student alone")
    ('KD', 'student alone')
    """
    return label.removeprefix("student, ")


def opening(record: Mapping[str, Any], reading: str) -> list[str]:
    """The paragraphs before a record's tables: what it ran with, how to read it, and what it is not."""
    parts = [f"{', '.join(f'{name} {value}' for name, value in record['environment'].items())}.", reading]
    if record["changes"]:
        parts.append(f"**Not the recipe's settings:** {', '.join(f'`{change}`' for change in record['changes'])}.")
    if record["quick"]:
        parts.append(
            "**quick: not evidence.** A tenth of the epochs, few variants and, for factor transfer, a small teacher: "
            "this shows that all of it runs."
        )
    return parts


def checked(
    text: str,
    ours: Sequence[Mapping[str, float]],
    than: Sequence[Mapping[str, float]],
    *,
    quick: bool,
    published: str = "without a figure",
    kind: str = "points",
    figure: float | None = None,
) -> dict[str, Any]:
    """A claim that ``ours`` err less than others, and what was found: see :func:`paired` and :func:`verdict`.

    Returns:
        ``claim``, ``published`` and ``kind`` as given; ``sides``, the errors of both, a value a seed; ``ours``, the
        difference; its ``verdict``.
    """
    found = paired(ours, than)
    shared = [seed for seed in ours[0] if all(seed in errors for errors in (*ours, *than))]
    sides = [[statistics.fmean(errors[seed] for errors in side) for seed in shared] for side in (ours, than)]
    said = verdict(found, kind, figure, quick=quick)
    return {"claim": text, "published": published, "kind": kind, "sides": sides, "ours": found, "verdict": said}


def claims_table(of: Mapping[str, Any], title: str) -> str:
    """The claims of a record on one data set."""
    lines = [[f"claim, on {title}", "published", "here", "verdict"]]
    for claim in of["claims"]:
        unit = {"points": "points", "relative": "% relative", "times": "times"}[claim["kind"]]
        here = f"{effect(claim['ours'], claim['kind'])} {unit}"
        lines.append([claim["claim"], claim["published"], here, claim["verdict"]])
    return table(lines)
