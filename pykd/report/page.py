"""One HTML file about any set of runs, which needs nothing beside it."""

import json
import reprlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pykd
from pykd import runs
from pykd._files import write_atomically
from pykd._svg import LOOKS, svg
from pykd.config import load_data
from pykd.report import figures
from pykd.report.answers import Answers, answers
from pykd.report.comparison import columned, compared, reading
from pykd.report.found import Found, find
from pykd.report.parts import Artist, Figure, Table, attempt
from pykd.report.records import sweep, tables

if TYPE_CHECKING:
    from pykd.config import Data
    from pykd.data import Splits

SHOWN = 12  # variants of a data set with figures of their own; layers of a network
CLASSES = 20  # of a confusion matrix
ALL_ROWS = {"per_class": None, "rows": None, "augment_once": False}  # of the data; the test rows are the same
PRIVATE = ("argv", "started")  # of an environment: what differs between runs of one machine
MARKS = dict(zip("osD^vPX", "●■◆▲▼✚✖", strict=True))  # matplotlib's, as words have them

T = TypeVar("T")
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 60


@dataclass(frozen=True)
class Bar:
    """A network's time: the mean over seeds with the least and the largest, also as shares of the longest."""

    name: str
    mean: str
    spread: str
    shares: tuple[float, float, float]


@dataclass(frozen=True)
class Variant:
    """The runs of one variant that have something to show."""

    name: str
    curves: list[Figure]
    weights: list[Figure]
    log_alpha: list[Figure]
    answers: "Answers | str"
    confusion: "Confusion | None"
    measured: str


@dataclass(frozen=True)
class Confusion:
    """The classes of a matrix, and its rows of (number, share of the row or of the largest mistake, right)."""

    classes: Sequence[str]
    rows: list[list[tuple[int, float, bool]]]
    text: str


@dataclass(frozen=True)
class Record:
    """What a grid's folder says beside its runs, as text or as a table with figures."""

    title: str
    text: str
    table: Table | None = None
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Section:
    """All runs on the same rows of the same data."""

    title: str
    measured_on: str
    table: Table | None
    reading: str
    notes: list[str]
    bytes: Figure | None
    legend: list[tuple[int, str, str]]
    latency: dict[str, list[Bar]]
    variants: list[Variant]
    left_out: int
    unfinished: list[Found] = field(default_factory=list)


def write(
    places: Sequence[Path],
    output: Path,
    *,
    changes: Sequence[str] = (),
    say: Callable[[str], None] = lambda doing: None,
) -> int:
    """Writes the report about the runs in ``places``; returns its bytes.

    Args:
        places: run folders, or folders that hold some.
        output: the HTML file.
        changes: assignments to the runs' settings, such as ``data.root=DIR``, to find the data with.
        say: is told what is being done.

    Raises:
        ImportError: a package of the ``[report]`` extra is missing.
        ConfigError: an assignment that no run can have.
        PykdError: a place without runs, or a file that cannot be written.
    """
    content = html(places, changes=changes, say=say).encode(errors="replace")
    write_atomically(output, content, then="write the report again")
    return len(content)


