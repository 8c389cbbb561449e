"""Factor transfer on Faster R-CNNs, end to end: examples/factor_transfer_detection.py on a drawn folder."""

import copy
import random
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.nn import Paraphraser, Translator

SCRIPT = Path(__file__).parents[1] / "examples" / "factor_transfer_detection.py"
example = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
CLASSES = ["disc", "square"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """In VOC's format: images of 64x64 pixels with one to three squares and discs, eight to learn from, four others."""
    chance = random.Random(0)
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / place).mkdir(parents=True)
    for part, count in {"train": 8, "val": 4}.items():
        names = [f"{part}{number}" for number in range(count)]
        (tmp_path / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            image = Image.new("RGB", (64, 64), tuple(chance.choices(range(100), k=3)))
            canvas, tree = ImageDraw.Draw(image), ElementTree.Element("annotation")
            for corner in chance.sample([(0, 0), (32, 0), (0, 32), (32, 32)], chance.randint(1, 3)):
                side, kind = chance.randint(16, 28), chance.choice(CLASSES)
                left, top = (start + chance.randint(0, 31 - side) for start in corner)
                box = (left, top, left + side - 1, top + side - 1)
                shape = canvas.ellipse if kind == "disc" else canvas.rectangle
                shape(box, fill=tuple(chance.choices(range(150, 256), k=3)))
                entry = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(entry, "name").text = kind
                bounds = ElementTree.SubElement(entry, "bndbox")
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                    ElementTree.SubElement(bounds, key).text = str(value + 1)
            image.save(tmp_path / "JPEGImages" / f"{name}.jpg")
            ElementTree.ElementTree(tree).write(tmp_path / "Annotations" / f"{name}.xml")
    return tmp_path


SMALL = {"batch": 4, "lr": 1e-3, "seed": 0}


def bits(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_both_stages(folder: Path) -> None:
    samples, classes = example.read(folder, "train")
    assert classes == CLASSES
    torch.manual_seed(0)
    teacher = example.detector("resnet34", 2, 64)
    losses = example.fit(teacher, example.detection_loss(teacher), samples, 2, **SMALL)
    assert losses[-1] < losses[0]
    teacher.requires_grad_(False).eval()

    paraphraser, before = Paraphraser(512, 0.25), bits(teacher)
    losses = example.fit(paraphraser, example.reconstruction_loss(paraphraser, teacher), samples, 4, **SMALL)
    assert losses[-1] < losses[0]
    assert same(bits(teacher), before)
    paraphraser.requires_grad_(False).eval()

    student, frozen = example.detector("resnet18", 2, 64), (bits(teacher), bits(paraphraser))
    start, translator = bits(student), Translator(512, paraphraser.factor_channels)
    both = nn.ModuleList([student, translator])
    batch, grads = example.load(samples[:2], student), []
    for beta in (0.0, 100.0):
        torch.manual_seed(1)
        both.zero_grad()
        transfer = example.transfer_loss(student, translator, teacher, paraphraser, beta)
        transfer(*batch).backward()
        grads.append({name: weight.grad.clone() for name, weight in both.named_parameters()})
    # The factors reach what makes them, and the rest of the student learns from its own losses alone.
    reached = {name for name, grad in grads[1].items() if not grad.equal(grads[0][name])}
    assert reached == {name for name in grads[0] if name.startswith(("0.backbone.body.", "1."))}
    assert all(grad.any() for name, grad in grads[0].items() if name.startswith("0."))

    losses = example.fit(both, transfer, samples, 3, **SMALL)
    assert losses[-1] < losses[0]
    assert same(bits(teacher), frozen[0]) and same(bits(paraphraser), frozen[1])
    assert start.keys() == student.state_dict().keys()
    assert not same(bits(student), start)
    assert 0 <= example.average_precision(student, samples[:2], 2) <= 1


def test_weight_zero_is_the_student_alone(folder: Path) -> None:
    samples, _ = example.read(folder, "val")
    torch.manual_seed(0)
    teacher, student = (example.detector("resnet18", 2, 64) for _ in range(2))
    alone, paraphraser, translator = copy.deepcopy(student), Paraphraser(512, 0.1), Translator(512, 51)
    teacher.requires_grad_(False).eval()
    paraphraser.requires_grad_(False).eval()
    own = example.fit(alone, example.detection_loss(alone), samples, 2, **SMALL)
    loss = example.transfer_loss(student, translator, teacher, paraphraser, 0.0)
    assert own == example.fit(nn.ModuleList([student, translator]), loss, samples, 2, **SMALL)
    assert same(bits(alone), bits(student))


def test_maps_are_of_the_same_images_at_the_same_size(folder: Path) -> None:
    samples, _ = example.read(folder, "val")
    torch.manual_seed(0)
    student = example.detector("resnet18", 2, 64).eval()
    images, _ = example.load(samples[:2], student)
    images[1] = images[1][:, :40]  # another shape: it is enlarged, and padded with the other to one
    _, (maps,) = example.features(student, images, [example.AT], of=student)
    assert example.maps_of(student, images).equal(maps)


class Answers(nn.Module):
    """Says what it is told, image by image."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers, self.weight = iter(answers), nn.Parameter(torch.zeros(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [next(self.answers) for _ in images]


def answer(boxes: Tensor, labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    return {"boxes": boxes.reshape(-1, 4), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def test_average_precision_by_hand(folder: Path) -> None:
    file = folder / "JPEGImages" / "val0.jpg"
    box, other, far = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 60, 60]])
    samples = [
        (file, {"boxes": torch.stack([box, other]), "labels": torch.tensor([1, 1])}),
        (file, {"boxes": far[None], "labels": torch.tensor([2])}),
    ]

    def measured(*answers: dict[str, Tensor]) -> float:
        return example.average_precision(Answers(list(answers)), samples, 2)

    right = answer(torch.stack([box, other]), [1, 1], [0.9, 0.8]), answer(far, [2], [0.7])
    nothing = answer(torch.zeros(0, 4), [], [])
    assert measured(*right) == 1
    assert measured(nothing, nothing) == 0
    assert measured(right[0], nothing) == 0.5
    # A box found twice is a false one the second time, and one of less than half an overlap is always.
    twice = answer(torch.stack([box, box + 1, other]), [1, 1, 1], [0.9, 0.8, 0.7])
    assert measured(twice, nothing) == pytest.approx((1 / 2 + 2 / 3 / 2) / 2)
    assert measured(answer(torch.stack([box + 4, other]), [1, 1], [0.9, 0.8]), nothing) == pytest.approx(1 / 8)
    # A false one before two right ones: at half the recall the best precision is that of the full one.
    late = answer(torch.stack([box + 4, box, other]), [1, 1, 1], [0.9, 0.8, 0.7])
    assert measured(late, nothing) == pytest.approx(2 / 3 / 2)
    # The false one of another image, between two right ones, counts by its score.
    assert measured(right[0], answer(far, [1], [0.85])) == pytest.approx((1 / 2 + 2 / 3 / 2) / 2)


BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
OBJECT = f"<annotation><object><name>disc</name>{BOX}</object></annotation>"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<annotation/>", "val0.xml has no object: annotate one, or leave its image out"),
        ("<annotation>", "val0.xml is not an annotation that can be read"),
        (
            "<annotation><object><name>disc</name></object></annotation>",
            "val0.xml has an object whose box holds no pixel",
        ),
        (OBJECT.format(9, 9, 8, 20), "val0.xml has an object whose box holds no pixel: correct its bndbox"),
        (OBJECT.format("a", 9, 18, 20), "val0.xml has an object whose box holds no pixel"),
        (OBJECT.format("nan", 9, 18, 20), "val0.xml has an object whose box holds no pixel"),
        (OBJECT.replace("disc", "cube").format(9, 9, 18, 20), "the class 'cube': take one of disc, square"),
    ],
)
def test_bad_annotations_are_told(folder: Path, text: str, sentence: str) -> None:
    (folder / "Annotations" / "val0.xml").write_text(text)
    with pytest.raises(PykdError, match=sentence):
        example.read(folder, "val", CLASSES)


def test_missing_files_are_told(folder: Path) -> None:
    with pytest.raises(PykdError, match=r"test\.txt names no image: write the names"):
        example.read(folder, "test")
    samples, _ = example.read(folder, "val")
    (folder / "JPEGImages" / "val0.jpg").write_text("no image")
    with pytest.raises(PykdError, match=r"val0\.jpg is not an image that can be read"):
        example.load(samples, nn.Linear(1, 1))
    (folder / "JPEGImages" / "val0.jpg").unlink()
    with pytest.raises(PykdError, match=r"val0\.jpg is missing: put the image there"):
        example.read(folder, "val")
    (folder / "Annotations" / "val0.xml").unlink()
    with pytest.raises(PykdError, match=r"val0\.xml is not an annotation that can be read"):
        example.read(folder, "val")


def test_script_writes_the_student_alone(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path_factory.mktemp("out") / "student.safetensors"
    short = ["--size=64", "--batch=4", "--epochs=1", "--paraphraser-epochs=1", "--teacher=resnet18"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), *short, f"--out={out}"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = re.findall(r"^(.+): AP50 [01]\.\d{3}, [\d,]+ parameters$", capsys.readouterr().out, re.MULTILINE)
    assert said == ["teacher", "student alone", "student, factor transfer"]
    assert load_file(out).keys() == example.detector("resnet18", 2, 64).state_dict().keys()

    (folder / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(SystemExit, match=r"train\.txt names no image: write the names of the part's images into it"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
