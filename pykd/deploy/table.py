"""Device results as one table: latency, energy and size against dense, per device and power mode. Needs numpy alone.

    python -m pykd.deploy.table results/*.json
    python -m pykd.deploy.table orin.json thor.json -o table.md --svg table.svg

A device result is what ``pykd-run --bench --json``, ``pykd bench --json`` and a bundle's ``run.sh`` write. Those of one
device (the same machine, software and power mode) stand together, whatever file they come from; nothing is left out but
a result that is given twice. Times, energy and memory of an emulated machine are not shown: they are the emulator's.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pykd._files import write_atomically
from pykd._svg import LOOKS, svg
from pykd.deploy.container import FormatError, brief, parse
from pykd.errors import PykdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSION = 1
LARGEST_FILE_BYTES, LARGEST_NUMBER, LONGEST_TEXT, MOST_RUNS = 16 << 20, 1e15, 1000, 1000

# ---- what a file says ------------------------------------------------------------------------------------------------

Leaf = tuple[str, Callable[[Any], bool]]
TEXT: Leaf = ("a text", lambda value: isinstance(value, str) and len(value) <= LONGEST_TEXT)
FLAG: Leaf = ("true or false", lambda value: type(value) is bool)
NUMBER: Leaf = (
    f"a number from 0 to {LARGEST_NUMBER:.0e}",
    lambda value: type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER,
)

# What the table reads; a key with a question mark may be null, or not there. Other keys are for other readers.
RECORD: dict[str, Any] = {
    "time": TEXT,
    "machine": {
        "name?": TEXT,
        "processor?": TEXT,
        "l4t?": TEXT,
        "jetpack?": TEXT,
        "power_mode?": {"name?": TEXT},
        "emulated?": FLAG,
    },
    "model": {"file": TEXT, "sha256": TEXT, "bytes": NUMBER, "dense_bytes": NUMBER},
    "check?": {"equal": FLAG},
    "runs": [
        {
            "engine": TEXT,
            "form": TEXT,
            "device": TEXT,
            "precision?": TEXT,
            "threads?": NUMBER,
            "batch": NUMBER,
            "latency_us?": {"p50?": NUMBER, "p99?": NUMBER},
            "rows_per_second?": NUMBER,
            "peak_memory_bytes?": NUMBER,
            "power?": {
                "source?": TEXT,
                "scope?": TEXT,
                "rails": [TEXT],
                "millijoules_per_row?": {"total?": NUMBER, "above_idle?": NUMBER},
            },
            "throttled?": FLAG,
            "missing": [TEXT],
        }
    ],
}


def read(path: Path) -> dict[str, Any]:
    """What a device result says of ``RECORD``, null where it says nothing.

    Args:
        path: of the file; anyone may have written it.

    Raises:
        PykdError: it cannot be read, or is no device result, by the first thing that is wrong.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES or not path.is_file():
            raise PykdError(f"{path} is no device result: give a file of at most {LARGEST_FILE_BYTES} bytes")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # a null character
        raise PykdError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    try:
        given = parse(content, "it")
        if type(version := given.get("pykd_device_result")) is not int or version != VERSION:
            raise FormatError(f"pykd_device_result should be {VERSION}, got {brief(version)}; another pykd may read it")
        return _checked(given, RECORD, "it")
    except FormatError as error:
        raise PykdError(f"{path} is no device result: {error}; measure again with --json") from error


def _checked(value: Any, form: Any, what: str) -> Any:
    """The part of a value that a form names."""
    if isinstance(form, list):
        if not isinstance(value, list) or len(value) > MOST_RUNS:
            raise FormatError(f"{what} should be a list of at most {MOST_RUNS}, got {brief(value)}")
        return [_checked(each, form[0], f"{what}[{index}]") for index, each in enumerate(value)]
    if isinstance(form, tuple):
        if not form[1](value):
            raise FormatError(f"{what} should be {form[0]}, got {brief(value)}")
        return value
    if not isinstance(value, dict):
        raise FormatError(f"{what} should be a JSON object, got {brief(value)}")
    found = {}
    for key, inner in form.items():
        name, optional = key.removesuffix("?"), key.endswith("?")
        path = name if what == "it" else f"{what}.{name}"
        if name not in value and not optional:
            raise FormatError(f"it lacks {path}")
        given = value.get(name)
        found[name] = None if given is None and optional else _checked(given, inner, path)
    return found


