"""Markdown tables from pytest-benchmark's JSON: medians in microseconds, and how far pykd is ahead of its fastest peer.

    python benchmarks/table.py                          every file in benchmarks/results
    python benchmarks/table.py results.json --write README.md

A benchmark's ``extra_info`` names its table (op, device, dtype, threads), its row (case) and its column
(implementation); ``calls`` is how many calls one round holds, where the benchmark's own iterations do not count them.
The median over all blocks of a case counts. A ratio below 1 is a loss, and it stays in the table. Where there is a
column `torch`, pykd is compared with it, too.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: made by `make bench` -->", "<!-- end of benchmarks -->"
FLOORS = {"copy", "empty op", "six products", "shrunk"}  # limits of the machine and of torch, which do less than the op

PEERS = ("mkl", "onnxruntime", "openvino", "scipy")  # packages whose versions a record has


def tables(record: dict[str, Any]) -> str:
    """The tables of one JSON file, under a line that says what it was measured on and with."""
    machine, commit = record["machine_info"], record["commit_info"]
    changes = " with changes" if commit["dirty"] else ""
    where = [machine.get("gpu") or machine["cpu"].get("brand_raw", machine["machine"])]
    where += [f"{name} {machine[name]}" for name in ("torch", "cuda", "driver", "isa", *PEERS) if machine.get(name)]
    where += [f"Python {machine['python_version']}", f"commit {commit['id'][:10]}{changes}", record["datetime"][:10]]

    blocks: dict[str, dict[str, dict[str, list[float]]]] = {}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        threads = f", {info['threads']} thread{'s' if info['threads'] > 1 else ''}" if info["device"] == "cpu" else ""
        title = f"{info['op']}, {info['device']}, {info['dtype']}{threads}"
        times = blocks.setdefault(title, {}).setdefault(info["case"], {}).setdefault(info["implementation"], [])
        times.append(benchmark["stats"]["median"] * 1e6 / info.get("calls", 1))
    parts = [f"Median microseconds on {', '.join(where)}."]
    parts += [table(title, cases) for title, cases in blocks.items()]
    return "\n\n".join(parts)


def table(title: str, cases: dict[str, dict[str, list[float]]]) -> str:
    """One table: a row a case, a column an implementation."""
    names = list(dict.fromkeys(name for row in cases.values() for name in row))
    ratios = ["torch / pykd"] * ("torch" in names) + ["fastest peer / pykd"]
    lines = [f"| {title} | {' | '.join(names + ratios)} |", "| --- |" + " ---: |" * len(names + ratios)]
    for case, row in cases.items():
        times = {name: median(blocks) for name, blocks in row.items()}
        peers = {name: time for name, time in times.items() if not name.startswith("pykd") and name not in FLOORS}
        others = [peers.get("torch")] * (len(ratios) - 1) + [min(peers.values(), default=None)]
        cells = [f"{times[name]:.1f}" if name in times else "" for name in names]
        cells += [f"{other / times['pykd']:.2f}" if other and "pykd" in times else "" for other in others]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(page: str, text: str) -> str:
    """The page with the text between its two marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page needs the lines '{BEGIN}' and '{END}', between which the tables go")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Markdown tables from pytest-benchmark's JSON")
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all of benchmarks/results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between PAGE's marks")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit("benchmarks/results holds no JSON file: run `make bench` first")
    text = "\n\n".join(tables(json.loads(file.read_text())) for file in files)
    if options.write:
        options.write.write_text(replaced(options.write.read_text(), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
