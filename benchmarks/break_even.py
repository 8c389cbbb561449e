"""At which share of stored weights a sparse layer costs as much as the fastest dense one, from a record.

    python benchmarks/break_even.py benchmarks/results/gpu.json

Measurements whose ``extra_info`` names a ``pattern`` and a ``density`` count (benchmarks/test_sparse_gpu.py). Between
two densities the logarithm of the ratio of the times is taken for linear.
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

DENSE = ("torch", "torch channels last", "torch compiled")

Times = dict[float, dict[str, float]]  # seconds of each implementation, by density


def times_of(record: dict[str, Any]) -> dict[str, Times]:
    """The medians over the blocks, by op, pattern and dtype, where a record that was cut off has pykd and dense."""
    found: dict[str, dict[float, dict[str, list[float]]]] = {}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        if "pattern" not in info:
            continue
        densities = found.setdefault(f"{info['op']} {info['pattern']}, {info['dtype']}", {})
        times = densities.setdefault(info["density"], {}).setdefault(info["implementation"], [])
        times.append(benchmark["stats"]["median"] / info.get("calls", 1))
    whole = {
        pattern: {
            density: {name: median(each) for name, each in times.items()}
            for density, times in densities.items()
            if "pykd" in times and not times.keys().isdisjoint(DENSE)
        }
        for pattern, densities in found.items()
    }
    return {pattern: times for pattern, times in whole.items() if times}


def break_even(times: Times) -> str:
    """The density below which pykd is faster than dense, or on which side of all that were measured it is."""
    ratios = {
        density: math.log(row["pykd"] / min(row[name] for name in DENSE if name in row))
        for density, row in sorted(times.items())
    }
    densities = list(ratios)
    if ratios[densities[0]] >= 0:
        return f"< {densities[0]:.0%}"
    for below, above in pairwise(densities):
        if ratios[above] >= 0:
            share = ratios[below] / (ratios[below] - ratios[above])
            return f"{below + share * (above - below):.0%}"
    return f"> {densities[-1]:.0%}"


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a pattern with how many times as fast as dense pykd is at each density, and where it is even."""
    patterns = times_of(record)
    densities = sorted({density for times in patterns.values() for density in times})
    lines = [
        f"| | {' | '.join(f'{density:.0%}' for density in densities)} | break-even density |",
        "| --- |" + " ---: |" * (len(densities) + 1),
    ]
    for pattern, times in patterns.items():
        ratios = (
            f"{min(times[density][name] for name in DENSE if name in times[density]) / times[density]['pykd']:.2f}"
            if density in times
            else ""
            for density in densities
        )
        lines.append(f"| {pattern} | {' | '.join(ratios)} | {break_even(times)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/break_even.py RECORD.json")
    try:
        record = json.loads(Path(sys.argv[1]).read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{sys.argv[1]} is no record of pytest-benchmark: {error}") from error
    print(table(record))