# ---- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A run, where it belongs, and what it is compared with.

    Attributes:
        device: machine, software and power mode.
        model: the file's name.
        label: engine, form, device, precision and threads.
        record: that the run is of.
        run: the same.
        dense: pykd's dense run of the same device, precision, threads and batch, if there is one.
        tensorrt: TensorRT's run of the same batch, of the same precision where there is one.
    """

    device: str
    model: str
    label: str
    record: Mapping[str, Any]
    run: Mapping[str, Any]
    dense: Mapping[str, Any] | None
    tensorrt: Mapping[str, Any] | None


def _device(machine: Mapping[str, Any]) -> str:
    parts = [machine["name"] or machine["processor"] or "unknown machine"]
    if machine["jetpack"] or machine["l4t"]:
        system = [f"{name} {machine[key]}" for name, key in (("JetPack", "jetpack"), ("L4T", "l4t")) if machine[key]]
        mode = (machine["power_mode"] or {"name": None})["name"]
        parts += [*system, f"power mode {mode or 'unknown'}"]
    return ", ".join([*parts, said] if (said := _emulated(machine)) else parts)


def _emulated(machine: Mapping[str, Any]) -> str:
    """What to say of a machine whose times are, or may be, an emulator's."""
    return {False: "", True: "emulated", None: "perhaps emulated"}[machine["emulated"]]


