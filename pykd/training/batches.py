"""Batches in an order that is a pure function of a seed, read from any position on, shared out among processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    get_worker_info,
)

from pykd.data import ImageFiles, InMemory, Normalizer, collate
from pykd.errors import PykdError
from pykd.training.stage import derive

# Evaluation reads large batches for speed; the bound keeps large images within a small machine's memory.
LARGE_BATCH_ROWS = 1024
LARGE_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Rows:
    """What one process holds of a global batch.

    ``weight`` is the number of rows that count: a process for which none is left holds the first row of the batch
    with weight 0, because every process must take part in every step.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor | None  # in the data, where the order is ours
    offset: int  # of the first row in the global batch
    weight: int
    total: int  # rows of the global batch

    def part(self, index: int, parts: int) -> "Rows":
        """One of ``parts`` equal slices (a slice may be one row larger than another)."""
        begin, end = (self.weight * i // parts for i in (index, index + 1))
        positions = None if self.positions is None else self.positions[begin:end]
        return Rows(
            self.inputs[begin:end], self.labels[begin:end], positions, self.offset + begin, end - begin, self.total
        )


def _unchanged(inputs: Tensor) -> Tensor:
    return inputs


@dataclass(frozen=True)
class Source:
    """Data as the engine reads them: by row where possible, else a loader from its start to its end.

    Images of ``pykd.data`` stay uint8 until they are on the device and augmented; ``normalized`` comes after that.
    """

    data: Any
    by_row: bool
    name: str  # for messages
    batch_size: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    workers: int = 0
    collate: Callable[[Any], Any] = collate
    indexed: bool = False  # samples carry an index: they are the same in every epoch
    large_batch: int = LARGE_BATCH_ROWS
    normalized: Callable[[Tensor], Tensor] = _unchanged  # makes what a network takes of a batch's inputs

    @classmethod
    def of(cls, data: Any, name: str) -> "Source":
        """What ``data``, a Dataset or a DataLoader, says about itself.

        A DataLoader over a map-style dataset with one of torch's two plain samplers is read by row, in an order of
        our own; any other is iterated as it is.

        Raises:
            PykdError: neither a Dataset nor a DataLoader, no rows, or samples that are not (inputs, label[, index]).
        """
        if isinstance(data, DataLoader):
            sampler = data.sampler
            plain = isinstance(sampler, SequentialSampler) or (
                type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
            )
            if not isinstance(data.dataset, IterableDataset) and plain and type(data.batch_sampler) is BatchSampler:
                source = cls(
                    _together(data.dataset),
                    by_row=True,
                    name=name,
                    batch_size=data.batch_size,
                    shuffle=isinstance(sampler, RandomSampler),
                    drop_last=data.drop_last,
                    workers=data.num_workers,
                    collate=collate if data.collate_fn is torch.utils.data.default_collate else data.collate_fn,
                )
            else:
                source = cls(data, by_row=False, name=name)
        elif isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise PykdError(f"{name} should be a map-style Dataset or a DataLoader, got {type(data).__name__}")
        else:
            source = cls(_together(data), by_row=True, name=name)
        try:
            rows = len(source.data)
        except TypeError:
            raise PykdError(f"{name} has no length: give its dataset a __len__, the schedule needs it") from None
        if rows == 0:
            raise PykdError(f"{name} has no rows")
        if not source.by_row:
            return source
        if isinstance(source.data, (InMemory, ImageFiles)) and source.data.normalize and source.collate is collate:
            source = replace(source, data=source.data.raw(), normalized=Normalizer(source.data.normalize))
        sample = source.fetch(torch.tensor([0]))
        row_bytes = max(1, source.normalized(sample[0]).nbytes)
        large = max(1, min(LARGE_BATCH_ROWS, LARGE_BATCH_BYTES // row_bytes))
        return replace(source, indexed=len(sample) == 3, large_batch=large)

    @property
    def rows(self) -> int:
        """Number of rows (of batches where the source is a loader that is iterated)."""
        return len(self.data)

    def split(self, share: float, seed: int) -> "tuple[Source, Source]":
        """Rows to train on and a random ``share`` of the rows to hold out; the same seed holds out the same rows."""
        if not self.by_row:
            raise PykdError(
                f"{self.name} can only be iterated: give the held-out rows as holdout=, a Dataset or a DataLoader"
            )
        held = round(share * self.rows) if 0 < share < 1 else 0
        if not 0 < held < self.rows:
            raise PykdError(
                f"holdout={share:g} of {self.rows} rows leaves nothing on one side: give a share in between"
            )
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(derive(seed, "holdout")))
        kept, out = order[held:].sort().values, order[:held].sort().values
        parts = (_together(Subset(self.data, rows.tolist())) for rows in (kept, out))
        return replace(self, data=next(parts)), replace(self, data=next(parts), name="holdout")

    def fetch(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The collated batch of these rows."""
        asked = positions if isinstance(self.data, InMemory) else positions.tolist()
        return self.checked(self.collate(_Samples(self.data)[asked]))

    def checked(self, batch: Any) -> tuple[Tensor, ...]:
        """``batch`` as (inputs, labels[, index]) tensors."""
        if not (isinstance(batch, (tuple, list)) and len(batch) in (2, 3) and isinstance(batch[0], Tensor)):
            raise PykdError(
                f"a sample of {self.name} should be (inputs, label) or (inputs, label, index), inputs a tensor"
            )
        if not isinstance(batch[1], Tensor) or batch[1].dtype != torch.int64 or batch[1].shape != batch[0].shape[:1]:
            raise PykdError(f"a label of {self.name} should be one integer, the number of a class")
        return tuple(batch)

    def check_labels(self, labels: Tensor, classes: int) -> None:
        """Raises a ``PykdError`` where a label is none of ``classes`` numbers from 0 on."""
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise PykdError(
                f"{self.name} has the label {wrong}, and the networks give {classes} logits: "
                f"labels should be 0 to {classes - 1}"
            )

    def batches(self, batch_size: int | None, *, shuffle: bool = False, rank: int = 0, world: int = 1) -> "Batches":
        """Batches of ``batch_size`` rows; process ``rank`` of ``world`` gets its contiguous slice of each."""
        return Batches(self, batch_size or self.batch_size or 1, shuffle, rank, world)


def _together(data: Any) -> Any:
    """A part of images in memory as images in memory, whose batches are gathered at once; other data as they are."""
    if type(data) is Subset and isinstance(whole := _together(data.dataset), InMemory):
        return whole.subset(torch.as_tensor(data.indices))
    return data


class _Samples:
    """Samples of a dataset, a list of positions at a time."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._gather = getattr(dataset, "__getitems__", None)

    def __getitem__(self, positions: Any) -> Any:
        return self._gather(positions) if self._gather else [self._dataset[position] for position in positions]


class _SeededSamples(_Samples):
    """For worker processes: what a dataset draws depends on the batch, not on the worker that happens to read it."""

    def __getitem__(self, request: Any) -> Any:
        seed, positions = request
        if get_worker_info() is not None:
            set_seed(seed % 2**32)
        return super().__getitem__(positions)


class Batches:
    """An epoch's batches.

    >>> from torch.utils.data import TensorDataset
    >>> source = Source.of(TensorDataset(torch.arange(5.0), torch.zeros(5, dtype=torch.int64)), "train")
    >>> [rows.inputs.tolist() for rows in source.batches(2)]
    [[0.0, 1.0], [2.0, 3.0], [4.0]]
    >>> [rows.inputs.tolist() for rows in source.batches(2, rank=1, world=2).read(seed=0, start=1)]
    [[3.0], [4.0]]
    """

    def __init__(self, source: Source, batch_size: int, shuffle: bool, rank: int, world: int) -> None:
        if world > 1 and not source.by_row:
            raise PykdError(f"{source.name} can only be iterated: with several processes give a map-style Dataset")
        self._source = source
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._rank = rank
        self._world = world
        if source.by_row:
            full, rest = divmod(source.rows, batch_size)
            self._length = full + (rest > 0 and not (source.drop_last and shuffle))
            if self._length == 0:
                raise PykdError(f"{source.name} has fewer rows than a batch of {batch_size} and drop_last is set")
        else:
            self._length = source.rows

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Rows]:
        return self.read(seed=0)

    def read(self, seed: int, start: int = 0) -> Iterator[Rows]:
        """The batches from number ``start`` on; ``seed`` decides their order where they are shuffled."""
        return self._by_row(seed, start) if self._source.by_row else self._iterated(seed, start)

    def _iterated(self, seed: int, start: int) -> Iterator[Rows]:
        generator = getattr(self._source.data, "generator", None)
        if generator is not None:
            generator.manual_seed(seed)
        batches = iter(self._source.data)
        for _ in islice(batches, start):
            pass
        return (
            Rows(inputs, labels, None, 0, len(inputs), len(inputs))
            for inputs, labels, *_ in map(self._source.checked, batches)
        )

    def _by_row(self, seed: int, start: int) -> Iterator[Rows]:
        rows = self._source.rows
        if self._shuffle:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        else:
            order = torch.arange(rows)
        mine = []
        for batch in torch.split(order, self._batch_size)[start : self._length]:
            begin, end = (len(batch) * i // self._world for i in (self._rank, self._rank + 1))
            mine.append((batch[begin:end] if end > begin else batch[:1], begin, end - begin, len(batch)))
        fetched: Iterator[tuple[Tensor, ...]]
        if self._source.workers and mine:
            requests = [(derive(seed, step), held[0].tolist()) for step, held in enumerate(mine, start)]
            fetched = iter(
                DataLoader(
                    _SeededSamples(self._source.data),  # type: ignore[arg-type]
                    sampler=requests,
                    batch_size=None,
                    collate_fn=self._source.collate,
                    num_workers=self._source.workers,
                    generator=torch.Generator().manual_seed(seed),
                )
            )
            fetched = map(self._source.checked, fetched)
        else:
            fetched = (self._source.fetch(held[0]) for held in mine)
        return (Rows(batch[0], batch[1], *held) for batch, held in zip(fetched, mine, strict=True))
