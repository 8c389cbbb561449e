"""Layers whose weights are sparse, for inference, and networks whose layers become such where that is faster."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from pykd.errors import PykdError
from pykd.nn.variational import _changed, _padding
from pykd.ops import sparse_conv2d, sparse_linear
from pykd.sparse import SparseWeight

Block = tuple[int, int]
BLOCKS: tuple[Block, ...] = ((1, 1), (1, 16), (4, 4), (8, 8), (16, 16))


class _Sparse(nn.Module):
    """What the layers have in common: a weight that is no parameter, and what the state holds of it."""

    _sides: ClassVar[int]

    bias: Tensor | None

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, SparseWeight) or len(weight.shape) != self._sides:
            got = list(weight.shape) if isinstance(weight, SparseWeight) else type(weight).__name__
            raise PykdError(f"weight should be a pykd.sparse.SparseWeight of {self._sides} sides, got {got}")
        if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (weight.shape[0],)):
            got = list(bias.shape) if isinstance(bias, Tensor) else repr(bias)
            raise PykdError(f"bias should be a tensor [{weight.shape[0]}] or None, got {got}")
        self.weight = weight
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "values"] = torch.tensor(self.weight.values)
        destination[prefix + "positions"] = torch.tensor(self.weight.positions)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        names = [prefix + "values", prefix + "positions"]
        given = [state_dict[name] for name in names if name in state_dict]
        if len(given) == 2:
            try:
                self.weight = _weight_of(self.weight.shape, *given)
            except ValueError as error:
                errors.append(f"{prefix}values and {prefix}positions are no weight {list(self.weight.shape)}: {error}")
        missing += [name for name in names if name not in state_dict]
        rest = {name: value for name, value in state_dict.items() if name not in names}
        super()._load_from_state_dict(rest, prefix, *args)

    def extra_repr(self) -> str:
        kept = self.weight.nnz / int(np.prod(self.weight.shape))
        return f"{list(self.weight.shape)}, block={self.weight.block}, kept={kept:.1%}, bias={self.bias is not None}"


def _weight_of(shape: tuple[int, ...], values: Tensor, positions: Tensor) -> SparseWeight:
    """The weight of a state.

    Raises:
        ValueError: it holds none of this shape.
    """
    if not (isinstance(values, Tensor) and isinstance(positions, Tensor)) or values.is_meta or positions.is_meta:
        raise ValueError("they are no tensors with numbers")
    if values.dim() != 3 or positions.shape != values.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(f"they are {list(values.shape)} and {list(positions.shape)}")
    if values.dtype == torch.bfloat16:
        values = values.float()
    if values.dtype not in (torch.float32, torch.float16, torch.float64, torch.int8):
        raise ValueError(f"the values are {values.dtype}")
    block = (values.shape[1], values.shape[2])
    return SparseWeight.from_blocks(shape, block, positions.cpu().numpy().copy(), values.cpu().numpy().copy())


class SparseLinear(_Sparse):
    """A linear layer for inference that stores and multiplies only what is not zero (:func:`pykd.ops.sparse_linear`).

    Its state holds the weight's stored blocks and their positions: it can be loaded from, and into, a layer of the same
    shape whatever entries and blocks that one has.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, copied, or None.

    Attributes:
        weight: the :class:`pykd.sparse.SparseWeight`; not a parameter.
        bias: a buffer, ``[out]``, or None.

    Raises:
        PykdError: no such weight or bias; in :meth:`from_dense` no such layer.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = layer.weight.data[:, 1:].zero_()
        >>> sparse = SparseLinear.from_dense(layer)
        >>> sparse
        SparseLinear([2, 4], block=(1, 1), kept=25.0%, bias=True)
        >>> rows = torch.randn(3, 4)
        >>> torch.allclose(sparse(rows), layer(rows))
        True
    """

    _sides = 2

    @classmethod
    def from_dense(cls, layer: nn.Linear, block: Block | None = None) -> Self:
        """The sparse layer of a dense one's weight, zeros left out; in blocks, or unstructured."""
        if not isinstance(layer, nn.Linear):
            raise PykdError(f"a sparse linear layer is made of a torch.nn.Linear, got {type(layer).__name__}")
        return cls(SparseWeight(layer.weight, block=block), layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(input, self.weight, self.bias)


class SparseConv2d(_Sparse):
    """A convolution for inference that stores and multiplies only what is not zero (:func:`pykd.ops.sparse_conv2d`).

    Args:
        weight: ``[out, in / groups, kernel height, kernel width]``.
        bias, stride, padding, dilation, groups: as of :func:`pykd.ops.sparse_conv2d`; the bias is copied.

    Attributes:
        weight, bias: as of :class:`SparseLinear`.
        stride, padding, dilation, groups: as given.

    Raises:
        PykdError: no such weight or bias; in :meth:`from_dense` no such layer, or padding that is not zeros, or differs
            on two sides.

    Example:
        >>> layer = nn.Conv2d(2, 4, 3, padding=1)
        >>> _ = layer.weight.data[:, 1].zero_()
        >>> sparse = SparseConv2d.from_dense(layer)
        >>> images = torch.randn(1, 2, 5, 5)
        >>> torch.allclose(sparse(images), layer(images), atol=1e-6)
        True
    """

    _sides = 4

    def __init__(
        self,
        weight: SparseWeight,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, block: Block | None = None) -> Self:
        """The sparse layer of a dense one's weight, as in :meth:`SparseLinear.from_dense`."""
        if not isinstance(layer, nn.Conv2d):
            raise PykdError(f"a sparse convolution is made of a torch.nn.Conv2d, got {type(layer).__name__}")
        if layer.padding_mode != "zeros":
            raise PykdError(f"a sparse convolution pads with zeros, not {layer.padding_mode}: keep that layer dense")
        weight = SparseWeight(layer.weight, block=block)
        shape: dict[str, Any] = {"stride": layer.stride, "padding": _padding(layer), "dilation": layer.dilation}
        return cls(weight, layer.bias, **shape, groups=layer.groups)

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.stride, self.padding, self.dilation, self.groups)
        if input.dim() == 3:  # an image alone, as torch.nn.Conv2d takes it
            return sparse_conv2d(input[None], self.weight, self.bias, *shape)[0]
        return sparse_conv2d(input, self.weight, self.bias, *shape)

    def extra_repr(self) -> str:
        shape = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"{super().extra_repr()}, {shape}"


