"""Feature maps of teacher and student at modules that a recipe names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.errors import PykdError
from pykd.methods import _fields
from pykd.nn.features import features
from pykd.training import Batch, FrozenTeacher


def check_points(teacher_at: object, student_at: object) -> None:
    """Two lists of names of one length, at least one each."""
    _fields.names("teacher_at", teacher_at)
    _fields.names("student_at", student_at)
    count, other = len(teacher_at), len(student_at)  # type: ignore[arg-type]  # they are lists by now
    if not count or count != other:
        raise ValueError(
            f"teacher_at and student_at should name as many modules, at least one, got {count} and {other}"
        )


def of_teacher(batch: Batch, names: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits and maps of the (first) teacher, without gradient, in one pass.

    Raises:
        PykdError: a teacher that is not frozen.
    """
    teacher = batch.teachers[0]
    if not isinstance(teacher, FrozenTeacher):
        raise PykdError(
            f"the teacher, a {type(teacher).__name__}, is not frozen: wrap it in pykd.training.FrozenTeacher"
        )
    logits, maps = features(teacher, batch.inputs, names, of=teacher.module)
    return logits, maps


@torch.no_grad()
def shapes(whose: str, network: nn.Module, inputs: Tensor, names: Sequence[str]) -> list[torch.Size]:
    """Of the maps at these modules, for one row.

    Raises:
        PykdError: unknown names, values that are no maps ``[rows, channels, height, width]``, or not finite.
    """
    training = {module: module.training for module in network.modules()}
    try:
        _, maps = features(network.eval(), inputs, names)
    except PykdError as error:
        raise PykdError(f"{whose}: {error}") from None
    finally:
        for module, mode in training.items():
            module.training = mode
    for name, value in zip(names, maps, strict=True):
        if value.dim() != 4:
            raise PykdError(
                f"{whose}: the module {name!r} gives {list(value.shape)}: name one that gives maps "
                "[rows, channels, height, width]"
            )
        if not value.isfinite().all():
            raise PykdError(f"{whose}: the module {name!r} gives NaN or infinity: train the network anew")
    return [value.shape for value in maps]


def aligned(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the smaller height and width: what is larger is averaged over its places.

    >>> one, other = aligned(torch.zeros(1, 2, 8, 4), torch.zeros(1, 3, 4, 8))
    >>> one.shape, other.shape
    (torch.Size([1, 2, 4, 4]), torch.Size([1, 3, 4, 4]))
    """
    height, width = (min(sides) for sides in zip(one.shape[2:], other.shape[2:], strict=True))
    return _pooled(one, height, width), _pooled(other, height, width)


def _pooled(maps: Tensor, height: int, width: int) -> Tensor:
    same = (maps.shape[2], maps.shape[3]) == (height, width)
    return maps if same else F.adaptive_avg_pool2d(maps, (height, width))
