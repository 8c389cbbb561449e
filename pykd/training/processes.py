"""Several processes that train one network: how they start, what they must agree on, and how they end together."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast,
    gather_object,
)
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from pykd.errors import Interrupted, PykdError, explained
from pykd.training.run_folder import difference, divided, whole

# A process that does not answer for so long is given up. It is to be longer than the longest work of one process alone.
TIMEOUT = timedelta(minutes=10)

_runs = itertools.count()


def accelerator_for(device: str | None) -> Accelerator:
    """The Accelerator of this process on ``"cpu"``, ``"cuda"``, or None for the best there is.

    Raises:
        PykdError: no such device, an Accelerator that stands in the way, or FSDP's first version.
    """
    if device not in (None, "cpu", "cuda"):
        raise PykdError(f"device should be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise PykdError("no CUDA device is available: use the device cpu, or ask pykd doctor what is missing")
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    current = AcceleratorState._shared_state.get("device")  # of an earlier run in this process
    if current is not None and current.type != wanted and not distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    # DDP orders its buckets anew after the first step where it need not look for unused parameters: with three
    # processes or more a resumed run would then have other bits.
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT), DistributedDataParallelKwargs(find_unused_parameters=True)]
    try:
        accelerator = Accelerator(cpu=wanted == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    except ValueError as error:
        raise PykdError(f"an Accelerator of this process stands in the way: {error}") from error
    if accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION") != "2":
            raise PykdError("FSDP's first version is not supported: add --fsdp_version 2")
        if accelerator.device.type == "cpu":  # where Accelerate would take DDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Where one of several processes fails, all do, with its sentence.

    Raises:
        PykdError: another process has failed, has died or does not answer.
    """
    if accelerator.num_processes == 1:
        yield
        return
    key = f"pykd/failure/{next(_runs)}"
    try:
        yield
    except Interrupted:  # which all of them are
        raise
    except Exception as error:
        said = str(error)
        of_gloo = isinstance(error, RuntimeError) and ("gloo" in said or "pair closure" in said)
        lost = of_gloo or isinstance(error, distributed.DistError)
        sentence = explained(error)
        if lost and ("imed out" in said or "timeout" in said):
            sentence = "another process does not answer: end all of them, and continue with --resume"
        elif lost:
            sentence = "another process has died: see what ended it, and continue with --resume"
        first = sentence
        with suppress(RuntimeError):  # what keeps it has died, too
            first = distributed.distributed_c10d._get_default_store().compare_set(key, "", sentence).decode()
        if lost or (isinstance(error, PykdError) and first != sentence):
            raise PykdError(first) from error
        raise


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Raises a ``PykdError`` that names the first setting in which two processes differ."""
    first, *others = gather_object([settings])
    for number, other in enumerate(others, 1):
        if found := difference(other, first):
            raise PykdError(
                f"process {number} has {found} as process 0: give all processes the same settings, data and versions"
            )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights alone: FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def shared(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The module as several processes train it, with the weights of the first; FSDP changes it in place."""
    if not is_sharded(accelerator):
        return accelerator.prepare_model(module)
    for value in module.state_dict().values():
        broadcast(value)
    return accelerator.prepare(module, optimizer)[0]


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, with all parts of what FSDP divides; all processes take part."""
    return tree_map_only(Tensor, lambda value: whole(value).cpu(), optimizer.state_dict())


def put_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads what :func:`whole_state` gave; a process of FSDP takes its part."""
    parameters: Sequence[Tensor] = [each for group in optimizer.param_groups for each in group["params"]]
    parts = {
        number: {name: divided(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})
