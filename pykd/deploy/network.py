"""A model file as a torch module."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.deploy.graph import Op
from pykd.deploy.model_file import ModelFile, read
from pykd.errors import PykdError


class FileNetwork(nn.Module):
    """The network of a model file, dense and in float32; it is not trained.

    Args:
        model: what the file says.

    Attributes:
        model: the same.

    Raises:
        PykdError: from a call, where the input's shape is another.

    Example:
        >>> from pykd.deploy.graph import Op
        >>> FileNetwork(ModelFile((2,), [Op("relu", (0,))]))(torch.tensor([[-1.0, 1.0]]))
        tensor([[0., 1.]])
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.model = model
        for number, op in enumerate(model.ops, 1):
            weight = None if op.weight is None else op.weight.dense()
            for name, values in (("weight", weight), ("bias", op.bias), ("scale", op.scale)):
                if values is not None:
                    value = nn.Parameter(torch.from_numpy(values.copy()), requires_grad=False)
                    self.register_parameter(f"{name}_{number}", value)
        if model.normalization:
            mean, std = (torch.tensor(each, dtype=torch.float64) for each in model.normalization)
            sides = [1] * (len(model.input_shape) - 1)
            self.register_buffer("pixel_scale", (1 / (255 * std)).float().view(-1, *sides), persistent=False)
            self.register_buffer("pixel_shift", (-mean / std).float().view(-1, *sides), persistent=False)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """The answers to rows ``[B, *input_shape]``: numbers as the network takes them, or pixels as uint8."""
        if input.shape[1:] != self.model.input_shape:
            raise PykdError(f"the file's network takes [rows, {self._sides()}], got {list(input.shape)}")
        if input.dtype == torch.uint8:
            if not self.model.normalization:
                raise PykdError("the file does not say how pixels are normalised: give float32")
            input = input.float() * self.pixel_scale + self.pixel_shift
        values = [input.float()]
        for number, op in enumerate(self.model.ops, 1):
            values.append(self._result(op, number, [values[each] for each in op.inputs]))
        return values[-1]

    def _sides(self) -> str:
        return ", ".join(map(str, self.model.input_shape))

    def _result(self, op: Op, number: int, inputs: list[Tensor]) -> Tensor:
        value, options = inputs[0], op.options
        vectors: Any = (getattr(self, f"{name}_{number}", None) for name in ("weight", "bias", "scale"))
        weight, bias, scale = vectors
        match op.kind:
            case "linear":
                return F.linear(value, weight, bias)
            case "conv2d":
                geometry = (options[name] for name in ("stride", "padding", "dilation", "groups"))
                return F.conv2d(value, weight, bias, *geometry)
            case "relu":
                return F.relu(value)
            case "leaky_relu":
                return F.leaky_relu(value, options["slope"])
            case "tanh":
                return value.tanh()
            case "max_pool2d":
                windows = (options["kernel"], options["stride"] or None, options["padding"])
                return F.max_pool2d(value, *windows, options["dilation"], options["ceil"])
            case "avg_pool2d":
                windows = (options["kernel"], options["stride"] or None, options["padding"])
                return F.avg_pool2d(value, *windows, options["ceil"], options["count_padding"])
            case "global_avg_pool":
                return value.mean((2, 3), keepdim=True)
            case "add":
                return value + inputs[1]
            case "concat":
                return torch.cat(inputs, 1)
            case "flatten":
                return value.flatten(1)
            case "softmax":
                return value.softmax(1)
            case "affine":
                sides = [1] * (value.dim() - 2)
                return value * scale.view(-1, *sides) + bias.view(-1, *sides)
        raise AssertionError(op.kind)


def load(path: str | Path) -> FileNetwork:
    """The network of a model file as a torch module, in float32.

    Args:
        path: of a ``*.pykd.safetensors``; anyone may have written it.

    Raises:
        PykdError: it cannot be read, or breaks a rule of the format.

    Example:
        >>> import tempfile
        >>> from pykd.deploy import export
        >>> layer = nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(layer, f"{folder}/layer.pykd.safetensors", torch.zeros(1, 4))
        ...     network = load(f"{folder}/layer.pykd.safetensors")
        >>> bool(torch.allclose(network(torch.ones(3, 4)), layer(torch.ones(3, 4))))
        True
    """
    return FileNetwork(read(path))
