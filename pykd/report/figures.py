"""Figures as SVG."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pykd._svg import LOOKS, svg
from pykd.errors import PykdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes"], None]  # draws one

TEACHER = "teacher"
SMALLER = (64, 256)  # the lines of error_against_bytes
CELLS = 128  # of a sparsity map's side, at most
PANEL = (3.2, 2.4)  # inches
ACROSS = 4  # panels in a row
MARKS = 10  # on a line
BESIDE = 1.015  # from a network's marks to the next one's, on a logarithmic axis


def error_against_bytes(rows: Sequence[Mapping[str, Any]], looks: Mapping[str, int] | None = None) -> bytes:
    """Test error over the bytes of the model file: a mark for each network of each variant, with its spread over seeds.

    Marks of one network are joined from the smallest file to the largest and say what their variant changes; the
    teacher's error is a level line, and its dense float32 file divided by 64 and by 256 are upright ones.

    Args:
        rows: what :func:`pykd.report.compared` gives.
        looks: for each label the number of its colour and mark; the figure is then small and has no legend.

    Returns:
        An SVG file.

    Raises:
        ImportError: matplotlib is missing.
        PykdError: no network of the rows has a model file.
    """
    marks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["name"] != TEACHER and row["file_bytes"]["values"]:
            marks.setdefault(row["label"], []).append(row)
    if not marks:
        raise PykdError("no network has a model file to count: run the comparison with networks that can be exported")
    teachers = {round(row["bytes"]["mean"]): row for row in rows if row["name"] == TEACHER}

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.add_subplot()
        for number, (label, of) in enumerate(marks.items()):
            colour, mark = LOOKS[(looks[label] if looks else number) % len(LOOKS)]
            # A baseline that the grid does not change is one mark.
            places = {(row["file_bytes"]["mean"], 100 * row["error"]["mean"]): row for row in of}
            for (size, error), row in sorted(places.items()):
                errors, sizes = row["error"]["values"], row["file_bytes"]["values"]
                if len(errors) == len(sizes):
                    axes.plot(sizes, [100 * each for each in errors], mark, color=colour, markersize=3, alpha=0.35)
                if len(places) > 1:
                    change = re.sub(r"(\w+\.)+(?=\w+=)", "", row["run"].partition("+")[2])
                    axes.annotate(change, (size, error), (4, 4), textcoords="offset points", fontsize=7, color=colour)
            of = [places[place] for place in sorted(places)]
            axes.errorbar(
                [row["file_bytes"]["mean"] for row in of],
                [100 * row["error"]["mean"] for row in of],
                xerr=[row["file_bytes"]["std"] or 0 for row in of],
                yerr=[100 * (row["error"]["std"] or 0) for row in of],
                fmt=mark,
                linestyle="-",
                linewidth=0.8,
                color=colour,
                capsize=2,
                label=label,
            )
        for size, row in teachers.items():
            level = 100 * row["error"]["mean"]
            axes.axhline(level, color="black", linewidth=0.8, label=f"teacher, {size:,} bytes dense")
            for factor in SMALLER:
                axes.axvline(size / factor, color="black", linewidth=0.8, linestyle=":")
                top = axes.get_xaxis_transform()
                axes.text(size / factor, 1.01, f"{factor}x", transform=top, ha="center", fontsize=7)
        axes.set_xscale("log", subs=())
        low, high = axes.get_xlim()
        numbers = ((1,) if high > 150 * low else (1, 3)) if looks and high > 12 * low else (1, 2, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=numbers))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("bytes of the model file")
        axes.set_ylabel("test error, %")
        axes.grid(linewidth=0.3, alpha=0.5)
        if not looks:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))

    return svg((3.4, 2.8) if looks else (8.0, 4.5), draw)


def error_against_k(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Test error over K, the images of each class that students learn from: a line a network, with its spread.

    Marks are means over the seeds, bars the sample standard deviations; the networks stand a little beside one
    another, so that no bar hides the next. The teacher's mean error is a level line. Means that span more than a
    factor of 10, none of them 0, are drawn on a logarithmic axis.

    Args:
        rows: each with ``name``, ``label`` and ``error``: for each K the errors, as shares, by seed.
        title: of the figure.

    Returns:
        An SVG file.

    Raises:
        ImportError: matplotlib is missing.
        PykdError: there is no network beside the teacher.

    Example:
        >>> row = {"name": "student", "label": "student", "error": {"1": {"0": 0.2, "1": 0.3}, "5": {"0": 0.1}}}
        >>> error_against_k([row], "digits")[:5]
        b'<?xml'
    """
    students = sorted((row for row in rows if row["name"] != TEACHER), key=lambda row: row["name"] != "student")
    if not students:
        raise PykdError(f"{title}: there is no network beside the teacher to show")
    means = {row["name"]: [statistics.fmean(of.values()) for of in row["error"].values()] for row in rows}
    least, most = min(map(min, means.values())), max(map(max, means.values()))

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes = figure.add_subplot()
        for number, row in enumerate(students):
            colour, mark = LOOKS[number % len(LOOKS)]
            by_k = {int(k): list(of.values()) for k, of in row["error"].items()}
            axes.errorbar(
                [k * BESIDE ** (number - (len(students) - 1) / 2) for k in by_k],
                [100 * statistics.fmean(of) for of in by_k.values()],
                yerr=[100 * statistics.stdev(of) if len(of) > 1 else 0 for of in by_k.values()],
                fmt=mark,
                linestyle="-" if number < len(LOOKS) else "--",
                fillstyle="full" if number < len(LOOKS) else "none",
                linewidth=0.8,
                color=colour,
                capsize=2,
                label=row["label"],
            )
        if TEACHER in means:
            axes.axhline(100 * statistics.fmean(means[TEACHER]), color="black", linewidth=0.8, label="teacher")
        ks = sorted({int(k) for row in rows for k in row["error"]})
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.xaxis.set_minor_locator(NullLocator())
        if 0 < 10 * least < most:
            axes.set_yscale("log", subs=())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("K, images of each class")
        axes.set_ylabel("test error, %")
        axes.grid(linewidth=0.3, alpha=0.5)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))

    return svg((8.0, 4.5), draw)


