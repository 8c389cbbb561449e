"""Images in folders: ``train/<class>/*`` and ``test/<class>/*`` below a root."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pykd.data.memory import InMemory, Normalize, Normalizer, Sample
from pykd.errors import PykdError

if TYPE_CHECKING:
    from pykd.config import Data

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# The mean and the deviation of a channel are known to about 1/sqrt(images * pixels) of a deviation.
STATISTICS_IMAGES = 4096


class ImageFiles(Dataset[Sample]):
    """Like ``InMemory``, for sets larger than the memory: an image is decoded whenever it is read."""

    def __init__(
        self, files: Sequence[Path], labels: Tensor, decode: Callable[[Path], Tensor], normalize: Normalize | None
    ) -> None:
        self.files = files
        self.labels = labels
        self.normalize = normalize
        self._decode = decode
        self._normalized = normalize and Normalizer(normalize)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image = self._decode(self.files[index])
        if self._normalized:
            image = self._normalized(image)
        return image, self.labels[index], torch.tensor(index)

    def subset(self, indices: Tensor) -> "ImageFiles":
        """The rows ``indices``, numbered anew."""
        return ImageFiles([self.files[i] for i in indices.tolist()], self.labels[indices], self._decode, self.normalize)

    def raw(self) -> "ImageFiles":
        """The same rows, whose images stay uint8."""
        return ImageFiles(self.files, self.labels, self._decode, None)


class _Decoder:
    """File to uint8 ``[3, H, W]``; all images have one size, the first one's or ``image_size``."""

    def __init__(self, image_size: int | None, first: Path) -> None:
        self.image_size = image_size
        self.first = first
        self.shape: torch.Size | None = None
        self.shape = self(first).shape

    def __call__(self, file: Path) -> Tensor:
        from PIL import Image, ImageOps

        try:
            if not file.is_file():
                raise OSError("not a file")
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise PykdError(f"{file} is not an image that can be read: delete or replace it") from error
        if self.image_size is not None:
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.shape is not None and pixels.shape != self.shape:
            raise PykdError(
                f"{file} has {image.width}x{image.height} pixels and {self.first} {self.shape[2]}x{self.shape[1]}: "
                "set data.image_size to bring all images to one size"
            )
        return pixels


def read(root: Path, data: "Data") -> tuple[InMemory | ImageFiles, InMemory | ImageFiles, tuple[str, ...]]:
    """Training part, test part, class names (the folders' names in order).

    Raises:
        PykdError: a folder is missing or empty, or a file is not an image, or sizes differ without ``image_size``.
    """
    train, test = (_files(root / part) for part in ("train", "test"))
    names = tuple(train)
    if len(names) < 2:
        raise PykdError(f"{root / 'train'} has one class, {names[0]!r}: a folder for each of two or more is needed")
    if foreign := [name for name in test if name not in train]:
        raise PykdError(f"{root / 'test'} has a class {foreign[0]!r} that {root / 'train'} has not")
    decode = _Decoder(data.image_size, train[names[0]][0])
    every = [file for part in (train, test) for files in part.values() for file in files]
    fits = len(every) * decode(decode.first).numel() <= data.memory_limit_gib * 2**30

    everything = [file for files in train.values() for file in files]
    sample = everything[:: -(-len(everything) // STATISTICS_IMAGES)]
    normalize = _statistics(_decode_all(sample, decode, "measuring"))

    def part(folders: dict[str, list[Path]]) -> InMemory | ImageFiles:
        files = [file for in_class in folders.values() for file in in_class]
        labels = torch.tensor([names.index(name) for name, in_class in folders.items() for _ in in_class])
        if fits:
            return InMemory(_decode_all(files, decode, "decoding"), labels, normalize)
        return ImageFiles(files, labels, decode, normalize)

    return part(train), part(test), names


def _files(folder: Path) -> dict[str, list[Path]]:
    """Image files of every class folder, sorted by path."""
    if not folder.is_dir():
        raise PykdError(
            f"{folder} is missing: set data.root or PYKD_DATA to a folder that holds train/<class>/ and test/<class>/"
        )
    classes = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        classes[place.name] = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(place, followlinks=True)
            for name in names
            if name.lower().endswith(ENDINGS)
        )
        if not classes[place.name]:
            raise PykdError(f"{place} holds no image: put some there ({', '.join(ENDINGS)}) or remove the folder")
    if not classes:
        raise PykdError(f"{folder} holds no class: put the images of each class into a folder of their own there")
    return classes


def _decode_all(files: Sequence[Path], decode: _Decoder, what: str) -> Tensor:
    from rich.console import Console
    from rich.progress import track

    assert decode.shape is not None
    images = torch.empty(len(files), *decode.shape, dtype=torch.uint8)

    def one(row: int) -> None:
        images[row] = decode(files[row])

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        console = Console(stderr=True)
        done = pool.map(one, range(len(files)))
        for _ in track(done, f"{what} images", len(files), console=console, disable=not sys.stderr.isatty()):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _statistics(images: Tensor) -> Normalize:
    pixels = images.transpose(0, 1).flatten(1)
    # A channel without any contrast is left as it is.
    std, mean = zip(*(torch.std_mean(channel.double() / 255, correction=0) for channel in pixels), strict=True)
    return tuple(float(value) for value in mean), tuple(float(value) or 1.0 for value in std)
