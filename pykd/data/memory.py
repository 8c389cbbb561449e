"""Images that stay in memory as uint8 and are normalised a batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Normalize = tuple[tuple[float, ...], tuple[float, ...]]
Sample = tuple[Tensor, Tensor, Tensor]


class InMemory(Dataset[Sample]):
    r"""Images, labels and their row numbers; an image is read as :math:`(image / 255 - mean) / std`.

    Give ``pykd.data.collate`` to the DataLoader: a whole batch is then gathered at once.

    Args:
        images: ``[N, C, H, W]``, uint8.
        labels: ``[N]``, int64.
        normalize: mean and standard deviation of each channel, for pixels in [0, 1].

    Raises:
        ValueError: shapes or dtypes differ from the above.

    Example:
        >>> digits = InMemory(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), ((0.5,), (0.25,)))
        >>> image, label, index = digits[3]
        >>> image.shape, label, index, image.max()
        (torch.Size([1, 8, 8]), tensor(3), tensor(3), tensor(-2.))
    """

    def __init__(self, images: Tensor, labels: Tensor, normalize: Normalize) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images should be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels should be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        self.images = images
        self.labels = labels
        self.normalize = normalize
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in normalize)
        self._scale = (1 / (255 * std)).float()
        self._shift = (-mean / std).float()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """Images ``[B, C, H, W]`` float32, labels ``[B]`` and indices ``[B]`` of a whole batch."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images.index_select(0, rows).float().mul_(self._scale).add_(self._shift)
        return images, self.labels.index_select(0, rows), rows

    def __getitem__(self, index: int) -> Sample:
        images, labels, indices = self.__getitems__([range(len(self))[index]])
        return images[0], labels[0], indices[0]

    def subset(self, indices: Tensor) -> "InMemory":
        """A copy of the rows ``indices``, numbered anew."""
        return InMemory(self.images[indices], self.labels[indices], self.normalize)


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


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Every image shifted by its own random offset of up to an eighth of its sides; edges are repeated.

    Args:
        images: ``[B, C, H, W]``.
        kind: "shift", or "shift_flip" to mirror every second image, too, by chance.
        generator: on the CPU; draws three numbers an image, whatever the kind.

    Returns:
        A new tensor like ``images``.
    """
    count, _, height, width = images.shape
    draws = torch.rand(3, count, generator=generator).to(images.device)

    def positions(side: int, draw: Tensor) -> Tensor:
        reach = side // 8
        offset = (draw * (2 * reach + 1)).long() - reach
        return (torch.arange(side, device=images.device) + offset[:, None]).clamp(0, side - 1)

    rows, columns = positions(height, draws[0]), positions(width, draws[1])
    if kind == "shift_flip":
        columns = torch.where(draws[2, :, None] < 0.5, columns, columns.flip(1))
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))
