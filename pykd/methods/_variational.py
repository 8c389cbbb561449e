"""What the methods over variational layers share: the warm-up of the divergence, and what a finished student tells."""

from typing import Any

import torch
from torch import nn

from pykd.methods._layers import layers
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
        as of :func:`pykd.methods._layers.layers`, and of a variational layer also ``threshold`` and ``log_alpha`` (80
        counts); ``warnings``, sentences.
    """
    noisy, found = variational_layers(trained), layers(student)
    for name, origin in noisy.items():
        if name in found:
            edges = torch.tensor(LOG_ALPHA_EDGES, dtype=torch.float32)
            log_alpha = origin.log_alpha.flatten().float().cpu().clamp(edges[0], edges[-1])
            found[name] |= {
                "threshold": origin.threshold,
                "log_alpha": torch.histogram(log_alpha, edges).hist.long().tolist(),
            }
    warnings = [
        f"layer {name!r} has no weight left, so that the logits no longer depend on the input: "
        "lower lambda_v, lambda_g or group_threshold"
        for name, layer in found.items()
        if layer["kept"] == 0
    ]
    value = float(kl(trained)) if noisy else None
    return {"kl": value, "log_alpha_edges": LOG_ALPHA_EDGES, "layers": found, "warnings": warnings}
