"""A teacher that stays as it is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pykd.training.batches import Source


class FrozenTeacher(nn.Module):
    """``module`` frozen for good: in eval mode, without gradients, run under ``no_grad``.

    Its parameters and buffers do not move, also when somebody calls ``train()`` on the wrapper, on the module or on
    a part of it: eval mode is set again before every call.

    Args:
        module: the trained teacher. Its parameters' ``requires_grad`` is switched off.

    Example:
        >>> teacher = FrozenTeacher(nn.BatchNorm1d(3)).train()
        >>> before = teacher.module.running_mean.clone()
        >>> teacher(torch.ones(2, 3)).requires_grad, before.equal(teacher.module.running_mean)
        (False, True)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """The logits, without gradient."""
        self.module.eval()
        logits: Tensor = self.module(inputs)
        return logits


# Of all teachers together. Larger sets of logits are computed anew in every step: they would compete with the
# networks for memory.
LARGEST_CACHE_BYTES = 2 << 30


class TeacherLogits:
    """The teacher's logits of a training batch, kept in memory where they fit into ``cache_bytes``.

    They are computed in batches that depend on nothing but the data, so that a resumed run sees the same bits;
    ``after_batch`` may raise meanwhile, where a run is stopped.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        source: Source,
        device: torch.device,
        *,
        cache_bytes: int,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.teacher = teacher
        self._source = source
        self._device = device
        self._cache_bytes = cache_bytes if source.indexed else 0
        self._after_batch = after_batch
        self._logits: Tensor | None = None

    def __call__(self, inputs: Tensor, positions: Tensor | None) -> Tensor:
        """Logits of the rows ``inputs``, which stand at ``positions`` in the training data."""
        if positions is None or not self._cache_bytes:
            return self.teacher(inputs)
        if self._logits is None:
            self._logits = self._compute()
        if self._logits is None:
            self._cache_bytes = 0
            return self.teacher(inputs)
        return self._logits.index_select(0, positions.to(self._device))

    def _compute(self) -> Tensor | None:
        kept: list[Tensor] = []
        with torch.autocast(self._device.type, enabled=False):
            for rows in self._source.batches(self._source.large_batch):
                kept.append(self.teacher(self._source.normalized(rows.inputs.to(self._device))))
                if kept[0][0].nbytes * self._source.rows > self._cache_bytes:
                    return None
                self._after_batch()
        return torch.cat(kept)
