"""What a page is made of: tables, figures, and sentences in their place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from markupsafe import Markup

from pykd.errors import PykdError
from pykd.report.inline import inlined

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Rows of cells below titles; the first cell of a row is its name."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure, or the sentence in its place."""

    image: Markup | None
    caption: str


class Artist:
    """Makes figures for the page, each with ids of its own."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def __call__(self, make: Callable[[], bytes], text: str, caption: str = "") -> Figure:
        """The figure, or the sentence that says why there is none."""
        image = attempt(lambda: inlined(make(), f"f{next(self._numbers)}", text))
        return Figure(image, caption or text) if isinstance(image, Markup) else Figure(None, image)


def attempt(make: Callable[[], T]) -> T | str:
    """What ``make`` gives, or why it cannot: files of runs may be missing, damaged, or of an older version."""
    try:
        return make()
    except (PykdError, OSError) as error:
        return f"Not shown: {error}."
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, SyntaxError) as error:
        return f"Not shown, because the run's files do not say it: {type(error).__name__}, {error}."
