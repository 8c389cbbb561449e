"""Files that are whole whenever the machine stops."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pykd.errors import PykdError


@contextmanager
def writing(path: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Turns an ``OSError`` into one sentence about ``path``; ``then`` is what to do once there is space."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PykdError(f"no space is left to write {path}: free some and {then}") from error
        raise PykdError(f"cannot write {path}: {error.strerror or error}; write it somewhere else") from error


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file down to the disk, not atomically."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, then: str = "continue with --resume") -> None:
    """``path`` holds either what it held before or all of ``content``, whenever the machine stops.

    Args:
        path: the file.
        content: all of it.
        then: what to do once there is space, for the message.

    Raises:
        PykdError: it cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with writing(path, then):
        try:
            write_synced(temporary, content)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
