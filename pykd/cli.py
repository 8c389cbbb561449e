"""The command line: ``pykd distill | evaluate | export | run | bench | compare | reproduce | sweep | report | ...``.

Torch and the pipelines are imported inside the commands that need them, so that help and mistakes are told at once.
"""

import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from typer.core import TyperGroup

    from pykd import config as recipes
    from pykd import grids, runs
    from pykd.config import ConfigError
    from pykd.jobs import at_once
except ModuleNotFoundError as error:
    raise SystemExit(f"pykd: {error.name} is missing: run pip install 'pykd[train]'") from error

import pykd
from pykd.errors import Interrupted, PykdError, explained

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module

    from pykd.deploy import Model

MODEL_FILE = ".pykd.safetensors"


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
            runs.tell(explained(error))
            raise typer.Exit(_code(error)) from None


def _code(error: BaseException) -> int:
    if isinstance(error, Interrupted):
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ConfigError) else 1


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
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Runs at once, each a process with a log in its folder; by default as many as there are processors, 8 at "
        "most, and 1 with CUDA.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, max=1024, help="Of each run. Results depend on it in their last bits; never on --jobs.")
]


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
    with_report: Annotated[bool, typer.Option("--report", help="Also write report.html into the run folder.")] = False,
) -> None:
    """Train a teacher, its student and the baselines, and compare them in a table.

    Data are looked for under --set data.root=FOLDER, else $PYKD_DATA, else ./data.
    """
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    config = recipes.load(recipe, changes)
    name = recipes.recipe_name(recipe)
    if not resume:
        out = out or runs.fresh(name)
    elif out is None:
        out = runs.newest(name, "summary.json")
    if resume and (out / "config.yaml").exists():
        config = runs.continued(out, config, changes)
    run = runs.distill(config, out, resume=resume, device=device)
    if runs.is_main_process():
        from pykd.training import show

        show(run.summary)
        typer.echo(f"{out} holds the weights, the metrics and this table", err=True)
        if with_report:
            _write_report([out], out / "report.html", changes)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, one safetensors file in it, or a model file.")],
    assignments: Assignments = None,
) -> None:
    """Evaluate a run's networks, or a model file, on the test data anew, on the CPU.

    "bytes" are those of a dense float32 file, "file" those of the model file that pykd export writes; "smaller" is how
    often they go into the dense bytes of the run's teacher.

    A model file outside a run folder needs --set data.name=NAME where it does not name its data itself.
    """
    if run.name.endswith(MODEL_FILE):
        _evaluate_file(run, assignments or [])
        return
    folder, role, config = runs.located(run, assignments or [])

    from pykd import data
    from pykd.training import evaluate as measure

    labels = runs.labels(config)
    files = {each: runs.weights_file(folder, each) for each in ([role] if role else labels)}
    files = {role: file for role, file in files.items() if file.exists()}
    if not files:
        raise PykdError(f"{folder} holds no weights yet: finish the run with --resume --out {folder}")
    splits = data.load(config.data, seed=config.seed)
    about = runs.about(config, splits)
    rows = []
    for role, file in files.items():
        network = runs.finished_network(config, role, file, splits)
        rows.append({"name": role, "label": labels[role], **measure(network, splits.test, about)})
    _show_sizes(rows, folder)


def _evaluate_file(file: Path, assignments: Sequence[str]) -> None:
    from pykd import data, deploy
    from pykd.training import evaluate as measure

    network = deploy.load(file)
    beside = file.parent / "config.yaml"
    if beside.is_file():
        config = runs.stored(file.parent, assignments)
        described, seed = config.data, config.seed
    else:
        described, seed = recipes.load_data(network.model.provenance.get("data"), assignments), 0
    splits = data.load(described, seed=seed)
    row = {"name": file.name, "label": file.name, **measure(network, splits.test)}
    _show_sizes([{**row, "file_bytes": file.stat().st_size, "file_reason": None}], file.parent)


