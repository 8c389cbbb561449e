"""What this machine has: versions, compiled operators, devices, data."""

import json
import os
import platform
from importlib import metadata

TRAIN_PACKAGES = ("accelerate", "torchvision", "pydantic", "PyYAML", "typer", "rich", "scikit-learn", "tensorboard")


def examine() -> tuple[dict[str, str], bool]:
    """Findings by topic, and whether the operators and the pipelines can be used here."""
    findings = {"pykd": _version("pykd"), "Python": platform.python_version(), "machine": _machine()}
    missing = [name for name in TRAIN_PACKAGES if _version(name) == "missing"]
    findings["packages"] = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "safetensors", *TRAIN_PACKAGES))
    if missing:
        findings["missing"] = f"{', '.join(missing)}: run pip install 'pykd[train]'"
    try:
        from pykd import _runtime

        machine = json.loads(_runtime.machine())
        if machine["name"]:
            software = f"L4T {machine['l4t'] or 'unknown'}, JetPack {machine['jetpack'] or 'unknown'}"
            mode = (machine["power_mode"] or {}).get("name", "unknown")
            findings["board"] = f"{machine['name']}, {software}, power mode {mode}"
        device = machine["cuda"]["name"] if machine["cuda"] else "none"
        findings["engine"] = f"built, instruction set {machine['isa']}, CUDA device {device}"
    except ImportError:
        findings["engine"] = "not built: run pip install . in pykd's source folder"
    try:
        findings |= _torch()
    except ImportError as error:
        return findings | {"operators": str(error)}, False
    return findings | _data(), not missing


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"


def _torch() -> dict[str, str]:
    import torch

    from pykd._extension import load

    findings = {"torch": f"{torch.__version__}, {torch.get_num_threads()} threads"}
    built = load()
    findings["operators"] = f"compiled for torch {built.torch_version}, instruction set {built.isa()}"
    findings["CUDA kernels"] = "built" if built.cuda else f"not built: {built.cuda_reason}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    findings["CUDA devices"] = ", ".join(names) or "none"
    return findings


def _data() -> dict[str, str]:
    from pykd.data import PLACES, data_root

    root = data_root(None)
    source = "PYKD_DATA" if "PYKD_DATA" in os.environ else "PYKD_DATA is not set"
    found = [f"{name} {'found' if (root / place).exists() else 'not there'}" for name, place in PLACES.items()]
    return {"data": f"digits come with scikit-learn; in {root} ({source}): {', '.join(found)}"}
