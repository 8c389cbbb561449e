"""What follows a layer up to its activation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.models import build
from pykd.nn.features import features
from pykd.pruning.following import activations


def test_normalisation_and_activation_of_every_layer_of_a_vgg() -> None:
    torch.manual_seed(0)
    network = build("vgg13", in_shape=(3, 8, 8), classes=4, width=0.1)
    inputs = torch.randn(5, 3, 8, 8)
    network(inputs)
    network.eval()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    found = activations(network, inputs, names)
    for name in names:
        stage, _, index = name.rpartition(".")
        _, (before, after) = features(network, inputs, [name, f"{stage}.{int(index) + 2}"])
        torch.testing.assert_close(found[name](before), after)


class Functions(nn.Module):
    """Activations as functions and methods; a sum before one; a layer whose outputs two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(3, 3) for _ in range(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        value = F.leaky_relu(self.drop(self.one(inputs)), 0.3)
        value = self.two(value).tanh()
        value = torch.relu(self.three(value) + value)
        both = self.four(value)
        return torch.relu(both) + both


def test_functions_methods_and_what_has_no_activation_of_its_own() -> None:
    found = activations(Functions(), torch.zeros(1, 3), ["one", "two", "three", "four"])
    values = torch.randn(4, 3)
    torch.testing.assert_close(found["one"](values), F.leaky_relu(values, 0.3))
    torch.testing.assert_close(found["two"](values), values.tanh())
    assert found["three"](values).equal(values) and found["four"](values).equal(values)
