"""The commands for a finished network: export it, run it, measure it, bundle it."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pykd import config as recipes
from pykd import runs
from pykd.cli._app import MODEL_FILE, Assignments, show_table
from pykd.config import ConfigError
from pykd.errors import PykdError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module

    from pykd.deploy import Model


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
        show_table(["step", "op", "form", "us"], layers)
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
    show_table([*titles, *(["W", "mJ a row", "above idle"] if power else [])], [_run_cells(run, power) for run in runs])
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
