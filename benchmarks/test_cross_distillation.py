"""Cross distillation of VGG-16 with five images a class of CIFAR's size, half of the input channels of each layer.

`plain` is the authors' loop (`plain_steps.py`), `pykd` the same steps on the layer's quadratic, `pykd exact` its least
squares, with rounds in place of steps. Every case has its preparations in it: of a layer, what is made of its inputs;
of the network, the layers' inputs too. The authors have 3000 steps a layer; a fifth of them is run of `pykd`, a
fiftieth of `plain`, with the whole schedule, and the time counted five and fifty times, preparations included. So what
`pykd` prepares is in its column five times.

A step of `plain` over all twelve layers is 62 billion multiplications at any stage: two inputs, forwards and
backwards. The quadratic has 13 in the mean of a run, as its columns go with their channels: of the layers of 64 and
128 channels less than a hundredth, of 256 channels a 14th to a 29th; of those of 512, where the images are so few that
A is no smaller than they, a quarter to three fifths.
"""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from alternating import Call, in_turns, measure_case
from plain_steps import plain_steps
from torch import Tensor, nn

pytest.importorskip("pykd.training", reason="training needs pip install 'pykd[train]'")

from pykd.methods import CrossDistillation, cross_distillation
from pykd.models import build
from pykd.pruning.layer import Exact, Steps
from pykd.pruning.reconstruction import Reconstruction

STEPS = {"pykd": 600, "plain": 60}  # that are run, of 3000
LAYERS = {"early": "stage1.3", "middle": "stage3.4", "late": "stage5.4"}
METHOD = CrossDistillation(fine_tune="none")
NAMES = ["pykd", "pykd exact", "plain"]


@cache
def teacher() -> tuple[nn.Module, Tensor]:
    """Untrained, but with the images' statistics; and the images."""
    torch.manual_seed(0)
    network, images = build("vgg16", in_shape=(3, 32, 32), classes=10), torch.rand(50, 3, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    return network.eval(), images


@cache
def layer(name: str) -> tuple[Any, Tensor, Tensor]:
    """The layer, and its inputs in the teacher and in a student that gives nearly the same."""
    network, images = teacher()
    inputs = cross_distillation._inputs(network, name, images)
    return network.get_submodule(name), inputs, inputs + 0.1 * inputs.std() * torch.randn_like(inputs)


def of_layer(name: str, implementation: str) -> tuple[Tensor, Tensor]:
    module, taught, mine = layer(name)
    count = module.in_channels // 2
    if implementation == "plain":
        return plain_steps(module, taught, mine, count, steps=STEPS[implementation])
    problem = Reconstruction(module, METHOD.terms)
    problem.add(taught, mine)
    solver = Exact(ridge=METHOD.ridge) if implementation == "pykd exact" else Steps(STEPS[implementation])
    return solver(problem, module.weight.detach(), "in", count)


def of_network(implementation: str) -> None:
    network, images = teacher()
    method = METHOD
    if implementation in STEPS:
        method = dataclasses.replace(METHOD, solver="adam", steps=STEPS[implementation])
    trained = method.prepare(network, [network], images[:1])
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "plain":
            patch.setattr(cross_distillation, "Reconstruction", Inputs)
            patch.setattr(cross_distillation, "Steps", lambda steps, _: Inputs.steps)
        for _ in method.start(trained, [network], images, 0):
            pass


class Inputs:
    """In the place of the layer's problem: its inputs."""

    def __init__(self, module: nn.Conv2d, _: object) -> None:
        self.module = module

    def add(self, taught: Tensor, mine: Tensor) -> None:
        self.taught, self.mine = taught, mine

    def steps(self, _: Tensor, groups: str, count: int) -> tuple[Tensor, Tensor]:
        return plain_steps(self.module, self.taught, self.mine, count, steps=STEPS["plain"])


def measured(benchmark, call: Call, case: str, threads: int, name: str, block: int) -> None:
    """Once, without a round before: a call takes seconds, a minute even."""
    measure_case(benchmark, call, "cross distillation", case, threads, name, block, 1, 1, warmup=0)
    if name in STEPS:
        benchmark.extra_info["calls"] = STEPS[name] / 3000


@pytest.mark.parametrize("block, name", in_turns(NAMES, 3))
@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("threads", [1, 2])
def test_layer(benchmark, which, threads, name, block):
    torch.set_num_threads(threads)
    shape = list(layer(LAYERS[which])[1].shape)  # which is made now
    case = f"a layer of inputs {shape}, 3000 steps"
    measured(benchmark, lambda: of_layer(LAYERS[which], name), case, threads, name, block)


@pytest.mark.parametrize("block, name", in_turns(NAMES, 2))
@pytest.mark.parametrize("threads", [1, 2])
def test_network(benchmark, threads, name, block):
    torch.set_num_threads(threads)
    teacher()
    measured(benchmark, lambda: of_network(name), "VGG-16, 3000 steps a layer", threads, name, block)
