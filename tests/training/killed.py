"""Trains a small run in one go, and again with kills at random moments.

``python killed.py FOLDER KILLS SEED`` prints one JSON line. Runs are forked, so that torch is imported once. A run is
killed a random time of milliseconds after a random number of steps: on a loaded machine it then comes as far as on an
idle one, and not to its end.
"""

import json
import os
import random
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import pykd
from pykd.config import Training
from pykd.training.loop import Fit

torch.set_num_threads(1)


class Rows(Dataset):
    """Two classes of noisy points; the samples carry their index."""

    def __init__(self, rows: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(rows) % 2
        self.inputs = torch.randn(rows, 6, generator=draw) + self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.inputs[index], self.labels[index], index


def network(width: int) -> nn.Module:
    """Has everything that a checkpoint must hold: weights, buffers, and dropout's random numbers."""
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 2))


def train(out: Path, rows: int = 800) -> None:
    """The run, from wherever ``out`` stands."""
    pykd.distill(
        pykd.methods.NoisyTeacher(),
        teacher=[lambda: network(32), lambda: network(16)],
        student=lambda: network(8),
        train=Rows(rows, 0),
        test=Rows(200, 1),
        teacher_training=Training(epochs=4, batch_size=10),
        training=Training(epochs=4, batch_size=10, optimizer="sgd", lr=0.01),
        out=out,
        resume=True,
        checkpoint_seconds=0.005,
        device="cpu",
        progress=False,
    )


def forked(out: Path, steps: int = 0, seconds: float = 0.0) -> int:
    """Runs :func:`train` in a process of its own, which is killed ``seconds`` after so many ``steps``.

    Returns:
        How it ended, as ``os.waitpid`` says it.
    """
    child = os.fork()
    if child == 0:
        try:
            if steps:
                kill_after(steps, seconds)
            train(out)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_after(steps: int, seconds: float) -> None:
    """Has the kernel end this process, by SIGALRM, for which nothing runs either: the clock sends no SIGKILL."""
    real, done = Fit._after_step, count(1)

    def after_step(fit: Fit) -> None:
        if next(done) == steps:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        real(fit)

    Fit._after_step = after_step  # type: ignore[method-assign]


def position(out: Path) -> tuple[str, int, int] | None:
    """Stage, epoch and step of the newest checkpoint."""
    folders = sorted(
        (path for path in (out / "checkpoints").glob("*") if path.name.isdigit()), key=lambda p: int(p.name)
    )
    if not folders:
        return None
    at = json.loads((folders[-1] / "position.json").read_text())["position"]
    return at["stage"], at["epoch"], at["step"]


def main(folder: Path, kills: int, seed: int) -> None:
    """See the module."""
    train(folder / "first", 40)  # imports everything and makes what a fork then need not
    assert forked(folder / "whole") == 0
    epochs = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    steps = len(epochs) * int(json.loads(epochs[0])["step"])
    draw = random.Random(seed)
    out = folder / "killed"
    positions = []
    for _ in range(kills):
        ended = forked(out, draw.randint(1, int(1.3 * steps / kills)), draw.uniform(1e-6, 0.004))
        if ended != signal.SIGALRM:
            raise SystemExit(f"the run ended with {ended} before it was killed")
        positions.append(position(out))
    assert forked(out) == 0
    print(json.dumps({"positions": positions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
