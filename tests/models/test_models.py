"""The networks by name: shapes, sizes, and what they refuse."""

import pytest
import torch
from torch import nn

from pykd import models


@pytest.mark.parametrize(
    ("name", "arguments", "in_shape", "parameters"),
    [
        ("mlp", {"widths": [800, 800]}, (1, 28, 28), 785 * 800 + 801 * 800 + 801 * 10),
        ("mlp", {"widths": []}, (3, 4, 5), 61 * 10),
        ("mlp", {"widths": (7,)}, (1, 8, 8), 65 * 7 + 8 * 10),
        ("lenet5", {}, (1, 28, 28), 61706),
        ("lenet5", {}, (1, 32, 32), 61706),
        ("lenet5", {}, (3, 32, 32), 62006),
        ("lenet5", {}, (1, 12, 12), 61706 - 24 * 16 * 120),
    ],
)
def test_shapes_and_sizes(name, arguments, in_shape, parameters):
    network = models.build(name, in_shape=in_shape, classes=10, **arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network(torch.zeros(2, *in_shape)).shape == (2, 10)


def test_mlp_is_affine_layers_and_relu():
    network = models.build("mlp", in_shape=(1, 2, 2), classes=3, widths=[5])
    images = torch.randn(4, 1, 2, 2)
    first, last = (layer for layer in network if isinstance(layer, nn.Linear))
    assert network(images).equal(last(first(images.flatten(1)).clamp(min=0)))


def test_lenet5_pads_small_images_as_mnist_was():
    small = models.build("lenet5", in_shape=(1, 28, 28), classes=10)
    large = models.build("lenet5", in_shape=(1, 32, 32), classes=10)
    large.load_state_dict(small.state_dict())
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(small(images), large(nn.functional.pad(images, (2, 2, 2, 2))))


@pytest.mark.parametrize("side", [1, 8, 11])
def test_lenet5_says_when_images_are_too_small(side):
    with pytest.raises(ValueError, match=f"at least 12x12 pixels, got {side}x28"):
        models.build("lenet5", in_shape=(1, side, 28), classes=10)


@pytest.mark.parametrize("widths", [3, "34", None, [0], [-1], [1.5], [True], ["a"]])
def test_mlp_refuses_widths_that_are_none(widths):
    with pytest.raises(ValueError, match="positive integers"):
        models.build("mlp", in_shape=(1, 8, 8), classes=10, widths=widths)


def test_unknown_names_and_arguments():
    with pytest.raises(ValueError, match="unknown network 'resnet'; known are lenet5, mlp"):
        models.build("resnet", in_shape=(1, 8, 8), classes=10)
    with pytest.raises(TypeError, match="width"):
        models.build("mlp", in_shape=(1, 8, 8), classes=10, width=[3])
