"""The command line: ``pykd distill | evaluate | compare | reproduce | recipes | doctor``.

Torch and the pipelines are imported inside the commands that need them, so that help and mistakes are told at once.
"""

import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from typer.core import TyperGroup

    from pykd import config as recipes
    from pykd.config import Config, ConfigError, Network
except ModuleNotFoundError as error:
    raise SystemExit(f"pykd: {error.name} is missing: run pip install 'pykd[train]'") from error

import pykd
from pykd.errors import Interrupted, PykdError

if TYPE_CHECKING:
    from torch.nn import Module

    from pykd.data import Splits
    from pykd.training import Run

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
    first_line = (str(error).splitlines() or [""])[0]
    return 1, f"{type(error).__name__}: {first_line}; run again with --debug for the traceback"


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
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. student.training.epochs=5; may be repeated."),
]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where to work; the best there is by default.")]


@app.command()
def distill(
    recipe: Recipe,
    assignments: Assignments = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or the recipe's newest unfinished one.")
    ] = False,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Decides initial values, order, noise and held-out rows.")] = None,
) -> None:
    """Train a teacher, its student and the baselines, and compare them in a table.

    Data are looked for under --set data.root=FOLDER, else $PYKD_DATA, else ./data.
    """
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    config = recipes.load(recipe, changes)
    name = recipes.recipe_name(recipe)
    if not resume:
        out = out or _fresh(name)
    elif out is None:
        out = _newest(name, "summary.json")
    if resume and (out / "config.yaml").exists():
        config = _continued(out, config, changes)
    run = _distill(config, out, resume=resume, device=device)
    if _is_main_process():
        from pykd.training import show

        show(run.summary)
        typer.echo(f"{out} holds the weights, the metrics and this table", err=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or one safetensors file in it.")],
    assignments: Assignments = None,
) -> None:
    """Evaluate a run's weights on the test data anew, on the CPU."""
    folder, roles = (run.parent, [run.stem]) if run.is_file() else (run, [])
    config = _stored(folder, assignments or [])

    from pykd import data
    from pykd.methods import METHODS
    from pykd.training import evaluate as measure
    from pykd.training import show

    method = _method(config, METHODS)
    labels = {name: name for name in config.teachers}
    labels |= {name: each.label for name, each in method.comparisons().items() if name in config.baselines}
    labels["student"] = method.label
    if roles and roles[0] not in labels:
        raise ConfigError(f"{run} is none of a run's weights: {', '.join(f'{role}.safetensors' for role in labels)}")
    files = {role: folder / f"{role}.safetensors" for role in roles or labels}
    files = {role: file for role, file in files.items() if file.exists()}
    if not files:
        raise PykdError(f"{folder} holds no weights yet: finish the run with --resume --out {folder}")
    splits = data.load(config.data, seed=config.seed)
    rows = []
    for role, file in files.items():
        described = config.teachers.get(role, config.student)
        module = _network(described.model_copy(update={"weights": str(file)}), role, splits)()
        rows.append({"name": role, "label": labels[role], "seconds": None, **measure(module, splits.test)})
    show({"measured_on": "test", "rows": rows})


@app.command()
def compare(
    recipe: Annotated[list[str], typer.Argument(help="Packaged recipes or YAML files.")],
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Runs of each: with seed, seed + 1, ...")] = 5,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Run with each of the values; several keys are combined."),
    ] = None,
    assignments: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/compare-<recipe>-<time> by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the grid in --out, or the newest one; finished runs stay.")
    ] = False,
    device: Device = None,
) -> None:
    """Run recipes with several seeds and settings: one table with mean and sample standard deviation."""
    runs = _grid(recipe, grid or [], assignments or [], seeds)
    _check_methods(runs)
    out = _grid_folder(f"compare-{recipes.recipe_name(recipe[0])}", out, resume)

    def write(finished: Finished) -> str:
        rows = _spread(finished)
        return _write_table(out / "table", _accuracies(rows), rows)

    _run_all(runs, out, write, resume=resume, device=device)


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="noisy_teacher")],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of every run; data.name=NAME names the data set (mnist by default), or one more.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Runs of each variant: 5 by default, 2 if quick.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Four variants and a tenth of the epochs, on digits: does it all run?")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/reproduce-<paper>-<time> by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the grid in --out, or the newest one; finished runs stay.")
    ] = False,
    device: Device = None,
) -> None:
    """Run a paper's experiment: its variants with several seeds, and our figures beside its claims.

    Every run is one of the recipe <paper>-<data set>; the variants of a seed learn from the same teacher.
    """
    from pykd import reproduce as experiments

    key = "data.name="
    data = [each.removeprefix(key) for each in assignments or [] if each.startswith(key)]
    data = list(dict.fromkeys(data)) or ["digits" if quick else "mnist"]
    changes = [each for each in assignments or [] if not each.startswith(key)]

    def plan(out: Path) -> list[tuple[str, Config]]:
        return experiments.runs(paper, data, changes, seeds=seeds or (2 if quick else 5), out=out, quick=quick)

    _check_methods(plan(Path()))  # mistakes are told before a folder is looked for
    out = _grid_folder(f"reproduce-{paper}", out, resume).resolve()
    if not quick and (seeds or 5) < experiments.TEACHERS:
        typer.echo(f"variants with several teachers are left out: they need {experiments.TEACHERS} seeds", err=True)

    def write(finished: Finished) -> str:
        variant, (first, *_) = next(iter(finished.items()))
        environment = json.loads((out / variant / f"seed-{first['seed']}" / "environment.json").read_bytes())
        record = experiments.record(paper, finished, changes=changes, quick=quick, environment=environment)
        return _write_table(out / "reproduce", experiments.markdown(record), record)

    _run_all(
        plan(out), out, write, resume=resume, device=device, needed=[f"{name}/{experiments.CLEAN}" for name in data]
    )


