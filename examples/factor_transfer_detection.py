"""Factor transfer between the backbones of two Faster R-CNNs, trained on a folder in the format of Pascal VOC.

The folder holds JPEGImages, Annotations, and ImageSets/Main with the names of each part's images. Nothing is
downloaded: all networks start from random weights. The paper's third experiment is of this kind; its settings are not
known, and all settings here are our own.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.transforms.functional import pil_to_tensor

from pykd.errors import PykdError
from pykd.nn import Paraphraser, Translator, features
from pykd.ops import factor_loss

AT = "backbone.body.layer4"  # of teacher and student
RATE = 0.5  # the paper's k
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

Target = dict[str, Tensor]  # boxes [objects, 4] in pixels, float32; labels [objects], from 1 on
Loss = Callable[[list[Tensor], list[Target]], Tensor]


def read(folder: Path, part: str, classes: list[str] | None = None) -> tuple[list[tuple[Path, Target]], list[str]]:
    """File and target of the part's images, and the classes: the part's own, sorted, where none are given."""
    listed = folder / "ImageSets" / "Main" / f"{part}.txt"
    names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()] if listed.is_file() else []
    if not names:
        raise PykdError(f"{listed} names no image: write the names of the part's images into it, one a line")
    found = [objects(folder / "Annotations" / f"{name}.xml") for name in names]
    classes = classes or sorted({label for each in found for label, _ in each})
    samples = []
    for name, each in zip(names, found, strict=True):
        image = folder / "JPEGImages" / f"{name}.jpg"
        if not image.is_file():
            raise PykdError(f"{image} is missing: put the image there, or take its name out of {listed}")
        if unknown := [label for label, _ in each if label not in classes]:
            raise PykdError(f"{name}.xml has an object of the class {unknown[0]!r}: take one of {', '.join(classes)}")
        labels = torch.tensor([classes.index(label) + 1 for label, _ in each])
        samples.append((image, {"boxes": torch.tensor([box for _, box in each]), "labels": labels}))
    return samples, classes


def objects(file: Path) -> list[tuple[str, list[float]]]:
    """Class and box of each object; difficult ones are as any other."""
    try:
        entries = ElementTree.parse(file).findall("object")
    except (OSError, ElementTree.ParseError) as error:
        raise PykdError(f"{file} is not an annotation that can be read: write it, or leave its image out") from error
    if not entries:
        raise PykdError(f"{file} has no object: annotate one, or leave its image out")
    found = []
    for entry in entries:
        try:
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            x1 = y1 = x2 = y2 = math.nan
        # VOC counts pixels from 1, and the last one belongs to the box.
        if not (1 <= x2 - x1 + 1 < math.inf and 1 <= y2 - y1 + 1 < math.inf):
            raise PykdError(f"{file} has an object whose box holds no pixel: correct its bndbox")
        found.append((entry.findtext("name", ""), [x1 - 1, y1 - 1, x2, y2]))
    return found


def load(samples: list[tuple[Path, Target]], module: nn.Module) -> tuple[list[Tensor], list[Target]]:
    """Images ``[3, height, width]`` in [0, 1], and targets, where the module's weights are."""
    device = next(module.parameters()).device
    images = []
    for file, _ in samples:
        try:
            image = pil_to_tensor(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise PykdError(f"{file} is not an image that can be read: replace it, or leave it out") from error
        images.append(image.to(device) / 255)
    return images, [{key: value.to(device) for key, value in target.items()} for _, target in samples]


def detector(network: str, classes: int, size: int) -> FasterRCNN:
    """A light Faster R-CNN, for images whose shorter side becomes ``size`` pixels."""
    body = getattr(torchvision.models, network)()
    channels = [body.inplanes >> shift for shift in (3, 2, 1, 0)]
    return FasterRCNN(
        BackboneWithFPN(body, {f"layer{i + 1}": str(i) for i in range(4)}, channels, out_channels=64),
        classes + 1,
        min_size=size,
        max_size=2 * size,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=32,
    )


def fit(
    module: nn.Module, loss: Loss, samples: list[tuple[Path, Target]], epochs: int, batch: int, lr: float, seed: int
) -> list[float]:
    """Trains the module; each epoch's loss. The seed decides the batches, whatever was trained before."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr)
    module.train()
    history = []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(samples)).split(batch):
            optimizer.zero_grad()
            value = loss(*load([samples[row] for row in rows], module))
            value.backward()
            optimizer.step()
            losses.append(value.item())
        history.append(sum(losses) / len(losses))
    return history


def detection_loss(network: FasterRCNN) -> Loss:
    """The sum of the network's own four losses."""
    return lambda images, targets: sum(network(images, targets).values())


@torch.no_grad()
def maps_of(network: FasterRCNN, images: list[Tensor]) -> Tensor:
    """The maps alone: transform and backbone are all that runs."""
    batch, _ = network.transform(images)
    _, (maps,) = features(network.backbone, batch.tensors, [AT], of=network)
    return maps


def reconstruction_loss(paraphraser: Paraphraser, teacher: FasterRCNN) -> Loss:
    """Stage 1, without labels: from the frozen teacher's maps to what the paraphraser makes of them."""

    def loss(images: list[Tensor], targets: list[Target]) -> Tensor:
        maps = maps_of(teacher, images)
        return F.l1_loss(paraphraser(maps), maps)

    return loss


def transfer_loss(
    student: nn.Module, translator: nn.Module, teacher: nn.Module, paraphraser: Paraphraser, beta: float
) -> Loss:
    """Stage 2: the student's own losses and, of the same pass, the distance of its factors to the teacher's."""

    def loss(images: list[Tensor], targets: list[Target]) -> Tensor:
        losses, (maps,) = features(lambda images: student(images, targets), images, [AT], of=student)
        with torch.no_grad():
            factors = paraphraser.factor(maps_of(teacher, images))
        return sum(losses.values()) + beta * factor_loss(translator(maps), factors)

    return loss


@torch.no_grad()
def average_precision(network: FasterRCNN, samples: list[tuple[Path, Target]], classes: int) -> float:
    """At IoU 0.5: the area under the best precision at each recall or a higher one, mean over the classes."""
    network.eval()
    found: list[list[tuple[float, bool]]] = [[] for _ in range(classes)]
    count = [0] * classes
    for sample in samples:
        images, (target,) = load([sample], network)
        (answer,) = network(images)
        for index in range(classes):
            boxes, mine = target["boxes"][target["labels"] == index + 1], answer["labels"] == index + 1
            count[index] += len(boxes)
            free = [True] * len(boxes) + [False]  # the last one stands for no box
            overlaps = F.pad(torchvision.ops.box_iou(answer["boxes"][mine], boxes), (0, 1))
            for score, row in zip(answer["scores"][mine], overlaps, strict=True):  # the best score first
                overlap, best = row.max(0)
                hit = bool(overlap >= 0.5) and free[best]
                free[best] &= not hit
                found[index].append((score.item(), hit))
    areas = []
    for each, boxes in zip(found, count, strict=True):
        hits = torch.tensor([hit for _, hit in sorted(each, key=lambda one: -one[0])], dtype=torch.bool)
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        if boxes:
            areas.append(float(precision.flip(0).cummax(0).values.flip(0)[hits].sum() / boxes))
    return sum(areas) / len(areas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="in VOC's format, such as VOCdevkit/VOC2012")
    parser.add_argument("--train", default="train", help="the part to learn from (%(default)s)")
    parser.add_argument("--test", default="val", help="the part to measure on (%(default)s)")
    parser.add_argument("--teacher", choices=RESNETS, default="resnet34", help="its body (%(default)s)")
    parser.add_argument("--student", choices=RESNETS, default="resnet18", help="its body (%(default)s)")
    parser.add_argument("--size", type=int, default=320, help="pixels of an image's shorter side (%(default)s)")
    parser.add_argument("--epochs", type=int, default=24, help="of teacher and students (%(default)s)")
    parser.add_argument("--paraphraser-epochs", type=int, default=6, help="of stage 1 (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="AdamW's, of all networks (%(default)s)")
    parser.add_argument("--beta", type=float, default=100, help="weight of the factors' distance (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the student's weights (safetensors)")
    options = parser.parse_args()
    if options.out and not options.out.parent.is_dir():
        parser.error(f"{options.out.parent} is not a folder: make it first, or choose another --out")

    train, classes = read(options.folder, options.train)
    test, _ = read(options.folder, options.test, classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = {"batch": options.batch, "lr": options.lr, "seed": options.seed}

    def report(name: str, network: FasterRCNN) -> None:
        weights = sum(each.numel() for each in network.parameters())
        print(f"{name}: AP50 {average_precision(network, test, len(classes)):.3f}, {weights:,} parameters", flush=True)

    torch.manual_seed(options.seed)
    teacher, student = (
        detector(body, len(classes), options.size).to(device) for body in (options.teacher, options.student)
    )
    alone = copy.deepcopy(student)
    fit(teacher, detection_loss(teacher), train, options.epochs, **how)
    teacher.requires_grad_(False).eval()
    report("teacher", teacher)

    images, _ = load(train[:1], teacher)
    paraphraser = Paraphraser(maps_of(teacher, images).shape[1], RATE).to(device)
    fit(paraphraser, reconstruction_loss(paraphraser, teacher), train, options.paraphraser_epochs, **how)
    paraphraser.requires_grad_(False).eval()

    fit(alone, detection_loss(alone), train, options.epochs, **how)
    report("student alone", alone)

    translator = Translator(maps_of(student.eval(), images).shape[1], paraphraser.factor_channels).to(device)
    loss = transfer_loss(student, translator, teacher, paraphraser, options.beta)
    fit(nn.ModuleList([student, translator]), loss, train, options.epochs, **how)
    report("student, factor transfer", student)
    if options.out:
        save_file(student.state_dict(), options.out)


if __name__ == "__main__":
    try:
        main()
    except PykdError as error:
        sys.exit(str(error))
