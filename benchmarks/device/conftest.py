"""What a record of the engine says about the device; nothing here needs torch."""

from typing import Any

from pykd import _runtime


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["isa"] = _runtime.isa()
