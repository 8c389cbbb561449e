"""What the final table says about a network."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from pykd.deploy.model_file import to_bytes
from pykd.deploy.tracing import described
from pykd.errors import PykdError
from pykd.training.batches import Source
from pykd.training.run_folder import weights

WARM_UP_RUNS = 10
LATENCY_RUNS = 200
LATENCY_SECONDS = 1.0


@torch.no_grad()
def accuracy(
    module: nn.Module,
    source: Source,
    accelerator: Accelerator | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Correct answers and rows, summed over all processes; the network is left in eval mode.

    Without an ``accelerator`` this process does it all, on the CPU. ``after_batch`` may raise, where a run is stopped.
    """
    module.eval()
    device, rank, world = torch.device("cpu"), 0, 1
    if accelerator is not None:
        device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    correct = torch.zeros((), dtype=torch.int64, device=device)
    rows = 0
    for batch in source.batches(source.large_batch, rank=rank, world=world):
        logits = module(source.normalized(batch.inputs.to(device)))
        source.check_labels(batch.labels, logits.shape[-1])
        answers = logits.argmax(-1)[: batch.weight]
        correct += (answers == batch.labels.to(device)[: batch.weight]).sum()
        rows += batch.total
        after_batch()
    return int(correct if accelerator is None else accelerator.reduce(correct)), rows


def describe(module: nn.Module, example: Tensor, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Size and speed: parameters, non-zeros, bytes of the dense file and of the model file, latency on the CPU.

    Args:
        module: any network; it is not changed.
        example: one row of inputs, ``[1, ...]``.
        about: what the model file says beside the network, in the words of :func:`pykd.deploy.export`.

    Returns:
        ``parameters``, ``nonzeros``, ``bytes`` (of a safetensors file with every value), ``file_bytes`` (of the model
        file that :func:`pykd.deploy.export` writes; None with the ``file_reason`` where it refuses the network) and
        ``latency_ms`` (median of one row, eval mode, torch's number of threads).

    Example:
        >>> describe(nn.Linear(3, 2), torch.zeros(1, 3))["parameters"]
        8
    """
    parameters = list(module.parameters())
    network = copy.deepcopy(module).cpu().eval()
    example = example.cpu()
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP_RUNS):
            network(example)
        end = time.perf_counter() + LATENCY_SECONDS
        while len(seconds) < LATENCY_RUNS and (not seconds or time.perf_counter() < end):
            begin = time.perf_counter()
            network(example)
            seconds.append(time.perf_counter() - begin)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "nonzeros": sum(int(parameter.count_nonzero()) for parameter in parameters),
        "bytes": len(save(weights(module))),
        **_file(network, example, about or {}),
        "latency_ms": statistics.median(seconds) * 1e3,
    }


def _file(network: nn.Module, example: Tensor, about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"file_bytes": len(to_bytes(described(network, example, **about)))}
    except PykdError as error:
        return {"file_bytes": None, "file_reason": str(error)}


def evaluate(module: nn.Module, data: Any, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A network's accuracy on ``data``, a Dataset or a DataLoader, and what :func:`describe` says; on the CPU.

    Args:
        module: the network; it is left on the CPU in eval mode.
        data: a Dataset or a DataLoader.
        about: see :func:`describe`.

    Raises:
        PykdError: ``data`` cannot be read.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
        >>> evaluate(nn.Identity(), data)["accuracy"]
        1.0
    """
    source = Source.of(data, "data")
    correct, rows = accuracy(module.cpu(), source)
    example = source.normalized(next(iter(source.batches(1))).inputs[:1])
    return {"accuracy": correct / rows, **describe(module, example, about)}


@torch.no_grad()
def agreement(network: nn.Module, other: nn.Module, data: Any) -> dict[str, Any]:
    """How far the logits of two networks are apart on ``data``, a Dataset or a DataLoader; on the CPU.

    Returns:
        ``rows``, the largest ``difference`` of two logits, the ``largest`` logit of ``network`` by its absolute value,
        and the ``accuracies`` of both.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
        >>> agreement(nn.Identity(), nn.Softmax(dim=1), data)["accuracies"]
        [1.0, 1.0]
    """
    source = Source.of(data, "data")
    networks = [each.cpu().eval() for each in (network, other)]
    rows, difference, largest, correct = 0, torch.zeros(()), 0.0, [0, 0]
    for batch in source.batches(source.large_batch):
        inputs = source.normalized(batch.inputs)
        mine, its = logits = [each(inputs) for each in networks]
        rows += batch.total
        difference = torch.maximum(difference, (mine - its).abs().max())  # NaN, where there is one
        largest = max(largest, float(mine.abs().max()))
        for index, each in enumerate(logits):
            correct[index] += int((each.argmax(-1) == batch.labels).sum())
    return {
        "rows": rows,
        "difference": float(difference),
        "largest": largest,
        "accuracies": [each / rows for each in correct],
    }