def _setting(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["device"], run["precision"] or "", run["threads"] or 0


def _label(run: Mapping[str, Any]) -> str:
    what = "TensorRT" if run["engine"] == "tensorrt" else f"{run['engine']} {run['form']}"
    threads = run["threads"] if run["device"] == "cpu" else None
    spread = "" if threads is None else f"{threads:g} thread{'s' * (threads != 1)}"
    return ", ".join(part for part in (what, run["device"], run["precision"], spread) if part)


def rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """All runs, those of a device and a model together, in the order of the first; then by batch and settings.

    Args:
        records: what :func:`read` gives; equal ones count once.
    """
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for index, record in enumerate(records):
        if record not in records[:index]:
            models = groups.setdefault(_device(record["machine"]), {})
            models.setdefault(record["model"]["sha256"], []).append(record)
    files = Counter(file for file, _ in {(each["model"]["file"], each["model"]["sha256"]) for each in records})
    result = []
    for device, models in groups.items():
        for sha, of in models.items():
            model = of[0]["model"]["file"]
            model += f" ({sha[:8]})" if files[model] > 1 else ""
            batches: dict[float, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
            for record in of:
                for run in record["runs"]:
                    batches.setdefault(run["batch"], []).append((record, run))
            for _, pairs in sorted(batches.items()):
                labels = Counter(_label(run) for _, run in pairs)
                for record, run in sorted(pairs, key=lambda pair: _order(pair[1])):
                    own = [each for owner, each in pairs if owner is record]
                    peers = own + [each for owner, each in pairs if owner is not record]
                    label = _label(run) + (f" of {record['time']}" if labels[_label(run)] > 1 else "")
                    result.append(Row(device, model, label, record, run, _dense(run, peers), _tensorrt(run, peers)))
    return result


def _order(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["engine"] != "pykd", *_setting(run), run["form"] == "dense"


def _dense(run: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    if run["engine"] != "pykd" or run["form"] == "dense":
        return None
    same = (peer for peer in peers if peer["engine"] == "pykd" and _setting(peer) == _setting(run))
    return next((peer for peer in same if peer["form"] == "dense"), None)


def _tensorrt(run: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    if run["engine"] != "pykd":
        return None
    others = [peer for peer in peers if peer["engine"] == "tensorrt"]
    return next((peer for peer in others if peer["precision"] == run["precision"]), next(iter(others), None))


class Metric(NamedTuple):
    """A column: what it shows of a run, in which form, whether more is better, and whether it is set beside others.

    The peak of the memory is not: that of the program itself and of its planning hides small networks.
    """

    title: str
    of: Callable[[Mapping[str, Any]], float | None]
    form: str
    more: bool = False
    compared: bool = True

    def ratio(self, run: Mapping[str, Any], other: Mapping[str, Any] | None) -> float | None:
        """How many times better the run is than the other."""
        mine, its = self.of(run), other and self.of(other)
        if not mine or not its or not self.compared:
            return None
        return mine / its if self.more else its / mine


def _inner(*keys: str, scale: float = 1) -> Callable[[Mapping[str, Any]], float | None]:
    def of(run: Mapping[str, Any]) -> float | None:
        value: Any = run
        for key in keys:
            value = value and value[key]
        return None if value is None else value * scale

    return of


ENERGY = ("power", "millijoules_per_row")
P50 = Metric("latency p50, us", _inner("latency_us", "p50"), ",.1f")
TOTAL = Metric("energy a row in all, mJ", _inner(*ENERGY, "total"), ",.4g")
ABOVE = Metric("energy a row above idle, mJ", _inner(*ENERGY, "above_idle"), ",.4g")
METRICS = [
    P50,
    Metric("latency p99, us", _inner("latency_us", "p99"), ",.1f"),
    Metric("rows a second", _inner("rows_per_second"), ",.0f", more=True),
    TOTAL,
    ABOVE,
    Metric("peak memory, MB", _inner("peak_memory_bytes", scale=1e-6), ",.1f", compared=False),
]


def _bytes(row: Row) -> tuple[float, float | None]:
    """Of the model's file, a dense float32 one for a dense run; and how many times smaller than that it is."""
    model = row.record["model"]
    if row.run["engine"] != "pykd" or row.run["form"] == "dense":
        return model["dense_bytes"], None
    return model["bytes"], model["dense_bytes"] / model["bytes"] if model["bytes"] else None


# ---- Markdown --------------------------------------------------------------------------------------------------------

LEGEND = """In brackets: how many times better than pykd's own dense run of the same device, precision, threads and
batch; and than TensorRT's run of that batch. A file's bytes are those of the model file, of a dense run those of the
network as a dense float32 file. Energy in all is what the rails named take; above idle is that less the idle power."""


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table with its footnotes; see :func:`rows`. Device and model are named where they begin."""
    notes: dict[str, int] = {}

    def noted(cell: str, reason: str) -> str:
        return f"{cell}[^{notes.setdefault(reason, len(notes) + 1)}]"

    def cell(row: Row, metric: Metric) -> str:
        if emulated := _emulated(row.record["machine"]):
            return f"{emulated}: no times" if metric is P50 else ""
        if (value := metric.of(row.run)) is None:
            why = "; ".join(row.run["missing"]) or "the result does not say why"
            return noted("not measured", f"Not measured: {_plain(why)}")
        text = format(value, metric.form)
        ratios = {"": metric.ratio(row.run, row.dense), "TensorRT ": metric.ratio(row.run, row.tensorrt)}
        better = [f"{name}{ratio:.2f}x" for name, ratio in ratios.items() if ratio is not None]
        text += f" ({', '.join(better)})" if better else ""
        if metric is P50 and row.run["throttled"]:
            return noted(text, "The clocks were throttled while this was measured.")
        if metric in (TOTAL, ABOVE):
            power = row.run["power"]
            rails, scope = " + ".join(power["rails"]) or "unknown rails", power["scope"] or "unknown scope"
            return noted(text, _plain(f"Power of {rails} ({scope}), by {power['source'] or 'an unknown source'}."))
        return text

    titles = ["device", "model", "run", "batch", *(metric.title for metric in METRICS), "file, bytes", "answers"]
    numbers = len(METRICS) + 2
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | --- |" + " ---: |" * numbers + " --- |"]
    above = ("", "")
    for row in rows(records):
        size, smaller = _bytes(row)
        check = row.record["check"] if row.run["engine"] == "pykd" else None
        place = (row.device, row.model)
        cells = ["", ""] if place == above else [_plain(each) for each in place]
        cells += [_plain(row.label), f"{row.run['batch']:,.0f}"]
        above = place
        cells += [cell(row, metric) for metric in METRICS]
        cells += [f"{size:,.0f}" + (f" ({smaller:.2f}x)" if smaller else "")]
        cells += ["not checked" if check is None else "equal" if check["equal"] else "**differ**"]
        lines.append(f"| {' | '.join(cells)} |")
    footnotes = [f"[^{number}]: {text}" for text, number in notes.items()]
    return "\n".join([*lines, "", LEGEND, *([""] if footnotes else []), *footnotes]) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*<>\[\]|&~])", r"\\\1", _printable(text))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- figure ----------------------------------------------------------------------------------------------------------

SPARSE, DENSE, OTHER = (LOOKS[index][0] for index in (0, 4, 2))
BAR, PANEL = 0.17, 0.8  # inches: a bar's height, and what stands above and below a panel's bars


def figure(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Latency, energy and size of all runs as an SVG file: a line of panels for each device and model.

    Raises:
        ImportError: matplotlib is missing.
        PykdError: there is no run.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows(records):
        groups.setdefault((row.device, row.model), []).append(row)
    if not groups:
        raise PykdError("the device results hold no run to show: measure again with --json")

    heights = [PANEL + BAR * len(of) for of in groups.values()]

    def draw(figure: "Figure") -> None:
        parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, ((device, model), of) in zip(parts, groups.items(), strict=True):
            part.suptitle(_shown(f"{device}: {model}"), fontsize=9)
            latency, energy, size = part.subplots(1, 3)
            labels = [_shown(f"{row.label}, batch {row.run['batch']:,.0f}") for row in of]
            for axes, title in (
                (latency, "latency p50 / batch, us"),
                (energy, "energy a row, mJ: in all (pale), above idle"),
                (size, "file, MB"),
            ):
                axes.set_title(title, fontsize=8)
                axes.set_yticks(range(len(of)), labels if axes is latency else [""] * len(of), fontsize=7)
                axes.set_ylim(len(of) - 0.4, -0.6)
                axes.tick_params(axis="x", labelsize=7)
            _bars(size, of, lambda row: _bytes(row)[0] / 1e6, lambda row: _bytes(row)[1])
            if emulated := _emulated(of[0].record["machine"]):
                for axes in (latency, energy):
                    axes.set_xticks([])
                    axes.text(0.5, 0.5, f"{emulated}: no times", transform=axes.transAxes, ha="center", va="center")
                continue
            _bars(latency, of, _of_a_row, lambda row: P50.ratio(row.run, row.dense))
            _bars(energy, of, lambda row: TOTAL.of(row.run), lambda row: TOTAL.ratio(row.run, row.dense), alpha=0.4)
            _bars(energy, of, lambda row: ABOVE.of(row.run))

    return svg((11.0, sum(heights)), draw)


def _of_a_row(row: Row) -> float | None:
    return None if (us := P50.of(row.run)) is None else us / max(row.run["batch"], 1)


def _bars(
    axes: "Axes",
    of: Sequence[Row],
    value: Callable[[Row], float | None],
    ratio: Callable[[Row], float | None] | None = None,
    alpha: float = 1,
) -> None:
    """A bar a run; with a ratio, how many times better it is than dense."""
    for place, row in enumerate(of):
        width = value(row)
        color = OTHER if row.run["engine"] != "pykd" else DENSE if row.run["form"] == "dense" else SPARSE
        axes.barh(place, width or 0, color=color, alpha=alpha, height=0.8)
        if ratio:
            times = ratio(row)
            text = "not measured" if width is None else "" if times is None else f"{times:.2f}x"
            axes.text(width or 0, place, f" {text}", va="center", fontsize=6)
    axes.set_xlim(0)


def _shown(text: str) -> str:
    """Text of a figure."""
    return _printable(text if len(text) <= 150 else f"{text[:147]}...")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    description = "Merges device results into one Markdown table, and a figure."
    parser = argparse.ArgumentParser(prog="python -m pykd.deploy.table", description=description)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULT.json", help="what a device measured")
    parser.add_argument("-o", "--output", type=Path, metavar="TABLE.md", help="the table; default: standard output")
    parser.add_argument(
        "--svg", type=Path, metavar="TABLE.svg", help="draw the figure, too (pip install 'pykd[report]')"
    )
    options = parser.parse_args(arguments)
    places = [file.resolve() for file in (options.output, options.svg) if file]
    if len({*places} - {file.resolve() for file in options.files}) < len(places):
        parser.error("-o and --svg would overwrite a result or each other: give files of their own")
    try:
        records = [read(file) for file in options.files]
        text = markdown(records)
        drawn = figure(records) if options.svg else b""
        if options.svg:
            write_atomically(options.svg, drawn, then="run it again")
        if options.output:
            write_atomically(options.output, text.encode(), then="run it again")
        else:
            sys.stdout.write(text)
    except (PykdError, ImportError) as error:
        print(f"pykd.deploy.table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
