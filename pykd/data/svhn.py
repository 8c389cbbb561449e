"""Street View House Numbers (Netzer et al., 2011), cropped digits: ``train_32x32.mat`` and ``test_32x32.mat``."""

from pathlib import Path

import numpy as np
import torch

from pykd.data.files import obtain
from pykd.data.memory import InMemory
from pykd.errors import PykdError

NORMALIZE = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
FILES = ("train_32x32.mat", "test_32x32.mat")


def read(root: Path, *, download: bool = False) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Training part, test part, class names.

    torchvision fetches the files but does not read them here: it wants the published MD5 sums, and so refuses a part
    of the set, and takes whatever labels a file has.

    Raises:
        PykdError: a file is missing (with the way to get it), broken, or holds something else.
    """
    from torchvision.datasets import SVHN

    def fetch() -> None:
        for split, file in zip(("train", "test"), FILES, strict=True):
            if not (root / file).exists():
                SVHN(str(root), split=split, download=True)

    obtain("SVHN", root, "", FILES, fetch, download=download)
    train, test = (_read(root / file) for file in FILES)
    return train, test, tuple("0123456789")


def _read(file: Path) -> InMemory:
    from scipy.io import loadmat

    try:
        content = loadmat(str(file), variable_names=("X", "y"))
    except Exception as error:  # scipy has no error of its own for a file that is none or ends early
        raise PykdError(f"{file} is not a whole .mat file: delete it and fetch it anew") from error
    for name in ("X", "y"):
        if name not in content:
            raise PykdError(f"{file} has no {name}: SVHN files hold the images as X and their labels as y")
    images, labels = (np.asarray(content[name]) for name in ("X", "y"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise PykdError(f"{file}: X should be uint8 [32, 32, 3, N], got {images.dtype} {list(images.shape)}")
    if labels.dtype.kind not in "uif" or labels.shape != (images.shape[3], 1):
        raise PykdError(f"{file}: y should be numbers [{images.shape[3]}, 1], got {labels.dtype} {list(labels.shape)}")
    if len(strange := labels[~np.isin(labels, range(1, 11))]):
        raise PykdError(f"{file} has the label {strange[0]}: those of SVHN are 1 to 10, where 10 is the digit 0")
    return InMemory(
        torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1))),
        torch.from_numpy(labels[:, 0].astype(np.int64) % 10),
        NORMALIZE,
    )
