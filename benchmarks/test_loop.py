"""What the training loop adds: an epoch of pykd's loop, and of one written by hand, over the same batches.

The network, the loss, the batches, the rates, the optimiser and the teacher's kept logits are those of the student in
noisy_teacher-mnist, whose steps are the shortest of the packaged recipes; images are random, of MNIST's shape. The loop
by hand has no more than a step needs. pykd's also sums the losses, checks that they and the weights are finite, looks
for signals, measures the accuracy on the held-out rows, here one batch, and keeps the best weights. The time is what
the one thread spends, as of ``time.process_time``.
"""

from functools import lru_cache
from time import process_time

import pytest
import torch
from alternating import Call, in_turns, measure_case

pytest.importorskip("pykd.training", reason="training needs pip install 'pykd[train]'")

from accelerate import Accelerator

from pykd import config, models
from pykd.data.memory import InMemory
from pykd.methods import NoisyTeacher
from pykd.ops import logit_regression
from pykd.training import FrozenTeacher, Stage
from pykd.training.batches import Source
from pykd.training.loop import Context, Fit, Signals, learning_rate
from pykd.training.progress import Reporter
from pykd.training.teacher import TeacherLogits

NAMES = ["pykd", "by hand"]
BATCHES = [32, 128]
STEPS = 60


def fit(batch_size: int) -> Fit:
    """The student's training, when it would begin."""
    recipe = config.load("noisy_teacher-mnist", [f"student.training.batch_size={batch_size}"])
    images = torch.randint(256, (STEPS * batch_size, 1, 28, 28), dtype=torch.uint8)
    data = InMemory(images, torch.arange(len(images)) % 10, ((0.1307,), (0.3081,)))
    train, holdout = (Source.of(each, "train") for each in (data, data.subset(torch.arange(batch_size))))
    teacher, student = (
        models.build(each.name, in_shape=(1, 28, 28), classes=10, **each.arguments)
        for each in (recipe.teacher, recipe.student)
    )
    cpu = torch.device("cpu")
    run = Context(
        accelerator=Accelerator(cpu=True),
        classes=10,
        holdout=holdout,
        example=torch.zeros(1, 1, 28, 28),
        seed=0,
        reporter=Reporter(visible=False),
        signals=Signals(),
    )
    stage = Stage("student", student, method().loss, recipe.student.training, "student", train)
    return Fit(run, stage, [TeacherLogits(FrozenTeacher(teacher), train, cpu, cache_bytes=2**30)])


def method() -> NoisyTeacher:
    return NoisyTeacher(
        **{key: value for key, value in config.load("noisy_teacher-mnist", []).method.items() if key != "name"}
    )


def by_hand(fit: Fit) -> Call:
    """An epoch as one writes it."""
    training, train, network, optimizer, how = fit._training, fit._stage.train, fit._module, fit._optimizer, method()
    batches = train.batches(training.batch_size, shuffle=True)
    logits = fit._teachers[0]._compute()
    total = training.epochs * len(batches)
    seeds = torch.arange(len(batches)).unbind()

    def epoch() -> None:
        network.train()
        for step, rows in enumerate(batches.read(seed=0)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, 2 * len(batches) + step, total)
            optimizer.zero_grad()
            taught = logits.index_select(0, rows.positions)
            answers = network(train.normalized(rows.inputs))
            loss = logit_regression(answers, taught, sigma=how.sigma, alpha=how.alpha, seed=seeds[step])
            loss.backward()
            optimizer.step()

    return epoch


@lru_cache(maxsize=1)
def calls(batch_size: int) -> dict[str, Call]:
    """An epoch in the middle of the training, of either loop, warmed up."""
    ours = fit(batch_size)

    def epoch() -> None:
        ours._at.epoch, ours._at.step = 2, 0
        ours._epoch()

    found = {"pykd": epoch, "by hand": by_hand(ours)}
    for call in found.values():
        call()
    return found


@pytest.mark.benchmark(timer=process_time)
@pytest.mark.parametrize("block, name", in_turns(NAMES, 9))
@pytest.mark.parametrize("batch_size", BATCHES)
def test_loop(benchmark, batch_size, name, block):
    torch.set_num_threads(1)
    case = f"{STEPS} steps of {batch_size}"
    measure_case(benchmark, calls(batch_size)[name], "loop", case, 1, name, block, 3, 1, warmup=0)
