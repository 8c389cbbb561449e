"""Data sets: what they hold, how they are split, and what is said where files are missing or broken.

MNIST, SVHN and CIFAR are tested on small files of their own layouts; where ``PYKD_DATA`` has real ones, on those too.
"""

import hashlib
import json
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import pykd
from pykd import data
from pykd.cli import app
from pykd.config import ConfigError, Data, Training, load
from pykd.errors import PykdError
from pykd.grids import with_shared_teachers

HAS_MNIST = (Path(os.environ.get("PYKD_DATA", "nowhere")) / "MNIST" / "raw").is_dir()


def in_memory(rows: int = 20, side: int = 8) -> data.InMemory:
    images = torch.randint(256, (rows, 2, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return data.InMemory(images, torch.arange(rows) % 4, ((0.5, 0.25), (0.25, 0.5)))


def test_samples_are_normalised_pixels_label_and_index():
    dataset = in_memory()
    image, label, index = dataset[7]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in dataset.normalize)
    torch.testing.assert_close(image, (dataset.images[7] / 255 - mean) / std)
    assert (int(label), int(index)) == (3, 7)
    assert dataset[-1][2] == 19
    with pytest.raises(IndexError):
        dataset[20]


def test_a_batch_is_its_samples():
    dataset = in_memory()
    gathered = next(iter(DataLoader(dataset, 6, collate_fn=data.collate)))
    stacked = data.collate([dataset[row] for row in range(6)])
    assert all(a.equal(b) for a, b in zip(gathered, stacked, strict=True))
    assert gathered[0].dtype == torch.float32
    assert gathered[2].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), "images should be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "images should be uint8"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            r"should be int64 \[2\]",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels should be int64"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, words):
    with pytest.raises(ValueError, match=words):
        data.InMemory(images, labels, ((0.0,), (1.0,)))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_held_out_share_is_stratified_and_decided_by_the_seed(share):
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    kept, held = data.stratified(labels, share, seed=3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(63))
    for label, rows in ((0, 50), (1, 10), (2, 2)):
        count = int((labels[held] == label).sum())
        assert abs(count - share * rows) <= 1
        assert 1 <= count < rows
    assert 3 not in labels[held]
    assert held.equal(data.stratified(labels, share, seed=3)[1])
    assert any(not held.equal(data.stratified(labels, share, seed=seed)[1]) for seed in range(4))


@pytest.mark.parametrize("count", [1, 5, 80])
def test_students_may_learn_from_few_rows_of_each_class(count):
    every = data.load(Data(name="digits"), seed=1)
    few = data.load(Data(name="digits", per_class=count), seed=1)
    assert few.train.labels.bincount().tolist() == [count] * 10
    for part in ("teacher_train", "holdout", "test"):
        assert getattr(few, part).images.equal(getattr(every, part).images)
    assert every.train.images.equal(every.teacher_train.images)
    images = {image.numpy().tobytes() for image in every.train.images}
    assert images.issuperset(image.numpy().tobytes() for image in few.train.images)
    assert data.load(Data(name="digits", per_class=count), seed=1).train.images.equal(few.train.images)
    fewer = data.few(every.train.labels, count, seed=1)
    assert set(fewer.tolist()) <= set(data.few(every.train.labels, count + 1, seed=1).tolist())
    assert not fewer.equal(data.few(every.train.labels, count, seed=2))


def test_too_few_rows_of_a_class_are_told():
    smallest = int(data.load(Data(name="digits")).train.labels.bincount().min())
    assert len(data.load(Data(name="digits", per_class=smallest)).train) == 10 * smallest
    with pytest.raises(PykdError, match=rf"data\.per_class={smallest + 1}: class 8 has {smallest} training rows"):
        data.load(Data(name="digits", per_class=smallest + 1))


def test_a_class_without_rows_is_told(tmp_path):
    write_svhn(tmp_path, y=(np.arange(40, dtype=np.uint8) % 9 + 1)[:, None])
    with pytest.raises(PykdError, match=r"data\.per_class=1: class 0 has no training rows; add some or set data\.rows"):
        data.load(Data(name="svhn", root=str(tmp_path), per_class=1))