@app.command("recipes")
def list_recipes() -> None:
    """List the packaged recipes."""
    described = recipes.recipes()
    width = max(map(len, described))
    for name, description in described.items():
        typer.echo(f"{name:{width}}  {description}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, compiled operators, devices, data."""
    from pykd.deploy.doctor import examine

    findings, usable = examine()
    width = max(map(len, findings))
    for topic, finding in findings.items():
        typer.echo(f"{topic:{width}}  {finding}")
    raise typer.Exit(0 if usable else 1)


def _distill(config: Config, out: Path, *, resume: bool, device: str | None) -> "Run":
    from pykd import data
    from pykd.methods import METHODS

    method = _method(config, METHODS)
    splits = data.load(config.data, seed=config.seed)
    return pykd.distill(
        method,
        teacher=[
            _network(config.teacher, "teacher", splits),
            *(_network(each, f"more_teachers.{n}", splits) for n, each in enumerate(config.more_teachers)),
        ],
        student=_network(config.student, "student", splits),
        train=splits.train,
        holdout=splits.holdout,
        test=splits.test,
        teacher_training=[None if each.weights else each.training for each in config.teachers.values()],
        training=config.student.training,
        baselines=config.baselines,
        out=out,
        seed=config.seed,
        resume=resume,
        device=device,
        config=config,
    )


def _method(config: Config, methods: Mapping[str, Any]) -> Any:
    fields = dict(config.method)
    return recipes.construct(recipes.choose(methods, fields.pop("name"), "method.name"), fields, "method")


def _network(described: Network, key: str, splits: "Splits") -> "Callable[[], Module]":
    """Makes the network, with its weights where the recipe names a file of them."""
    from pykd.models import NETWORKS
    from pykd.training import load_weights

    factory = recipes.choose(NETWORKS, described.name, f"{key}.name")

    def make() -> "Module":
        shape = {"in_shape": splits.in_shape, "classes": splits.classes}
        module = recipes.construct(factory, described.arguments, key, **shape)
        if described.weights:
            load_weights(module, described.weights)
        return module

    return make


Finished = Mapping[str, Sequence[Mapping[str, Any]]]


def _run_all(
    runs: Sequence[tuple[str, Config]],
    out: Path,
    write: Callable[[Finished], str],
    *,
    resume: bool,
    device: str | None,
    needed: Collection[str] = (),
) -> None:
    """Does the runs of a grid that are not finished; after each, ``write`` writes the table of all that are.

    A variant of which no run may fail, as others need them, is named in ``needed``.
    """
    summaries = [_finished(out / variant / f"seed-{config.seed}", config) for variant, config in runs]
    failures = []
    text = ""
    for number, (variant, config) in enumerate(runs):
        folder = out / variant / f"seed-{config.seed}"
        if _is_main_process():
            typer.echo(f"[{number + 1}/{len(runs)}] {folder}", err=True)
        try:
            summaries[number] = summaries[number] or _distill(config, folder, resume=resume, device=device).summary
        except (ConfigError, Interrupted):
            raise
        except PykdError as error:
            if variant in needed:
                raise
            failures.append(str(error))
            typer.echo(f"pykd: {error}", err=True)
            continue
        finished: dict[str, list[dict[str, Any]]] = {}
        for (name, each), summary in zip(runs, summaries, strict=True):
            if summary:
                finished.setdefault(name, []).append({"seed": each.seed, **summary})
        if _is_main_process():
            text = write(finished)
    typer.echo(text, nl=False)
    if failures:
        raise PykdError(f"{len(failures)} of {len(runs)} runs failed, the first: {failures[0]}")


def _check_methods(runs: Sequence[tuple[str, Config]]) -> None:
    """Raises for a method that no run could have, before the first one starts."""
    from pykd.methods import METHODS

    for _, config in runs:
        _method(config, METHODS)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fresh(name: str) -> Path:
    if "RANK" in os.environ:
        raise ConfigError("several processes need one folder: give --out")
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _grid_folder(name: str, out: Path | None, resume: bool) -> Path:
    if resume:
        return out or _newest(name)
    out = out or _fresh(name)
    if out.is_dir() and any(out.iterdir()):
        raise PykdError(f"{out} is not empty: continue it with --resume, or give another --out")
    return out


def _newest(name: str, until: str | None = None) -> Path:
    """The newest folder of a recipe's runs that does not hold the file ``until``."""
    mine = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
    folders = [path for path in RUNS.glob("*") if mine.fullmatch(path.name) and not (until and (path / until).exists())]
    if not folders:
        raise PykdError(f"{RUNS} holds no unfinished run of {name}: leave --resume out to start one, or give --out")
    return max(folders)


def _stored(folder: Path, changes: Sequence[str] = ()) -> Config:
    file = folder / "config.yaml"
    if not file.is_file():
        raise PykdError(f"{folder} is not a run folder: it holds no config.yaml")
    return recipes.load(str(file), changes)


def _continued(out: Path, config: Config, changes: Sequence[str]) -> Config:
    """The settings to resume ``out`` with: its own, unless the command line changes some."""
    stored = _stored(out)
    for key, mine, its in (
        ("method.name", config.method["name"], stored.method["name"]),
        ("data.name", config.data.name, stored.data.name),
    ):
        if mine != its:
            raise PykdError(f"{out} is a run of another recipe, with {key} {its}, not {mine}: give another --out")
    return _stored(out, changes)


def _grid(names: Sequence[str], axes: Sequence[str], changes: Sequence[str], seeds: int) -> list[tuple[str, Config]]:
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


def _finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that needs no more work."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return summary if _stored(folder) == config else None


def _spread(finished: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for every network of every variant, over its seeds."""
    rows = []
    for variant, summaries in finished.items():
        for first in summaries[0]["rows"]:
            same = [row for summary in summaries for row in summary["rows"] if row["name"] == first["name"]]
            row = {"run": variant, "name": first["name"], "label": first["label"]}
            row |= {"seeds": [summary["seed"] for summary in summaries], "n": len(same)}
            for key in ("accuracy", "parameters", "nonzeros", "bytes", "latency_ms", "seconds"):
                values = [each[key] for each in same if each[key] is not None]
                mean = statistics.fmean(values) if values else None
                std = statistics.stdev(values) if len(values) > 1 else None
                row[key] = {"mean": mean, "std": std, "values": values}
            rows.append(row)
    return rows


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> str:
    from pykd.reproduce import table

    def accuracy(of: Mapping[str, Any]) -> str:
        return f"{of['mean']:.2%}" + (f" ± {100 * of['std']:.2f}" if of["std"] is not None else "")

    def mean(of: Mapping[str, Any], form: str) -> str:
        return "-" if of["mean"] is None else format(of["mean"], form)

    lines = [
        ["run", "network", "test accuracy", "n", "parameters", "non-zeros", "bytes", "latency (ms)", "training (s)"]
    ]
    for row in rows:
        sizes = [mean(row[key], ",.0f") for key in ("parameters", "nonzeros", "bytes")]
        times = [mean(row["latency_ms"], ".3f"), mean(row["seconds"], ".1f")]
        lines.append([row["run"], row["label"], accuracy(row["accuracy"]), str(row["n"]), *sizes, *times])
    return table(lines)


def _write_table(file: Path, text: str, data: Any) -> str:
    """Writes ``file`` with the endings .md and .json; returns what the first holds."""
    from pykd.training.run_folder import write_atomically

    write_atomically(file.with_suffix(".md"), f"{text}\n".encode())
    write_atomically(file.with_suffix(".json"), (json.dumps(data, indent=2) + "\n").encode())
    return f"{text}\n"


def main() -> None:
    """The console script ``pykd``."""
    app(prog_name="pykd")


if __name__ == "__main__":
    main()