def log_alpha(facts: Mapping[str, Any], title: str) -> bytes:
    """Histograms of log alpha, one a layer, with the threshold from which on weights are cut away.

    Args:
        facts: of a finished network with variational layers, as in a summary's row.
        title: of the figure.

    Returns:
        An SVG file.

    Raises:
        ImportError: matplotlib is missing.
        PykdError: no layer has a histogram.

    Example:
        >>> layer = dict(weights=4, kept=1, threshold=3.0, log_alpha=[1, 3])
        >>> log_alpha({"log_alpha_edges": [-20, 0, 20], "layers": {"fc": layer}}, "student")[:5]
        b'<?xml'
    """
    return _together(log_alpha_panels(facts, title), title)


def log_alpha_panels(facts: Mapping[str, Any], title: str) -> dict[str, Panel]:
    """The panels of :func:`log_alpha`, each by its heading."""
    layers = {name: layer for name, layer in facts["layers"].items() if "log_alpha" in layer}
    if not layers:
        raise PykdError(f"{title}: no layer is variational, so that there is no log alpha to show")
    edges = np.asarray(facts["log_alpha_edges"])

    def panel(layer: Mapping[str, Any]) -> Panel:
        counts = np.asarray(layer["log_alpha"])

        def draw(axes: "Axes") -> None:
            axes.stairs(100 * counts / max(1, counts.sum()), edges, fill=True, color=LOOKS[0][0])
            axes.axvline(layer["threshold"], color=LOOKS[1][0], linestyle="--", label="threshold")
            axes.set_xlabel("log alpha")
            axes.set_ylabel("share, %")
            axes.legend(fontsize=7)

        return draw

    return {_kept(name, layer["kept"], layer["weights"]): panel(layer) for name, layer in layers.items()}


def sparsity(weights: Path, layers: Iterable[str], title: str, in_shape: Sequence[int] | None = None) -> bytes:
    """Where the weights of each layer are that are not 0; large layers as shares of blocks.

    Args:
        weights: safetensors file of a network.
        layers: names of its linear and convolutional layers, the first one first; their weights are shown flattened to
            [outputs, inputs * kernel].
        title: of the figure.
        in_shape: (channels, height, width) of an image; a first layer that reads all of one is also shown as the share
            of weights that every pixel keeps, mean over the channels.

    Returns:
        An SVG file.

    Raises:
        ImportError: matplotlib is missing.
        PykdError: the file cannot be read, or holds no such layers.
    """
    return _together(sparsity_panels(weights, layers, title, in_shape), title)