@pytest.mark.parametrize("count", [1, 37, 1298])
def test_students_may_learn_from_few_rows_of_any_class(count):
    every = data.load(Data(name="digits"), seed=1)
    few = data.load(Data(name="digits", rows=count), seed=1)
    assert few.train.images.shape == (count, 1, 8, 8)
    for part in ("teacher_train", "holdout", "test"):
        assert getattr(few, part).images.equal(getattr(every, part).images)

    def contents(part):
        return {(image.numpy().tobytes(), int(label)) for image, label in zip(part.images, part.labels, strict=True)}

    more = data.load(Data(name="digits", rows=count + 1), seed=1)
    assert contents(few.train) < contents(more.train) <= contents(every.train)
    assert data.load(Data(name="digits", rows=count), seed=1).train.images.equal(few.train.images)
    assert not data.load(Data(name="digits", rows=count), seed=2).train.images.equal(few.train.images)


def test_more_rows_than_there_are_are_told():
    assert len(data.load(Data(name="digits", rows=1299)).train) == 1299
    with pytest.raises(PykdError, match=r"data\.rows=1300: there are 1299 training rows; ask for fewer"):
        data.load(Data(name="digits", rows=1300))


def test_rows_are_counted_in_one_way():
    with pytest.raises(ConfigError, match=r"data\.rows should be left out where data\.per_class is set, got 50"):
        load("noisy_teacher-digits", ["data.per_class=5", "data.rows=50"])


@pytest.mark.parametrize("count", [{"per_class": 4}, {"rows": 40}, {}])
def test_rows_augmented_once_are_shifts_of_their_own(count):
    settings = Data(name="digits", augment="crop", **count)
    plain = data.load(settings, seed=3)
    once = settings.model_copy(update={"augment_once": True})
    splits = data.load(once, seed=3)
    assert splits.train.labels.equal(plain.train.labels)
    for part in ("teacher_train", "holdout", "test"):
        assert getattr(splits, part).images.equal(getattr(plain, part).images)
    padded = nn.functional.pad(plain.train.images, (1, 1, 1, 1))
    shifts = [padded[:, :, down : down + 8, right : right + 8] for down in range(3) for right in range(3)]
    same = torch.stack([(shift == splits.train.images).flatten(1).all(1) for shift in shifts])
    assert same.any(0).all()
    assert same.any(1).all()
    assert data.load(once, seed=3).train.images.equal(splits.train.images)
    anew = data.augment(plain.train.images, "crop", torch.Generator().manual_seed(4))
    assert not anew.equal(splits.train.images)


def test_files_augmented_once_are_decoded_where_they_fit(tmp_path):
    root = str(write_folder(tmp_path, (16, 16)))
    few = {"name": "imagefolder", "root": root, "augment": "shift_flip", "per_class": 2}
    limit = 6 * 3 * 16 * 16 / 2**30
    files, decoded, memory = (
        data.load(Data(**few, **more))
        for more in (
            {"memory_limit_gib": limit},
            {"memory_limit_gib": limit, "augment_once": True},
            {"augment_once": True},
        )
    )
    assert isinstance(files.train, data.ImageFiles)
    assert isinstance(decoded.teacher_train, data.ImageFiles)
    every = range(6)
    for ours, theirs in zip(decoded.train.__getitems__(every), memory.train.__getitems__(every), strict=True):
        assert ours.equal(theirs)
    assert decoded.train.labels.equal(files.train.labels)
    assert not decoded.train.images.equal(torch.stack([image for image, _, _ in files.train.raw()]))
    with pytest.raises(
        PykdError, match=r"data\.augment_once keeps the 6 rows of students in memory, 4\.29e-06 GiB: ask"
    ):
        data.load(Data(**few, memory_limit_gib=limit / 2, augment_once=True))


def test_few_rows_are_no_reason_for_another_teacher(tmp_path):
    changes = ["data.per_class=3", "data.rows=9", "data.rows=9", "data.augment_once=true", "data.augment=crop"]
    runs = [(str(number), load("noisy_teacher-digits", [change])) for number, change in enumerate(changes)]
    shared = [config.teacher.weights for _, config in with_shared_teachers(runs, tmp_path)]
    assert shared == [None, *[str(tmp_path / "0" / "seed-0" / "teacher.safetensors")] * 3, None]


