"""The table of ``pykd compare``: a row for every network of every variant, over its seeds."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pykd.report.tables import interval, percent, signed_percent, table

MEASURED = ("accuracy", "parameters", "nonzeros", "bytes", "file_bytes", "latency_ms", "seconds")
READING = {
    "above teacher, points": "above teacher: in brackets the 95 % interval (Student's t) of the mean difference to the "
    "teacher's error in the same run",
    "non-zeros": "non-zeros: in brackets how often they go into the number of the teacher's parameters",
    "file bytes": "file: the model file that pykd export writes, with indices, biases and header",
    "times smaller": "smaller: the teacher's dense float32 file divided by that file, mean, least and largest",
}


def compared(finished: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the table, as plain data.

    Args:
        finished: for every variant the summaries of its finished runs, each with its ``seed``.

    Returns:
        For each network its ``run`` (the variant), ``name``, ``label``, ``seeds`` and their number ``n``;
        ``accuracy``, ``error``, ``parameters``, ``nonzeros``, ``nonzero_ratio`` (the teacher's parameters /
        ``nonzeros``), ``bytes``, ``file_bytes``, ``ratio`` (bytes of the teacher's dense float32 file /
        ``file_bytes``), ``latency_ms`` and ``seconds`` with ``mean``, ``std`` (of the sample) and ``values``, which are
        fewer than ``n`` where a run does not say one; and ``above_teacher``, by how much its error is above the
        teacher's: ``points``, a share, with its 95 % ``interval``.

    Example:
        >>> rows = [dict(name=name, label=name, accuracy=0.9, bytes=640, file_bytes=10) for name in ("teacher", "a")]
        >>> compared({"r": [{"seed": 0, "rows": rows}]})[1]["ratio"]
        {'mean': 64.0, 'std': None, 'values': [64.0]}
    """
    found = []
    for variant, summaries in finished.items():
        teachers, *_ = networks = list(zip(*(summary["rows"] for summary in summaries), strict=True))
        for of in networks:
            pairs = list(zip(of, teachers, strict=True))
            row: dict[str, Any] = {"run": variant, "name": of[0]["name"], "label": of[0]["label"]}
            row |= {"seeds": [summary["seed"] for summary in summaries], "n": len(of)}
            for key in MEASURED:
                row[key] = _spread([own[key] for own in of if own.get(key) is not None])
            row["error"] = _spread([1 - own["accuracy"] for own in of])
            for ratio, whole, part in (("nonzero_ratio", "parameters", "nonzeros"), ("ratio", "bytes", "file_bytes")):
                row[ratio] = _spread(
                    [teacher[whole] / own[part] for own, teacher in pairs if own.get(part) and teacher.get(whole)]
                )
            row["above_teacher"] = None
            if of is not teachers:
                points, low_high = interval([teacher["accuracy"] - own["accuracy"] for own, teacher in pairs])
                row["above_teacher"] = {"points": points, "interval": low_high}
            found.append(row)
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The table of a ``record``: what it was made of, its rows, and how to read them.

    Columns of which nothing is known are left out.

    Args:
        record: ``recipes``, ``changes`` and ``grid``, as on the command line; ``environment``, as in a run folder's
            ``environment.json``; ``rows``, see :func:`compared`.

    Example:
        >>> rows = [dict(name="teacher", label="teacher", accuracy=0.9, parameters=8, bytes=640)]
        >>> record = dict(recipes=["r"], changes=[], grid=[], environment={"pykd": "1.0"})
        >>> print(markdown({**record, "rows": compared({"r": [{"seed": 0, "rows": rows}]})}))
        `r`; pykd 1.0.
        <BLANKLINE>
        | network | n | test error, % | parameters | dense bytes |
        | ------- | - | ------------- | ---------- | ----------- |
        | teacher | 1 | 10.00         | 8          | 640         |
    """
    made_of = [*record["recipes"], *(f"--set {each}" for each in record["changes"])]
    made_of += [f"--grid {each}" for each in record["grid"]]
    ran_with = [f"{name} {value}" for name, value in record["environment"].items()]
    columns = columned(record["rows"])
    if len(record["recipes"]) == 1:  # what a run changes tells it from the others
        changes = [run.partition("+")[2] for run in columns.pop("run", [])]
        columns = {"change": changes, **columns} if any(changes) else columns
    lines = [list(columns), *(list(cells) for cells in zip(*columns.values(), strict=True))]
    parts = [f"{', '.join(f'`{each}`' for each in made_of)}; {', '.join(ran_with)}.", table(lines)]
    if notes := reading(columns, record["rows"]):
        parts.append(textwrap.fill(notes, 120))
    return "\n\n".join(parts)


def columned(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The cells of each column by its title, without columns of which nothing is known."""
    columns: dict[str, list[str]] = {}
    for row in rows:
        for title, cell in _cells(row).items():
            columns.setdefault(title, []).append(cell)
    return {title: cells for title, cells in columns.items() if any(cells)}


def reading(columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How to read the table; empty where that goes without saying."""
    notes = [note for title, note in READING.items() if title in columns]
    if any(row["n"] > 1 for row in rows):
        notes.insert(0, "Mean and sample standard deviation over n seeds")
    return "; ".join(notes) + "." * bool(notes)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    def mean(key: str, form: str) -> str:
        return "" if row[key]["mean"] is None else form.format(row[key]["mean"])

    ratios = row["ratio"]["values"]
    spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
    above = row["above_teacher"]
    return {
        "run": row["run"],
        "network": row["label"],
        "n": str(row["n"]),
        "test error, %": percent(row["error"]["values"]),
        "above teacher, points": signed_percent(above["points"], above["interval"]) if above else "",
        "parameters": mean("parameters", "{:,.0f}"),
        "non-zeros": mean("nonzeros", "{:,.0f}") + mean("nonzero_ratio", " ({:.1f}x)"),
        "dense bytes": mean("bytes", "{:,.0f}"),
        "file bytes": mean("file_bytes", "{:,.0f}"),
        "times smaller": mean("ratio", "{:.1f}") + spread,
        "latency (ms)": mean("latency_ms", "{:.3f}"),
        "training (s)": mean("seconds", "{:.1f}"),
    }
