"""Checkpoints: whole or not there, and never unpickled."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from pykd._files import sync_folder, write_synced, writing
from pykd.errors import PykdError

FORMAT = 1
LARGEST_POSITION_BYTES = 64 << 20

Natural = Annotated[int, Field(ge=0)]


@dataclass
class Position:
    """Where a run stands; plain data, the same on every process."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    stage: str
    started: Natural = 0  # steps done of what comes before the first epoch
    epoch: Natural = 0  # epochs done
    step: Natural = 0  # optimiser steps done in the epoch
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # spent on the stage
    best_accuracy: Annotated[float, Field(ge=-1, le=1)] = -1.0
    best_epoch: Natural = 0
    metrics_offset: Natural = 0
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # results of the stages before
    identity: dict[str, Any] = field(default_factory=dict)  # of the run


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    position: Position
    model: dict[str, Tensor]
    best: dict[str, Tensor]
    state: dict[str, Any]  # optimiser, scaler, random numbers, losses of the epoch


class Checkpoints:
    """The newest ``keep`` checkpoints of a run, each a folder with a number for a name.

    A folder holds ``model.safetensors``, ``best.safetensors``, ``state.pt`` and ``position.json`` with the SHA-256 of
    the other three and of itself. It is written under another name, synced and renamed, so that what has a number is
    whole; what was damaged later shows in the sums.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._damaged: list[Path] = []

    def _numbered(self) -> list[Path]:
        try:
            names = [name for name in os.listdir(self._folder) if name.isascii() and name.isdecimal()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PykdError(
                f"cannot read {self._folder}: {error.strerror}; mend that or start again with another --out"
            ) from error
        return [self._folder / name for name in sorted(names, key=int)]

    def save(self, saved: Saved) -> None:
        """Writes a checkpoint and removes those beyond ``keep`` and those that :meth:`newest` passed over.

        Raises:
            PykdError: it cannot be written; the older ones are untouched.
        """
        buffer = io.BytesIO()
        torch.save(saved.state, buffer)
        contents = {
            "model.safetensors": safetensors.torch.save(saved.model),
            "best.safetensors": safetensors.torch.save(saved.best),
            "state.pt": buffer.getvalue(),
        }
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        position = {"format": FORMAT, "position": asdict(saved.position), "files": sums}
        contents["position.json"] = json.dumps({**position, "sha256": _sum(position)}).encode()
        older = self._numbered()
        target = self._folder / f"{int(older[-1].name) + 1 if older else 1:06d}"
        temporary = self._folder / ".writing"
        with writing(target):
            try:
                _remove(temporary)
                temporary.mkdir(parents=True)
                for name, content in contents.items():
                    write_synced(temporary / name, content)
                sync_folder(temporary)
                os.rename(temporary, target)
                sync_folder(self._folder)
            except OSError:
                _remove(temporary)
                raise
        whole = [path for path in [*older, target] if path not in self._damaged]
        for path in [*self._damaged, *whole[: -self._keep]]:
            _remove(path)
        self._damaged = []

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, if any, and a sentence for each that was passed over.

        Raises:
            PykdError: there are checkpoints, and none is whole.
        """
        passed: list[str] = []
        self._damaged = []
        for path in reversed(self._numbered()):
            try:
                return _read(path), passed
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, MemoryError,
                    pickle.UnpicklingError, safetensors.SafetensorError) as error:  # fmt: skip
                passed.append(f"checkpoint {path} is damaged ({_reason(error)})")
                self._damaged.append(path)
        if passed:
            raise PykdError(f"{passed[0]} and no older one is whole: start again with another --out")
        return None, passed


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'position'}: {first['msg']}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _remove(path: Path) -> None:
    """A folder, or what somebody put in its place; what cannot be removed stays."""
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sum(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Saved:
    file = path / "position.json"
    if file.stat().st_size > LARGEST_POSITION_BYTES:
        raise ValueError("position.json is too large")
    position = json.loads(file.read_bytes())
    if position.pop("sha256") != _sum(position):
        raise ValueError("position.json does not have its sum")
    if position["format"] != FORMAT:
        raise ValueError("it is of another version of pykd")
    contents = {}
    for name in ("model.safetensors", "best.safetensors", "state.pt"):
        contents[name] = (path / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != position["files"][name]:
            raise ValueError(f"{name} does not have its sum")
    return Saved(
        TypeAdapter(Position).validate_json(json.dumps(position["position"])),
        safetensors.torch.load(contents["model.safetensors"]),
        safetensors.torch.load(contents["best.safetensors"]),
        torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True),
    )
