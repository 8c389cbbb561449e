"""Checkpoints: whole or not there, and never unpickled."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pykd._files import sync_folder, write_synced, writing
from pykd.errors import PykdError

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    position: dict[str, Any]  # where the run stands, plain data
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

    def _numbered(self) -> list[Path]:
        return sorted((path for path in self._folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))

    def save(self, saved: Saved) -> None:
        """Writes a checkpoint and removes those beyond ``keep``.

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
        position = {"format": FORMAT, "position": saved.position, "files": sums}
        contents["position.json"] = json.dumps({**position, "sha256": _sum(position)}).encode()
        older = self._numbered()
        target = self._folder / f"{int(older[-1].name) + 1 if older else 1:06d}"
        temporary = self._folder / ".writing"
        with writing(target):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                for name, content in contents.items():
                    write_synced(temporary / name, content)
                sync_folder(temporary)
                os.rename(temporary, target)
                sync_folder(self._folder)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        for path in [*older, target][: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, if any, and a sentence for each that was passed over.

        Raises:
            PykdError: there are checkpoints, and none is whole.
        """
        passed: list[str] = []
        for path in reversed(self._numbered()):
            try:
                return _read(path), passed
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError,
                    safetensors.SafetensorError) as error:  # fmt: skip
                passed.append(f"checkpoint {path} is damaged ({error or type(error).__name__})".split("\n")[0])
        if passed:
            raise PykdError(f"{passed[0]} and no older one is whole: start again with another --out")
        return None, passed


def _sum(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Saved:
    position = json.loads((path / "position.json").read_bytes())
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
        position["position"],
        safetensors.torch.load(contents["model.safetensors"]),
        safetensors.torch.load(contents["best.safetensors"]),
        torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True),
    )
