"""Images that stay in memory as uint8 and are normalised a batch at a time."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Normalize = tuple[tuple[float, ...], tuple[float, ...]]
Sample = tuple[Tensor, Tensor, Tensor]


class Normalizer:
    r"""Turns pixels into what a network takes, on the device where they are: :math:`(x / 255 - mean) / std`.

    Args:
        normalize: mean and standard deviation of each channel, for pixels in [0, 1].

    Example:
        >>> Normalizer(((0.5,), (0.25,)))(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
        tensor([[[[-2.,  2.]]]])
    """

    def __init__(self, normalize: Normalize) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in normalize)
        self._scale = (1 / (255 * std)).float()
        self._shift = (-mean / std).float()

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 ``[..., C, H, W]`` of ``images``, uint8 of the same shape."""
        self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.float().mul_(self._scale).add_(self._shift)


class InMemory(Dataset[Sample]):
    r"""Images, labels and their row numbers; an image is read as :math:`(image / 255 - mean) / std`.

    Give ``pykd.data.collate`` to the DataLoader: a whole batch is then gathered at once.

    Args:
        images: ``[N, C, H, W]``, uint8.
        labels: ``[N]``, int64.
        normalize: mean and standard deviation of each channel, for pixels in [0, 1]; None leaves the images uint8.

    Raises:
        ValueError: shapes or dtypes differ from the above.

    Example:
        >>> digits = InMemory(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), ((0.5,), (0.25,)))
        >>> image, label, index = digits[3]
        >>> image.shape, label, index, image.max()
        (torch.Size([1, 8, 8]), tensor(3), tensor(3), tensor(-2.))
    """

    def __init__(self, images: Tensor, labels: Tensor, normalize: Normalize | None) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images should be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels should be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        self.images = images
        self.labels = labels
        self.normalize = normalize
        self._normalized = normalize and Normalizer(normalize)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """Images ``[B, C, H, W]``, labels ``[B]`` and indices ``[B]`` of a whole batch."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images.index_select(0, rows)
        if self._normalized:
            images = self._normalized(images)
        return images, self.labels.index_select(0, rows), rows

    def __getitem__(self, index: int) -> Sample:
        images, labels, indices = self.__getitems__([range(len(self))[index]])
        return images[0], labels[0], indices[0]

    def subset(self, indices: Tensor) -> "InMemory":
        """A copy of the rows ``indices``, numbered anew."""
        return InMemory(self.images[indices], self.labels[indices], self.normalize)

    def raw(self) -> "InMemory":
        """The same rows, whose images stay uint8."""
        return InMemory(self.images, self.labels, None)


def collate(batch: Sample | list[Sample]) -> Sample:
    """``collate_fn`` of a DataLoader: takes a batch that is already gathered as it is, stacks a list of samples."""
    return batch if isinstance(batch, tuple) else tuple(default_collate(batch))


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out: ``share`` of every class, at least one row and never all; ascending.

    A class of a single row is kept.

    The same labels, share and seed give the same rows on every machine.
    """
    random = np.random.RandomState(seed)
    held = []
    for label in np.unique(labels.numpy()):
        rows = np.flatnonzero(labels.numpy() == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(random.permutation(rows)[:count])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.from_numpy(np.concatenate(held))] = True
    return (~out).nonzero().flatten(), out.nonzero().flatten()


def few(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """``per_class`` random rows of every class, ascending; the same arguments give the same rows on every machine.

    With the same seed, more rows of a class hold the fewer.

    >>> few(torch.tensor([0, 1, 1, 0, 1]), 1, seed=0).numel()
    2
    """
    random = np.random.RandomState(seed)
    drawn = [random.permutation(np.flatnonzero(labels.numpy() == label))[:per_class] for label in np.unique(labels)]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Every image shifted by its own random offset of up to an eighth of its sides (4 pixels of 32), and more.

    Args:
        images: ``[B, C, H, W]`` of any dtype, on any device.
        kind: "shift" repeats the edges, "crop" fills up with zeros (black in uint8); "_flip" after it mirrors every
            second image, by chance; "_cutout" at the end fills a square with zeros, whose side is half the image's
            shorter side and whose centre is anywhere in the image, so that it may hang over the edges.
        generator: on the CPU; draws five numbers an image, whatever the kind and the device.

    Returns:
        A new tensor like ``images``.

    Raises:
        ValueError: another ``kind``.

    Example:
        >>> images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
        >>> augment(images, "crop_flip", torch.Generator().manual_seed(0)).dtype
        torch.uint8
    """
    if not (words := re.fullmatch("(shift|crop)(_flip)?(_cutout)?", kind)):
        raise ValueError(f"augment should be shift or crop, with _flip, _cutout or both after it, got {kind!r}")
    fill, flip, cutout = words.groups()
    count, _, height, width = images.shape
    draws = torch.rand(5, count, 1, generator=generator).to(images.device)

    def source(side: int, draw: Tensor) -> Tensor:
        reach = side // 8
        return torch.arange(side, device=images.device) + (draw * (2 * reach + 1)).long() - reach

    rows, columns = source(height, draws[0]), source(width, draws[1])
    if flip:
        columns = torch.where(draws[2] < 0.5, columns, columns.flip(1))
    result = images.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand_as(images))
    result = result.gather(3, columns.clamp(0, width - 1)[:, None, None, :].expand_as(images))
    if fill == "crop":
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        result.masked_fill_(~inside[:, None], 0)
    if cutout:
        length = min(height, width) // 2

        def hole(side: int, draw: Tensor) -> Tensor:
            place = torch.arange(side, device=images.device) - (draw * side).long() + length // 2
            return (place >= 0) & (place < length)

        result.masked_fill_((hole(height, draws[3])[:, :, None] & hole(width, draws[4])[:, None, :])[:, None], 0)
    return result
