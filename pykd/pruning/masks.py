"""Weights that stay zero whatever an optimiser does to them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pykd.errors import PykdError


class Mask(nn.Module):
    """The parametrisation of a masked weight: what is optimised, times 0 or 1.

    Args:
        keep: bool, of the weight's shape; False where it is to stay zero.
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.keep, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def mask_(network: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Masks weights of the network, in place, by torch's parametrisation of ``weight``.

    Gradients are zero where the mask is False, and neither momentum nor weight decay moves what the network computes.
    Masks are buffers: of the network's ``state_dict``, on its device. A layer that is masked gets the new mask.

    Args:
        network: in whose modules of these names ``weight`` is masked.
        keep: bool masks by the module's name, of its weight's shape.

    Raises:
        PykdError: an unknown module, or a mask of another shape.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> mask_(layer, {"0": torch.tensor([[True, False], [True, True]])})
        >>> layer[0].weight[0, 1].item()
        0.0
    """
    for name, mask in keep.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            raise PykdError(f"there is no module {name!r} to be masked") from None
        weight = layer.weight
        if not isinstance(weight, Tensor) or mask.shape != weight.shape:
            raise PykdError(f"the mask of {name!r} should have the shape of its weight, got {list(mask.shape)}")
        mask = mask.to(weight.device)
        if masked(layer):
            layer.parametrizations.weight[0].keep.copy_(mask)  # type: ignore[union-attr, index]
        else:
            parametrize.register_parametrization(layer, "weight", Mask(mask))


def masked(layer: nn.Module) -> bool:
    """Whether the layer's weight has a mask."""
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], Mask)  # type: ignore[union-attr, index]


def unmask_(network: nn.Module) -> None:
    """Ends the masks, in place: the zeros are plain weights again.

    >>> layer = nn.Linear(2, 1)
    >>> mask_(layer, {"": torch.tensor([[True, False]])})
    >>> unmask_(layer)
    >>> layer.weight[0, 1].item(), sorted(layer.state_dict())
    (0.0, ['bias', 'weight'])
    """
    for layer in list(network.modules()):
        if masked(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
