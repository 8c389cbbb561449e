"""Variational layers: eval mode is the masked means, networks are turned into them and back, noise is keyed by row."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd import reference
from pykd.errors import PykdError
from pykd.nn import (
    GroupVariationalConv2d,
    GroupVariationalLinear,
    VariationalConv2d,
    VariationalLinear,
    kl,
    plain,
    set_noise,
    variational,
    variational_layers,
)
from pykd.nn.group_variational import GROUPED

IMAGES = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 3),
    "linear, no bias": lambda: nn.Linear(8, 3, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv, groups": lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2, bias=False),
    "conv, same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same"),
    "conv, valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
}
KINDS = [None, GROUPED]


def network() -> nn.Sequential:
    """All kinds of layers, one of them used twice."""
    torch.manual_seed(1)
    shared = nn.Linear(12, 12)
    return nn.Sequential(
        nn.Conv2d(4, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 12), shared, nn.ReLU()),
        shared,
        nn.Linear(12, 2, bias=False),
    )


def noisy_copy(of: nn.Module, kinds: dict | None = None) -> nn.Module:
    """A variational copy, in which about half of the weights or groups are above the threshold."""
    copied = variational(of, kinds=kinds)
    draw = torch.Generator().manual_seed(2)
    for layer in variational_layers(copied).values():
        mean, log_variance = layer.log_uniform
        wanted = 3 + torch.randn(mean.shape, generator=draw)
        log_variance.data.copy_(wanted + 2 * mean.detach().abs().log())
    return copied


@pytest.mark.parametrize("kinds", KINDS, ids=["weights", "groups"])
@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_is_the_plain_layer(name: str, kinds: dict | None) -> None:
    layer = LAYERS[name]()
    layer.weight.data[0, 0] = 0.0
    noisy = noisy_copy(layer, kinds).eval()
    rows = IMAGES
    assert 0 < noisy.sparsity() < 1
    back = noisy.to_plain()
    assert type(back) is type(layer)
    assert 0 < int(back.weight.count_nonzero()) < layer.weight.numel()
    torch.testing.assert_close(noisy(rows), back(rows), rtol=0, atol=0)
    torch.testing.assert_close(noisy.to_plain(math.inf)(rows), layer(rows))
    assert not back.training


@pytest.mark.parametrize("threshold", [-2.0, 3.0])
def test_mask_is_where_log_alpha_is_below_the_threshold(threshold: float) -> None:
    layer = VariationalLinear.from_plain(nn.Linear(6, 5), log_sigma2=-2.0, threshold=threshold)
    expected = -2.0 - layer.theta.detach().double().square().log() < threshold
    assert layer.mask().equal(expected)
    assert layer.sparsity() == 1 - expected.double().mean().item()
    assert torch.equal(layer.to_plain().weight, layer.theta.detach() * expected)


def test_theta_of_zero_is_pruned_whatever_its_variance() -> None:
    layer = VariationalLinear(3, 1)
    layer.theta.data.zero_()
    layer.log_sigma2.data[0] = torch.tensor([-math.inf, 0.0, 1e30])
    assert layer.log_alpha.equal(torch.full((1, 3), math.inf))
    assert layer.sparsity() == 1.0
    layer.log_sigma2.data.fill_(-8.0)
    value = kl(layer)
    value.backward()
    assert value.item() == 0.0
    assert layer.theta.grad.equal(torch.zeros(1, 3))
    assert layer.log_sigma2.grad.equal(torch.zeros(1, 3))


@pytest.mark.parametrize("kinds", KINDS, ids=["weights", "groups"])
def test_all_pruned_network_gives_finite_logits(kinds: dict | None) -> None:
    noisy = variational(network(), log_sigma2=30.0, kinds=kinds)
    assert all(layer.sparsity() == 1.0 for layer in variational_layers(noisy).values())
    assert noisy.eval()(IMAGES).isfinite().all()
    assert all(not layer.weight.any() for layer in plain(noisy).modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))


@pytest.mark.parametrize("kinds", KINDS, ids=["weights", "groups"])
def test_network_there_and_back(kinds: dict | None) -> None:
    original = network().eval()
    before = copy.deepcopy(original.state_dict())
    noisy = variational(original, kinds=kinds)
    assert noisy[3][2] is noisy[4], "a layer that is used twice stays one"
    assert len(variational_layers(noisy)) == 4
    back = plain(noisy, threshold=math.inf)
    assert back[3][2] is back[4]
    assert list(back.state_dict()) == list(before)
    for name, value in back.state_dict().items():
        assert value.equal(before[name]), name
        assert original.state_dict()[name].equal(before[name]), name
    torch.testing.assert_close(back(IMAGES), original(IMAGES), rtol=0, atol=0)
    torch.testing.assert_close(plain(noisy)(IMAGES), noisy(IMAGES), rtol=0, atol=0)


def test_state_dict_holds_the_promised_names() -> None:
    assert list(VariationalLinear(3, 2).state_dict()) == ["theta", "log_sigma2", "bias"]
    assert list(VariationalConv2d(3, 2, 3, bias=False).state_dict()) == ["theta", "log_sigma2"]


def test_constructors_draw_the_plain_layers_values() -> None:
    for make, same in (
        (lambda: VariationalLinear(5, 4), lambda: nn.Linear(5, 4)),
        (lambda: VariationalConv2d(4, 6, 3, groups=2), lambda: nn.Conv2d(4, 6, 3, groups=2)),
    ):
        torch.manual_seed(3)
        layer = make()
        torch.manual_seed(3)
        expected = same()
        assert layer.theta.equal(expected.weight)
        assert layer.bias.equal(expected.bias)
        assert (layer.log_sigma2 == -10).all()


def test_skipped_and_frozen_layers() -> None:
    original = network()
    original[5].weight.requires_grad_(False)
    noisy = variational(original, skip=["0", "3.1"])
    assert type(noisy[0]) is nn.Conv2d
    assert type(noisy[3][1]) is nn.Linear
    assert not noisy[5].theta.requires_grad
    assert not noisy[5].log_sigma2.requires_grad
    assert not plain(noisy)[5].weight.requires_grad


def tied_to_embedding() -> nn.Sequential:
    network = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


def tied() -> nn.Module:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    return nn.Sequential(one, other)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: variational(nn.Sequential(nn.ConvTranspose2d(3, 2, 3))),
            "layer '0' is a ConvTranspose2d, .*: skip it",
        ),
        (lambda: variational(nn.Conv1d(3, 2, 3)), "the network is a Conv1d, which has no variational form: skip it"),
        (lambda: variational(nn.Sequential(nn.Conv2d(3, 2, 3, padding_mode="reflect"))), "'0' pads by reflect"),
        (lambda: variational(network(), skip=["7"]), "the network has no layer '7' to skip; it has 0, 1, 2"),
        (lambda: variational(tied()), "layers '0' and '1' share a weight"),
        (lambda: variational(tied(), skip=["0"]), "layers '0' and '1' share a weight"),
        (lambda: variational(tied_to_embedding()), "layers '0' and '1' share a weight"),
        (lambda: VariationalConv2d(3, 2, 3, padding_mode="circular"), "pads with zeros, not circular"),
        (lambda: VariationalConv2d(3, 2, 4, padding="same"), r"padding='same' of the kernel \(4, 4\) differs"),
    ],
)
def test_what_has_no_variational_form_is_named(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(PykdError, match=sentence):
        make()


def test_skip_lets_other_layers_through() -> None:
    noisy = variational(nn.Sequential(nn.Conv2d(3, 2, 3, padding_mode="reflect"), nn.Conv2d(2, 2, 1)), skip=["0"])
    assert list(variational_layers(noisy)) == ["1"]


@pytest.mark.parametrize("kinds", KINDS, ids=["weights", "groups"])
def test_noise_of_a_row_depends_on_its_number_alone(kinds: dict | None) -> None:
    noisy = noisy_copy(nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 7)), kinds).train()
    seed = torch.tensor(9)

    def forward(rows: slice) -> Tensor:
        set_noise(noisy, seed, rows.start)
        return noisy(IMAGES[rows]).detach()

    whole = forward(slice(0, 5))
    torch.testing.assert_close(torch.cat([forward(slice(0, 2)), forward(slice(2, 5))]), whole)
    set_noise(noisy, seed + 1)
    assert not torch.allclose(noisy(IMAGES), whole)
    set_noise(noisy, None)
    torch.manual_seed(1)
    one = noisy(IMAGES)
    assert not torch.allclose(noisy(IMAGES), one)
    torch.manual_seed(1)
    assert noisy(IMAGES).equal(one)


def test_every_layer_draws_noise_of_its_own() -> None:
    layer = VariationalLinear(4, 4)
    layer.theta.data.zero_()
    layer.bias.data.zero_()
    both = nn.Sequential(layer, copy.deepcopy(layer))
    set_noise(both, torch.tensor(5))
    rows = torch.ones(3, 4)
    assert not torch.allclose(both[0](rows), both[1](rows))


def test_forward_is_the_op() -> None:
    linear, conv = VariationalLinear(8, 3), VariationalConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    seed = torch.tensor(4)
    set_noise(nn.ModuleList([linear]), seed, 3)
    set_noise(nn.ModuleList([conv]), seed, 3)
    expected = reference.variational_linear(
        IMAGES[:, 0, 0], linear.theta, linear.log_sigma2, linear.bias, seed=seed, row_offset=3
    )
    torch.testing.assert_close(linear(IMAGES[:, 0, 0]), expected)
    expected = reference.variational_conv2d(
        IMAGES, conv.theta, conv.log_sigma2, conv.bias, 2, 1, 1, 2, seed=seed, row_offset=3
    )
    torch.testing.assert_close(conv(IMAGES), expected)


def test_kl_sums_over_the_network() -> None:
    noisy = noisy_copy(network())
    layers = variational_layers(noisy).values()
    expected = sum(reference.variational_kl(layer.theta, layer.log_sigma2) for layer in layers)
    torch.testing.assert_close(kl(noisy), expected)
    assert kl(nn.Linear(3, 2)).item() == 0.0


def test_kl_of_groups_is_the_papers() -> None:
    layer = GroupVariationalLinear(4, 3, log_sigma2=-1.5)
    layer.scale.data.copy_(torch.tensor([1.0, -0.5, 0.1, 2.0]))
    sigma2, theta = layer.log_sigma2.double().exp(), layer.theta.double()
    posterior = torch.distributions.Normal(theta, sigma2.sqrt())
    weights = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    scales = reference.variational_kl(layer.scale.double(), layer.scale_log_sigma2.double())
    torch.testing.assert_close(kl(layer), (weights + scales).float())


@pytest.mark.parametrize("kind", [GroupVariationalLinear, GroupVariationalConv2d])
def test_group_layers_have_the_mean_and_variance_of_the_model(kind: type[nn.Module]) -> None:
    draw = torch.Generator().manual_seed(6)
    rows = 40_000
    if kind is GroupVariationalLinear:
        layer = kind(3, 2, log_sigma2=-2.0)
        x = torch.randn(3, generator=draw)
        inputs = x.expand(rows, 3)
    else:
        layer = kind(3, 2, 1, log_sigma2=-2.0)
        x = torch.randn(3, generator=draw)
        inputs = x.view(1, 3, 1, 1).expand(rows, 3, 1, 1)
    layer.scale.data.copy_(1 + 0.3 * torch.randn(layer.scale.shape, generator=draw))
    set_noise(layer, torch.tensor(3))
    outputs = layer(inputs).detach().flatten(1).double()
    theta, sigma2 = layer.theta.detach().flatten(1).double(), layer.log_sigma2.detach().flatten(1).double().exp()
    mu, varsigma2 = layer.scale.detach().double(), layer.scale_log_sigma2.detach().double().exp()
    x, bias = x.double(), layer.bias.detach().double()
    if kind is GroupVariationalLinear:
        mean = theta @ (mu * x) + bias
        variance = ((mu**2 + varsigma2) * sigma2 + varsigma2 * theta**2) @ x**2
    else:
        inner, spread = theta @ x + bias, sigma2 @ x**2
        mean, variance = mu * inner, (mu**2 + varsigma2) * spread + varsigma2 * inner**2
    torch.testing.assert_close(outputs.mean(0), mean, atol=5 * float((variance / rows).sqrt().max()), rtol=0)
    torch.testing.assert_close(outputs.var(0), variance, atol=0, rtol=0.06)


def test_half_precision_is_trained_under_autocast() -> None:
    noisy = variational(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(noisy(IMAGES[:, 0, 0]), torch.tensor([0, 1, 0, 1, 0])) + kl(noisy)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in noisy.parameters())
