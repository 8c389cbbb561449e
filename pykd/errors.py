"""Errors whose message is meant for the user: one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path


class PykdError(Exception):
    """The work failed; the message says why and what to do."""


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
