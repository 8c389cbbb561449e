"""Features by name: what comes back, what stays behind, what is refused."""

import pytest
import torch
from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.nn.features import features


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.idle = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ReLU()
        self.twice, self.pair, self.in_place = nn.Tanh(), Pair(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        one, other = self.pair(self.twice(self.twice(x)))
        return self.in_place(one + other)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


INPUTS = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def test_values_come_with_their_gradients() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    output, (last, hidden) = features(network, x, ["1.1", "1.0"])
    assert output.equal(last)
    assert hidden.equal(network[0](x).tanh())
    hidden.sum().backward()
    assert network[0].weight.grad is not None
    assert network[1][1].weight.grad is None


def test_nothing_stays_behind() -> None:
    network = Block()
    before = network(INPUTS)
    for names in (["conv"], ["twice"], ["pair"], ["nothing"]):
        try:
            features(network, INPUTS, names)
        except PykdError:
            assert names != ["conv"]
        assert not any(module._forward_hooks for module in network.modules())
    assert network(INPUTS).equal(before)


def test_a_wrapped_network_is_called() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    wrapper = nn.Sequential(network, nn.Softmax(1))
    output, (hidden,) = features(wrapper, torch.ones(1, 3), ["0"], of=network)
    assert output.equal(network[1](hidden).softmax(1))


def test_a_function_is_called_with_any_inputs() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, rows: list[Tensor], target: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.linear(torch.stack(rows)) - target).square().sum()}

    network, rows = Sums(), [torch.ones(3), torch.zeros(3)]
    losses, (hidden,) = features(lambda rows: network(rows, torch.ones(4)), rows, ["linear"], of=network)
    assert losses["loss"].equal((hidden - 1).square().sum())
    with pytest.raises(PykdError, match="network is a function: give the module that it calls"):
        features(lambda rows: network(rows, torch.ones(4)), rows, ["linear"])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["covn"], "there is no module 'covn': did you mean 'conv'"),
        ([""], "there is no module ''"),
        (["conv", "relu", "conv"], "the module 'conv' is named twice"),
        (["idle"], "the module 'idle' is not called in a pass"),
        (["twice"], "the module 'twice' is called twice in a pass"),
        (["pair"], "the module 'pair' gives a tuple, not a tensor"),
    ],
)
def test_mistakes_are_told(names: list[str], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence):
        features(Block(), INPUTS, names)


def test_values_that_are_written_over_are_told() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))
    with torch.no_grad(), pytest.raises(PykdError, match="what the module '0' gives is written over by a later one"):
        features(network, INPUTS, ["0"])
    _, (maps,) = features(network, INPUTS, ["1"])
    assert (maps >= 0).all()


def test_values_without_versions() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    with torch.inference_mode():
        output, (value,) = features(network, torch.ones(1, 2), ["1"])
    assert value is output
