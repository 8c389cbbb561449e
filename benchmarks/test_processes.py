"""What a second process brings: LeNet-5 trained by one process on one core, and by two on two, 128 rows a step each.

An epoch is that of pykd's loop over images in memory, random ones of MNIST's shape, with the accuracy on held-out rows,
here one batch. Both train on as many rows: two processes take half the steps, of batches twice as large, and add up
gradients by gloo. The time is that of a clock: what stands beside the processes on the machine counts.

``python test_processes.py CORE`` is one of the processes: it trains an epoch for each line on standard input.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from alternating import Call, in_turns, measure_case

NAMES = ["pykd", "one process"]
ROWS, BATCH = 15_360, 128


def train(core: int) -> None:
    """See the module."""
    os.sched_setaffinity(0, {core})
    import torch

    from pykd import models
    from pykd.config import Training
    from pykd.data.memory import InMemory
    from pykd.training import Stage, label_loss
    from pykd.training.batches import Source
    from pykd.training.loop import Context, Fit, Signals
    from pykd.training.processes import accelerator_for
    from pykd.training.progress import Reporter

    torch.set_num_threads(1)
    accelerator = accelerator_for("cpu")
    images = torch.randint(256, (ROWS, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = InMemory(images, torch.arange(ROWS) % 10, ((0.1307,), (0.3081,)))
    run = Context(
        accelerator=accelerator,
        classes=10,
        holdout=Source.of(data.subset(torch.arange(BATCH)), "holdout"),
        example=torch.zeros(1, 1, 28, 28),
        seed=0,
        reporter=Reporter(visible=False),
        signals=Signals(),
    )
    training = Training(epochs=10**6, batch_size=BATCH * accelerator.num_processes)
    network = models.build("lenet5", in_shape=(1, 28, 28), classes=10)
    fit = Fit(run, Stage("teacher", network, label_loss, training, "teacher", Source.of(data, "train")), [])
    print("ready", flush=True)
    for _ in sys.stdin:
        fit._epoch()
        print("done", flush=True)


class Together:
    """Processes that train together, each on a core of its own."""

    def __init__(self, cores: list[int]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(len(cores)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._each = [
            subprocess.Popen(
                [sys.executable, __file__, str(core)],
                env=os.environ
                | {"OMP_NUM_THREADS": "1"}
                | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(cores) > 1 else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, core in enumerate(cores)
        ]
        self._wait("ready")

    def _wait(self, word: str) -> None:
        assert [each.stdout.readline().strip() for each in self._each] == [word] * len(self._each)

    def epoch(self) -> None:
        for each in self._each:
            print(file=each.stdin, flush=True)
        self._wait("done")

    def end(self) -> None:
        for each in self._each:
            each.kill()
            each.wait()


@pytest.fixture(scope="module")
def calls() -> Iterator[dict[str, Call]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    two, one = Together(cores[:2]), Together(cores[:1])
    yield {"pykd": two.epoch, "one process": one.epoch}
    two.end()
    one.end()


@pytest.mark.parametrize("block, name", in_turns(NAMES, 9))
def test_two_processes(benchmark, calls, name, block):
    case = f"LeNet-5, {ROWS:,} rows"
    measure_case(benchmark, calls[name], f"two processes of {BATCH} rows", case, 1, name, block, 1, 1)


if __name__ == "__main__":
    train(int(sys.argv[1]))