def html(
    places: Sequence[Path], *, changes: Sequence[str] = (), say: Callable[[str], None] = lambda doing: None
) -> str:
    """The page that :func:`write` writes."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ImportError("a report needs jinja2: run pip install 'pykd[report]'") from error
    svg((1, 1), lambda figure: None)  # a missing matplotlib is told before the work
    load_data("digits", changes)  # and a mistake in these
    say("reading the runs")
    found, records = find(places)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    draw = Artist()
    load = cache(_splits)
    groups: dict[tuple[str, str], list[Found]] = {}
    for run in found:
        groups.setdefault((run.data, run.measured_on), []).append(run)
    sections = [
        _section(*key, of, changes, draw, lambda data: load(data.model_dump_json()), say) for key, of in groups.items()
    ]
    say("writing the page")
    return environment.get_template("page.html").render(
        made=datetime.now(UTC).isoformat(" ", timespec="seconds").replace("+00:00", " UTC"),
        version=pykd.__version__,
        places=[str(place) for place in places],
        found=found,
        counted=_counted(found),
        variants=_by_variant(found),
        sections=sections,
        records=[_record(each, draw) for each in records],
        differences=_differences(_by_variant(found)),
        commands=_grouped((run.command, run) for run in found if run.command),
        environments=_grouped((_environment(run), run) for run in found if run.environment),
        looks=LOOKS,
    )


def _splits(data: str) -> "Splits":
    from pykd.config import Data
    from pykd.data import load

    return load(Data.model_validate_json(data).model_copy(update=ALL_ROWS), seed=0)


def _by_variant(found: Iterable[Found]) -> dict[str, list[Found]]:
    variants: dict[str, list[Found]] = {}
    for run in found:
        variants.setdefault(run.variant, []).append(run)
    return variants


def _counted(found: Sequence[Found]) -> str:
    unfinished = sum(run.summary is None for run in found)
    variants = len(_by_variant(found))
    words = f"{len(found)} {'run' if len(found) == 1 else 'runs'}"
    words += f" of {variants} variants" if 1 < variants < len(found) else ""
    return words + (f", {unfinished} of them unfinished" if unfinished else "")


def _section(
    data: str,
    measured_on: str,
    found: Sequence[Found],
    changes: Sequence[str],
    draw: Artist,
    load: "Callable[[Data], Splits]",
    say: Callable[[str], None],
) -> Section:
    variants = _by_variant(found)
    finished, notes = _alike(variants)
    rows = compared(finished) if finished else []
    columns = columned(rows)
    table = _comparison(columns, measured_on) if rows else None
    labels = {name: _labels(of) for name, of in variants.items()}
    stages = [labels[run.variant].get(row["stage"], row["stage"]) for run in found for row in run.metrics]
    looks = _looks(dict.fromkeys([*(label for of in labels.values() for label in of.values()), *stages]))
    sizes = None
    if any(row["name"] != figures.TEACHER and row["file_bytes"]["values"] for row in rows):
        said = "; ".join(
            f"{row['label']}{_changed(row['run'])}: {row['file_bytes']['mean']:,.0f} bytes, {row['error']['mean']:.2%}"
            for row in rows[: 4 * SHOWN]
            if row["file_bytes"]["values"]
        )
        caption = (
            "Error against the bytes of the model file. The level line is the teacher's error, the dotted ones are its "
            "dense file divided by 64 and by 256."
        )
        text = f"Test error against bytes of the model file. {said}."
        sizes = draw(lambda: figures.error_against_bytes(rows, looks), text, caption)
    shown = list(variants.items())[:SHOWN]
    made = []
    for number, (name, of) in enumerate(shown):
        say(f"{data}: {name}, {number + 1} of {len(shown)}")
        made.append(_variant(name, of, looks, labels[name], changes, draw, load))
    title = data if measured_on == "test" else f"{data}, held-out rows"
    unfinished = [run for run in found if run.summary is None]
    return Section(
        title=title,
        measured_on=measured_on,
        table=table,
        reading=reading(columns, rows),
        notes=notes,
        bytes=sizes,
        legend=[(*_look(number), label) for label, number in looks.items()],
        latency=_bars(rows),
        variants=made,
        left_out=len(variants) - len(shown),
        unfinished=unfinished,
    )


def _comparison(columns: dict[str, list[str]], measured_on: str) -> Table:
    """The table, each variant below its name."""
    error = "test error, %" if measured_on == "test" else "held-out error, %"
    titles, runs_of, rows = [error if title == "test error, %" else title for title in columns], columns["run"], []
    for number, cells in enumerate(zip(*columns.values(), strict=True)):
        if len(set(runs_of)) > 1 and runs_of[number] not in runs_of[:number]:
            rows.append([runs_of[number]])
        rows.append(list(cells[1:]))
    return Table(titles[1:], rows)


def _alike(variants: Mapping[str, Sequence[Found]]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The summaries of each variant whose networks are those of its first one, and what is left out."""
    finished: dict[str, list[dict[str, Any]]] = {}
    notes = []
    for name, of in variants.items():
        names = None
        for run in of:
            if run.summary is None:
                continue
            own = [row["name"] for row in run.summary["rows"]]
            names = names or own
            if own == names:
                finished.setdefault(name, []).append(run.summary)
            else:
                notes.append(
                    f"{run.folder} is not in the table: its networks are not those of its variant's first run."
                )
    return finished, notes


def _labels(found: Iterable[Found]) -> dict[str, str]:
    """What a variant's table calls its networks: another variant's student may be another method's."""
    return {row["name"]: row["label"] for run in found if run.summary for row in run.summary["rows"]}


