"""MNIST from the files that torchvision reads, decoded once."""

from pathlib import Path

from pykd.data.files import obtain, whole
from pykd.data.memory import InMemory

NORMALIZE = ((0.1307,), (0.3081,))
PLACE = "MNIST/raw"
FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


def read(root: Path, *, download: bool = False) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Training part, test part, class names.

    Raises:
        PykdError: the files are missing (with the way to get them) or broken.
    """
    from torchvision.datasets import MNIST

    obtain("MNIST", root, PLACE, FILES, lambda: MNIST(str(root), download=True), download=download)
    parts = []
    for train in (True, False):
        with whole("MNIST", root / PLACE):
            part = MNIST(str(root), train=train)
            parts.append(InMemory(part.data.unsqueeze(1), part.targets, NORMALIZE))
    return parts[0], parts[1], tuple("0123456789")
