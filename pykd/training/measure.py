"""What the final table says about a network."""

import copy
import statistics
import time
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from pykd.training.batches import Source
from pykd.training.run_folder import weights

WARM_UP_RUNS = 10
LATENCY_RUNS = 200
LATENCY_SECONDS = 1.0


@torch.no_grad()
def accuracy(module: nn.Module, source: Source, accelerator: Accelerator | None = None) -> tuple[int, int]:
    """Correct answers and rows, summed over all processes; the network is left in eval mode.

    Without an ``accelerator`` this process does it all, on the CPU.
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
    return int(correct if accelerator is None else accelerator.reduce(correct)), rows


def describe(module: nn.Module, example: Tensor) -> dict[str, Any]:
    """Size and speed: parameters, non-zeros, bytes of the safetensors file, median latency on the CPU.

    Args:
        module: any network; it is not changed.
        example: one row of inputs, ``[1, ...]``.

    Returns:
        ``parameters``, ``nonzeros``, ``bytes`` and ``latency_ms`` (one row, eval mode, torch's number of threads).

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
        "latency_ms": statistics.median(seconds) * 1e3,
    }


def evaluate(module: nn.Module, data: Any) -> dict[str, Any]:
    """A network's accuracy on ``data``, a Dataset or a DataLoader, and what :func:`describe` says; on the CPU.

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
    return {"accuracy": correct / rows, **describe(module, source.normalized(next(iter(source.batches(1))).inputs[:1]))}
