"""What a run's student answers on the test data: which classes it mistakes for which, and on which images."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pykd import runs
from pykd.errors import PykdError

if TYPE_CHECKING:
    from pykd.config import Data
    from pykd.data import ImageFiles, InMemory, Splits

MISTAKES = 24
LARGEST_SIDE = 96  # of an image in the page, in pixels


@dataclass(frozen=True)
class Mistake:
    """An image whose class was not found.

    Args:
        row: of the test data.
        png: the image.
        truth: its class.
        answer: the class that the student takes it for.
        confidence: the student's, a share.
    """

    row: int
    png: bytes
    truth: str
    answer: str
    confidence: float


@dataclass(frozen=True)
class Answers:
    """A student's answers.

    Args:
        classes: their names.
        confusion: how many rows of each class (down) it takes for each (across).
        mistakes: of those, the ones of which it is surest, the surest first.
    """

    classes: Sequence[str]
    confusion: NDArray[np.int64]
    mistakes: list[Mistake]

    @property
    def right(self) -> int:
        """Rows whose class was found."""
        return int(np.trace(self.confusion))

    @property
    def rows(self) -> int:
        """All of them."""
        return int(self.confusion.sum())


def answers(run: Path, changes: Sequence[str], load: "Callable[[Data], Splits]") -> Answers:
    """The answers of the student in the folder ``run``, on the CPU.

    Args:
        run: of a finished run.
        changes: assignments to its settings, such as ``data.root=DIR``.
        load: gives the data.

    Raises:
        PykdError: the settings, the weights or the data cannot be read.
    """
    import torch

    from pykd.training.batches import Source

    config = runs.stored(run, ["data.download=false", *changes])  # only what is asked for now
    file = runs.weights_file(run, "student")
    if not file.is_file():
        raise PykdError(f"{file.name} is missing, so that the student cannot be asked")
    splits = load(config.data)
    network = runs.finished_network(config, "student", file, splits).cpu().eval()
    source = Source.of(splits.test, "test")
    answered, sure, labels = [], [], []
    with torch.inference_mode():
        for batch in source.batches(source.large_batch):
            logits = network(source.normalized(batch.inputs))
            source.check_labels(batch.labels, logits.shape[-1])
            best = logits.softmax(-1).max(-1)
            answered.append(best.indices)
            sure.append(best.values)
            labels.append(batch.labels)
    answer, confidence, label = torch.cat(answered), torch.cat(sure), torch.cat(labels)
    count = splits.classes
    confusion = torch.bincount(label * count + answer, minlength=count * count).view(count, count)
    wrong = (answer != label).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    images, names = splits.test.raw(), splits.class_names
    mistakes = [
        Mistake(row, _png(images, row), names[label[row]], names[answer[row]], float(confidence[row]))
        for row in wrong.tolist()
    ]
    return Answers(names, confusion.numpy(), mistakes)


def _png(images: "InMemory | ImageFiles", row: int) -> bytes:
    from PIL import Image

    pixels: Any = images[row][0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels[:, :, :3])
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