def sparsity_panels(
    weights: Path,
    layers: Iterable[str],
    title: str,
    in_shape: Sequence[int] | None = None,
    block: tuple[int, int] | None = None,
) -> dict[str, Panel]:
    """The panels of :func:`sparsity`, each by its heading; with a ``block`` also one of each layer's blocks."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(weights)
        kept = {name: tensors[f"{name}.weight"] != 0 for name in layers}
    except (OSError, SafetensorError, KeyError) as error:
        raise PykdError(f"cannot read {weights}, or a layer in it: {error}") from error
    if not kept:
        raise PykdError(f"{title}: there is no layer to show")
    panels: dict[str, Panel] = {}
    first = next(iter(kept.values()))
    if in_shape is not None and first.shape[1:] == (math.prod(in_shape),):
        image = first.mean(0).reshape(in_shape).mean(0)
        heading = "pixels read by the first layer"
        panels[heading] = partial(_map, shares=image, shape=image.shape, sides=("column", "row"), aspect="equal")
    for name, layer in kept.items():
        matrix = layer.reshape(len(layer), -1)
        sides = ("input" if layer.ndim == 2 else "input, kernel position", "output")
        heading = _kept(name, int(layer.sum()), layer.size)
        panels[heading] = partial(_map, shares=_shares(matrix, CELLS), shape=matrix.shape, sides=sides)
        if block:
            blocks = _sums(matrix, block) > 0
            heading = f"layer {name}: {blocks.sum():,} of {blocks.size:,} blocks of {block[0]}x{block[1]} kept"
            sides = ("column of blocks", "row of blocks")
            panels[heading] = partial(_map, shares=_shares(blocks, CELLS), shape=blocks.shape, sides=sides)
    return panels


def learning_curves(
    stages: Mapping[str, Sequence[Mapping[int, float]]], title: str, looks: Mapping[str, int], *, log: bool = False
) -> bytes:
    """A figure over the epochs: a line a stage, the mean over its seeds, in a band from the least to the largest.

    Args:
        stages: for each the values by epoch of every seed.
        title: of the vertical axis.
        looks: for each the number of its colour and mark.
        log: draw values that span more than a factor of 10, none of them 0, on a logarithmic axis.

    Returns:
        An SVG file.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> learning_curves({"teacher": [{1: 0.5, 2: 0.25}]}, "loss", {"teacher": 0})[:5]
        b'<?xml'
    """
    every = [value for seeds in stages.values() for of in seeds for value in of.values()]

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for name, seeds in stages.items():
            number = looks[name]
            colour, mark = LOOKS[number % len(LOOKS)]
            epochs = sorted({epoch for of in seeds for epoch in of})
            values = [[of[epoch] for of in seeds if epoch in of] for epoch in epochs]
            if len(seeds) > 1:
                axes.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.25, lw=0)
            axes.plot(
                epochs,
                [statistics.fmean(each) for each in values],
                mark + ("-" if number < len(LOOKS) else "--"),
                color=colour,
                linewidth=1.2,
                markersize=4,
                markevery=max(1, math.ceil(len(epochs) / MARKS)),
            )
        if log and 0 < 10 * min(every, default=0) < max(every, default=0):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(linewidth=0.3, alpha=0.5)

    return svg(PANEL, draw)


def alone(panel: Panel) -> bytes:
    """A figure of one panel; its heading stands elsewhere."""
    return svg(PANEL, lambda figure: panel(figure.add_subplot()))


def _together(panels: Mapping[str, Panel], title: str) -> bytes:
    across = min(len(panels), ACROSS)
    down = math.ceil(len(panels) / ACROSS)

    def draw(figure: "Figure") -> None:
        for number, (heading, panel) in enumerate(panels.items()):
            axes = figure.add_subplot(down, across, number + 1)
            panel(axes)
            axes.set_title(heading, fontsize=8)
        figure.suptitle(title, fontsize=10)

    return svg((PANEL[0] * across, 0.4 + PANEL[1] * down), draw)


def _kept(name: str, kept: int, weights: int) -> str:
    return f"layer {name}: {kept:,} of {weights:,} weights kept"


def _map(
    axes: "Axes",
    *,
    shares: NDArray[np.float64],
    shape: tuple[int, ...],
    sides: tuple[str, str],
    aspect: Literal["equal", "auto"] = "auto",
) -> None:
    """Shares in colours, over the indices of what has the ``shape``."""
    rows, columns = shape
    image = axes.imshow(
        100 * shares,
        cmap="cividis",
        vmin=0,
        vmax=100 * max(float(shares.max()), 1e-12),
        aspect=aspect,
        extent=(0, columns, rows, 0),
        interpolation="nearest",
    )
    axes.set_xlabel(sides[0])
    axes.set_ylabel(sides[1])
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes).set_label("kept, %", fontsize=8)


def _shares(kept: NDArray[np.bool_], cells: int) -> NDArray[np.float64]:
    """Shares of the true entries of a matrix in a grid of blocks, of at most ``cells`` rows and columns.

    >>> _shares(np.array([[True, False, True], [True, True, False]]), 2)
    array([[0.5, 1. ],
           [1. , 0. ]])
    """
    block = [math.ceil(length / cells) for length in kept.shape]
    return _sums(kept, block) / _sums(np.ones_like(kept), block)


def _sums(kept: NDArray[np.bool_], block: Sequence[int]) -> NDArray[np.float64]:
    """How many entries of a matrix are true in each block of so many rows and columns; the last may be smaller."""
    sums = kept.astype(np.float64)
    for axis, (length, side) in enumerate(zip(kept.shape, block, strict=True)):
        sums = np.add.reduceat(sums, np.arange(0, length, side), axis=axis)
    return sums
