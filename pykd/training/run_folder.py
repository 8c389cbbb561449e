"""A run's folder: what lies in it, and that nothing in it is ever half-written."""

import fcntl
import hashlib
import json
import os
import platform
import reprlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pykd._files import write_atomically, writing
from pykd.config import dump
from pykd.errors import PykdError

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120

# Settings that decide nothing about the weights: they may change when a run is resumed.
FREE_SETTINGS = (
    "description",
    "checkpoint_seconds",
    "keep_checkpoints",
    "data.root",
    "data.download",
    "data.memory_limit_gib",
)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, each in memory of its own (safetensors stores no shared memory).

    All processes take part where FSDP divides them.
    """
    return {name: whole(value.detach()).clone().contiguous().cpu() for name, value in module.state_dict().items()}


def whole(value: Tensor) -> Tensor:
    """All parts of a tensor that FSDP divides; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def divided(value: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor where FSDP divides ``like``, which has its shape; else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def put_weights(module: nn.Module, values: Mapping[str, Tensor], where: str) -> None:
    """Loads ``values`` into ``module``.

    Raises:
        PykdError: names or shapes differ; the first difference is named.
    """
    own = module.state_dict()
    for name in [*own, *values]:
        if name not in values or name not in own:
            owner = "the file" if name not in values else "the network"
            raise PykdError(f"{where} belongs to another network: {owner} has no {name!r}")
        if own[name].shape != values[name].shape:
            shapes = f"{list(values[name].shape)}, not {list(own[name].shape)}"
            raise PykdError(f"{where} belongs to another network: {name!r} is {shapes}")
    module.load_state_dict({name: divided(value, own[name]) for name, value in values.items()})


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Puts the weights of a safetensors file into ``module``.

    Raises:
        PykdError: no such file, not safetensors, or weights of another network.
    """
    put_weights(module, read_weights(Path(path)), str(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PykdError: no such file, or not safetensors.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise PykdError(f"cannot read {path}: {error.strerror}") from error
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise PykdError(f"{path} is not a whole safetensors file: {error}") from error


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first setting that differs, as ``key = old, not new``."""
    if key in FREE_SETTINGS:
        return None
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            if found := difference(old.get(name), new.get(name), f"{key}.{name}".lstrip(".")):
                return found
        return None
    return None if old == new else f"{key} = {_brief.repr(old)}, not {_brief.repr(new)}"


def require_same(recorded: Any, current: Mapping[str, Any], where: str) -> None:
    """Raises a ``PykdError`` that names the first setting in which a recorded run differs from this one."""
    if found := difference(recorded, current):
        raise PykdError(f"{where} is of another run: {found}; resume with the same settings or give another --out")


class RunFolder:
    """The files of one run; one process at a time may work in it.

    Args:
        path: the folder; it is made when it is missing.
        settings: everything that decides the result, as plain data; ``config.yaml`` holds it.
        resume: go on with the run that is there, if one is; else a folder that holds a run is refused.

    Raises:
        PykdError: it cannot be written, holds a run or a run with other settings, or is in use.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self._config = path / "config.yaml"
        self._metrics = path / "metrics.jsonl"
        self.settings = settings
        self._boards: dict[str, Any] = {}
        with writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        try:
            with suppress(OSError):  # a file system without locks
                self._lock_folder()
            self._open(resume)
        except BaseException:
            self.close()
            raise

    def _lock_folder(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PykdError(f"another process is working in {self.path}: wait for it or give another --out") from None

    def _open(self, resume: bool) -> None:
        if not self._config.exists():
            if self._metrics.exists() or self.checkpoints.exists() or self.summary.exists():
                raise PykdError(f"{self.path} holds files of a run but no config.yaml: give another --out")
            write_atomically(self.path / "environment.json", _json(environment()))
            write_atomically(self._config, dump(self.settings).encode())
        elif not resume:
            raise PykdError(f"{self.path} already holds a run: continue it with --resume or give another --out")
        else:
            try:
                recorded = dict(yaml.safe_load(self._config.read_bytes()))
            except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
                raise PykdError(f"{self._config} cannot be read: give another --out") from error
            require_same(recorded, self.settings, str(self._config))
        with writing(self._metrics):
            self._metrics.touch()

    def close(self) -> None:
        """Lets other processes work here."""
        try:
            for board in self._boards.values():
                with writing(self.path / "tensorboard"):
                    board.close()
        finally:
            self._lock.close()

    def weights_file(self, name: str) -> Path:
        """Where a network's weights lie."""
        return self.path / f"{name}.safetensors"

    def write_weights(self, name: str, module: nn.Module) -> str:
        """Writes a network's weights; returns their SHA-256."""
        content = safetensors.torch.save(weights(module))
        write_atomically(self.weights_file(name), content)
        return hashlib.sha256(content).hexdigest()

    def read_checked_weights(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """A finished network's weights, which must be those that were written."""
        path = self.weights_file(name)
        found = None
        with suppress(OSError):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found is None or found != sha256:
            raise PykdError(f"{path} is missing or was changed: put it back or start again with another --out")
        return read_weights(path)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``, and its numbers to TensorBoard where that is installed."""
        with writing(self._metrics), self._metrics.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        with writing(self.path / "tensorboard"), suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            if (board := self._boards.get(row["stage"])) is None:
                # What a killed run wrote from this epoch on is hidden.
                board = SummaryWriter(str(self.path / "tensorboard" / row["stage"]), purge_step=row["epoch"])
                self._boards[row["stage"]] = board
            for name in ("loss", "holdout_accuracy", "lr"):
                if row[name] is not None:  # no accuracy of what gives no logits
                    board.add_scalar(name, row[name], row["epoch"])

    def metrics_offset(self) -> int:
        """Length of ``metrics.jsonl`` in bytes, all of them on the disk."""
        with writing(self._metrics), self._metrics.open("rb+") as stream:
            os.fsync(stream.fileno())
            return stream.seek(0, os.SEEK_END)

    def cut_metrics(self, offset: int) -> None:
        """Drops the rows after ``offset``: they will be written again."""
        with writing(self._metrics):
            if self._metrics.stat().st_size < offset:
                raise PykdError(f"{self._metrics} has lost rows: put it back or start again with another --out")
            os.truncate(self._metrics, offset)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows."""
        try:
            return [dict(json.loads(line)) for line in self._metrics.read_text().splitlines()]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PykdError(f"{self._metrics} cannot be read: put it back or start again with another --out") from error

    def read_summary(self) -> dict[str, Any] | None:
        """``summary.json`` of a finished run."""
        try:
            summary: dict[str, Any] = dict(json.loads(self.summary.read_bytes()))
            if not all(isinstance(row["label"], str) for row in summary["rows"]):
                raise TypeError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PykdError(
                f"{self.summary} cannot be read: put it back, or delete it and train again with --resume"
            ) from error
        return summary

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``, which makes the run a finished one; its checkpoints go."""
        write_atomically(self.summary, _json(summary))
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    revision = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    packages = ("pykd", "torch", "accelerate", "numpy", "safetensors")
    found = {}
    for name in packages:
        with suppress(ImportError):
            found[name] = version(name)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        **found,
        "git": revision,
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
