"""docs/claims.md: what the papers claim, with what the committed records say beside it.

python benchmarks/claims.py --write    # or without, to look at it
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd.reproduce._paper import WHOLE, by_seed
from pykd.reproduce.claims import page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "claims.md"
# What pykd compare recorded of a paper's experiment, before pykd reproduce ran it.
COMPARED = [
    "variational_student-mnist",
    "variational_student-mnist-low-data",
    "factor_transfer-mnist",
    "factor_transfer-digits",
]
CROSSED = "cross_distillation-mnist"  # structured, few images, many seeds


def text() -> str:
    files = [*sorted((RESULTS / "reproduce").glob("*.json")), *sorted((RESULTS / "paper").glob("*.json"))]
    records = [(file, json.loads(file.read_text())) for file in files]
    for name in (*COMPARED, CROSSED):
        file = RESULTS / "compare" / f"{name}.json"
        record = json.loads(file.read_text())
        records.append((file, (crossed if name == CROSSED else reproduced)(record)))
    return page((str(file.relative_to(ROOT)), record) for file, record in records) + "\n"


def reproduced(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of ``pykd compare`` as ``pykd reproduce`` has it: what a run changes names its variant."""
    paper, _, data = record["recipes"][0].partition("-")
    rows = [{**row, "run": row["run"].rpartition(".")[2] if "+" in row["run"] else WHOLE} for row in record["rows"]]
    return {"paper": paper, "changes": record["changes"], "quick": False, "data": {data: {"rows": rows}}}


def crossed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a grid over ``data.per_class``: a row a network, its errors by K."""
    rows: dict[str, dict[str, Any]] = {}
    for row in sorted(record["rows"], key=lambda row: row["name"] == "student"):
        own = rows.setdefault(row["name"], {"name": row["name"], "label": row["label"], "error": {}})
        own["error"][row["run"].rpartition("=")[2]] = by_seed(row)
    data: Sequence[Mapping[str, Any]] = [
        {"recipe": record["recipes"][0], "pruning": "structured", "rows": list(rows.values())}
    ]
    return {"paper": "cross_distillation", "changes": record["changes"], "quick": False, "data": data}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(text())
    else:
        print(text(), end="")
