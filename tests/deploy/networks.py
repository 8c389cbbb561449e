"""Networks that hold every operator of a model file, their weights pruned, and rows for them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pykd
from pykd.deploy.network import FileNetwork


def pruned(network: nn.Module, density: float = 0.2, seed: int = 0) -> nn.Module:
    """The network in eval mode with a share of its weights, random norms and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.dim() > 1:
                value.mul_((torch.rand(value.shape, generator=generator) < density) / density)
            elif name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                value.copy_(torch.randn(value.shape, generator=generator))
    return network.eval()


class Residual(nn.Module):
    """A block with an addition, the way of torchvision's ResNets."""

    def __init__(self, channels: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity()
        if stride > 1 or channels != outputs:
            self.short = nn.Sequential(nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class Everything(nn.Module):
    """Each operator at least once, as modules, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=(2, 1), dilation=(1, 2))
        self.deep = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 6, 1, groups=2)
        self.leaky = nn.LeakyReLU(0.2)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(10 + 20, 5)
        self.end = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.wide(self.before(x)), 3, 2, padding=1, ceil_mode=True)
        y = self.norm(self.deep(x)) + x
        both = torch.cat([torch.tanh(self.left(y)), self.leaky(self.right(y))], 1)
        small = F.avg_pool2d(both, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        parts = F.adaptive_avg_pool2d(small, (2, 1))
        values = torch.cat((both.mean((2, 3)), parts.view(parts.size(0), -1)), dim=1)
        return self.end(self.last(self.drop(F.dropout(values, 0.1, self.training))))


class Exact(FileNetwork):
    """A file's network in float64."""

    def forward(self, input: Tensor) -> Tensor:
        values = [input]
        for number, op in enumerate(self.model.ops, 1):
            values.append(self._result(op, number, [values[each] for each in op.inputs]))
        return values[-1]


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """By name, each with the shape of a row."""
    torch.manual_seed(0)
    images = {"in_shape": (1, 28, 28), "classes": 10}
    built = {
        "mlp": (pykd.models.build("mlp", widths=[40, 20], **images), (1, 28, 28)),
        "lenet5": (pykd.models.build("lenet5", **images), (1, 28, 28)),
        "modified_lenet": (pykd.models.build("modified_lenet", **images), (1, 28, 28)),
        "nin": (pykd.models.build("nin", in_shape=(3, 16, 16), classes=5), (3, 16, 16)),
        "residual": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3),
                Residual(8, 8),
                Residual(8, 16, 2),
                nn.AdaptiveAvgPool2d((1, 1)),
                nn.Flatten(),
                nn.Linear(16, 4),
            ),
            (3, 14, 14),
        ),
        "everything": (Everything(), (3, 17, 16)),
    }
    return {name: (pruned(network), shape) for name, (network, shape) in built.items()}
