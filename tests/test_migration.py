"""docs/migration.md: both formulas of a row are equal in value and gradient, and the recipes are recipes."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd import config, methods, models, testing
from pykd.nn import Paraphraser, Translator, features
from pykd.training import Batch, FrozenTeacher

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
TABLES = re.findall(r"^\| what you had \| in plain torch \| in pykd \|\n\|.+\n((?:\|.+\n)+)", PAGE, re.M)
ROWS = [row.strip("| ").split(" | ") for table in TABLES for row in table.splitlines()]
RECIPES = [each for each in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S) if each.startswith("method:")]
LEAVES = ("s", "hs", "ws", "f")  # what the student computes


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The page's functions, and the tensors that its formulas speak of, in float64."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.tensor([3, -100, 0, 9, -100, 1, 4, 4])
    names.update(
        s=drawn(8, 10, scale=3.0),
        t=drawn(8, 10, scale=3.0),
        y=torch.randint(10, (8,), generator=generator),
        p=drawn(8, 10).softmax(1),
        hs=drawn(8, 4),
        ws=drawn(10, 4),
        ht=drawn(8, 6),
        wt=drawn(10, 6),
        labels=labels,
        k=labels != -100,
        n=17,
        f=drawn(3, 2, 4, 4),
        g=drawn(3, 2, 4, 4),
        u=lambda factors: F.normalize(factors.flatten(1)),
        z=lambda logits: (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7),
        entropy=lambda logits: F.cross_entropy(logits, logits.softmax(1)),
    )
    for leaf in LEAVES:
        names[leaf].requires_grad_()
    return names


def value_and_grads(formula: str, names: dict[str, Any]) -> tuple[Tensor, ...]:
    value = eval(formula, names)
    return value.detach(), *torch.autograd.grad(value, [names[leaf] for leaf in LEAVES], materialize_grads=True)


def test_the_page_is_read() -> None:
    assert len(TABLES) == 3 and len(RECIPES) == 2


@pytest.mark.parametrize(("torch_has", "pykd_has"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_both_sides_are_equal(torch_has: str, pykd_has: str, names: dict[str, Any]) -> None:
    sides = [value_and_grads(cell.strip("`"), names) for cell in (torch_has, pykd_has)]
    for expected, found in zip(*sides, strict=True):
        testing.assert_matches(found, expected, length=80, magnitude=expected.abs().max())


def test_attention_transfer_is_the_other_library_s() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(5, 2, 6, 6), torch.arange(5) % 3
    teacher, student = (
        nn.Sequential(nn.Conv2d(2, width, 3), nn.Flatten(), nn.Linear(16 * width, 3)) for width in (7, 4)
    )
    frozen = FrozenTeacher(teacher)
    batch = Batch(inputs, labels, torch.tensor(0), 0, [lambda: frozen(inputs)], teachers=[frozen])
    found = methods.AttentionTransfer(beta=3.0, teacher_at=["0"], student_at=["0"]).loss(student, batch)
    logits, (mine,) = features(student, inputs, ["0"])
    attention = [F.normalize(maps.pow(2).mean(1).flatten(1)) for maps in (mine, teacher[0](inputs))]
    expected = F.cross_entropy(logits, labels) + 3 * (attention[0] - attention[1]).pow(2).mean()
    testing.assert_matches(found, expected.double(), length=128, magnitude=1.0)


def test_paraphraser_and_translator_are_the_other_library_s() -> None:
    torch.manual_seed(0)

    def layers(kind: Any, *channels: int) -> list[nn.Module]:
        pairs = itertools.pairwise(channels)
        return [each for pair in pairs for each in (kind(*pair, 3, stride=1, padding=1), nn.LeakyReLU(0.1))]

    encoder = layers(nn.Conv2d, 8, 8, 4, 4)
    other, maps = nn.Sequential(*encoder, *layers(nn.ConvTranspose2d, 4, 4, 8, 8)), torch.randn(2, 8, 5, 5)
    paraphraser, translator = Paraphraser(8, 0.5), Translator(8, 4)
    for module, source in ((paraphraser, other), (translator, nn.Sequential(*encoder))):
        weights = zip(module.state_dict(), source.state_dict().values(), strict=True)
        module.load_state_dict(dict(weights))
        assert module(maps).equal(source(maps))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_recipes(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    read = config.load(str(file))
    fields = dict(read.method)
    method = config.construct(config.choose(methods.METHODS, fields.pop("name"), "method.name"), fields, "method")
    assert method.label
    for network in (read.teacher, read.student):
        names = dict(models.build(network.name, in_shape=(3, 32, 32), classes=4, **network.arguments).named_modules())
        assert {*fields.get("teacher_at", []), *fields.get("student_at", [])} <= {*names}


def test_networks_have_torchvision_s_names() -> None:
    import torchvision

    mine = models.build("resnet18", in_shape=(3, 224, 224), classes=1000)
    assert mine.state_dict().keys() == torchvision.models.resnet18().state_dict().keys()
