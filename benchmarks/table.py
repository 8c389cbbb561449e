"""Markdown tables from pytest-benchmark's JSON: medians in microseconds, and how far pykd is ahead of its fastest peer.

    python benchmarks/table.py                          every file in benchmarks/results
    python benchmarks/table.py results.json --write docs/benchmarks.md
    python benchmarks/table.py --summary --write README.md

A benchmark's ``extra_info`` names its table (op, device, dtype, threads), its row (case) and its column
(implementation); ``calls`` is how many calls one round holds, where the benchmark's own iterations do not count them.
A ``value`` of a ``unit`` stands in the place of the time where something else was measured, of which less is better.
``bytes`` are those that an op cannot but move: beside a column `copy` they give the share of the copy's bandwidth.
The median over all blocks of a case counts. A ratio below 1 is a loss, and it stays in the table. Where there is a
column `torch`, pykd is compared with it, too. The summary has the ratios alone: of each table the least, the median and
the most of its rows.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: made by `make bench` -->", "<!-- end of benchmarks -->"
# Limits of the machine and of torch, which do less than the op.
FLOORS = {"copy", "empty op", "six products", "shrunk", "passes", "only numpy"}
MOVED, SHARE = "MB", "share of copy"  # that pykd's op moves at least, and at which share of the copy's bandwidth
# What a record says about its machine, beside the processor's or the card's name.
FACTS = ("torch", "cuda", "driver", "isa", "SMs", "L2", "SM clock", "memory clock", "power limit", "temperature")
PACKAGES = ("mkl", "onnxruntime", "openvino", "scipy")  # packages whose versions a record has

Row = dict[str, float]  # an implementation's median; what is moved, and the share of the copy's bandwidth
Table = dict[str, Row]  # of each case


def machine_of(record: dict[str, Any]) -> str:
    """What a record was measured on and with."""
    machine, commit = record["machine_info"], record["commit_info"]
    changes = " with changes" if commit["dirty"] else ""
    where = [machine.get("gpu") or machine["cpu"].get("brand_raw", machine["machine"])]
    where += [f"{name} {machine[name]}" for name in (*FACTS, *PACKAGES) if machine.get(name)]
    where += [f"Python {machine['python_version']}", f"commit {commit['id'][:10]}{changes}", record["datetime"][:10]]
    return ", ".join(where)


def tables_of(record: dict[str, Any]) -> dict[str, Table]:
    """The tables of one JSON file by their titles."""
    blocks: dict[str, dict[str, dict[str, list[float]]]] = {}
    moved: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        threads = f", {info['threads']} thread{'s' if info['threads'] > 1 else ''}" if info["device"] == "cpu" else ""
        title = f"{info['op']}, {info['device']}, {info['dtype']}{threads}"
        if "unit" in info:
            title = f"{info['op']}, {info['unit']}"
        times = blocks.setdefault(title, {}).setdefault(info["case"], {}).setdefault(info["implementation"], [])
        times.append(info.get("value", benchmark["stats"]["median"] * 1e6 / info.get("calls", 1)))
        if "bytes" in info:
            moved.setdefault((title, info["case"]), {})[info["implementation"]] = info["bytes"]
    return {
        title: {
            case: with_share({name: median(times) for name, times in row.items()}, moved.get((title, case), {}))
            for case, row in cases.items()
        }
        for title, cases in blocks.items()
    }


def with_share(row: Row, moved: dict[str, float]) -> Row:
    """The row with the share of the copy's bandwidth, where it is known what pykd and the copy move."""
    if {"pykd", "copy"} <= moved.keys() & row.keys():
        row[MOVED] = moved["pykd"] / 1e6
        row[SHARE] = moved["pykd"] / row["pykd"] / (moved["copy"] / row["copy"])
    return row


def ratios(row: Row) -> dict[str, float]:
    """How many times as long as pykd torch takes, and the fastest peer."""
    left_out = FLOORS | {MOVED, SHARE}
    peers = {name: time for name, time in row.items() if not name.startswith("pykd") and name not in left_out}
    others = {"torch / pykd": peers.get("torch"), "fastest peer / pykd": min(peers.values(), default=None)}
    found = {name: other / row["pykd"] for name, other in others.items() if other and row.get("pykd")}
    return found | ({SHARE: row[SHARE]} if SHARE in row else {})


def rendered(title: str, table: Table) -> str:
    """One table: a row a case, a column an implementation."""
    found = dict.fromkeys(name for row in table.values() for name in row)
    names = [name for name in found if name not in (MOVED, SHARE)] + [MOVED] * (MOVED in found)
    compared = ["torch / pykd"] * ("torch" in names) + ["fastest peer / pykd"] + [SHARE] * (SHARE in found)
    lines = [f"| {title} | {' | '.join(names + compared)} |", "| --- |" + " ---: |" * len(names + compared)]
    for case, row in table.items():
        cells = [f"{row[name]:.1f}" if name in row else "" for name in names]
        cells += [f"{ratios(row)[name]:.2f}" if name in ratios(row) else "" for name in compared]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(record: dict[str, Any]) -> str:
    """All of a record, under a line that says where it was measured."""
    named = ", or what a table names," if any("unit" in each["extra_info"] for each in record["benchmarks"]) else ""
    parts = [f"Median microseconds{named} on {machine_of(record)}.{while_measured(record)}"]
    return "\n\n".join(parts + [rendered(title, table) for title, table in tables_of(record).items()])


def while_measured(record: dict[str, Any]) -> str:
    """The clocks and temperatures of a card beside its measurements, and what its cache held."""
    infos = [benchmark["extra_info"] for benchmark in record["benchmarks"]]
    clocks, celsius = ([info[name] for info in infos if name in info] for name in ("sm_mhz", "celsius"))
    text = f" SM clock {min(clocks)} to {max(clocks)} MHz, {min(celsius)} to {max(celsius)} C." if clocks else ""
    return text + (" What fits into L2 is hot there." if any("l2" in info for info in infos) else "")


def summary(records: list[dict[str, Any]]) -> str:
    """A line for each table of all records."""
    found = [
        (title, [ratios(row) for row in table.values()])
        for record in records
        for title, table in tables_of(record).items()
    ]
    names = ["torch / pykd", "fastest peer / pykd"]
    names += [SHARE] * any(SHARE in row for _, rows in found for row in rows)
    lines = [f"| | cases | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for title, rows in found:
        cells = []
        for name in names:
            each, digits = [row[name] for row in rows if name in row], 2 if name == SHARE else 1
            cells.append(f"{median(each):.{digits}f} ({min(each):.2f} to {max(each):.{digits}f})" if each else "")
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(page: str, text: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with the text between its two marks."""
    head, begin, rest = page.partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if not (begin and end):
        raise SystemExit(f"the page needs the lines '{marks[0]}' and '{marks[1]}', between which the tables go")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Markdown tables from pytest-benchmark's JSON")
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all of benchmarks/results")
    parser.add_argument("--summary", action="store_true", help="the ratios alone, a line a table")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between PAGE's marks")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit("benchmarks/results holds no JSON file: run `make bench` first")
    records = [json.loads(file.read_text()) for file in files]
    text = summary(records) if options.summary else "\n\n".join(map(tables, records))
    if options.write:
        options.write.write_text(replaced(options.write.read_text(), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
