"""Runs as their folders show them: finished, half-finished, or damaged."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pykd.config import ConfigError, mapping
from pykd.errors import PykdError

SEED = re.compile(r"seed-(\d+)")  # the folder of one run of several that differ in the seed alone
RECORDS = ("reproduce", "sweep")  # what a grid's folder may hold beside its runs, as .md, as .json or as both
LARGEST_CONFIG_BYTES = 20_000


@dataclass(frozen=True)
class Found:
    """One run.

    Args:
        folder: where it lies.
        variant: what it shares with the runs that differ from it in the seed alone.
        seed: of it.
        settings: of ``config.yaml``; empty where that cannot be read.
        config: the text of that file.
        environment: of ``environment.json``.
        metrics: the rows of ``metrics.jsonl`` that can be read.
        summary: of ``summary.json``; None of a run that is not finished.
        notes: what is wrong with the folder, in sentences.
    """

    folder: Path
    variant: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> str:
        """The name of its data set."""
        data = self.settings.get("data")
        return str(data.get("name")) if isinstance(data, dict) and data.get("name") else "own data"

    @property
    def measured_on(self) -> str:
        """The rows that its table is about: "test" or "holdout"."""
        return str((self.summary or {}).get("measured_on", "test"))

    @property
    def started(self) -> str:
        """When, to the minute."""
        return str(self.environment.get("started", ""))[:16].replace("T", " ")

    @property
    def state(self) -> str:
        """How far it came."""
        if self.summary:
            return "finished"
        last = self.metrics[-1] if self.metrics else None
        return "unfinished: " + (f"{last['stage']}, epoch {last['epoch']}" if last else "no epoch is done")

    @property
    def command(self) -> str:
        """What it was started with."""
        argv = self.environment.get("argv")
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            return ""
        mine = Path(argv[0]).name == "pykd" or Path(argv[0]).parts[-2:] == ("pykd", "__main__.py")
        program = ["pykd"] if mine else ["python", argv[0]]
        return shlex.join([*program, *argv[1:]])

    @property
    def is_recipe(self) -> bool:
        """Whether ``config.yaml`` says all that the run needs; ``pykd.distill`` takes networks of one's own."""
        student = self.settings.get("student")
        return isinstance(student, dict) and "name" in student

    @property
    def going_on(self) -> str:
        """The command that goes on with it."""
        return shlex.join(["pykd", "distill", str(self.folder / "config.yaml"), "--resume", "--out", str(self.folder)])


def find(places: Sequence[Path]) -> tuple[list[Found], list[Path]]:
    """All runs in the folders ``places``, each read as far as it can be, and the records of the grids among them.

    Raises:
        PykdError: a place that is no folder, or holds neither a run nor a record.
    """
    runs: dict[Path, tuple[Path, Path]] = {}  # the folder as it was found, and where
    records: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise PykdError(f"{place} is no folder: give run folders, or folders of pykd compare, reproduce or sweep")
        own = list(_run_folders(place))
        names = RECORDS if own else (*RECORDS, "table")  # the page has a table of the runs
        grid = [place / name for name in names if any((place / f"{name}{end}").is_file() for end in (".md", ".json"))]
        if not own and not grid:
            raise PykdError(f"{place} holds no run: give run folders, or folders of pykd compare, reproduce or sweep")
        for folder in own:
            runs.setdefault(folder.resolve(), (folder, place))
        records |= dict.fromkeys(grid)
    titles: dict[Path, str] = {}
    for folder, (_, place) in runs.items():
        group = _group(folder)
        if group not in titles:
            title = _title(group, place.resolve(), alone=len(places) == 1)
            titles[group] = str(group) if title in titles.values() else title
    return [_read(found, titles[_group(folder)]) for folder, (found, _) in runs.items()], list(records)


def _run_folders(place: Path) -> Iterable[Path]:
    for folder, below, files in os.walk(place):
        if "config.yaml" in files:
            yield Path(folder)
            below.clear()
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """For an order in which 10 comes after 9.

    >>> sorted(["a-10", "a-9", "a"], key=_natural)
    ['a', 'a-9', 'a-10']
    """
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _group(folder: Path) -> Path:
    return folder.parent if SEED.fullmatch(folder.name) else folder


def _title(group: Path, place: Path, *, alone: bool) -> str:
    if place not in group.parents:
        return group.name
    below = group.relative_to(place).as_posix()
    return below if alone else f"{place.name}/{below}"


def _read(folder: Path, variant: str) -> Found:
    notes: list[str] = []
    config, settings = "", {}
    try:
        with (folder / "config.yaml").open("rb") as stream:
            config = stream.read(LARGEST_CONFIG_BYTES).decode(errors="replace")
        settings = mapping(config, "config.yaml")
    except OSError as error:
        notes.append(f"config.yaml cannot be read: {error.strerror}.")
    except ConfigError as error:
        notes.append(f"{error}.")
    seed = settings.get("seed")
    if not isinstance(seed, int):
        seed = int(match[1]) if (match := SEED.fullmatch(folder.name)) else 0
    environment = _mapping(folder / "environment.json", notes) or {}
    metrics = _metrics(folder / "metrics.jsonl", notes)
    summary = _mapping(folder / "summary.json", notes) if (folder / "summary.json").exists() else None
    if summary is not None and not _is_table(summary.get("rows")):
        notes.append("summary.json holds no table: put it back, or delete it and train again with --resume.")
        summary = None
    if summary is not None:
        summary = {**summary, "seed": seed}
    return Found(folder, variant, seed, settings, config, environment, metrics, summary, notes)


def _mapping(file: Path, notes: list[str]) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        if isinstance(found, dict):
            return found
    notes.append(f"{file.name} cannot be read.")
    return None


def _is_table(rows: Any) -> bool:
    """Whether these are a summary's rows, though perhaps of an older version."""
    return (
        bool(rows)
        and isinstance(rows, list)
        and all(
            isinstance(row, dict)
            and isinstance(row.get("name"), str)
            and isinstance(row.get("label"), str)
            and _is_number(row.get("accuracy"))
            and 0 <= row["accuracy"] <= 1
            and all(row.get(key) is None or _is_number(row[key]) for key in NUMBERS)
            for row in rows
        )
    )


NUMBERS = ("parameters", "nonzeros", "bytes", "file_bytes", "latency_ms", "seconds")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # a JSON integer has no limit


def _metrics(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows that can be read; of a row that stands there twice the last."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    damaged = 0
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        notes.append(f"{file.name} cannot be read.")
        return []
    for line in lines:
        try:
            row = json.loads(line)
            stage, epoch = row["stage"], row["epoch"]
            if not isinstance(stage, str) or not isinstance(epoch, int) or not _is_number(row["loss"]):
                raise ValueError
            if row.get("holdout_accuracy") is not None and not _is_number(row["holdout_accuracy"]):
                raise ValueError
            found[stage, epoch] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    if damaged:
        notes.append(f"{damaged} of {len(lines)} lines of {file.name} cannot be read and are left out.")
    return list(found.values())
