"""A model file answered, and measured, by pykd's engine: numpy arrays in and out. Needs numpy alone."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pykd.errors import PykdError

LARGEST_BATCH = 256  # rows that go through at a time
KEPT_BATCHES = 4  # sizes whose plans are kept
FLOATS, PIXELS = np.dtype(np.float32), np.dtype(np.uint8)
DEVICES, PRECISIONS = ("cpu", "cuda"), ("float32", "float16", "bfloat16")


class Choice(NamedTuple):
    """What the planner took for a layer.

    Attributes:
        step: of the file's graph, counted from 1.
        op: linear or conv2d.
        form: how the weight lies in memory: pairs (single entries), sparse 16x16 (or other blocks), dense.
        us: microseconds of the layer for the whole batch, measured, or estimated where nothing was.
    """

    step: int
    op: str
    form: str
    us: float


class Memory(NamedTuple):
    """Bytes that a batch size needs.

    Attributes:
        weights: in the forms that the planner took; batch sizes for which a layer has the same form share it.
        workspace: that runs write to.
    """

    weights: int
    workspace: int


class Model:
    """The network of a model file, on the CPU or on CUDA, by the engine: no torch, no framework.

    It may be called by several threads at the same time, and keeps a plan for each of them; a process that was forked
    plans anew. What it takes for each layer is measured the first time a batch size comes, and remembered in
    ``$XDG_CACHE_HOME/pykd/plans.json`` (``~/.cache`` by default; not at all where the environment variable
    ``PYKD_CACHE`` is ``off``).

    Args:
        path: of a ``*.pykd.safetensors``; anyone may have written it.
        threads: that a call works with; by default as many as this process has processors, on CUDA one. Small layers
            take one.
        measure: time each layer's forms on this machine; otherwise a model of their costs decides, and the same file
            gives the same bits on every processor of a kind.
        device: cpu or cuda.
        precision: float32, float16 or bfloat16, of what CUDA's tensor cores multiply; sums are float32.

    Attributes:
        threads: the same.
        input_shape: of one row, without the batch.
        output_shape: of one row's answer.
        takes_pixels: whether the file says how pixels are normalised.

    Raises:
        PykdError: the file cannot be read, or breaks a rule of the format; ``threads`` is not in 1 to 256; device or
            precision is not known. At the first call: there is no CUDA here, or the device lacks the precision.
        ImportError: the engine is not compiled here.

    Cost: reading checks the whole file. A call on a new batch size plans it, which takes from some milliseconds to a
    few seconds; any other call takes about two microseconds beside the network itself.

    Example:
        >>> import tempfile, torch
        >>> from pykd.deploy import Model, export
        >>> layer = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(layer, f"{folder}/layer.pykd.safetensors", torch.zeros(1, 4))
        ...     model = Model(f"{folder}/layer.pykd.safetensors", threads=1)
        >>> answers = model(np.ones((3, 4), np.float32))
        >>> bool(np.allclose(answers, layer(torch.ones(3, 4)).detach(), atol=1e-6))
        True
    """

    _all: ClassVar[weakref.WeakSet[Model]] = weakref.WeakSet()

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        measure: bool = True,
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        _runtime = _engine()
        for what, value, known in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise PykdError(f"{what} should be {' or '.join(known)}, got {value!r}")
        if threads is None:
            threads = 1 if device == "cuda" else min(len(os.sched_getaffinity(0)), _runtime.most_threads)
        self.threads = threads
        if type(self.threads) is not int or not 1 <= self.threads <= _runtime.most_threads:
            raise PykdError(f"threads should be 1 to {_runtime.most_threads}, got {threads}")
        self._settings: dict[str, Any] = {
            "threads": self.threads,
            "measure": measure,
            "cache": _cache(),
            "device": device,
            "precision": precision,
        }
        self._runtime = _runtime
        self._begin()
        try:
            self._network = _runtime.Network(_name(path))
        except ValueError as error:
            raise PykdError(str(error)) from None
        self.input_shape: tuple[int, ...] = self._network.input_shape
        self.output_shape: tuple[int, ...] = self._network.output_shape
        self.takes_pixels: bool = self._network.takes_pixels
        self._all.add(self)

    def _begin(self) -> None:
        """Without plans: at the start, and in a process that was forked, which has none of their threads."""
        self._lock = threading.Lock()
        self._planning = threading.Lock()  # two that measure at once would disturb, and not remember, each other
        self._idle: OrderedDict[int, list[Any]] = OrderedDict()  # by batch size, the one last used at the end

    @classmethod
    def _after_fork(cls) -> None:
        for model in cls._all:
            model._begin()

    def __call__(self, array: ArrayLike) -> NDArray[np.float32]:
        """The answers to a batch.

        Args:
            array: ``[rows, *input_shape]``: floats as the network takes them, or pixels as uint8, which are read as
                ``(pixel / 255 - mean) / std`` where the file has both. Rows go through 256 at a time.

        Returns:
            ``[rows, *output_shape]``, float32. A row's last bits may depend on how many rows are beside it, and where
            nothing remembers what was measured also on the time.

        Raises:
            PykdError: another shape or dtype.
        """
        rows = np.asarray(array)
        if rows.ndim == 0 or rows.shape[1:] != self.input_shape:
            sides = ", ".join(map(str, self.input_shape))
            raise PykdError(f"the file's network takes [rows, {sides}], got {list(rows.shape)}")
        if rows.dtype == PIXELS:
            if not self.takes_pixels:
                raise PykdError("the file does not say how pixels are normalised: give float32")
        elif rows.dtype != FLOATS:
            if rows.dtype.kind != "f":
                raise PykdError(f"the network takes floats, or pixels as uint8, got {rows.dtype}")
            rows = rows.astype(FLOATS)
        if not (rows.flags.c_contiguous and rows.flags.aligned):
            rows = np.require(rows, requirements=["C", "A"])
        if 1 <= len(rows) <= LARGEST_BATCH:
            return self._part(rows)
        parts = [self._part(rows[at : at + LARGEST_BATCH]) for at in range(0, len(rows), LARGEST_BATCH)]
        return np.concatenate([np.empty((0, *self.output_shape), np.float32), *parts])

    @property
    def ends_in_softmax(self) -> bool:
        """Whether answers are probabilities already."""
        return self._network.ends_in_softmax

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the answers, or none."""
        return self._network.classes

    @property
    def licence(self) -> str:
        """One line."""
        return self._network.licence

    @property
    def provenance(self) -> dict[str, str]:
        """Where the network comes from; numbers as their digits."""
        return self._network.provenance

    @property
    def file_bytes(self) -> int:
        """The file's size."""
        return self._network.file_bytes

    def choices(self, batch: int = 1) -> list[Choice]:
        """What the planner took for each layer with a weight, at a batch size."""
        plan = self._take(batch)
        self._give_back(batch, plan)
        return [Choice(*choice) for choice in plan.choices()]

    def memory(self, batch: int = 1) -> Memory:
        """What a batch size needs."""
        plan = self._take(batch)
        self._give_back(batch, plan)
        return Memory(plan.weight_bytes, plan.workspace_bytes)

    def latencies(self, batch: int = 1, seconds: float = 1.0) -> NDArray[np.float64]:
        """Microseconds of runs on zeros, ascending: as many as fit into ``seconds``, but 20 to 200,000."""
        plan = self._take(batch)
        try:
            return np.array(plan.latencies(seconds))
        finally:
            self._give_back(batch, plan)

    def _part(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        plan = self._take(len(rows))
        try:
            return plan.run(rows)
        finally:
            self._give_back(len(rows), plan)

    def _take(self, batch: int) -> Any:
        """A plan that nobody else uses."""
        try:
            return self._idle[batch].pop()
        except (KeyError, IndexError):
            pass
        try:
            with self._planning:
                return self._runtime.Plan(self._network, batch, **self._settings)
        except (ValueError, RuntimeError) as error:
            raise PykdError(str(error)) from None

    def _give_back(self, batch: int, plan: Any) -> None:
        try:
            self._idle[batch].append(plan)
            self._idle.move_to_end(batch)
        except KeyError:
            with self._lock:
                self._idle.setdefault(batch, []).append(plan)
                while len(self._idle) > KEPT_BATCHES:
                    self._idle.popitem(last=False)


os.register_at_fork(after_in_child=Model._after_fork)


def bench(
    path: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    devices: Sequence[str] = ("cpu",),
    precisions: Sequence[str] = ("float32",),
    dense: bool = False,
    power: bool = False,
    seconds: float = 2.0,
    samples: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] = "/",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures a model file on this machine, every batch with every number of threads, device and precision.

    Args:
        path: of a ``*.pykd.safetensors``.
        batches: rows of a run.
        threads: that work, on the CPU.
        devices: cpu, cuda.
        precisions: float32, float16, bfloat16, of what CUDA's tensor cores multiply.
        dense: also the network with every weight dense.
        power: also idle power, and the energy of a row, where the machine has power monitors that can be read.
        seconds: of each of three repeats, after up to two to warm up.
        samples: a CSV file for every sample of power.
        root: the folder in which sensors and versions are read, such as a copy of a device's files.
        say: is called with what is going on, a sentence at a time; what it raises ends the measurement.

    Returns:
        The device result: ``machine``, ``model`` and ``runs``. A value that could not be had is None, and ``missing``
        beside it says why; a run that failed has no latencies.

    Raises:
        PykdError: the file cannot be read, the samples cannot be written, or an option is out of range.
        ImportError: the engine is not compiled here.

    Example:
        >>> import tempfile, torch
        >>> from pykd.deploy import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(torch.nn.Linear(4, 2), f"{folder}/layer.pykd.safetensors", torch.zeros(1, 4))
        ...     record = bench(f"{folder}/layer.pykd.safetensors", batches=[1, 8], seconds=0.01)
        >>> [run["batch"] for run in record["runs"]]
        [1, 8]
        >>> record["runs"][0]["latency_us"]["p50"] > 0
        True
    """
    options = {"batches": batches, "threads": threads, "devices": devices, "precisions": precisions}
    try:
        record = _engine().measure(
            _name(path),
            **options,
            dense=dense,
            power=power,
            seconds=seconds,
            samples=_name(samples or ""),
            root=_name(root),
            cache=_cache(),
            say=say,
        )
    except (ValueError, RuntimeError) as error:
        raise PykdError(str(error)) from None
    return json.loads(record)


def _engine() -> Any:
    try:
        from pykd import _runtime
    except ImportError as error:
        raise ImportError(
            f"pykd's engine is not compiled here ({error}): run `pip install .` in pykd's source folder, "
            "with PYKD_TORCH=off for the engine alone"
        ) from error
    return _runtime


def _name(path: str | os.PathLike[str]) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:
        raise PykdError(f"cannot read {path!r}: a path has no null characters")
    return name


def _cache() -> bytes:
    """The file that remembers what was measured; empty where there is none."""
    if os.environ.get("PYKD_CACHE") == "off":
        return b""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykd"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return b""
    return os.fsencode(folder / "plans.json")
