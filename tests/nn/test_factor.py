"""Paraphraser and translator: the authors' layers, options, sizes that cannot be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pykd.nn.factor import Paraphraser, Translator

MAPS = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))


def encoded(maps, state, kind):
    for number in (1, 2, 3):
        weight, bias = (state[f"conv{number}.{name}"] for name in ("weight", "bias"))
        maps = F.leaky_relu(kind(maps, weight, bias, padding=1), 0.1)
    return maps


def test_paraphraser_is_the_authors_layers():
    paraphraser = Paraphraser(6, 0.5)
    factor = encoded(MAPS, paraphraser.encoder.state_dict(), F.conv2d)
    assert factor.shape == (2, 3, 5, 4)
    torch.testing.assert_close(paraphraser.factor(MAPS), factor)
    torch.testing.assert_close(paraphraser(MAPS), encoded(factor, paraphraser.decoder.state_dict(), F.conv_transpose2d))
    shapes = [tuple(layer.weight.shape[:2]) for layer in paraphraser.modules() if hasattr(layer, "weight")]
    assert shapes == [(6, 6), (3, 6), (3, 3), (3, 3), (3, 6), (6, 6)]


def test_translator_is_the_encoder_from_the_students_channels():
    translator = Translator(6, 9)
    torch.testing.assert_close(translator(MAPS), encoded(MAPS, translator.layers.state_dict(), F.conv2d))
    assert translator(MAPS).shape == (2, 9, 5, 4)


@pytest.mark.parametrize(("rate", "channels"), [(0.75, 4), (1, 6), (2.0, 12), (0.1, 1)])
def test_rates(rate, channels):
    assert Paraphraser(6, rate).factor(MAPS).shape == (2, channels, 5, 4)


def test_batch_norm_is_an_option():
    for module in (Paraphraser(6, 0.5, batch_norm=True), Translator(6, 3, batch_norm=True)):
        norms = [layer.num_features for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert norms == ([6, 3, 3, 3, 6, 6] if isinstance(module, Paraphraser) else [6, 3, 3])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Paraphraser(64, 0.005), "rate 0.005 leaves none of 64 channels: take at least 0.0156"),
        (lambda: Paraphraser(64, -1), "rate should be a positive number, got -1"),
        (lambda: Paraphraser(64, float("nan")), "rate should be a positive number, got nan"),
        (lambda: Paraphraser(0, 0.5), "channels should be a positive integer, got 0"),
        (lambda: Translator(3, 0), "out_channels should be a positive integer, got 0"),
        (lambda: Translator(True, 3), "in_channels should be a positive integer, got True"),
    ],
)
def test_sizes_that_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
