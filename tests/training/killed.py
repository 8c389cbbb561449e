"""Trains a small run in one go, and again under SIGKILL at random moments; compares what is left.

``python killed.py FOLDER KILLS SEED`` prints one JSON line. Runs are forked, so that torch is imported once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import pykd
from pykd.config import Training

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
        checkpoint_seconds=0.02,
        device="cpu",
        progress=False,
    )


def forked(out: Path) -> int:
    """Starts :func:`train` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            train(out)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def position(out: Path) -> tuple[str, int, int] | None:
    """Stage, epoch and step of the newest checkpoint."""
    folders = sorted(
        (path for path in (out / "checkpoints").glob("*") if path.name.isdigit()), key=lambda p: int(p.name)
    )
    if not folders:
        return None
    at = json.loads((folders[-1] / "position.json").read_text())["position"]
    return at["stage"], at["epoch"], at["step"]


def cpu_seconds(child: int) -> float:
    """What a process has used so far: other work on the machine does not count."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(folder: Path, kills: int, seed: int) -> None:
    """See the module."""
    train(folder / "first", 40)  # imports everything and makes what a fork then need not
    child = forked(folder / "whole")
    while position(folder / "whole") is None:
        time.sleep(0.005)
    start = cpu_seconds(child)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    work = usage.ru_utime + usage.ru_stime - start
    draw = random.Random(seed)
    out = folder / "killed"
    positions = []
    for _ in range(kills):
        child = forked(out)
        end = start + draw.uniform(0, 1.6 * work / kills)  # starting again takes a third of it and more
        while cpu_seconds(child) < end:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit("the run ended before it was killed")
        positions.append(position(out))
    assert os.waitpid(forked(out), 0)[1] == 0
    print(json.dumps({"positions": positions, "start": start, "work": work}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
