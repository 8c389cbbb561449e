"""The networks by name: shapes, sizes, and what they refuse."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from pykd import models


def vgg_parameters(widths):
    """Of colour images of 32x32 in ten classes: the weights, two parameters a normalised channel, the last biases."""
    a, b, c, d = widths
    kernels = 3 * a + a * a + a * b + b * b + b * c + 2 * c * c + c * d + 5 * d * d
    return 9 * kernels + d * d + 2 * (2 * a + 2 * b + 3 * c + 7 * d) + (d + 1) * 10


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
        ("nin", {}, (3, 32, 32), 14592 + 30880 + 15456 + 460992 + 2 * 37056 + 331968 + 37056 + 1930),
        ("nin", {"dropout": 0.0}, (1, 28, 28), 966986 - 2 * 25 * 192),
        ("nin", {}, (2, 6, 7), 966986 - 25 * 192),
        ("shallow_cnn", {}, (3, 32, 32), 4864 + 204928 + 3201 * 1024 + 10250),
        ("shallow_cnn", {"dropout": 0.5}, (1, 28, 28), 64 * 26 + 204928 + (128 * 16 + 1) * 1024 + 10250),
        ("shallow_cnn", {}, (3, 16, 16), 4864 + 204928 + 129 * 1024 + 10250),
        ("modified_lenet", {}, (3, 32, 32), 6 * 76 + 16 * 151 + 1025 * 1024 + 10250),
        ("modified_lenet", {"dropout": 0.25}, (1, 28, 28), 6 * 26 + 16 * 151 + (16 * 49 + 1) * 1024 + 10250),
        ("modified_lenet", {}, (3, 4, 5), 6 * 76 + 16 * 151 + 17 * 1024 + 10250),
        ("lenet300100", {}, (1, 28, 28), 785 * 300 + 301 * 100 + 101 * 10),
        ("lenet300100", {"dropout": 0.5}, (1, 8, 8), 65 * 300 + 301 * 100 + 101 * 10),
        ("lenet5_caffe", {}, (1, 28, 28), 26 * 20 + 501 * 50 + 801 * 500 + 501 * 10),
        ("lenet5_caffe", {}, (3, 32, 32), 76 * 20 + 501 * 50 + 1251 * 500 + 501 * 10),
        ("lenet5_caffe", {}, (1, 16, 17), 26 * 20 + 501 * 50 + 51 * 500 + 501 * 10),
        ("vgg", {}, (3, 32, 32), vgg_parameters([64, 128, 256, 512])),
        ("vgg", {"width": 0.125}, (3, 64, 40), vgg_parameters([8, 16, 32, 64]) + 64 * 64),
        ("resnet20", {}, (3, 32, 32), 269722 + 2752),
        ("resnet20", {"dropout": 0.5}, (1, 5, 1), 269722 + 2752 - 18 * 16),
        ("resnet32", {}, (3, 32, 32), 464154 + 2752),
        ("resnet44", {}, (3, 32, 32), 658586 + 2752),
        ("resnet56", {}, (3, 32, 32), 853018 + 2752),
        ("resnet110", {}, (3, 32, 32), 1727962 + 2752),
        ("resnet", {"depth": 8}, (3, 32, 32), 75290 + 2752),
        ("wrn", {"depth": 16, "width": 2}, (3, 32, 32), 703284 - 90 * 129),
        ("wrn", {"depth": 40, "width": 2}, (3, 32, 32), 2255156 - 90 * 129),
        ("wrn", {"depth": 10, "width": 1, "dropout": 0.3}, (1, 8, 8), 77850 - 18 * 16),
        ("vgg13", {}, (3, 32, 32), 9413066),
        ("vgg13", {"dropout": 0.5}, (1, 8, 8), 9413066 - 18 * 64),
        ("vgg16", {}, (3, 32, 32), 14724042),
        (
            "vgg13",
            {"width": 0.25},
            (1, 28, 28),
            9 * (16 + 16**2 + 16 * 32 + 32**2 + 32 * 64 + 64**2 + 64 * 128 + 3 * 128**2) + 4 * 368 + 129 * 10,
        ),
        ("vgg16", {"width": 1e-9}, (3, 32, 32), 9 * (3 + 12) + 2 * 13 + 20),
        ("resnet18", {}, (3, 224, 224), 11689512 - 990 * 513),
        ("resnet18", {"dropout": 0.5}, (1, 28, 28), 11689512 - 990 * 513 - (49 * 3 - 9) * 64),
        ("resnet50", {}, (3, 32, 32), 25557032 - 990 * 2049 - (49 - 9) * 3 * 64),
        ("vgg", {"width": 1e-9, "dropout": 0.5}, (3, 32, 32), vgg_parameters([1, 1, 1, 1])),
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


def test_nin_begins_as_small_normal_numbers():
    torch.manual_seed(0)
    for name, value in models.NIN(in_shape=(3, 32, 32), classes=10).named_parameters():
        if name.endswith("bias"):
            assert not value.any()
        else:
            bound = 5 / value.numel() ** 0.5
            assert abs(value.mean() / 0.05) < bound
            assert abs(value.std() / 0.05 - 1) < bound


def test_nin_is_the_mean_over_the_places_of_its_last_maps():
    network = models.NIN(in_shape=(3, 32, 32), classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = nn.Sequential(*list(network)[:-2])(images)
    assert maps.shape == (2, 4, 8, 8)
    torch.testing.assert_close(network(images), maps.mean((2, 3)))


def test_shallow_networks_are_their_formulas():
    images = torch.randn(2, 3, 32, 32)

    def convolutions(network, activation, padding):
        maps = images
        for layer in (layer for layer in network if isinstance(layer, nn.Conv2d)):
            maps = F.max_pool2d(activation(F.conv2d(maps, layer.weight, layer.bias, padding=padding)), 2)
        hidden, last = (layer for layer in network if isinstance(layer, nn.Linear))
        return last(activation(hidden(maps.flatten(1))))

    for name, activation, padding in (("shallow_cnn", torch.relu, 0), ("modified_lenet", torch.tanh, 2)):
        network = models.build(name, in_shape=(3, 32, 32), classes=10, dropout=0.5).eval()
        torch.testing.assert_close(network(images), convolutions(network, activation, padding))


# Of networks that differ in their depth alone the smallest ones.
DIFFERENT = [
    name
    for name in models.NETWORKS
    if name not in {"resnet", "vgg16", *(f"resnet{depth}" for depth in (32, 34, 44, 56, 101, 110, 152))}
]


@pytest.mark.parametrize(("name", "share"), [(name, share) for name in DIFFERENT for share in (0.0, 0.5)])
def test_dropout_acts_in_training_alone(name, share):
    torch.manual_seed(0)
    network = models.build(name, in_shape=(3, 32, 32), classes=10, dropout=share)
    images = torch.randn(2, 3, 32, 32)
    assert network.train()(images).equal(network(images)) == (share == 0)
    assert network.eval()(images).equal(network(images))
    plain = models.build(name, in_shape=(3, 32, 32), classes=10, dropout=0.0)
    plain.load_state_dict(network.state_dict())
    assert plain.eval()(images).equal(network(images))


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), "0.5", None, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_dropout_is_a_share(name, share):
    with pytest.raises(ValueError, match=r"dropout should be a number in \[0, 1\), got"):
        models.build(name, in_shape=(3, 32, 32), classes=10, dropout=share)


@pytest.mark.parametrize(
    ("name", "side"), [("nin", 6), ("shallow_cnn", 16), ("modified_lenet", 4), ("lenet5_caffe", 16)]
)
def test_networks_say_when_images_are_too_small(name, side):
    network = models.build(name, in_shape=(1, side, side), classes=3)
    assert network(torch.zeros(2, 1, side, side)).shape == (2, 3)
    with pytest.raises(ValueError, match=f"{name} needs images of at least {side}x{side} pixels, got {side - 1}x40"):
        models.build(name, in_shape=(1, side - 1, 40), classes=3)


def test_lenet5_caffe_has_one_relu():
    network = models.build("lenet5_caffe", in_shape=(1, 28, 28), classes=10)
    images = torch.randn(2, 1, 28, 28)
    first, second, hidden, last = (layer for layer in network if hasattr(layer, "weight"))
    maps = F.max_pool2d(second(F.max_pool2d(first(images), 2)), 2)
    torch.testing.assert_close(network(images), last(hidden(maps.flatten(1)).relu()))


def test_vgg_is_normalised_layers_in_five_stages():
    torch.manual_seed(0)
    network = models.build("vgg", in_shape=(3, 32, 32), classes=10, width=0.125).eval()
    norms = [layer for layer in network if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        assert norm.eps == 1e-3
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    maps = images = torch.randn(2, 3, 32, 32)
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    for number, (layer, norm) in enumerate(zip(convolutions, norms, strict=False), 1):
        maps = norm(F.conv2d(maps, layer.weight, padding=1)).relu()
        if number in (2, 4, 7, 10, 13):
            maps = F.max_pool2d(maps, 2)
    hidden, last = (layer for layer in network if isinstance(layer, nn.Linear))
    torch.testing.assert_close(network(images), last(norms[-1](hidden(maps.flatten(1))).relu()))


def test_vgg_begins_as_he_et_al():
    torch.manual_seed(0)
    for layer in models.VGG(in_shape=(3, 32, 32), classes=10, width=0.5):
        if isinstance(layer, nn.Conv2d):
            bound = 5 / layer.weight.numel() ** 0.5
            scale = (2 / layer.weight[0].numel()) ** 0.5
            assert abs(layer.weight.mean() / scale) < bound
            assert abs(layer.weight.std() / scale - 1) < bound


def test_resnet20_is_three_stages_of_residual_blocks():
    torch.manual_seed(0)
    network = models.build("resnet20", in_shape=(3, 32, 32), classes=10).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
    values = iter(network.state_dict().values())

    def normalised(maps, stride=1):
        kernel, weight, bias, mean, variance, _ = (next(values) for _ in range(6))
        maps = F.conv2d(maps, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return F.batch_norm(maps, mean, variance, weight, bias)

    images = torch.randn(2, 3, 32, 32)
    maps = normalised(images).relu()
    for stride in (1, 1, 1, 2, 1, 1, 2, 1, 1):
        residual = normalised(normalised(maps, stride).relu())
        maps = (residual + (maps if stride == 1 else normalised(maps, stride))).relu()
    assert maps.shape == (2, 64, 8, 8)
    torch.testing.assert_close(network(images), F.linear(maps.mean((2, 3)), *values))


def test_wide_residual_blocks_are_normalised_first():
    torch.manual_seed(0)
    network = models.build("wrn", in_shape=(3, 8, 8), classes=4, depth=10, width=2).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()

    def active(maps, norm):
        return F.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    images = torch.randn(2, 3, 8, 8)
    maps = F.conv2d(images, network.stem.weight, padding=1)
    for stage, stride in ((network.stage1, 1), (network.stage2, 2), (network.stage3, 2)):
        (block,) = stage
        before = active(maps, block.first[0])
        first, norm, *_, second = block.residual
        residual = F.conv2d(before, first.weight, stride=stride, padding=1)
        maps = F.conv2d(active(residual, norm), second.weight, padding=1)
        maps = maps + F.conv2d(before, block.shortcut.weight, stride=stride)
    head = network.head
    expected = head[-1](active(maps, head[0]).mean((2, 3)))
    torch.testing.assert_close(network(images), expected)


def test_imagenet_networks_are_torchvisions():
    network = models.build("resnet18", in_shape=(3, 64, 64), classes=1000)
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert network.eval()(images).equal(theirs.eval()(images))
    small = models.build("resnet18", in_shape=(1, 28, 28), classes=10)
    assert small.layer1(small.relu(small.bn1(small.conv1(torch.zeros(1, 1, 28, 28))))).shape == (1, 64, 28, 28)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("resnet", {"depth": 21}, r"depth should be 6 n \+ 2 with n >= 1, such as 20, got 21"),
        ("wrn", {"depth": 16.0}, r"depth should be 6 n \+ 4 with n >= 1, such as 16, got 16.0"),
        ("wrn", {"width": 0}, "width should be a positive integer, got 0"),
    ],
)
def test_depths_and_widths_that_cannot_be(name, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.build(name, in_shape=(3, 32, 32), classes=10, **arguments)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), "1", None, True])
@pytest.mark.parametrize("name", ["vgg", "vgg13"])
def test_vgg_says_what_width_is(name, width):
    with pytest.raises(ValueError, match="width should be a positive number, got"):
        models.build(name, in_shape=(3, 32, 32), classes=10, width=width)


def test_vgg_says_when_images_are_too_small():
    with pytest.raises(ValueError, match="vgg needs images of at least 32x32 pixels, got 28x40"):
        models.build("vgg", in_shape=(3, 28, 40), classes=10)


@pytest.mark.parametrize("widths", [3, "34", None, [0], [-1], [1.5], [True], ["a"]])
def test_mlp_refuses_widths_that_are_none(widths):
    with pytest.raises(ValueError, match="positive integers"):
        models.build("mlp", in_shape=(1, 8, 8), classes=10, widths=widths)


def test_unknown_names_and_arguments():
    with pytest.raises(
        ValueError,
        match="unknown network 'resent'; known are lenet300100, lenet5, lenet5_caffe, mlp, modified_lenet, nin, "
        "resnet, resnet20, resnet32",
    ):
        models.build("resent", in_shape=(1, 8, 8), classes=10)
    with pytest.raises(TypeError, match="width"):
        models.build("mlp", in_shape=(1, 8, 8), classes=10, width=[3])
