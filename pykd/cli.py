"""The command line: ``pykd distill | evaluate | compare | recipes | doctor``.

Torch and the pipelines are imported inside the commands that need them, so that help and mistakes are told at once.
"""

import functools
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from typer.core import TyperGroup

    from pykd import config as recipe_config
    from pykd.config import Config, ConfigError
except ModuleNotFoundError as error:
    raise SystemExit(f"pykd: {error.name} is missing: run pip install 'pykd[train]'") from error

import pykd
from pykd.errors import Interrupted, PykdError

if TYPE_CHECKING:
    from pykd.training.distill import Run

RUNS = Path("runs")


class _Group(TyperGroup):
    """Takes ``--debug`` before or after the command's name; a failure becomes one sentence and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = "--debug" in args
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "exit_code") or isinstance(error, BrokenPipeError):
                raise
            if ctx.obj:
                traceback.print_exception(error)
            code, sentence = _meaning(error)
            typer.echo(f"pykd: {sentence}", err=True)
            raise typer.Exit(code) from None


def _meaning(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted):
        return 128 + error.signum, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, PykdError):
        return 2 if isinstance(error, ConfigError) else 1, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 1, f"{error.name} is missing: run pip install 'pykd[train]'"
    if isinstance(error, ImportError):
        return 1, str(error)
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, "out of memory: take smaller networks or a smaller batch_size"
    return 1, f"{type(error).__name__}: {error}; run again with --debug for the traceback"


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pykd {pykd.__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 success, 1 the work failed, 2 usage, 130 and 143 interrupted (after saving).")
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Small networks out of large ones: train a teacher, distil a student, compare them."""


Recipe = Annotated[str, typer.Argument(help="Name of a packaged recipe (see pykd recipes), or a YAML file.")]
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. student.training.epochs=5; may be repeated."),
]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where to train; the best there is by default.")]


@app.command()
def distill(
    recipe: Recipe,
    set_: Assignments = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or the recipe's newest unfinished one.")
    ] = False,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Decides initial values, order, noise and the held-out share.")] = None,
) -> None:
    """Train a teacher, its student and the baselines, and compare them in a table."""
    assignments = [*set_, *([] if seed is None else [f"seed={seed}"])]
    config = recipe_config.load(recipe, assignments)
    name = recipe_config.recipe_name(recipe)
    if resume:
        out = out or _newest(name, lambda folder: not (folder / "summary.json").exists())
        stored = _stored(out)
        if (stored.method["name"], stored.data.name) != (config.method["name"], config.data.name):
            raise PykdError(
                f"{out} is a run of {stored.method['name']} on {stored.data.name}: give its own recipe, or another --out"
            )
        config = config if assignments else stored
    run = _distill(config, out or _fresh(name), resume=resume, device=device)
    typer.echo(f"{run.out}", err=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or one safetensors file in it.")],
    set_: Assignments = [],  # noqa: B006
) -> None:
    """Evaluate a run's weights on the test data anew."""
    from pykd import data
    from pykd.training import evaluate as measure

    folder, wanted = (run.parent, [run.stem]) if run.is_file() else (run, None)
    config = _stored(folder, set_)
    roles = ["teacher", *config.baselines, "student"]
    if wanted and wanted[0] not in roles:
        raise PykdError(f"{run}: a run's weights are called {', '.join(f'{role}.safetensors' for role in roles)}")
    found = [role for role in wanted or roles if (folder / f"{role}.safetensors").is_file()]
    if not found:
        raise PykdError(f"{folder} holds no weights yet: finish the run with --resume --out {folder}")
    splits = data.load(config.data, seed=config.seed)
    rows = []
    for role in found:
        file = folder / f"{role}.safetensors"
        network = config.teacher if role == "teacher" else config.student
        module = _load_weights(_network(network, "teacher" if role == "teacher" else "student", splits)(), file)
        values = torch_values(module)
        rows.append({"network": role})
    typer.echo(_table(rows))


@app.command()
def compare(
    recipe: Annotated[list[str], typer.Argument(help="Packaged recipes or YAML files.")],
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Runs of each: seed, seed + 1, ...")] = 5,
    grid: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE,VALUE", help="Run with each value; several keys are combined.")
    ] = [],  # noqa: B006
    set_: Assignments = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/compare-<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the grid in --out, or the newest one: finished runs are kept.")
    ] = False,
    device: Device = None,
) -> None:
    """Run recipes with several seeds, and settings; one table with mean and spread (sample standard deviation)."""
    runs = list(_grid(recipe, grid, set_, seeds))
    name = f"compare-{recipe_config.recipe_name(recipe[0])}"
    if resume:
        out = out or _newest(name, lambda folder: True)
    else:
        out = out or _fresh(name)
        if out.exists() and any(out.iterdir()):
            raise PykdError(f"{out} is not empty: continue it with --resume, or give another --out")
    failures = []
    results: dict[str, list[dict[str, Any]]] = {}
    for number, (variant, config) in enumerate(runs, 1):
        folder = out / variant / f"seed-{config.seed}"
        typer.echo(f"[{number}/{len(runs)}] {variant}, seed {config.seed}", err=True)
        try:
            summary = _finished(folder, config) or _distill(config, folder, resume=resume, device=device).summary
        except ConfigError:
            raise
        except Interrupted:
            raise
        except PykdError as error:
            failures.append(f"{folder}: {error}")
            typer.echo(f"pykd: {failures[-1]}", err=True)
            continue
        results.setdefault(variant, []).append(summary)
        _write_table(out, results)
    typer.echo((out / "table.md").read_text() if results else "no run has finished")
    if failures:
        raise PykdError(f"{len(failures)} of {len(runs)} runs failed: {failures[0]}")