@pytest.mark.parametrize("few", [["data.per_class=3"], ["data.rows=30", "data.augment_once=true"]])
def test_a_run_with_few_rows_teaches_from_all(few, tmp_path):
    changes = [*few, "teacher.training.epochs=1", "student.training.epochs=1", "baselines=[]"]
    words = ["distill", "noisy_teacher-digits", "--out", str(tmp_path / "run"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, *(word for change in changes for word in ("--set", change))])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("teacher", 21), ("student", 1)]


def test_digits():
    splits = data.load(Data(name="digits", holdout=0.2), seed=1)
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [1154, 288, 355]
    assert splits.classes == 10
    assert splits.in_shape == (1, 8, 8)
    assert splits.train.images.max() == 255
    assert splits.test.labels.bincount().min() >= 34
    pixels = torch.cat([splits.train.images, splits.holdout.images]) / 255
    torch.testing.assert_close(splits.train.normalize[0][0], float(pixels.mean()), atol=5e-5, rtol=0)
    torch.testing.assert_close(splits.train.normalize[1][0], float(pixels.std(correction=0)), atol=5e-5, rtol=0)


def test_test_part_does_not_depend_on_the_seed():
    first, second = (data.load(Data(), seed=seed) for seed in (0, 1))
    assert first.test.images.equal(second.test.images)
    assert not first.holdout.images.equal(second.holdout.images)


def test_normalised_on_the_device_is_normalised_in_the_loader():
    dataset = in_memory()
    rows = [3, 1, 4]
    pixels, labels, indices = dataset.raw().__getitems__(rows)
    assert pixels.dtype == torch.uint8
    images, *same = dataset.__getitems__(rows)
    assert data.Normalizer(dataset.normalize)(pixels).equal(images)
    assert all(a.equal(b) for a, b in zip((labels, indices), same, strict=True))


def test_a_run_augments_pixels_and_trains_on_normalised_ones():
    dataset = in_memory(rows=40)
    seen = []

    class Student(nn.Linear):
        def forward(self, images):
            if isinstance(images, torch.Tensor):  # tracing, for the size of the model file, shows it something else
                seen.append(images.dtype)
            return super().forward(images.flatten(1))

    def augment(images, generator):
        seen.append(images.dtype)
        return data.augment(images, "shift", generator)

    def run(train):
        return pykd.distill(
            pykd.methods.NoisyTeacher(),
            teacher=nn.Sequential(nn.Flatten(), nn.Linear(128, 4)),
            student=lambda: Student(128, 4),
            train=train,
            holdout=dataset,
            training=Training(epochs=2, batch_size=16, augment=True),
            augment=augment,
            baselines=["alone"],
            progress=False,
            device="cpu",
        )

    torch.manual_seed(0)
    ours = run(dataset)
    assert set(seen) == {torch.uint8, torch.float32}
    seen.clear()
    torch.manual_seed(0)
    floats = run(DataLoader(dataset, 16, shuffle=True, collate_fn=lambda batch: data.collate(batch)))
    assert set(seen) == {torch.float32}
    assert [row["loss"] for row in ours.metrics] == [row["loss"] for row in floats.metrics]


