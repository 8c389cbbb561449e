"""What grids record beside their runs: a paper's claims, and the trials of a sweep."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pykd._svg import LOOKS
from pykd.report import figures
from pykd.report.parts import Artist, Figure, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRIALS = 200  # in the table
WORD = 12  # letters below a figure


def tables(file: Path) -> Markup:
    """The Markdown that pykd wrote, as HTML: its paragraphs and tables; all else stays text."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("zero", {"html": False}).enable(["table", "backticks", "emphasis"])
    tokens = reader.parse(file.read_text())
    for token in tokens:
        if token.type == "th_open":
            token.attrSet("scope", "col")
    return Markup(reader.renderer.render(tokens, reader.options, {}))


def sweep(record: Mapping[str, Any], draw: Artist) -> tuple[Table, list[Figure]]:
    """The trials of a ``sweep.json`` as a table, and their objective over their order and over each setting."""
    best = record["best"]["number"] if isinstance(record["best"], dict) else record["best"]
    trials = sorted(record["trials"], key=lambda trial: trial["number"])
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    rows = [
        [
            f"{trial['number']}{' (best)' if trial['number'] == best else ''}",
            *(_said(trial["values"].get(key)) for key in keys),
            _said(trial["objective"]),
            str(trial.get("run") or ""),
        ]
        for trial in trials
    ]
    caption = f"{len(trials)} trials of {record['recipe']}"
    if len(rows) > TRIALS:
        rows, caption = rows[:TRIALS], f"{caption}, the first {TRIALS}"
    done = [trial for trial in trials if trial["objective"] is not None]
    made = []
    for key in ["trial", *keys] if done else []:
        points = [
            (trial["number"] if key == "trial" else trial["values"].get(key), trial["objective"]) for trial in done
        ]
        text = f"Objective over {key}: {min(y for _, y in points):.4g} to {max(y for _, y in points):.4g}"
        marked = next((each for each, trial in zip(points, done, strict=True) if trial["number"] == best), None)
        if marked:
            text += f", the best trial (diamond) {_said(marked[1])} at {_said(marked[0])}"
        made.append(draw(partial(figures.alone, partial(_points, points=points, best=marked, title=key)), f"{text}."))
    return Table(["trial", *keys, "objective", "run"], rows, f"{caption}."), made


def _said(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _points(axes: "Axes", *, points: Sequence[tuple[Any, float]], best: tuple[Any, float] | None, title: str) -> None:
    numbers = [x for x, _ in points if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) < len(points):  # words stand side by side
        points = [(str(x)[:WORD], y) for x, y in points]
        best = best and (str(best[0])[:WORD], best[1])
    elif title != "trial" and 0 < 100 * min(numbers) <= max(numbers) and math.isfinite(max(numbers)):
        axes.set_xscale("log")
    axes.plot(*zip(*points, strict=True), "o", color=LOOKS[0][0], markersize=4)
    if best:
        axes.plot(*best, "D", color=LOOKS[1][0], markersize=7)
    axes.set_xlabel(title)
    axes.set_ylabel("objective")
    axes.grid(linewidth=0.3, alpha=0.5)
