"""Grids: runs of several recipes, settings and seeds in one folder, and the table written after each of them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from pykd import config as recipes
from pykd import runs
from pykd.config import Config, ConfigError
from pykd.errors import PykdError
from pykd.jobs import Jobs

ALL_ROWS = {"per_class": None, "rows": None, "augment_once": False}  # of the data; what cuts the students' alone

Finished = Mapping[str, Sequence[Mapping[str, Any]]]


def plan(names: Sequence[str], axes: Sequence[str], changes: Sequence[str], seeds: int) -> list[tuple[str, Config]]:
    """Every run's variant, which names its folder, and settings; all are checked before the first one starts."""
    variants: dict[str, list[Config]] = {}
    for name in names:
        for choice in recipes.grid(axes):
            first = recipes.load(name, [*changes, *choice])
            words = [recipes.recipe_name(name), *choice]
            variant = re.sub(r"[^\w.,=+-]+", "_", "+".join(words).replace('"', ""))
            if variant in variants:
                raise ConfigError(f"two of the runs would both be called {variant}: rename a recipe or change --grid")
            seeds_of = [f"seed={first.seed + number}" for number in range(seeds)]
            variants[variant] = [recipes.load(name, [*changes, *choice, seed]) for seed in seeds_of]
    return [(variant, config) for variant, configs in variants.items() for config in configs]


def folder_of(name: str, out: Path | None, resume: bool) -> Path:
    """The folder of all runs of the grid ``name``."""
    if resume:
        return out or runs.newest(name)
    out = out or runs.fresh(name)
    if out.is_dir() and any(out.iterdir()):
        raise PykdError(f"{out} is not empty: continue it with --resume, or give another --out")
    return out


def _finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that needs no more work."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return summary if runs.stored(folder) == config else None


def with_shared_teachers(planned: Sequence[tuple[str, Config]], out: Path) -> list[tuple[str, Config]]:
    """Of the runs that would train equal teachers, the first does; the others read the weights from its folder.

    A run that has begun keeps the teachers it has, and of those that train some, one that has done so comes first.
    """
    folders = [out / variant / f"seed-{config.seed}" for variant, config in planned]
    sources: dict[str, Path] = {}
    shared = list(planned)
    for index in sorted(
        range(len(planned)), key=lambda index: not runs.weights_file(folders[index], "teacher").exists()
    ):
        (variant, config), folder = planned[index], folders[index]
        if any(teacher.weights for teacher in config.teachers.values()):
            continue
        data = config.data.model_dump(exclude=set(ALL_ROWS))
        key = repr((config.seed, data, {name: each.model_dump() for name, each in config.teachers.items()}))
        source = sources.get(key, folder)
        if (folder / "config.yaml").is_file():
            weights = runs.stored(folder).teacher.weights
            source = Path(weights).parent if weights else folder
        sources.setdefault(key, source)
        if source != folder:
            teacher, *more = (
                each.model_copy(update={"weights": str(runs.weights_file(source, name))})
                for name, each in config.teachers.items()
            )
            shared[index] = variant, config.model_copy(update={"teacher": teacher, "more_teachers": more})
    return shared


def run_all(
    planned: Sequence[tuple[str, Config]],
    out: Path,
    write: Callable[[Finished], str],
    *,
    resume: bool,
    jobs: int,
    threads: int,
    device: str | None,
    draw: Callable[[Finished], None] | None = None,
) -> None:
    """Does the runs of a grid that are not finished; after each, ``write`` writes the table of all that are.

    A run that reads a teacher from another's folder waits until it lies there. At the end ``draw`` makes figures.
    """
    folders = [out / variant / f"seed-{config.seed}" for variant, config in planned]
    configs = {folder: config for folder, (_, config) in zip(folders, planned, strict=True)}
    summaries = {folder: _finished(folder, config) for folder, config in configs.items()}
    _check_begun(planned, out)
    waiting = {folder: config for folder, config in configs.items() if not summaries[folder]}
    check_data(waiting.values())
    failures: list[str] = []

    def finished() -> Finished:
        found: dict[str, list[dict[str, Any]]] = {}
        for folder, (variant, config) in zip(folders, planned, strict=True):
            if summary := summaries[folder]:
                found.setdefault(variant, []).append({"seed": config.seed, **summary})
        return found

    def table() -> str:
        return write(found) if runs.is_main_process() and (found := finished()) else ""

    text = table()
    done = len(planned) - len(waiting)
    with Jobs(jobs, threads=threads, device=device, out=out, runs=len(planned), done=done) as going:

        def failed(error: PykdError) -> None:
            failures.append(str(error))
            going.say(f"pykd: {error}")

        while waiting or going.busy:
            for folder, config in list(waiting.items()):
                if not going.free:
                    break
                source = missing_teacher(config, out)
                if source and (source in waiting or source in going.busy):
                    continue
                del waiting[folder]
                if source:
                    failed(PykdError(f"{folder} is left out: {source} has not trained its teacher"))
                    continue
                if going.alone:
                    going.say(f"[{folders.index(folder) + 1}/{len(planned)}] {folder}")
                going.start(config, folder, resume=resume)
            for folder, error in going.ended():
                if isinstance(error, ConfigError):
                    raise error
                if error:
                    failed(error)
                    continue
                done += 1
                summaries[folder] = _finished(folder, configs[folder])
                if not going.alone:
                    going.say(f"[{done}/{len(planned)}] {folder}: {in_words(summaries[folder])}")
                text = table()
    typer.echo(text, nl=False)
    if draw and runs.is_main_process() and (found := finished()):
        try:
            draw(found)
        except ImportError as error:
            typer.echo(str(error), err=True)
    if failures:
        raise PykdError(f"{len(failures)} of {len(planned)} runs failed, the first: {failures[0]}")


