"""What the methods over variational layers share: the warm-up of the divergence, and what a finished student tells."""

from typing import Any

import torch
from torch import nn

from pykd.nn import kl, plain, variational_layers
from pykd.training import Batch

# Bins of the histograms of log alpha; what lies outside counts in the last bin of its side.
LOG_ALPHA_EDGES = [edge / 2 for edge in range(-40, 41)]


def warm_up(batch: Batch, start: float, end: float) -> float:
    """0 up to the share ``start`` of the epochs, 1 from the share ``end`` on, linear in between; constant in an epoch.

    >>> empty = torch.empty(0)
    >>> epochs = [Batch(empty, empty, empty, 0, [], epoch=epoch, epochs=10) for epoch in range(10)]
    >>> [warm_up(batch, 0.2, 0.6) for batch in epochs]
    [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    """
    first, last = start * batch.epochs, end * batch.epochs
    if batch.epoch >= last:
        return 1.0
    return max(0.0, (batch.epoch - first) / (last - first))


def write_back(trained: nn.Module, student: nn.Module) -> None:
    """Puts what ``trained``, ``student`` with variational layers, is in eval mode into ``student``."""
    student.load_state_dict(plain(trained).state_dict())


@torch.no_grad()
def facts(trained: nn.Module, student: nn.Module) -> dict[str, Any]:
    """What a finished student is like, as plain data.

    Returns:
        ``kl``, the divergence of the whole network; ``log_alpha_edges``, 81 edges of the histograms' bins; ``layers``,
        for every linear and convolutional layer ``shape``, ``weights`` and ``kept`` (numbers of weights),
        ``sparsity``, ``kept_inputs`` and ``kept_outputs`` (numbers of units or channels with a weight left), and of a
        variational layer ``threshold`` and ``log_alpha`` (80 counts); ``warnings``, sentences.
    """
    noisy = variational_layers(trained)
    layers, warnings = {}, []
    for name, layer in student.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        left = (layer.weight != 0).flatten(2).any(-1) if layer.weight.dim() > 2 else layer.weight != 0
        parts = layer.groups if isinstance(layer, nn.Conv2d) else 1  # each has inputs of its own
        apart = left.view(parts, len(left) // parts, left.shape[1])
        count = int(layer.weight.count_nonzero())
        layers[name] = {
            "shape": list(layer.weight.shape),
            "weights": layer.weight.numel(),
            "kept": count,
            "sparsity": 1 - count / max(1, layer.weight.numel()),
            "kept_inputs": int(apart.any(1).sum()),
            "kept_outputs": int(left.any(1).sum()),
        }
        if (origin := noisy.get(name)) is not None:
            edges = torch.tensor(LOG_ALPHA_EDGES)
            log_alpha = origin.log_alpha.flatten().float().cpu().clamp(edges[0], edges[-1])
            layers[name] |= {
                "threshold": origin.threshold,
                "log_alpha": torch.histogram(log_alpha, edges).hist.long().tolist(),
            }
        if count == 0:
            warnings.append(
                f"layer {name!r} has no weight left, so that the logits no longer depend on the input: "
                "lower lambda_v, lambda_g or group_threshold"
            )
    value = float(kl(trained)) if noisy else None
    return {"kl": value, "log_alpha_edges": LOG_ALPHA_EDGES, "layers": layers, "warnings": warnings}