_KINDS: dict[Callable[..., Any], Any] = {nn.Linear.forward: SparseLinear, nn.Conv2d.forward: SparseConv2d}


@dataclass(frozen=True)
class Timed:
    """What :func:`sparsify` measured of a layer.

    Attributes:
        seconds: of the calls of one forward pass, the median for each form: "dense", or the block of a sparse weight.
        form: the fastest of them, which the layer has now.
    """

    seconds: dict[str | Block, float]

    @property
    def form(self) -> str | Block:
        return min(self.seconds, key=self.seconds.__getitem__)


def sparsify(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    blocks: Collection[Block] = BLOCKS,
    seconds: float = 0.02,
) -> nn.Module:
    """A copy of ``model`` for inference, with sparse layers where they are measured faster on this machine.

    Each ``Linear`` and ``Conv2d`` whose weight has zeros is timed on what it gets in a forward pass of the example, in
    turns with its sparse forms: unstructured, and in the blocks of which some are zero. The fastest form stays, and a
    layer that loses stays dense. Measure with the batch size and the number of threads that will be used. Weights that
    ``torch.nn.utils.prune`` masks, or that are parametrised, count as the layer uses them. Layers stay as they are
    that have hooks, pad with other than zeros, compute in other dtypes than float32, float16 and bfloat16, are not
    called, or are subclasses with a ``forward`` of their own.

    Args:
        model: any network; it is not changed.
        example_input: what the model is called with: a tensor, or a tuple of arguments.
        blocks: the sparse forms that are tried; (1, 1) is unstructured.
        seconds: about how long a form of a layer is timed; a slow one gets eight passes all the same.

    Returns:
        The copy, in eval mode and without gradients. Its attribute ``sparsified`` maps the name of each layer that was
        timed to its :class:`Timed`.

    Raises:
        PykdError: a block that is none, or a network that uses the weights of such layers itself.

    Cost: two forward passes, and per layer and form a packed weight and about ``seconds``.

    Example:
        >>> layer = nn.Linear(512, 512)
        >>> _ = layer.weight.data[16:].zero_()
        >>> fast = sparsify(nn.Sequential(layer, nn.ReLU()), torch.randn(1, 512))
        >>> sorted(map(str, fast.sparsified["0"].seconds))
        ['(1, 1)', '(1, 16)', '(16, 16)', '(4, 4)', '(8, 8)', 'dense']
    """
    for block in blocks:
        if not (isinstance(block, tuple) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
            raise PykdError(f"blocks should be pairs (rows, columns), both at least 1, got {block!r}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    layers = {name: layer for name, layer in model.named_modules() if _kind(layer) is not None}
    found: dict[str, Timed] = {}
    faster: dict[int, nn.Module] = {}
    with torch.no_grad(), _evaluating(model):
        for name, inputs in _inputs(model, layers, arguments).items():
            layer = layers[name]
            forms = {"dense": layer, **_forms(layer, inputs, blocks)}
            if len(forms) > 1:
                found[name] = timed = Timed(_times(forms, inputs, seconds))
                if timed.form != "dense":
                    faster[id(layer)] = forms[timed.form]
        # Masked weights are computed anew by every pass; without gradients they can be copied.
        fast = _changed(model, lambda layer, original: faster.get(id(original), layer))
        fast.eval().requires_grad_(False)
        try:
            fast(*arguments)
        except (AttributeError, TypeError) as error:
            raise PykdError(
                f"the network does not run with sparse layers ({error}): where it uses a layer's weight itself, "
                "convert the other layers one by one, by SparseLinear.from_dense and SparseConv2d.from_dense"
            ) from error
    fast.__dict__["sparsified"] = found
    return fast


def _kind(layer: nn.Module) -> Any:
    """The sparse class of a layer; None: it has none, or hooks see what it does."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    alone = "forward" not in layer.__dict__ and all(isinstance(hook, BasePruningMethod) for hook in hooks)
    own = getattr(type(layer), "_conv_forward", nn.Conv2d._conv_forward) is not nn.Conv2d._conv_forward
    return _KINDS.get(type(layer).forward) if alone and not own else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {layer: layer.training for layer in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def _inputs(model: nn.Module, layers: Mapping[str, Any], arguments: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What each layer is called with in a pass, in order. No hooks: some modules avoid their fast path beside them."""
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = layer.forward

        def listening(input: Tensor) -> Tensor:
            seen.setdefault(name, []).append(input)
            return forward(input)

        return listening

    try:
        for name, layer in layers.items():
            layer.forward = listen(name, layer)
        model(*arguments)
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
    return seen


def _forms(layer: Any, inputs: list[Tensor], blocks: Collection[Block]) -> dict[str | Block, nn.Module]:
    """The sparse forms of a layer that leave something out."""
    dtypes = {tensor.dtype for tensor in (layer.weight, *inputs)}
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16} or not layer.weight.isfinite().all():
        return {}
    try:
        forms = {block: _kind(layer).from_dense(layer, block) for block in blocks}
    except PykdError:  # its padding
        return {}
    return {block: form.eval() for block, form in forms.items() if form.weight.values.size < layer.weight.numel()}


def _times(forms: Mapping[str | Block, nn.Module], inputs: list[Tensor], seconds: float) -> dict[str | Block, float]:
    """The median seconds of each form for all the inputs, measured in turns."""

    def once(form: nn.Module, repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            for each in inputs:
                form(each)
        if inputs[0].is_cuda:
            torch.cuda.synchronize(inputs[0].device)
        return (perf_counter() - begin) / repeats

    rounds = 5
    for form in forms.values():
        once(form, 1)  # packs the weight, and warms up
    repeats = {name: max(1, round(seconds / rounds / once(form, 2))) for name, form in forms.items()}
    measured = [{name: once(form, repeats[name]) for name, form in forms.items()} for _ in range(rounds)]
    return {name: median(each[name] for each in measured) for name in forms}