def _looks(labels: Iterable[str]) -> dict[str, int]:
    """For each network, by its label, the number of its colour and mark in all figures; teachers are black.

    >>> _looks(["teacher", "student alone", "student, KD", "teacher-2"])
    {'teacher': 6, 'student alone': 0, 'student, KD': 1, 'teacher-2': 13}
    """
    black = len(LOOKS) - 1
    taught = (number + number // black for number in count())
    teachers = count(black, len(LOOKS))
    return {label: next(teachers if label.startswith(figures.TEACHER) else taught) for label in labels}


def _look(number: int) -> tuple[int, str]:
    colour = number % len(LOOKS)
    return colour, MARKS[LOOKS[colour][1]]


def _changed(name: str) -> str:
    change = name.partition("+")[2]
    return f" ({change})" if change else ""


def _bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Bar]]:
    """By variant."""
    most = max((max(row["latency_ms"]["values"], default=0) for row in rows), default=0) or 1
    bars: dict[str, list[Bar]] = {}
    for row in rows:
        mean, values = row["latency_ms"]["mean"], row["latency_ms"]["values"]
        if values:
            low, high = min(values), max(values)
            shares = (100 * mean / most, 100 * low / most, 100 * high / most)
            spread = f"{low:.3f} to {high:.3f}" if len(values) > 1 else ""
            bars.setdefault(row["run"], []).append(Bar(row["label"], f"{mean:.3f}", spread, shares))
    return bars


def _variant(
    name: str,
    found: Sequence[Found],
    looks: Mapping[str, int],
    labels: Mapping[str, str],
    changes: Sequence[str],
    draw: Artist,
    load: "Callable[[Data], Splits]",
) -> Variant:
    first = next((run for run in found if run.summary), None)
    answered: Answers | str = "Not shown: no run of this variant is finished."
    weights: list[Figure] = []
    log_alpha: list[Figure] = []
    measured = ""
    if first is not None and first.summary is not None:
        folder, summary = first.folder, first.summary
        answered = attempt(lambda: answers(folder, changes, load))
        for row in summary["rows"]:
            weights += _weights(first, row, draw)
            log_alpha += _log_alpha(first, row, draw)
        measured = next((f"{row['accuracy']:.2%}" for row in summary["rows"] if row["name"] == "student"), "")
    confusion = _confusion(answered) if isinstance(answered, Answers) else None
    curves = [
        _curves(found, looks, labels, *which, draw)
        for which in (("loss", "loss"), ("holdout_accuracy", "held-out accuracy, %"))
    ]
    return Variant(name, curves, weights, log_alpha, answered, confusion, measured)


def _curves(
    found: Sequence[Found], looks: Mapping[str, int], labels: Mapping[str, str], key: str, title: str, draw: Artist
) -> Figure:
    factor = 100 if key == "holdout_accuracy" else 1
    lines: dict[str, list[dict[int, float]]] = {}
    for run in found:
        own: dict[str, dict[int, float]] = {}
        for row in run.metrics:
            if row.get(key) is not None:
                own.setdefault(labels.get(row["stage"], row["stage"]), {})[row["epoch"]] = factor * row[key]
        for label, line in own.items():
            lines.setdefault(label, []).append(line)
    if not lines:
        return Figure(None, f"Not shown: no epoch with a {title.partition(',')[0]} is done.")
    said = []
    for label, seeds in lines.items():
        ends = [[of[end(of)] for of in seeds] for end in (min, max)]
        first, last = (sum(each) / len(each) for each in ends)
        said.append(f"{label}: {first:.4g} to {last:.4g} in {max(map(max, seeds))} epochs")
    over = f", mean over {len(found)} seeds" if len(found) > 1 else ""
    text = f"{title.capitalize()} by epoch{over}. {'; '.join(said)}."
    return draw(
        lambda: figures.learning_curves(lines, title, looks, log=key == "loss"),
        text,
        f"{title.capitalize()} by epoch{over}",
    )


def _panels(panels: Callable[[], Mapping[str, figures.Panel]], of: str, text: str, draw: Artist) -> list[Figure]:
    made = attempt(panels)
    if isinstance(made, str):
        return [Figure(None, f"{of}. {made}")]
    return [
        draw(partial(figures.alone, panel), f"{text} of {of}, {heading}", f"{of}, {heading}")
        for heading, panel in made.items()
    ]


