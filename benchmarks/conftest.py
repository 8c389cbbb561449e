"""What each record of benchmarks/results says about the machine beside pytest-benchmark's own facts."""

import sys
from pathlib import Path
from typing import Any

import torch

from pykd._extension import load

sys.path.insert(0, str(Path(__file__).parent))  # for what the benchmarks share, in any of pytest's import modes


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cuda = torch.cuda.is_available()
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = load().isa()
    machine_info["cuda"] = torch.version.cuda if cuda else None
    machine_info["gpu"] = torch.cuda.get_device_name() if cuda else None
