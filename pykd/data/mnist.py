"""MNIST from the files that torchvision reads, decoded once."""

from pathlib import Path

from pykd.data.memory import InMemory
from pykd.errors import PykdError

NORMALIZE = ((0.1307,), (0.3081,))


def read(root: Path) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Training part, test part, class names.

    Raises:
        PykdError: the files are missing (with the way to get them) or broken.
    """
    from torchvision.datasets import MNIST

    if not (root / "MNIST" / "raw").is_dir():
        raise PykdError(
            f"MNIST is not in {root}: set data.root or PYKD_DATA to the folder that holds MNIST/raw, or fetch it with "
            f"python -c \"import torchvision; torchvision.datasets.MNIST('{root}', download=True)\""
        )
    parts = []
    for train in (True, False):
        try:
            part = MNIST(str(root), train=train, download=False)
            parts.append(InMemory(part.data.unsqueeze(1), part.targets, NORMALIZE))
        except (RuntimeError, ValueError, AssertionError, OSError, EOFError) as error:
            raise PykdError(
                f"the MNIST files in {root / 'MNIST' / 'raw'} are incomplete or broken: delete them and fetch them anew"
            ) from error
    return parts[0], parts[1], tuple("0123456789")