def _layers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The largest layers of a network, in its order."""
    layers = (row.get("facts") or {}).get("layers", {})
    largest = sorted(layers, key=lambda name: -layers[name]["weights"])[:SHOWN]
    return {name: {**layer, "kept": int(layer["kept"])} for name, layer in layers.items() if name in largest}


def _weights(run: Found, row: Mapping[str, Any], draw: Artist) -> list[Figure]:
    layers = attempt(lambda: _layers(row))
    if isinstance(layers, str):
        return [Figure(None, f"{row['label']}. {layers}")]
    if all(each["kept"] == each["weights"] for each in layers.values()):
        return []
    groups = (run.settings.get("method") or {}).get("groups")
    block = tuple(groups) if isinstance(groups, list) and len(groups) == 2 else None

    def panels() -> Mapping[str, figures.Panel]:
        shape = (run.summary or {}).get("input_shape")
        file = runs.weights_file(run.folder, row["name"])
        return figures.sparsity_panels(file, layers, row["label"], shape, block)

    return _panels(panels, row["label"], "Map of the weights", draw)


def _log_alpha(run: Found, row: Mapping[str, Any], draw: Artist) -> list[Figure]:
    layers = attempt(lambda: {name: each for name, each in _layers(row).items() if "log_alpha" in each})
    if not layers or isinstance(layers, str):
        return []
    facts = {**row["facts"], "layers": layers}
    return _panels(lambda: figures.log_alpha_panels(facts, row["label"]), row["label"], "Histogram of log alpha", draw)


def _confusion(of: Answers) -> Confusion:
    """The matrix, of the classes with the most mistakes where there are many."""
    matrix = of.confusion
    wrong = matrix.copy()
    for index in range(len(wrong)):
        wrong[index, index] = 0
    most = sorted((-(wrong.sum(0) + wrong.sum(1))).argsort(kind="stable")[:CLASSES].tolist())
    largest = max(1, int(wrong.max()))
    rows = []
    for truth in most:
        total = max(1, int(matrix[truth].sum()))
        cells = [(int(matrix[truth, answer]), truth == answer) for answer in most]
        rows.append([(n, 100 * n / (total if right else largest), right) for n, right in cells])
    text = f"{of.right:,} of {of.rows:,} right"
    if of.right < of.rows:
        truth, answer = divmod(int(wrong.argmax()), len(wrong))
        text += f"; most often, {int(wrong.max())} times, {of.classes[truth]} is taken for {of.classes[answer]}"
    if len(most) < len(of.classes):
        text += f"; the {len(most)} classes with the most mistakes of {len(of.classes)}"
    return Confusion([of.classes[each] for each in most], rows, text + ".")


def _record(record: Path, draw: Artist) -> Record:
    """What a grid's folder says beside its runs: its tables, and a sweep's trials."""
    title = f"{record.name} of {record.parent.resolve().name}"
    if record.name == "sweep":
        made = attempt(lambda: sweep(json.loads(record.with_suffix(".json").read_bytes()), draw))
        return Record(title, made) if isinstance(made, str) else Record(title, "", *made)
    return Record(title, attempt(lambda: tables(record.with_suffix(".md"))))


def _flat(settings: Mapping[str, Any], key: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{key}{name}.")
        elif name == "weights" and isinstance(value, str):
            flat[f"{key}{name}"] = "/".join(Path(value).parts[-3:])
        else:
            flat[f"{key}{name}"] = _brief.repr(value) if isinstance(value, str) else json.dumps(value, default=str)[:80]
    return flat


def _differences(variants: Mapping[str, Sequence[Found]]) -> Table | None:
    """What the settings of the variants' first runs differ in."""
    from pykd.training.run_folder import FREE_SETTINGS

    flat = {name: _flat(of[0].settings) for name, of in variants.items()}
    keys = dict.fromkeys(key for each in flat.values() for key in each if key not in (*FREE_SETTINGS, "seed"))
    differing = [key for key in keys if len({each.get(key) for each in flat.values()}) > 1]
    if not differing:
        return None
    rows = [[name, *(each.get(key, "") for key in differing)] for name, each in flat.items()]
    return Table(["run", *differing], rows)


def _environment(run: Found) -> tuple[tuple[str, str], ...]:
    def said(value: Any) -> str:
        return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

    return tuple((key, said(value)[:200]) for key, value in run.environment.items() if key not in PRIVATE)


def _grouped(pairs: Iterable[tuple[T, Found]]) -> dict[T, list[Found]]:
    groups: dict[T, list[Found]] = {}
    for key, run in pairs:
        groups.setdefault(key, []).append(run)
    return groups
