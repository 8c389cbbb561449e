"""What a network costs to run."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flops(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-adds of all matrix products and convolutions of a forward pass, zeroes counted as other numbers.

    Args:
        model: any network; it is not changed, and runs in eval mode.
        example_input: what it is run on; one row gives the multiply-adds of one row.

    Cost: a copy of the network and a forward pass.

    Example:
        >>> flops(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 6, 6)) == 3 * 8 * 9 * 4 * 4
        True
    """
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(example_input)
    return counter.get_total_flops() // 2
