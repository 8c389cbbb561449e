"""The regulariser that makes blocks of a student's weights sparse where its teacher's are."""

from collections.abc import Mapping

from torch import Tensor, nn

from pykd.errors import PykdError
from pykd.nn.variational import VariationalConv2d, VariationalLinear
from pykd.ops import block_norm, block_norms

KINDS = {nn.Linear: "Linear", VariationalLinear: "Linear", nn.Conv2d: "Conv2d", VariationalConv2d: "Conv2d"}


class BlockSparseRegularizer(nn.Module):
    r"""The norm of the groups of a student's and a teacher's weights, taken together (Hegde et al. 2020, :math:`R_g`).

    .. math:: R_g = \sum_{l} \sum_{m} \bigl\lVert (S_{lm}, T_{lm}) \bigr\rVert

    over the matched layers :math:`l` and their groups :math:`m`, with the largest absolute value as the norm
    (``"l1_linf"``) or the Euclidean one (``"l1_l2"``). Groups are matched by their place; those that one side has alone
    stand alone. The weights of a variational layer are its means. See :func:`pykd.ops.block_norm`.

    Args:
        student: the network to be regularised, plain or variational.
        teacher: stays as it is; its weights never get a gradient.
        groups: ``"in"``, ``"out"``, ``"kernel"`` or ``(rows, columns)``.
        norm: ``"l1_linf"`` or ``"l1_l2"``.
        match: ``"order"`` pairs the linear and convolutional layers as they come, ``"name"`` those of the same name, a
            mapping says the teacher's layer for a student's; student layers that it leaves out are not regularised.
        scale_by_size: a group counts with the root of its number of weights.

    Raises:
        PykdError: layers that cannot be matched, or a teacher's weight that is not finite.
        ValueError: ``groups`` or ``norm`` of another form.

    Cost: a pass over the student's weights. A teacher enters by the norms of its groups, computed once, unless groups
    are blocks or scaled.

    Example:
        >>> regularizer = BlockSparseRegularizer(nn.Linear(4, 2), nn.Linear(4, 8))
        >>> regularizer().shape
        torch.Size([])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        groups: str | tuple[int, int] = "in",
        norm: str = "l1_linf",
        match: str | Mapping[str, str] = "order",
        scale_by_size: bool = False,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.norm = norm
        self.scale_by_size = scale_by_size
        self._layers: list[nn.Module] = []  # in a list: they are the student's
        mine, its = _layers(student), _layers(teacher)
        for number, (one, other) in enumerate(_matched(mine, its, match).items()):
            weight = _weight(its[other]).detach()
            if not bool(weight.isfinite().all()):
                raise PykdError(f"a weight of the teacher's layer {other!r} is not finite: give another teacher")
            if isinstance(groups, str) and not scale_by_size:
                norms = block_norms(weight, groups=groups, norm=norm)
                weight = {"in": norms.unsqueeze(0), "out": norms.unsqueeze(-1), "kernel": norms}[groups]
            self._layers.append(mine[one])
            self.register_buffer(f"_teacher{number}", weight.to(_weight(mine[one])), persistent=False)

    def forward(self) -> Tensor:
        """The regulariser of the student's weights as they are now, a scalar with gradient."""
        return block_norm(
            [_weight(layer) for layer in self._layers],
            groups=self.groups,
            norm=self.norm,
            teachers=list(self.buffers()),
            scale_by_size=self.scale_by_size,
        )


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight if isinstance(layer, (nn.Linear, nn.Conv2d)) else layer.theta  # type: ignore[assignment]
    return weight


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if type(layer) in KINDS}


def _matched(
    mine: Mapping[str, nn.Module], its: Mapping[str, nn.Module], match: str | Mapping[str, str]
) -> Mapping[str, str]:
    """The teacher's layer for a layer of the student, by name."""
    if match == "order":
        kinds = [[KINDS[type(layer)] for layer in layers.values()] for layers in (mine, its)]
        if kinds[0] != kinds[1]:
            raise PykdError(
                f"the student's layers ({_listed(mine)}) cannot be matched with the teacher's ({_listed(its)}) by "
                "order: give match={student layer: teacher layer}"
            )
        return dict(zip(mine, its, strict=True))
    if not isinstance(match, Mapping):
        if match != "name":
            raise PykdError(f"match should be order, name or a mapping of layers' names, got {match!r}")
        match = {name: name for name in mine}
    for one, other in match.items():
        for owner, name, layers in (("student", one, mine), ("teacher", other, its)):
            if name not in layers:
                raise PykdError(f"the {owner} has no layer {name!r} to match; it has {_listed(layers)}")
        if KINDS[type(mine[one])] != KINDS[type(its[other])]:
            raise PykdError(f"student layer {one!r} and teacher layer {other!r} are of two kinds: match equal ones")
    return match


def _listed(layers: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name or 'itself'}: {KINDS[type(layer)]}" for name, layer in layers.items()) or "none"
