"""Data sets: what they hold, how they are split, and what is said where files are missing or broken.

MNIST is tested on small files of its own layout, and on the real ones where ``PYKD_DATA`` has them.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pykd import data
from pykd.config import Data
from pykd.errors import PykdError

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


def test_digits():
    splits = data.load(Data(name="digits", holdout=0.2), seed=1)
    assert [len(part) for part in (splits.train, splits.holdout, splits.test)] == [1154, 288, 355]
    assert splits.classes == 10
    assert splits.in_shape == (1, 8, 8)
    assert splits.train.images.max() == 255
    assert splits.test.labels.bincount().min() >= 34
    pixels = torch.cat([splits.train.images, splits.holdout.images]) / 255
    torch.testing.assert_close(splits.normalize[0][0], float(pixels.mean()), atol=5e-5, rtol=0)
    torch.testing.assert_close(splits.normalize[1][0], float(pixels.std(correction=0)), atol=5e-5, rtol=0)


def test_test_part_does_not_depend_on_the_seed():
    first, second = (data.load(Data(), seed=seed) for seed in (0, 1))
    assert first.test.images.equal(second.test.images)
    assert not first.holdout.images.equal(second.holdout.images)


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


def test_missing_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(PykdError, match=r"set data.root or PYKD_DATA .* or fetch it with python -c") as caught:
        data.load(Data(name="mnist", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["missing", "short", "foreign", "empty"])
def test_broken_mnist_is_told(how, tmp_path):
    write_mnist(tmp_path, 40)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = {"missing": None, "short": file.read_bytes()[:-7], "foreign": b"GIF89a" * 99, "empty": b""}[how]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
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
