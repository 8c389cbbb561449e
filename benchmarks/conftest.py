"""What each record of benchmarks/results says about the machine beside pytest-benchmark's own facts."""

import os
import subprocess
import sys
from collections.abc import Generator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for what the benchmarks share, in any of pytest's import modes

from table import PACKAGES

collect_ignore = ["device"]  # measured where it is named: on a device, into a record of its own
os.environ["PYKD_CACHE"] = "off"  # plans are measured anew
os.environ["KMP_BLOCKTIME"] = "1"  # ms: oneMKL's threads would spin for 200 beside those that are measured next


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= {package.name: package.version for package in distributions() if package.name in PACKAGES}
    try:
        import torch

        from pykd._extension import load
    except ImportError:  # what benchmarks/device needs not
        return
    cuda = torch.cuda.is_available()
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = load().isa()
    machine_info["cuda"] = torch.version.cuda if cuda else None
    machine_info["gpu"] = torch.cuda.get_device_name() if cuda else None
    if cuda:
        card = torch.cuda.get_device_properties()
        machine_info |= {"SMs": card.multi_processor_count, "L2": f"{card.L2_cache_size / 1e6:.0f} MB", **of_driver()}


def of_driver() -> dict[str, str]:
    """What nvidia-smi says about the card; nothing where it says nothing."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        driver, sm, max_sm, memory, max_memory, watts, celsius = said.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {
        "driver": driver,
        "SM clock": f"{sm} of {max_sm} MHz",
        "memory clock": f"{memory} of {max_memory} MHz",
        "power limit": f"{watts} W",
        "temperature": f"{celsius} C",
    }


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves out what no table needs: a record has thousands of measurements."""
    for benchmark in output_json["benchmarks"]:
        for name in ("fullname", "group", "name", "options", "param", "params"):
            del benchmark[name]
        stats = benchmark["stats"]
        benchmark["stats"] = {name: stats[name] for name in ("min", "median", "max", "rounds", "iterations")}


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    if revision := os.environ.get("PYKD_REVISION"):  # of a tree without .git
        commit_info["id"], dirty, _ = revision.partition("-dirty")
        commit_info["dirty"] = bool(dirty)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Drops what an interrupt left without a measurement, of which pytest-benchmark could make no record."""
    measured = session.config._benchmarksession
    measured.benchmarks = [each for each in measured.benchmarks if each.stats.data]
    return (yield)