def _show_sizes(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table of networks' sizes beside that of the teacher in ``folder``, where there is one."""
    from pykd.training import show

    if (teacher := runs.weights_file(folder, "teacher")).exists():
        dense = teacher.stat().st_size
        for row in rows:
            row["ratio"] = dense / row["bytes"]
            row["file_ratio"] = row["file_bytes"] and dense / row["file_bytes"]
    show({"measured_on": "test", "rows": rows})
    for row in rows:
        if reason := row.get("file_reason"):
            typer.echo(f"{row['label']} has no model file: {reason}", err=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, of which the student is taken, or one of its weights.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help=f"The file; its name ends in {MODEL_FILE}, or in .onnx.")
    ],
    format: Annotated[
        Literal["pykd", "onnx"],
        typer.Option(help="pykd's model file, or a dense ONNX graph for other engines."),
    ] = "pykd",
    values: Annotated[
        Literal["float32", "float16", "bfloat16", "int8"],
        typer.Option(
            help="How weights are stored; int8 with a scale for every output. An ONNX graph computes in float16 where "
            "this is float16, as TensorRT's --stronglyTyped needs; otherwise it is float32, its weights rounded so."
        ),
    ] = "float32",
    block: Annotated[
        str | None,
        typer.Option(metavar="ROWSxCOLUMNS", help="Store weights in blocks, e.g. 4x4; single ones otherwise."),
    ] = None,
    licence: Annotated[str, typer.Option(help="A line that the file says about its licence.")] = "not stated",
    assignments: Assignments = None,
) -> None:
    """Write a network as one small file, and check its answers on the held-out rows."""
    what, ending = {"pykd": ("a model file", MODEL_FILE), "onnx": ("an ONNX file", ".onnx")}[format]
    if not output.name.endswith(ending):
        raise ConfigError(f"-o {output}: the name of {what} ends in {ending}")
    sides = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", block or "1x1")
    if not sides:
        raise ConfigError(f"--block {block}: write rows and columns, e.g. 4x4")
    folder, role, config = runs.located(run, assignments or [])
    role = role or "student"

    from pykd import data
    from pykd._files import write_atomically
    from pykd.deploy.model_file import from_bytes, to_bytes
    from pykd.deploy.network import FileNetwork
    from pykd.deploy.tracing import described
    from pykd.training.measure import agreement

    if not (weights := runs.weights_file(folder, role)).exists():
        raise PykdError(f"{folder} holds no weights of {role}: finish the run with --resume --out {folder}")
    splits = data.load(config.data, seed=config.seed)
    network = runs.finished_network(config, role, weights, splits)
    example = splits.holdout[0][0][None]
    about = runs.about(config, splits)
    shape = (int(sides[1]), int(sides[2]))
    model = described(network, example, values=values, block=shape, licence=licence, **about)
    content = to_bytes(model)
    model = from_bytes(content)  # with the values that are stored
    stored: Module = FileNetwork(model)
    if format == "onnx":
        from pykd.deploy import onnx
        from pykd.deploy.onnx_network import Float16Network, OnnxNetwork

        content = onnx.to_bytes(model, dtype=onnx.dtype_of(values))
        stored = OnnxNetwork(content)
        if values == "float16":
            stored = Float16Network(model)
    found = agreement(network, stored, splits.holdout)
    if not math.isfinite(found["difference"]):
        raise PykdError(
            "some answers on the held-out rows are not finite: export with --values float32, or train again"
        )
    write_atomically(output, content, then="export again")
    line = f"{output}: {len(content):,} bytes"
    if (teacher := runs.weights_file(folder, "teacher")).exists():
        dense = teacher.stat().st_size
        line += f", {dense / len(content):.1f} times smaller than the teacher's float32 file ({dense:,})"
    typer.echo(line, err=True)
    typer.echo(
        f"on {found['rows']:,} held-out rows its answers differ by {found['difference']:.2g} at most (the largest is "
        f"{found['largest']:.3g}); accuracy {found['accuracies'][1]:.2%}, the network's {found['accuracies'][0]:.2%}",
        err=True,
    )


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A model file.")],
    input: Annotated[
        Path | None, typer.Option(help="An image, or an .npy of float32 or uint8 (pixels): a row or a batch.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Take so many rows of the test data instead, and show their labels.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the answers as they are, float32, to an .npy file instead.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Name so many of each row's likeliest classes.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="That work; all processors by default.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Bring an image to the network's size.")] = False,
    assignments: Assignments = None,
) -> None:
    """Answer images, arrays or test data by a model file, with the engine.

    Images are turned into grey or colours as the network takes them; another size is an error without --resize. The
    test data are those that the file names, or of --set data.name=NAME.
    """
    if (input is None) == (rows is None):
        raise ConfigError("give either --input or --rows")

    import numpy as np

    from pykd.deploy import Model

    model = Model(file, threads=threads)
    labels = None
    if input is None:
        from pykd import data

        test = data.load(recipes.load_data(model.provenance.get("data"), assignments or []), seed=0).test
        samples = [test[row] for row in range(min(rows or 0, len(test)))]
        batch, labels = np.stack([image.numpy() for image, *_ in samples]), [int(label) for _, label, *_ in samples]
    else:
        batch = _read_rows(input, model, resize)
    answers = model(batch)
    if output:
        from pykd._files import writing

        with writing(output), output.open("wb") as stream:
            np.save(stream, answers)
        return
    if answers.ndim != 2:
        raise PykdError(f"{file} answers with {list(answers.shape[1:])}, not with classes: give --output FILE.npy")
    shares = answers.astype(np.float64)
    if not model.ends_in_softmax:
        shares = np.exp(shares - shares.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
    names = model.classes or [str(number) for number in range(answers.shape[1])]
    if labels and max(labels) >= len(names):
        raise PykdError(
            f"{file} has {len(names)} classes, the data has the label {max(labels)}: give the data it was made for, "
            "--set data.name=NAME"
        )
    for row, share in enumerate(shares):
        best = np.argsort(-share, kind="stable")[:top]
        truth = "" if labels is None else f"  (it is {names[labels[row]]})"
        typer.echo(f"{row}:" + "".join(f"  {names[each]} {share[each]:.2%}" for each in best) + truth)
    if labels is not None:
        right = int((answers.argmax(1) == labels).sum())
        typer.echo(f"{right} of {len(labels)} right", err=True)


def _read_rows(file: Path, model: "Model", resize: bool) -> "NDArray[Any]":
    """What an image or an .npy file holds, as a batch."""
    from tokenize import TokenError

    import numpy as np
    from PIL import Image

    try:
        with file.open("rb") as stream:
            if stream.read(6) == b"\x93NUMPY":
                stream.seek(0)
                array: NDArray[Any] = np.load(stream, allow_pickle=False)
                return array[None] if array.shape == model.input_shape else array
        with Image.open(file) as image:
            channels, *sides = model.input_shape
            if len(sides) != 2 or channels not in (1, 3):
                raise PykdError(f"the network takes {list(model.input_shape)}, not images: give an .npy file")
            pixels = image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "it is neither an image of some size nor an .npy file of numbers"
        raise PykdError(f"cannot read {file}: {why}") from None
    height, width = sides
    if resize:
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    if pixels.size != (width, height):
        raise PykdError(
            f"{file} is {pixels.width}x{pixels.height}, the network takes {width}x{height} (width x height): "
            "crop it, or add --resize"
        )
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)[None]


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="A model file.")],
    batch: Annotated[str, typer.Option(help="Rows of a run; a list, such as 1,8,64, measures each.")] = "1",
    threads: Annotated[str, typer.Option(help="That work on the CPU; also a list.")] = "1",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the engine works.")] = "cpu",
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of what CUDA's tensor cores multiply.")
    ] = "float32",
    dense: Annotated[bool, typer.Option("--dense", help="Also with every weight dense.")] = False,
    power: Annotated[bool, typer.Option("--power", help="Also idle power, and the energy of a row.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="Of each of three repeats.")] = 2.0,
    record: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write what was measured to a JSON file, too.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Write every sample of power to a CSV file.")] = None,
) -> None:
    """Measure a model file on this machine: latency, throughput, memory, power, and what was taken for each layer."""
    from rich.console import Console

    from pykd._files import write_atomically, writing
    from pykd.deploy.engine import bench as measure

    if record:  # before all that takes time
        with writing(record, "measure again"), TemporaryFile(dir=record.parent):
            pass
    with Console(stderr=True).status("measuring ...") as status:
        found = measure(
            file,
            batches=_whole_numbers("--batch", batch),
            threads=_whole_numbers("--threads", threads),
            devices=[device],
            precisions=[precision],
            dense=dense,
            power=power,
            seconds=seconds,
            samples=samples,
            say=lambda doing: status.update(f"{doing} ..."),
        )
    runs, model = found["runs"], found["model"]
    missing = list(dict.fromkeys(why for run in runs for why in run["missing"]))
    if all(run["latency_us"]["runs"] is None for run in runs):
        raise PykdError(f"nothing could be measured: {missing[-1]}")
    if len(runs) == 1:
        layers = [[str(each["step"]), each["op"], each["form"], f"{each['us']:,.2f}"] for each in runs[0]["layers"]]
        _show_table(["step", "op", "form", "us"], layers)
    titles = [
        "form",
        "threads",
        "batch",
        "us",
        "90 %",
        "99 %",
        "least",
        "rows a second",
        "weights",
        "workspace",
        "peak",
    ]
    _show_table(
        [*titles, *(["W", "mJ a row", "above idle"] if power else [])], [_run_cells(run, power) for run in runs]
    )
    typer.echo(
        f"us: microseconds of a run, 90 % and 99 % of them below; memory in bytes; the file has {model['bytes']:,}, "
        f"dense it would have {model['dense_bytes']:,}"
    )
    for why in missing:
        typer.echo(f"missing: {why}", err=True)
    if record:
        write_atomically(record, (json.dumps(found, indent=2) + "\n").encode(), then="measure again")


def _whole_numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise ConfigError(f"{option} {text}: give a whole number from 1 on, or a list such as 1,8,64")
    return [int(number) for number in text.split(",")]


def _run_cells(run: dict[str, Any], power: bool) -> list[str]:
    us, taken = run["latency_us"], run["power"] or {"watts": None, "millijoules_per_row": {}}
    energy = taken["millijoules_per_row"]
    figures = [
        *((us[key], 2) for key in ("p50", "p90", "p99", "min")),
        (run["rows_per_second"], 0),
        *((run[f"{key}_bytes"], 0) for key in ("weight", "workspace", "peak_memory")),
        *([(taken["watts"], 2), (energy.get("total"), 4), (energy.get("above_idle"), 4)] if power else []),
    ]
    cells = ["-" if value is None else f"{value:,.{digits}f}" for value, digits in figures]
    return [run["form"], str(run["threads"]), str(run["batch"]), *cells]


@app.command()
def bundle(
    file: Annotated[Path, typer.Argument(help="A model file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")],
    rows: Annotated[
        int | None, typer.Option(min=1, help="Take so many rows of the test data that the file names (64).")
    ] = None,
    input: Annotated[Path | None, typer.Option(help="Take the rows of an .npy file of floats instead.")] = None,
    onnx: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(help="Add the dense network as ONNX, for a comparison with TensorRT."),
    ] = None,
    binaries: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Add the pykd-run in it, e.g. build/cross; the device builds one otherwise."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle; its results stay.")] = False,
    assignments: Assignments = None,
) -> None:
    """Write a folder to copy to a device such as a Jetson: its run.sh checks the network's answers and measures it.

    The test data are those that the file names, or of --set data.name=NAME; where they are not there, random rows are
    taken.
    """
    if input and rows:
        raise ConfigError("give either --input or --rows")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: run pykd export {file} -o student{MODEL_FILE}, and bundle that file")

    from pykd.deploy import Model
    from pykd.deploy import bundle as bundles

    model = Model(file, threads=1, measure=False)
    batch = _read_rows(input, model, resize=False) if input else _test_rows(model, rows or 64, assignments or [])
    sizes = bundles.bundle(file, output, batch, onnx=onnx, binaries=binaries, force=force)
    for name, size in sorted(sizes.items()):
        typer.echo(f"{size:>12,} bytes  {name}", err=True)
    typer.echo(f"{output}: {sum(sizes.values()):,} bytes, {len(batch)} rows with their answers", err=True)
    folder = output.resolve()
    start = shlex.quote(f"./{folder.name}/run.sh")  # by the device's shell, too
    typer.echo(f"next: scp -r {shlex.quote(str(folder))} DEVICE: && ssh DEVICE {shlex.quote(start)}", err=True)


