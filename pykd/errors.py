"""Errors whose message is meant for the user: one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path


class PykdError(Exception):
    """The work failed; the message says why and what to do."""


def explained(error: BaseException) -> str:
    """What a user is told about any error.

    >>> explained(KeyError("x"))
    "KeyError: 'x'; run again with --debug for the traceback"
    """
    if isinstance(error, PykdError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is missing: run pip install 'pykd[train]'"
    if isinstance(error, ImportError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: take smaller networks or a smaller batch_size"
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}; run again with --debug for the traceback"


class Interrupted(PykdError):  # noqa: N818
    """A signal ended the run after its state was saved.

    Args:
        signum: the signal's number; a command exits with 128 plus this.
        out: the run folder that holds the state, if there is one.
    """

    def __init__(self, signum: int, out: Path | None = None) -> None:
        super().__init__(
            f"interrupted, {out} is saved: continue with --resume"
            if out
            else "interrupted; without out= nothing is saved"
        )
        self.signum = signum
