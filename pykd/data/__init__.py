"""Data sets by name, split into training, held-out and test parts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pykd.data import cifar, digits, imagefolder, mnist, svhn
from pykd.data.imagefolder import ImageFiles
from pykd.data.memory import InMemory, Normalizer, Sample, augment, collate, few, stratified
from pykd.errors import PykdError

if TYPE_CHECKING:
    from pykd.config import Data


# Below the data root.
PLACES = {
    "MNIST": mnist.PLACE,
    "SVHN": svhn.FILES[0],
    **{f"CIFAR-{classes}": place for classes, place in cifar.PLACE.items()},
}


@dataclass(frozen=True)
class Splits:
    """The parts of a data set; every choice is made on ``holdout``, ``test`` is for the last row of a table.

    Teachers learn from ``teacher_train``, which are all rows that are not held out, students from ``train``: of these
    as many as ``data.per_class`` or ``data.rows`` says, augmented once where ``data.augment_once`` does.
    """

    train: InMemory | ImageFiles
    teacher_train: InMemory | ImageFiles
    holdout: InMemory | ImageFiles
    test: InMemory | ImageFiles
    class_names: tuple[str, ...]
    in_shape: tuple[int, int, int]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def data_root(root: str | None) -> Path:
    """Where files are looked for: ``root``, else ``$PYKD_DATA``, else ``./data``."""
    return Path(root or os.environ.get("PYKD_DATA") or "data").expanduser()


def load(data: "Data", *, seed: int = 0) -> Splits:
    """The data set that ``data`` names; ``seed`` decides which rows are held out and drawn, and what augments once.

    Raises:
        PykdError: missing or broken files, in one sentence that says how to get or mend them.

    Example:
        >>> from pykd.config import Data
        >>> splits = load(Data(name="digits"))
        >>> len(splits.train), len(splits.holdout), len(splits.test), splits.in_shape
        (1299, 143, 355, (1, 8, 8))
    """
    root = data_root(data.root)
    parts: tuple[InMemory | ImageFiles, InMemory | ImageFiles, tuple[str, ...]]
    if data.name == "digits":
        parts = digits.read()
    elif data.name == "mnist":
        parts = mnist.read(root, download=data.download)
    elif data.name == "svhn":
        parts = svhn.read(root, download=data.download)
    elif data.name == "cifar10":
        parts = cifar.read(root, 10, download=data.download)
    elif data.name == "cifar100":
        parts = cifar.read(root, 100, download=data.download)
    else:
        parts = imagefolder.read(root, data)
    train, test, class_names = parts
    for part in (train, test):
        if not len(part):
            raise PykdError(f"{data.name} in {root} has no rows: delete its files and fetch them anew")
    kept, held = stratified(train.labels, data.holdout, seed)
    channels, height, width = train[0][0].shape
    teacher_train = train.subset(kept)
    labels, learnt = teacher_train.labels, teacher_train
    if data.per_class is not None:
        for label, name in enumerate(class_names):
            if not (rows := int((labels == label).sum())):
                raise PykdError(
                    f"data.per_class={data.per_class}: class {name} has no training rows; add some or set data.rows"
                )
            if rows < data.per_class:
                raise PykdError(
                    f"data.per_class={data.per_class}: class {name} has {rows} training rows; ask for fewer"
                )
        learnt = teacher_train.subset(few(labels, data.per_class, seed))
    if data.rows is not None:
        if len(labels) < data.rows:
            raise PykdError(f"data.rows={data.rows}: there are {len(labels)} training rows; ask for fewer")
        learnt = teacher_train.subset(few(torch.zeros_like(labels), data.rows, seed))  # as if of one class
    if data.augment_once:
        size = len(learnt) * channels * height * width / 2**30
        if isinstance(learnt, ImageFiles) and size > data.memory_limit_gib:
            raise PykdError(
                f"data.augment_once keeps the {len(learnt)} rows of students in memory, {size:.3g} GiB: "
                "ask for fewer with data.per_class or data.rows, or raise data.memory_limit_gib"
            )
        raw = learnt.raw()
        images = raw.images if isinstance(raw, InMemory) else torch.stack([raw[row][0] for row in range(len(raw))])
        images = augment(images, data.augment, torch.Generator().manual_seed(seed))
        learnt = InMemory(images, learnt.labels, learnt.normalize)
    return Splits(
        train=learnt,
        teacher_train=teacher_train,
        holdout=train.subset(held),
        test=test,
        class_names=class_names,
        in_shape=(channels, height, width),
    )


__all__ = [
    "ImageFiles",
    "InMemory",
    "Normalizer",
    "Sample",
    "Splits",
    "augment",
    "collate",
    "data_root",
    "few",
    "load",
    "stratified",
]
