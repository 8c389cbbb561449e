"""The program: its options, how a failure is told, and what its commands share."""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import pykd
from pykd import runs
from pykd.config import ConfigError
from pykd.errors import Interrupted, explained

MODEL_FILE = ".pykd.safetensors"
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


def show_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