def _test_rows(model: "Model", count: int, assignments: Sequence[str]) -> "NDArray[Any]":
    """Rows of the test data of a model file; random ones where there are none, which is said."""
    import numpy as np

    try:
        from pykd import data

        test = data.load(recipes.load_data(model.provenance.get("data"), assignments), seed=0).test
        return np.stack([test[row][0].numpy() for row in range(min(count, len(test)))])
    except (PykdError, ImportError) as error:
        if assignments:
            raise
        typer.echo(f"random rows are taken: {error}", err=True)
        return np.random.default_rng(0).standard_normal((count, *model.input_shape), np.float32)


def _show_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On standard output; plain text when that is not a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


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
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Run recipes with several seeds and settings: one table with mean and sample standard deviation.

    The folder holds table.md, table.json and figures: error-bytes.svg, and of the first seed's networks
    log-alpha-*.svg and sparsity-*.svg.

    Teachers that would be trained alike, from one seed, are trained once: the first run's serves the others. So it
    is, too, where data.per_class differs, which cuts the students' rows alone.
    """
    planned = grids.plan(recipe, grid or [], assignments or [], seeds)
    grids.check_methods(planned)
    count = at_once(jobs, threads, device)
    out = grids.folder_of(f"compare-{recipes.recipe_name(recipe[0])}", out, resume).resolve()

    def write(finished: grids.Finished) -> str:
        from pykd.report import compared, markdown
        from pykd.report.tables import ran_with

        record = {
            "recipes": [recipes.recipe_name(each) for each in recipe],
            "changes": grids.deciding(assignments or []),
            "grid": grid or [],
            "environment": ran_with(grids.environment(finished, out)),
            "rows": compared(finished),
        }
        return grids.write_table(out / "table", markdown(record), record)

    planned = grids.with_shared_teachers(planned, out)
    grids.run_all(
        planned,
        out,
        write,
        resume=resume,
        jobs=count,
        threads=threads,
        device=device,
        draw=lambda finished: grids.draw(finished, out),
    )


@app.command()
def reproduce(
    paper: Annotated[
        str, typer.Argument(help="noisy_teacher, variational_student, factor_transfer, cross_distillation, or all")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of every run; data.name=NAME names the data set (mnist by default), or one more.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Runs of each variant: 5 or 3 by default, as the paper's grid has them; 2 if quick."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few variants, 2 seeds and a tenth of the epochs, on digits: does it run?")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/reproduce-<paper>-<time> by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the grid in --out, or the newest one; finished runs stay.")
    ] = False,
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Run a paper's experiment: its variants with several seeds, and our figures beside its claims.

    Every run is one of a recipe <paper>-<data set>; the variants of a seed learn from the same teacher. With all, the
    folder holds one for each paper, and claims.md.
    """
    from pykd.reproduce import PAPERS
    from pykd.reproduce.experiment import run as run_experiments

    if paper != "all":
        recipes.choose(PAPERS, paper, "paper")
    key = "data.name="
    data = [each.removeprefix(key) for each in assignments or [] if each.startswith(key)]
    run_experiments(
        list(PAPERS) if paper == "all" else [paper],
        list(dict.fromkeys(data)) or ["digits" if quick else "mnist"],
        [each for each in assignments or [] if not each.startswith(key)],
        out,
        seeds=seeds,
        quick=quick,
        resume=resume,
        jobs=jobs,
        threads=threads,
        device=device,
    )


