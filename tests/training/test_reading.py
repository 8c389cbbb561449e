"""Images in memory: an epoch gathers its batches at once, and never asks PIL."""

import pickle
import sys
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Subset

import pykd
from pykd import data
from pykd.config import Data, Training
from pykd.data import InMemory
from pykd.training.batches import Source

ROWS = 40


def write_mnist(root: Path, _: pytest.MonkeyPatch) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = np.array([0x803, ROWS, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(256)) * (ROWS * 784 // 256) + bytes(128))
        labels = np.array([0x801, ROWS], dtype=">i4").tobytes() + bytes(row % 10 for row in range(ROWS))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    (root / kind.base_folder).mkdir()

    def put(file: str, content: dict[str, Any]) -> list[str]:
        (root / kind.base_folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(pickle.dumps(content)).hexdigest()]

    batch = {"data": np.zeros((ROWS, 3072), dtype=np.uint8), "labels": [row % 10 for row in range(ROWS)]}
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [put(file, batch) for file, _ in getattr(kind, name)])
    file, total = put(kind.meta["filename"], {kind.meta["key"]: list("0123456789")})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": total})


@pytest.mark.parametrize("part", [{}, {"per_class": 2}, {"rows": 20}])
@pytest.mark.parametrize(("name", "write"), [("mnist", write_mnist), ("cifar10", write_cifar10)])
def test_an_epoch_never_asks_pil(
    name: Any, write: Any, part: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch)
    splits = data.load(Data(name=name, root=str(tmp_path), holdout=0.25, **part))

    def asked(*_: object, **__: object) -> None:
        pytest.fail("a row was read by itself, or by PIL")

    for module in [each for each in sys.modules if each.split(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(PIL.Image.Image, "__init__", asked)
    monkeypatch.setattr(PIL.Image, "fromarray", asked)
    monkeypatch.setattr(InMemory, "__getitem__", asked)
    features = np.prod(splits.in_shape).item()
    for train in (splits.train, Subset(splits.train, range(4, 16)), DataLoader(splits.train, 5, shuffle=True)):
        run = pykd.distill(
            pykd.methods.NoisyTeacher(),
            teacher=lambda: nn.Sequential(nn.Flatten(), nn.Linear(features, 10)),
            student=lambda: nn.Sequential(nn.Flatten(), nn.Linear(features, 10)),
            train=train, holdout=0.25, teacher_training=Training(epochs=1, batch_size=5, augment=True), epochs=1,
            augment=lambda images, generator: data.augment(images, "crop_flip", generator), batch_size=5,
            baselines=[], device="cpu", progress=False,
        )  # fmt: skip
        assert len(run.metrics) == 2


def test_a_part_of_images_in_memory_is_gathered_at_once() -> None:
    images = torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = InMemory(images, torch.arange(30), ((0.5,), (0.25,)))
    rows = [5, 29, 0, 7, 7, 11]
    nested = Subset(Subset(whole, rows), [3, 0, 5])
    source = Source.of(nested, "train")
    assert isinstance(source.data, InMemory)
    assert source.indexed
    (batch,) = source.batches(3)
    assert batch.inputs.dtype == torch.uint8
    assert source.normalized(batch.inputs).equal(whole.__getitems__([7, 5, 11])[0])
    assert batch.labels.tolist() == [7, 5, 11]
    kept, held = Source.of(whole, "train").split(0.2, seed=3)
    assert isinstance(kept.data, InMemory)
    assert isinstance(held.data, InMemory)
    assert sorted([*kept.data.labels.tolist(), *held.data.labels.tolist()]) == list(range(30))