AUGMENTATIONS = get_args(Data.model_fields["augment"].annotation)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (5, 1, 28, 17), (3, 2, 7, 9)])
def test_augmented_images_are_those_of_the_definition(kind, shape):
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    given = images.clone()
    result = data.augment(images, kind, torch.Generator().manual_seed(2))
    assert result.dtype == torch.uint8
    assert images.equal(given)
    draws = torch.rand(5, len(images), generator=torch.Generator().manual_seed(2)).double().numpy()
    for number, image in enumerate(images.numpy()):
        down, right, mirror, *centre = draws[:, number]
        reach = [side // 8 for side in image.shape[1:]]
        padding = [(0, 0), *((each, each) for each in reach)]
        padded = np.pad(image, padding, mode="edge" if kind.startswith("shift") else "constant")
        top, left = (int(draw * (2 * each + 1)) for draw, each in zip((down, right), reach, strict=True))
        expected = padded[:, top : top + image.shape[1], left : left + image.shape[2]].copy()
        if "flip" in kind and mirror >= 0.5:
            expected = expected[:, :, ::-1].copy()
        if "cutout" in kind:
            length = min(image.shape[1:]) // 2
            begins = [int(draw * side) - length // 2 for draw, side in zip(centre, image.shape[1:], strict=True)]
            rows, columns = (slice(max(0, begin), max(0, begin + length)) for begin in begins)
            expected[:, rows, columns] = 0
        assert np.array_equal(result[number].numpy(), expected)
    assert result.equal(data.augment(images, kind, torch.Generator().manual_seed(2)))
    assert not result.equal(data.augment(images, kind, torch.Generator().manual_seed(3)))
    floats = data.augment(images.float(), kind, torch.Generator().manual_seed(2))
    assert floats.equal(result.float())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmenting_on_a_gpu_is_augmenting_on_the_cpu(kind):
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    here, there = (data.augment(images.to(at), kind, torch.Generator().manual_seed(2)) for at in ("cpu", "cuda"))
    assert there.is_cuda
    assert there.cpu().equal(here)
    normalize = data.Normalizer(((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    torch.testing.assert_close(normalize(there).cpu(), normalize(here))


@pytest.mark.parametrize("kind", ["flip", "shift_cutout_flip", "shiftflip", ""])
def test_unknown_augmentations_are_refused(kind):
    with pytest.raises(ValueError, match="augment should be shift or crop"):
        data.augment(torch.zeros(1, 1, 8, 8), kind, torch.Generator())


@pytest.mark.parametrize("kind", ["shift", "shift_flip"])
def test_augmented_images_are_shifted_ones(kind):
    image = torch.arange(256.0).view(1, 16, 16)
    shifted = data.augment(image.expand(200, 2, 16, 16), kind, torch.Generator().manual_seed(0))
    assert shifted.shape == (200, 2, 16, 16)
    assert shifted[:, 0].equal(shifted[:, 1])
    centre = shifted[:, 0, 7, 7]
    across = shifted[:, 0, 7, 8] - centre
    assert set(across.tolist()) == ({1.0} if kind == "shift" else {1.0, -1.0})
    rows = set(((centre // 16) - 7).tolist())
    assert rows == {-2, -1, 0, 1, 2}
    again = data.augment(image.expand(200, 2, 16, 16), kind, torch.Generator().manual_seed(0))
    assert shifted.equal(again)


def test_augmenting_tiny_images_leaves_them():
    images = torch.rand(5, 1, 3, 3)
    assert data.augment(images, "shift", torch.Generator()).equal(images)


def test_root_is_the_setting_then_the_environment_then_data(monkeypatch):
    monkeypatch.setenv("PYKD_DATA", "/somewhere")
    assert data.data_root("~/here") == Path.home() / "here"
    assert data.data_root(None) == Path("/somewhere")
    monkeypatch.delenv("PYKD_DATA")
    assert data.data_root(None) == Path("data")


def write_mnist(root: Path, rows: int) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.random.RandomState(0).randint(0, 256, (rows, 28, 28), dtype=np.uint8)
        header = np.array([0x803, rows, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.array([0x801, rows], dtype=">i4").tobytes() + bytes(row % 10 for row in range(rows))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_mnist_reads_its_files(tmp_path):
    write_mnist(tmp_path, 40)
    splits = data.load(Data(name="mnist", root=str(tmp_path), holdout=0.25))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [30, 10, 40]
    assert splits.in_shape == (1, 28, 28)
    assert splits.test.labels.tolist() == [row % 10 for row in range(40)]
    assert splits.test.images.dtype == torch.uint8


def write_svhn(root: Path, rows: int = 40, **changes: object) -> None:
    for number, part in enumerate(("train", "test")):
        random = np.random.RandomState(number)
        images = random.randint(0, 256, (32, 32, 3, rows), dtype=np.uint8)
        labels = (np.arange(rows, dtype=np.uint8) % 10 + 1)[:, None]
        content = {"X": images, "y": labels, **changes}
        content = {name: value for name, value in content.items() if value is not None}
        savemat(root / f"{part}_32x32.mat", content, do_compression=True)


@pytest.fixture
def write_cifar(monkeypatch):
    """Writes small files in CIFAR's layout, and has torchvision take their sums for the published ones."""

    def write(root: Path, classes: int = 10, rows: int = 40) -> None:
        kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
        folder = root / kind.base_folder
        folder.mkdir()

        def put(file: str, content: dict[str, object]) -> list[str]:
            (folder / file).write_bytes(pickle.dumps(content))
            return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

        def batches(files: list[list[str]]) -> list[list[str]]:
            random = np.random.RandomState(len(files))
            key = "labels" if classes == 10 else "fine_labels"
            pixels = (random.randint(0, 256, (rows, 3072), dtype=np.uint8) for _ in files)
            labels = [row % classes for row in range(rows)]
            return [put(file, {"data": data, key: labels}) for (file, _), data in zip(files, pixels, strict=True)]

        monkeypatch.setattr(kind, "train_list", batches(kind.train_list))
        monkeypatch.setattr(kind, "test_list", batches(kind.test_list))
        names = [f"class {number}" for number in range(classes)]
        file, md5 = put(kind.meta["filename"], {kind.meta["key"]: names})
        monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": md5})

    return write


@pytest.fixture
def offline(monkeypatch):
    """No network; holds the addresses that were asked for."""
    asked = []

    def refuse(request, *args, **kwargs):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.mark.parametrize(
    ("name", "title", "file"),
    [
        ("mnist", "MNIST", "MNIST/raw/train-images-idx3-ubyte"),
        ("svhn", "SVHN", "train_32x32.mat"),
        ("cifar10", "CIFAR-10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "CIFAR-100", "cifar-100-python/train"),
    ],
)
def test_missing_files_are_fetched_only_where_that_is_asked_for(name, title, file, tmp_path, offline):
    root = tmp_path / "new" / "root"
    with pytest.raises(PykdError) as caught:
        data.load(Data(name=name, root=str(root)))
    assert str(caught.value) == (
        f"{title} is not in {root}: set data.root or PYKD_DATA to the folder that holds {file}, "
        "or fetch it with --set data.download=true"
    )
    assert not offline
    assert not root.exists()
    with pytest.raises(PykdError, match=f"{title} cannot be fetched into {root} .*no network.*: go on where") as caught:
        data.load(Data(name=name, root=str(root), download=True))
    assert offline
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_told(tmp_path, offline):
    (tmp_path / "file").write_text("")
    with pytest.raises(PykdError, match=r"SVHN cannot be fetched into .*file"):
        data.load(Data(name="svhn", root=str(tmp_path / "file"), download=True))


def test_what_is_there_is_not_fetched(tmp_path, offline, write_cifar):
    write_mnist(tmp_path, 40)
    write_svhn(tmp_path)
    write_cifar(tmp_path, 10)
    write_cifar(tmp_path, 100, rows=200)
    for name in ("mnist", "svhn", "cifar10", "cifar100"):
        assert len(data.load(Data(name=name, root=str(tmp_path), download=True)).test) in (40, 200)
    assert not offline


def test_what_was_fetched_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: write_mnist(Path(self.root), 40))
    assert len(data.load(Data(name="mnist", root=str(tmp_path / "new"), download=True)).test) == 40


@pytest.mark.parametrize(("classes", "rows", "batches"), [(10, 40, 5), (100, 200, 1)])
def test_cifar_reads_its_files(classes, rows, batches, tmp_path, write_cifar):
    write_cifar(tmp_path, classes, rows)
    splits = data.load(Data(name=f"cifar{classes}", root=str(tmp_path), holdout=0.5))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [rows * batches // 2] * 2 + [rows]
    assert splits.in_shape == (3, 32, 32)
    assert splits.class_names == tuple(f"class {number}" for number in range(classes))
    assert splits.test.labels.tolist() == [row % classes for row in range(rows)]
    pixels = np.random.RandomState(1).randint(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
    assert np.array_equal(splits.test.images.numpy(), pixels)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("how", ["short", "foreign", "empty"])
def test_broken_cifar_is_told_and_never_unpickled(how, file, tmp_path, write_cifar):
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / file
    file.write_bytes({"short": file.read_bytes()[:-7], "foreign": b"cos\nabort\n(tR.", "empty": b""}[how])
    with pytest.raises(PykdError, match=r"the CIFAR-10 files in .*cifar-10-batches-py are incomplete or broken"):
        data.load(Data(name="cifar10", root=str(tmp_path)))


def test_svhn_reads_its_files(tmp_path):
    write_svhn(tmp_path)
    splits = data.load(Data(name="svhn", root=str(tmp_path), holdout=0.25))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [30, 10, 40]
    assert splits.in_shape == (3, 32, 32)
    assert splits.class_names == tuple("0123456789")
    assert splits.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 4
    pixels = np.random.RandomState(1).randint(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    assert np.array_equal(splits.test.images.numpy(), pixels.transpose(3, 2, 0, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"X": None}, "train_32x32.mat has no X: SVHN files hold"),
        ({"y": None}, "train_32x32.mat has no y: SVHN files hold"),
        ({"X": np.zeros((32, 32, 3, 40))}, r"X should be uint8 \[32, 32, 3, N\], got float64 \[32, 32, 3, 40\]"),
        ({"X": np.zeros((40, 32, 32, 3), np.uint8)}, r"got uint8 \[40, 32, 32, 3\]"),
        ({"X": np.zeros((32, 32), np.uint8)}, r"got uint8 \[32, 32\]"),
        ({"X": {"a": 1}}, r"X should be uint8 \[32, 32, 3, N\]"),
        ({"y": np.ones((39, 1))}, r"y should be numbers \[40, 1\], got float64 \[39, 1\]"),
        ({"y": np.ones((1, 40), np.uint8)}, r"got uint8 \[1, 40\]"),
        ({"y": np.array([["one"]] * 40, object)}, r"y should be numbers \[40, 1\], got object"),
        ({"y": np.full((40, 1), 11, np.uint8)}, "has the label 11: those of SVHN are 1 to 10, where 10 is the digit 0"),
        ({"y": np.full((40, 1), -1, np.int16)}, "has the label -1"),
        ({"y": np.full((40, 1), 2.5)}, "has the label 2.5"),
        ({"y": np.full((40, 1), np.nan)}, "has the label nan"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.zeros((0, 1), np.uint8)}, "has no rows"),
    ],
)
def test_wrong_svhn_files_say_what_is_wrong(changes, words, tmp_path):
    write_svhn(tmp_path, **changes)
    with pytest.raises(PykdError, match=words) as caught:
        data.load(Data(name="svhn", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["short", "a few bytes", "foreign", "empty", "folder"])
def test_broken_svhn_is_told(how, tmp_path):
    write_svhn(tmp_path)
    file = tmp_path / "test_32x32.mat"
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    else:
        broken = {"short": content[:-70], "a few bytes": content[:200], "foreign": b"GIF89a" * 99, "empty": b""}
        file.write_bytes(broken[how])
    words = "SVHN is not in" if how == "folder" else "test_32x32.mat is not a whole .mat file: delete it and fetch"
    with pytest.raises(PykdError, match=words):
        data.load(Data(name="svhn", root=str(tmp_path)))


@pytest.mark.parametrize("how", ["short", "foreign", "empty"])
def test_broken_mnist_is_told(how, tmp_path):
    write_mnist(tmp_path, 40)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes({"short": file.read_bytes()[:-7], "foreign": b"GIF89a" * 99, "empty": b""}[how])
    with pytest.raises(PykdError, match="incomplete or broken"):
        data.load(Data(name="mnist", root=str(tmp_path)))


@pytest.mark.skipif(not HAS_MNIST, reason="PYKD_DATA names no folder with MNIST/raw")
def test_real_mnist():
    splits = data.load(Data(name="mnist", holdout=0.1))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [54001, 5999, 10000]
    images, _, _ = splits.train.__getitems__(range(len(splits.train)))
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def write_folder(root: Path, size: tuple[int, int] = (9, 7), rows: int = 6) -> Path:
    random = np.random.RandomState(0)
    for part in ("train", "test"):
        for name in ("cat", "dog", "owl"):
            (root / part / name / "more").mkdir(parents=True)
            for row in range(rows):
                pixels = random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                place = root / part / name / ("more" if row % 2 else ".")
                Image.fromarray(pixels).save(place / f"{row}.png")
    return root


def test_image_folder_reads_its_files(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    splits = data.load(Data(name="imagefolder", root=str(tmp_path), holdout=0.2))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [15, 3, 18]
    assert splits.class_names == ("cat", "dog", "owl")
    assert splits.in_shape == (3, 7, 9)
    expected = np.asarray(Image.open(tmp_path / "test" / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(splits.test.images[0].numpy(), expected)
    assert splits.test.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_a_large_image_folder_is_read_lazily_with_the_same_values(tmp_path):
    write_folder(tmp_path)
    small = data.load(Data(name="imagefolder", root=str(tmp_path)))
    large = data.load(Data(name="imagefolder", root=str(tmp_path), memory_limit_gib=0.0))
    assert isinstance(large.train, data.ImageFiles)
    assert isinstance(small.train, data.InMemory)
    for part in ("train", "holdout", "test"):
        ours, theirs = (next(iter(DataLoader(getattr(s, part), 4, collate_fn=data.collate))) for s in (small, large))
        torch.testing.assert_close(ours, theirs)
    pixels, label, index = large.train.raw()[3]
    assert pixels.equal(small.train.raw()[3][0])
    assert (int(label), int(index)) == (int(small.train.labels[3]), 3)


def test_image_size_brings_images_to_one_size(tmp_path):
    write_folder(tmp_path)
    other = tmp_path / "train" / "dog" / "9.jpg"
    Image.new("L", (20, 50), 128).save(other)
    with pytest.raises(PykdError, match=r"9\.jpg has 20x50 pixels and .* 9x7: set data\.image_size"):
        data.load(Data(name="imagefolder", root=str(tmp_path)))
    splits = data.load(Data(name="imagefolder", root=str(tmp_path), image_size=6))
    assert splits.in_shape == (3, 6, 6)


def test_a_set_without_contrast_is_normalised_to_finite_values(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for row in range(2):
                Image.new("RGB", (4, 4), "black").save(tmp_path / part / name / f"{row}.png")
    splits = data.load(Data(name="imagefolder", root=str(tmp_path), holdout=0.5))
    assert splits.train[0][0].isfinite().all()


def broken(root: Path, how: str) -> str:
    file = root / "train" / "dog" / "3.png"
    if how == "no train":
        (root / "train").rename(root / "training")
    elif how == "no test":
        (root / "test").rename(root / "testing")
    elif how == "text":
        file.write_text("not an image")
    elif how == "cut":
        content = (root / "train" / "dog" / "0.png").read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty file":
        file.write_bytes(b"")
    elif how == "dangling":
        file.symlink_to(root / "nowhere.png")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "empty class":
        (root / "train" / "emu").mkdir()
    elif how == "foreign class":
        (root / "test" / "cat").rename(root / "test" / "yak")
    elif how == "one class":
        for name in ("dog", "owl"):
            (root / "train" / name).rename(root / name)
            (root / "test" / name).rename(root / f"{name}-test")
    elif how == "no class":
        for path in (root / "train").iterdir():
            path.rename(root / path.name)
    return {
        "no train": "train is missing: set data.root or PYKD_DATA to a folder that holds train/<class>/",
        "no test": "test is missing",
        "empty class": "emu holds no image",
        "foreign class": "has a class 'yak' that",
        "one class": "has one class, 'cat'",
        "no class": "train holds no class",
    }.get(how, r"3\.png is not an image that can be read")


HOWS = "no train,no test,text,cut,empty file,dangling,pipe,empty class,foreign class,one class,no class"


@pytest.mark.parametrize("how", HOWS.split(","))
def test_wrong_image_folders_say_what_to_do(how, tmp_path):
    words = broken(write_folder(tmp_path, rows=3), how)
    with pytest.raises(PykdError, match=words) as caught:
        data.load(Data(name="imagefolder", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_real_cifar10_in_folders(cifar10_folder):
    splits = data.load(Data(name="imagefolder", root=str(cifar10_folder)))
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [720, 80, 200]
    assert splits.class_names[0] == "airplane"
    for ours, published in zip(splits.train.normalize, data.cifar.NORMALIZE[10], strict=True):
        assert ours == pytest.approx(published, abs=0.02)
