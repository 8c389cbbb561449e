"""Real data, where there is some."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory):
    """80 real training and 20 test images of every class, in folders.

    Each tar holds, for every class, strips of images below one another.
    """
    place = Path(os.environ.get("PYKD_DATA", "nowhere")) / "cifar10"
    if not all((place / f"{name}.tar").is_file() for name in ("train_a", "test")):
        pytest.skip("PYKD_DATA names no folder with cifar10/train_a.tar and cifar10/test.tar")
    root = tmp_path_factory.mktemp("cifar10")
    for archive, rows in (("train_a", 80), ("test", 20)):
        with tarfile.open(place / f"{archive}.tar") as tar:
            for member in tar.getmembers():
                if not member.name.endswith(".0.webp"):
                    continue
                strip = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                folder = root / member.name.removesuffix(".0.webp")
                folder.mkdir(parents=True)
                for row in range(rows):
                    strip.crop((0, 32 * row, 32, 32 * row + 32)).save(folder / f"{row}.png")
    return root
