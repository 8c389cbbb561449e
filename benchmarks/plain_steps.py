"""The authors' steps of cross distillation as one writes them first, beside `pykd.pruning.layer.Steps`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain_steps(
    layer: nn.Conv2d, teacher: Tensor, student: Tensor, count: int, *, mu: float = 0.6, steps: int, lr: float = 5e-4
) -> tuple[Tensor, Tensor]:
    """The layer's weight with ``count`` input channels left, and its mask, by Adam on the convex objective.

    Each step runs the convolution on the teacher's and on the student's inputs and back to the weight; the teacher's
    answers, which no step changes, are computed once. In the first third channels go, smallest l2 norm first, with
    their gradients and moments; then the rate is a tenth.
    """
    weight = layer.weight.detach().clone().requires_grad_()
    keep, channels = torch.ones_like(weight, dtype=torch.bool), weight.shape[1]
    adam = torch.optim.Adam([weight], lr)
    with torch.no_grad():
        parts = [(mu, teacher, layer(teacher)), (1 - mu, student, layer(student))]
    third = steps // 3
    for step in range(1, steps + 1):
        loss = torch.zeros(())
        for factor, inputs, taught in parts:
            answer = F.conv2d(inputs, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
            loss = loss + factor * F.mse_loss(answer, taught)
        adam.zero_grad()
        loss.backward()
        assert weight.grad is not None
        weight.grad *= keep
        adam.param_groups[0]["lr"] = lr if step <= third else lr / 10
        adam.step()
        if step > third:
            continue
        with torch.no_grad():
            left = count + (channels - count) * (third - step) // third
            stay = weight.square().sum((0, 2, 3)).topk(left).indices
            keep = torch.zeros_like(keep).index_fill_(1, stay, True)
            for each in (weight, *(adam.state[weight][name] for name in ("exp_avg", "exp_avg_sq"))):
                each *= keep
    return weight.detach(), keep
