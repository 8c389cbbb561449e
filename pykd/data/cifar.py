"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the files that torchvision reads, decoded once."""

from pathlib import Path
from typing import Literal

import torch

from pykd.data.files import obtain, whole
from pykd.data.memory import InMemory

NORMALIZE = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
PLACE = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def read(
    root: Path, classes: Literal[10, 100], *, download: bool = False
) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Training part, test part, class names (the fine ones of CIFAR-100).

    The files are pickles; torchvision opens one only if its MD5 sum is the published one.

    Raises:
        PykdError: the files are missing (with the way to get them) or not the published ones.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    name, place = f"CIFAR-{classes}", PLACE[classes]
    kind = CIFAR10 if classes == 10 else CIFAR100
    files = [*(file for file, _ in (*kind.train_list, *kind.test_list)), kind.meta["filename"]]
    obtain(name, root, place, files, lambda: kind(str(root), download=True), download=download)
    parts = []
    for train in (True, False):
        with whole(name, root / place):
            part = kind(str(root), train=train)
            images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            parts.append(InMemory(images, torch.tensor(part.targets), NORMALIZE[classes]))
    return parts[0], parts[1], tuple(part.classes)
