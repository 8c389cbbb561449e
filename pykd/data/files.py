"""Files of the public data sets: found below a root, or fetched."""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from pykd.errors import PykdError


def obtain(
    name: str, root: Path, place: str, files: Sequence[str], fetch: Callable[[], object], *, download: bool
) -> None:
    """Sees to it that ``root / place`` holds ``files``; what is there is never fetched again.

    Args:
        name: the data set's, for messages.
        root: where data are looked for.
        place: folder below ``root``.
        files: names of the files in it.
        fetch: downloads those that are missing.
        download: whether it may.

    Raises:
        PykdError: a file is missing and may not or cannot be fetched.
    """

    def missing() -> str | None:
        return next((file for file in files if not (root / place / file).is_file()), None)

    if (file := missing()) is None:
        return
    if not download:
        raise PykdError(
            f"{name} is not in {root}: set data.root or PYKD_DATA to the folder that holds {Path(place, file)}, "
            "or fetch it with --set data.download=true"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".fetching").open("w") as lock:  # of several processes one fetches
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if missing():
                fetch()
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip("<>")
        raise PykdError(
            f"{name} cannot be fetched into {root} ({reason}): go on where there is a network, or put it there yourself"
        ) from error


@contextmanager
def whole(name: str, place: Path) -> Iterator[None]:
    """Turns what a reader says of broken files in the folder ``place`` into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError) as error:
        raise PykdError(
            f"the {name} files in {place} are incomplete or broken: delete them and fetch them anew"
        ) from error