def in_words(summary: Mapping[str, Any] | None) -> str:
    """What a run brought, in a line.

    >>> in_words({"rows": [{"label": "student, KD", "holdout_accuracy": 0.98}]})
    'student, KD: 98.00 % of the held-out rows right'
    """
    row = (summary or {"rows": [{}]})["rows"][-1]
    return f"{row['label']}: {100 * row['holdout_accuracy']:.2f} % of the held-out rows right" if row else "finished"


def check_methods(planned: Sequence[tuple[str, Config]]) -> None:
    """Raises for a method or a baseline that no run could have, before the first one starts."""
    for _, config in planned:
        comparisons = runs.method(config).comparisons()
        for name in config.baselines:
            recipes.choose(comparisons, name, "baselines")


def _check_begun(planned: Sequence[tuple[str, Config]], out: Path) -> None:
    """Raises for a run that has begun with other settings, before any goes on: one table holds runs of one kind."""
    from pykd.training.run_folder import require_same

    for variant, config in planned:
        folder = out / variant / f"seed-{config.seed}"
        if (folder / "config.yaml").is_file():
            require_same(runs.stored(folder).model_dump(mode="json"), config.model_dump(mode="json"), str(folder))


def check_data(configs: Iterable[Config]) -> None:
    """Raises for data that cannot be read, before the first run starts."""
    from pykd import data

    whole = {repr(each): each for config in configs for each in [config.data.model_copy(update=ALL_ROWS)]}
    for each in whole.values():
        data.load(each, seed=0)


def missing_teacher(config: Config, out: Path) -> Path | None:
    """The folder below ``out`` of the run that should have trained a teacher of this one, and has not."""
    for teacher in config.teachers.values():
        if teacher.weights and out in Path(teacher.weights).parents and not Path(teacher.weights).exists():
            return Path(teacher.weights).parent
    return None


def deciding(changes: Sequence[str]) -> list[str]:
    """The assignments that decide results: others, paths among them, are no concern of a table's reader."""
    from pykd.training.run_folder import FREE_SETTINGS

    return [each for each in changes if each.partition("=")[0].strip() not in FREE_SETTINGS]


def environment(finished: Finished, out: Path) -> dict[str, Any]:
    """What the first of the runs was done with."""
    variant, (first, *_) = next(iter(finished.items()))
    found: dict[str, Any] = json.loads((out / variant / f"seed-{first['seed']}" / "environment.json").read_bytes())
    return found


def draw(finished: Finished, out: Path) -> None:
    """The figures of a comparison: of all its runs, and of the networks of every variant's first one."""
    from pykd import report
    from pykd._files import write_atomically

    rows = report.compared(finished)
    if any(row["file_bytes"]["values"] for row in rows if row["name"] != "teacher"):
        write_atomically(out / "error-bytes.svg", report.error_against_bytes(rows))
    for variant, (first, *_) in finished.items():
        for row in first["rows"]:
            title = f"{variant}, {row['label']}, seed {first['seed']}"
            name = f"{variant}-{row['name']}.svg"
            layers = (row.get("facts") or {}).get("layers", {})
            if any("log_alpha" in layer for layer in layers.values()):
                write_atomically(out / f"log-alpha-{name}", report.log_alpha(row["facts"], title))
            if any(layer["kept"] < layer["weights"] for layer in layers.values()):
                weights = runs.weights_file(out / variant / f"seed-{first['seed']}", row["name"])
                figure = report.sparsity(weights, layers, title, first.get("input_shape"))
                write_atomically(out / f"sparsity-{name}", figure)


def write_table(file: Path, text: str, data: Any) -> str:
    """Writes ``file`` with the endings .md and .json; returns what the first holds."""
    from pykd._files import write_atomically

    write_atomically(file.with_suffix(".md"), f"{text}\n".encode())
    write_atomically(file.with_suffix(".json"), (json.dumps(data, indent=2) + "\n").encode())
    return f"{text}\n"
