"""Several runs at once: workers, each a process that does one run after another and ends with the one that asks.

What a run computes depends, in its last bits, on the threads it has, and never on how many runs go on beside it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pykd import runs
from pykd._files import writing
from pykd.config import Config, ConfigError
from pykd.errors import Interrupted, PykdError

LOG = "log.txt"  # in a run's folder: what its worker said
MOST_BY_DEFAULT = 8  # each has its data and its networks in memory
LOOK_SECONDS = 0.2


def at_once(jobs: int | None, threads: int, device: str | None) -> int:
    """How many runs go on at once: ``jobs``, or as many as torch would take threads for one, and one with CUDA.

    Raises:
        ConfigError: several, where a launcher's processes already share each run.
    """
    if "RANK" in os.environ:
        if jobs not in (None, 1):
            raise ConfigError(f"--jobs {jobs}: the launcher's processes share each run: leave --jobs out")
        return 1
    if jobs:
        return jobs
    import torch

    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return 1
    return max(1, min(MOST_BY_DEFAULT, torch.get_num_threads() // threads))


class Jobs:
    """Runs that go on at once; a signal ends them all, each of them saved.

    Where it is one at a time, this process does it and shows how it goes; else a line a run is shown, a worker's own
    words are in the run's folder, and a worker that is killed fails its run alone.

    Args:
        count: runs at once.
        threads: of each.
        device: of each.
        out: the folder of all runs, for the message of a signal.
        runs: how many there are, for the bar on a terminal.
        done: how many of them are finished.
    """

    def __init__(self, count: int, *, threads: int, device: str | None, out: Path, runs: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        from pykd.training.loop import Signals

        self._count, self._threads, self._device, self._out = count, threads, device, out
        self._workers: list[_Worker] = []
        self._ended: list[tuple[Path, PykdError | None]] = []
        self._signals = Signals()
        self._stack = ExitStack()
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(console=self._console, disable=count == 1 or not self._console.is_terminal)
        self._task = self._bar.add_task("runs", total=runs, completed=done)

    def __enter__(self) -> "Jobs":
        if self._count > 1:
            self._stack.enter_context(self._signals.caught())
            self._stack.callback(self._stop)
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """One line on standard error."""
        if runs.is_main_process():
            self._console.print(text, markup=False, soft_wrap=True)

    @property
    def alone(self) -> bool:
        """Whether one run at a time goes on, and speaks for itself."""
        return self._count == 1

    @property
    def busy(self) -> list[Path]:
        """The folders of the runs that go on."""
        return [worker.folder for worker in self._workers if worker.folder]

    @property
    def free(self) -> bool:
        """Whether another run can start."""
        return len(self.busy) + len(self._ended) < self._count

    def start(self, config: Config, folder: Path, *, resume: bool) -> None:
        """Starts a run; where one goes on at a time, does it."""
        if self.alone:
            self._ended.append((folder, self._do(config, folder, resume)))
            return
        worker = next((each for each in self._workers if not each.folder), None)
        if worker is None:
            worker = _Worker(self._threads)
            self._workers.append(worker)
        worker.start(config, folder, resume, self._device)

    def _do(self, config: Config, folder: Path, resume: bool) -> PykdError | None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            runs.distill(config, folder, resume=resume, device=self._device)
        except Interrupted:
            raise
        except PykdError as error:
            if os.environ.get("WORLD_SIZE", "1") != "1":  # it may be this process's alone, and the others wait
                raise
            return error
        finally:
            torch.set_num_threads(before)
        return None

    def ended(self) -> list[tuple[Path, PykdError | None]]:
        """The folders of runs that are over, each with why it failed; waits a moment where there is none.

        Raises:
            Interrupted: a signal came.
        """
        working = {worker.answers: worker for worker in self._workers if worker.folder}
        for answers in wait(list(working), LOOK_SECONDS) if working else ():
            worker = working[answers]
            self._ended.append(worker.ended())
            if worker.gone:
                self._workers.remove(worker)
        if self._signals.received:
            raise Interrupted(self._signals.received, self._out)
        found, self._ended = self._ended, []
        self._bar.advance(self._task, len(found))
        return found

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process in a session of its own, out of a terminal's reach: its parent alone signals it."""

    def __init__(self, threads: int) -> None:
        self.folder: Path | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from pykd.jobs import work; work({threads})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.answers: Any = self.process.stdout

    def start(self, config: Config, folder: Path, resume: bool, device: str | None) -> None:
        self.folder = folder
        request = {"config": config.model_dump(mode="json"), "folder": str(folder), "resume": resume, "device": device}
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has died: ended() tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    def ended(self) -> tuple[Path, PykdError | None]:
        """Which run, and why it failed; it waits for the answer."""
        assert self.folder
        folder, self.folder = self.folder, None
        if not (answer := self.answers.readline()):
            self.close()
            code = self.process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return folder, PykdError(f"{folder}: its process died ({how}): see {LOG} there, and go on with --resume")
        found = json.loads(answer)
        if found["error"] is None:
            return folder, None
        return folder, (ConfigError if found["usage"] else PykdError)(found["error"])

    def close(self) -> None:
        """Waits for its end."""
        self.process.wait()
        assert self.process.stdin
        self.answers.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def work(threads: int) -> None:
    """What a worker does: the runs that lines on standard input ask for, a line of answer each.

    When standard input ends, so does the worker, its run saved: whoever asked is gone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    requests: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, requests), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        asked = requests.get()
        error: BaseException | None = None
        try:
            _speak_into(Path(asked["folder"]))
            config = Config.model_validate(asked["config"])
            runs.distill(config, Path(asked["folder"]), resume=asked["resume"], device=asked["device"])
        except Interrupted as signalled:
            print(f"pykd: {signalled}", file=sys.stderr, flush=True)
            os._exit(128 + signalled.signum)
        except PykdError as failed:
            error = failed
            print(f"pykd: {failed}", file=sys.stderr)
        except Exception as failed:
            traceback.print_exc()
            first_line = (str(failed).splitlines() or [""])[0]
            error = PykdError(f"{asked['folder']}: {type(failed).__name__}: {first_line}; see {LOG} there")
        said = {"error": error and str(error), "usage": isinstance(error, ConfigError)}
        with suppress(BrokenPipeError):
            print(json.dumps(said), file=answers, flush=True)


def _read(lines: Iterable[str], requests: "SimpleQueue[Any]") -> None:
    for line in lines:
        requests.put(json.loads(line))
    os.kill(os.getpid(), signal.SIGTERM)


def _speak_into(folder: Path) -> None:
    """From here on what this process says goes into the folder's log."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