@app.command()
def sweep(
    recipe: Recipe,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=AXIS",
            help="A key to vary, and its values: LOW:HIGH, behind it :log or :int or both, or VALUE,VALUE; may be "
            "repeated. E.g. method.sigma=0.01:2:log, student.training.epochs=5:50:int.",
        ),
    ],
    assignments: Assignments = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="How many; of a grid all, if they are fewer.")] = 20,
    maximize: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="What to have most of; holdout_accuracy by default.")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="What to have least of instead, e.g. file_bytes.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least held-out accuracy that the best trial may have.")
    ] = None,
    sampler: Annotated[
        Literal["tpe", "random", "grid"], typer.Option(help="Who chooses: Optuna, or all in turn.")
    ] = "tpe",
    seed: Annotated[int | None, typer.Option(help="Of all runs, which share a teacher, and of the choices.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/sweep-<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out, or the newest one; --trials may have grown.")
    ] = False,
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Search a recipe's settings for the best student, by its accuracy on the held-out rows; never on test rows.

    Each trial is a run folder; students are trained without baselines unless --set baselines=[...] names some. The
    folder holds sweep.json, sweep.md and sweep.svg. Trials that a signal or a crash ended go on with --resume.
    """
    from pykd import sweeps
    from pykd._files import write_atomically

    if maximize and minimize:
        raise ConfigError("give either --maximize or --minimize")
    if "RANK" in os.environ:
        raise ConfigError("a sweep is one process, with --jobs for more: start it without a launcher")
    direction = "minimize" if minimize else "maximize"
    objective = sweeps.Objective(minimize or maximize or sweeps.ACCURACY, direction, min_accuracy)
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    planned = sweeps.Sweep(recipe, over, changes, objective, sampler)
    count = at_once(jobs, threads, device)
    out = grids.folder_of(f"sweep-{recipes.recipe_name(recipe)}", out, resume).resolve()
    planned.run(out, trials, resume=resume, jobs=count, threads=threads, device=device)
    typer.echo(sweeps.markdown(planned.record))
    try:
        write_atomically(out / "sweep.svg", sweeps.figure(planned.record))
    except ImportError as error:
        typer.echo(str(error), err=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of compare, reproduce or sweep.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", dir_okay=False, help="The file; it is replaced if it is there.")
    ] = Path("report.html"),
    assignments: Assignments = None,
) -> None:
    """Write one HTML file about runs, finished or not: tables, curves, maps of weights, mistakes, commands, settings.

    It needs nothing beside it, and no network. The students are asked again on the test data, which are looked for
    under --set data.root=FOLDER, else where the runs found them.
    """
    _write_report(runs, output, assignments or [])


def _write_report(places: Sequence[Path], output: Path, changes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from pykd._files import writing
    from pykd.report.page import write

    with writing(output, "write the report again"), TemporaryFile(dir=output.parent):  # before all that takes time
        pass
    with Console(stderr=True).status("reading the runs ...") as status:
        size = write(places, output, changes=changes, say=lambda doing: status.update(f"{escape(doing)} ..."))
    typer.echo(f"{output}: {size:,} bytes", err=True)


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


def main() -> None:
    """The console script ``pykd``."""
    if "RANK" in os.environ:  # torch says there what it thinks of find_unused_parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    app(prog_name="pykd")


if __name__ == "__main__":
    main()
