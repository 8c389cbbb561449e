"""What a run says while it works: bars on a terminal, a line an epoch elsewhere, and the table at its end."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

# Reading the loss waits for the device, so it is read no more often than eyes can follow.
REFRESH_SECONDS = 0.1
PLAIN_WIDTH = 120

# Of the table: the key in a row, the title, the form. A column that no row has is left out.
COLUMNS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "parameters": ("parameters", "{:,}"),
    "nonzeros": ("non-zeros", "{:,}"),
    "bytes": ("bytes", "{:,}"),
    "ratio": ("smaller", "{:.1f}x"),
    "file_bytes": ("file", "{:,}"),
    "file_ratio": ("smaller", "{:.1f}x"),
    "latency_ms": ("latency (ms)", "{:.3f}"),
    "seconds": ("training (s)", "{:.1f}"),
}


class Reporter:
    """Speaks on standard error, or not at all (``visible=False``)."""

    def __init__(self, *, visible: bool) -> None:
        self._visible = visible
        self._console = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._next = 0.0
        self._steps = 0
        self._accuracy = ""

    def say(self, text: str) -> None:
        """One line."""
        if self._visible:
            self._console.print(text, markup=False, soft_wrap=True)

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        """A stage of ``epochs`` times ``steps`` begins or goes on after ``done`` of them."""
        self._steps = steps
        self._accuracy = ""
        if self._visible and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                Remaining(),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=epochs * steps, completed=done, text="")
            self._bar.start()

    def before(self, stage: str, done: int, of: int) -> None:
        """``done`` steps ``of`` the work before a stage's first epoch are done."""
        if self._bar is None:
            self.start(stage, 1, of, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text="compressing")
        elif done == of:
            self.say(f"{stage}: {of} of {of} layers are compressed")

    def step(self, epoch: int, step: int, loss: Callable[[], float]) -> None:
        """``step`` steps of epoch number ``epoch`` are done."""
        if self._bar is not None and (now := time.monotonic()) >= self._next:
            self._next = now + REFRESH_SECONDS
            text = f"epoch {epoch + 1}  loss {loss():.4g}{self._accuracy}"
            self._bar.update(self._task, completed=epoch * self._steps + step, text=text)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """An epoch ended with this row of metrics."""
        held_out = row["holdout_accuracy"]  # None of what gives no logits
        self._accuracy = "" if held_out is None else f"  holdout {held_out:.2%}"
        if self._bar is not None:
            text = f"epoch {row['epoch']}  loss {row['loss']:.4g}{self._accuracy}"
            self._bar.update(self._task, completed=row["epoch"] * self._steps, text=text)
        elif not self._console.is_terminal:
            right = "" if held_out is None else f"holdout accuracy {held_out:.2%}, "
            self.say(
                f"{row['stage']}: epoch {row['epoch']}/{epochs}, loss {row['loss']:.4g}, {right}{row['seconds']:.1f} s"
            )

    def stop(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table of a run's summary on standard output; plain text when that is not a terminal.

    Args:
        summary: ``Run.summary``, or what ``summary.json`` holds.
        console: where to print instead.

    Example:
        >>> size = dict(parameters=8, nonzeros=8, bytes=132)
        >>> row = dict(label="teacher", accuracy=0.99, **size, latency_ms=0.01, seconds=1.5)
        >>> show({"measured_on": "test", "rows": [row]})
                  test accuracy  parameters  non-zeros  bytes  latency (ms)  training (s)
         teacher         99.00%           8          8    132         0.010           1.5
    """
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, header_style="bold")
    table.add_column("")
    rows: Sequence[Mapping[str, Any]] = summary["rows"]
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    for key in shown:
        title, _ = COLUMNS[key]
        table.add_column(f"{summary['measured_on']} {title}" if key == "accuracy" else title, justify="right")
    for row in rows:
        cells = ("-" if row.get(key) is None else COLUMNS[key][1].format(row[key]) for key in shown)
        table.add_row(row["label"], *cells)
    console.print(table)
