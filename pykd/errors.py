"""Errors whose message is meant for the user: one sentence that says what to do."""


class PykdError(Exception):
    """The work failed; the message says why and what to do."""


class Interrupted(PykdError):
    """A signal ended the run after a checkpoint was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted; continue with --resume")
        self.signum = signum
