"""An epoch of the student in each packaged recipe: with pykd's ops, and with plain torch in their place.

An epoch is all that the recipe does between two of them: batches, augmentation, the teacher's logits where they are not
kept, the step, the accuracy on the held-out rows. It stands in the middle of the recipe's training, when every term of
the loss is there, and is the same one in every turn. Teachers are as they begin, and images random, of the data set's
shape: the time does not depend on what they hold; there are 6,400 of them, so that a turn is short. The digits are the
real ones. What comes before the epochs is left out. On a CPU the time is what the one thread spends, as of
``time.process_time``: other work on the machine does not count.

`plain torch` is ``plain_ops.py``: the same recipe with the functions that one writes first. An epoch of it must not
reach one of pykd's operators.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from time import process_time
from types import ModuleType
from typing import Any

import pytest
import torch
from alternating import in_turns, measure_case

pytest.importorskip("pykd.training", reason="training needs pip install 'pykd[train]'")

import plain_ops
from torch.utils._python_dispatch import TorchDispatchMode

import pykd.data
from pykd import config, runs
from pykd.data.memory import InMemory
from pykd.training.loop import Fit

SETS = {"mnist": (1, 28, 28), "svhn": (3, 32, 32), "cifar": (3, 32, 32)}  # by the shape of an image
IMAGES = 6_400
WARM_UP = 5  # steps
NAMES = ["pykd", "plain torch"]
RECIPES = ["noisy_teacher", "variational_student", "factor_transfer", "cross_distillation"]
ON_CPU = [f"{name}-{data}" for name in RECIPES for data in ("digits", "mnist")]
ON_CPU += ["sparse_vd-mnist", "cross_distillation-mnist_vgg"]
# An epoch of cross_distillation-cifar10 has labels alone, and imagefolder's differs from CIFAR's by its files alone.
FOR_A_GPU = ["noisy_teacher-cifar10", "noisy_teacher-svhn", "variational_student-cifar10"]
FOR_A_GPU += ["factor_transfer-cifar10", "factor_transfer-cifar100"]


class Reached(Exception):  # noqa: N818  # it is no error
    """The student's training would begin."""


class Called(TorchDispatchMode):
    """Notes pykd's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pykd":
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def random_images(shape: tuple[int, ...]) -> Callable[..., tuple[InMemory, InMemory, tuple[str, ...]]]:
    """What reads a data set."""
    normalize = (0.5,) * shape[0], (0.25,) * shape[0]

    def read(_: object, classes: int = 10, **__: object) -> tuple[InMemory, InMemory, tuple[str, ...]]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (IMAGES, *shape), dtype=torch.uint8, generator=generator)
        part = InMemory(images, torch.arange(IMAGES) % classes, normalize)
        return part, part, tuple(map(str, range(classes)))

    return read


def replaced(name: str) -> Any:
    return plain_ops.in_place_of_pykd() if name == "plain torch" else nullcontext()


@lru_cache(maxsize=len(NAMES))
def student(recipe: str, device: str, name: str) -> Fit:
    """The student's training, warmed up, when it would begin."""

    def run(fit: Fit) -> None:
        if fit._stage.name == "student":
            raise Reached(fit)

    with pytest.MonkeyPatch.context() as patch:
        for data, shape in SETS.items():
            module: ModuleType = getattr(pykd.data, data)
            patch.setattr(module, "read", random_images(shape))
        patch.setattr(Fit, "run", run)
        try:
            runs.distill(config.load(recipe, []), None, resume=False, device=device)
        except Reached as reached:
            fit: Fit = reached.args[0]
    begin(fit, max(0, fit._steps - WARM_UP))
    with replaced(name), Called() as called:
        fit._epoch()
    assert bool(called.names) == (name == "pykd"), f"{name} calls {called.names or 'no op of pykd'}"
    return fit


def begin(fit: Fit, step: int = 0) -> None:
    """The epoch in the middle, from a step on."""
    fit._at.epoch, fit._at.step = fit._epochs // 2, step


def measure(benchmark, recipe: str, device: str, title: str, name: str, block: int) -> None:
    fit = student(recipe, device, name)
    case = f"{recipe}, {fit._steps} steps of {min(fit._training.batch_size, fit._stage.train.rows)}"
    rounds = max(1, min(25, 50 // fit._steps))
    with replaced(name):
        measure_case(benchmark, fit._epoch, "epoch", case, 1, name, block, rounds, 1, lambda: begin(fit), 0, title)


@pytest.mark.benchmark(timer=process_time)
@pytest.mark.parametrize("block, name", in_turns(NAMES, 5))
@pytest.mark.parametrize("recipe", ON_CPU)
def test_epoch(benchmark, recipe, name, block):
    torch.set_num_threads(1)
    measure(benchmark, recipe, "cpu", "cpu", name, block)


@pytest.mark.gpu
@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("recipe", ON_CPU + FOR_A_GPU)
def test_epoch_on_gpu(benchmark, recipe, name, block):
    measure(benchmark, recipe, "cuda", torch.cuda.get_device_name(), name, block)
