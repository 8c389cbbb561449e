"""Cross distillation: objectives, what is pruned and stays so, errors that name the layer, whole runs."""

import copy
import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pykd
from pykd.config import Training
from pykd.deploy import export
from pykd.errors import Interrupted, PykdError
from pykd.methods import CrossDistillation
from pykd.models import build
from pykd.pruning import flops, remove_dead
from pykd.pruning.reconstruction import Reconstruction
from pykd.training import Batch, FrozenTeacher, Run

DRAW = torch.Generator().manual_seed(0)
LABELS = torch.arange(40) % 4
INPUTS = torch.randn(40, 2, 8, 8, generator=DRAW) + LABELS.view(-1, 1, 1, 1) * torch.randn(2, 8, 8, generator=DRAW)
ROWS = TensorDataset(INPUTS, LABELS, torch.arange(40))
KNOWN = CrossDistillation()


def network(seed: int = 0) -> nn.Sequential:
    """Convolutions with and without batch normalisation, and two linear layers."""
    torch.manual_seed(seed)
    found = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 6, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip
    found(INPUTS)  # statistics of their own for the normalisations
    return found.eval()


def compressed(method: CrossDistillation, teacher: nn.Module, inputs: Tensor = INPUTS) -> nn.Module:
    """The student before any fine-tuning."""
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        nn.init.constant_(parameter, 0.5)
    trained = method.prepare(student, [teacher], inputs[:1])
    assert all(done <= of for done, of in method.start(trained, [teacher], inputs, 0))
    method.finish(trained, student)
    return student.eval()


def distance(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return float((one(INPUTS) - other(INPUTS)).square().mean())


def kept(student: nn.Module) -> dict[str, int]:
    """Weights other than zero."""
    return {name: int(value.count_nonzero()) for name, value in student.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize(
    ("soft", "same"),
    [
        ({"alpha": 1.0, "beta": 0.0}, {"objective": "convex", "mu": 1.0}),
        ({"alpha": 0.0, "beta": 1.0}, {"objective": "convex", "mu": 0.0}),
        ({"alpha": 1.0, "beta": 1.0}, {"objective": "plain"}),
    ],
    ids=["correction", "imitation", "plain"],
)
def test_corners_of_soft_cross_distillation_are_the_other_objectives(soft: Any, same: Any) -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    teacher, student, weight = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6), torch.randn(5, 3, 3, 3)

    def found(method: CrossDistillation) -> tuple[float, Tensor]:
        problem = Reconstruction(layer, method.terms)
        problem.add(teacher, student)
        return problem.loss(weight), problem.gradient(weight)

    (loss, gradient), (expected, slope) = (
        found(CrossDistillation(objective="soft", **soft)),
        found(CrossDistillation(**same)),
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["convex", "soft", "plain"])
def test_what_keeps_everything_is_the_teacher(objective: str) -> None:
    teacher = network()
    assert distance(compressed(CrossDistillation(objective=objective, keep=1.0), teacher), teacher) < 1e-12


METHODS = {
    "exact": {},
    "adam": {"solver": "adam", "steps": 400, "lr": 2e-3},
    "activation": {"solver": "adam", "steps": 400, "lr": 2e-3, "activation": True},
    "proximal": {"solver": "proximal", "penalty": 1e-2},
}


@pytest.mark.parametrize("groups", ["in", "weight"])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_each_way_is_nearer_to_the_teacher_than_pruning_alone(groups: str, how: Any) -> None:
    teacher = network()
    method = CrossDistillation(groups=groups, keep=0.5, linear=True, **how)
    student = compressed(method, teacher)
    counts = kept(student)
    if method.solver == "proximal":  # as many as the penalty left
        assert sum(counts.values()) < sum(kept(teacher).values())
    else:
        assert counts == {"0.weight": 144, "3.weight": 432, "7.weight": 324, "10.weight": 120, "12.weight": 20}
    alone = compressed(dataclasses.replace(KNOWN, objective="none", groups=groups, linear=True), teacher)
    assert distance(student, teacher) < 0.9 * distance(alone, teacher)
    for name, module in student.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.equal(teacher.get_submodule(name).running_mean)  # type: ignore[union-attr, arg-type]


def test_comparisons_prune_as_much_and_are_told_apart() -> None:
    teacher = network()
    found = CrossDistillation(linear=True).comparisons()
    assert len({each.label for each in found.values()}) == len(found)
    expected = kept(compressed(KNOWN.comparisons()["magnitude"], teacher))  # type: ignore[arg-type]
    for name, each in KNOWN.comparisons().items():
        if not isinstance(each, CrossDistillation):
            assert name in ("alone", "clean", "kd")
            continue
        assert kept(compressed(each, teacher)) == expected, name  # type: ignore[arg-type]
    assert "thinet" not in CrossDistillation(groups="weight").comparisons()


def test_later_layers_see_the_pruned_student() -> None:
    """The third convolution's solution is that of its problem with the inputs that the student gives it."""
    teacher = network()
    method = CrossDistillation(keep=0.5, objective="plain")
    student = compressed(method, teacher)
    problem = Reconstruction(teacher[7], method.terms)
    problem.add(teacher[:7](INPUTS), student[:7](INPUTS))
    mask = student[7].weight != 0
    expected = problem.solve(mask, method.ridge)
    torch.testing.assert_close(student[7].weight.detach(), expected, rtol=1e-4, atol=1e-5)


def train(method: CrossDistillation, out: Path | None = None, **changes: Any) -> Run:
    arguments: dict[str, Any] = {
        "teacher": lambda: network(1),
        "student": lambda: network(2),
        "train": ROWS,
        "holdout": ROWS,
        "teacher_training": Training(epochs=4, batch_size=20, lr=5e-3),
        "training": Training(
            epochs=5, batch_size=20, lr=1e-2, optimizer="sgd", momentum=0.9, weight_decay=0.1, schedule="constant"
        ),
        "baselines": [],
        "out": out,
        "device": "cpu",
        "progress": False,
    }
    return pykd.distill(method, **{**arguments, **changes})


@pytest.mark.parametrize("fine_tune", ["labels", "kd", "features"])
@pytest.mark.parametrize("groups", ["in", "weight"])
def test_sparsity_is_the_same_after_fine_tuning_with_momentum_and_weight_decay(groups: str, fine_tune: str) -> None:
    method = CrossDistillation(groups=groups, keep=0.4, linear=True, fine_tune=fine_tune)
    run = train(method)
    before = train(dataclasses.replace(method, fine_tune="none"))
    pairs = dict(before.student.named_parameters())
    assert kept(run.student) == kept(before.student)
    for name, value in run.student.named_parameters():
        assert ((value != 0) == (pairs[name] != 0)).all() or value.dim() == 1
        assert not value.equal(pairs[name]), "fine-tuning moves what is left"
    teacher: Any = run.teacher.module
    for one, other in ((run.student, teacher), (before.student, before.teacher.module)):
        assert one[1].running_var.equal(other[1].running_var)  # type: ignore[index]
    facts = run.summary["rows"][-1]["facts"]["layers"]
    assert facts["7"]["kept"] == kept(run.student)["7.weight"] and facts["0"]["sparsity"] == 0
    assert run.metrics[-1]["epoch"] == 5 and before.metrics[-1]["stage"] == "teacher"


def test_removal_changes_no_answer() -> None:
    student = train(CrossDistillation(keep=0.5, linear=True)).student
    smaller = remove_dead(student, INPUTS[:1])
    torch.testing.assert_close(smaller(INPUTS), student(INPUTS), rtol=1e-5, atol=1e-5)
    assert [smaller.get_submodule(name).weight.shape[1] for name in ("3", "7", "10", "12")] == [4, 6, 12, 5]
    assert flops(smaller, INPUTS[:1]) < 0.5 * flops(student, INPUTS[:1])


@pytest.mark.parametrize("groups", ["in", "weight"])
def test_residual_networks_are_pruned_inside_their_blocks(groups: str) -> None:
    torch.manual_seed(0)
    teacher = build("resnet20", in_shape=(2, 8, 8), classes=4)
    teacher(INPUTS)
    teacher.eval()
    student = compressed(CrossDistillation(groups=groups, keep=0.5), teacher)
    halved = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.Conv2d)
        and int(student.get_submodule(name).weight.count_nonzero()) == module.weight.numel() // 2  # type: ignore[union-attr, operator]
    ]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in teacher.modules())
    assert len(halved) == (9 if groups == "in" else convolutions - 1)
    torch.testing.assert_close(remove_dead(student, INPUTS[:1])(INPUTS), student(INPUTS), rtol=1e-4, atol=1e-4)


def test_int8_levels_are_those_of_the_model_file_and_nearer_to_the_teacher_than_the_nearest(tmp_path: Path) -> None:
    teacher = network()
    student = compressed(CrossDistillation(keep=1.0, int8=True, linear=True, ridge=1e-4), teacher)
    nearest = copy.deepcopy(teacher)
    for name, value in student.named_parameters():
        if value.dim() > 1:
            rows = value.detach().flatten(1)
            scale = rows.abs().amax(1, keepdim=True) / 127
            levels = rows / scale
            torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
            mine = nearest.get_parameter(name).detach().flatten(1)
            size = mine.abs().amax(1, keepdim=True) / 127
            nearest.get_parameter(name).data = ((mine / size).round() * size).view_as(value)
    assert distance(student, teacher) < distance(nearest, teacher)
    export(student, tmp_path / "a.pykd.safetensors", INPUTS[:1], values="int8")
    answers = pykd.deploy.load(tmp_path / "a.pykd.safetensors")(INPUTS)
    torch.testing.assert_close(answers, student(INPUTS), rtol=1e-4, atol=1e-4)


def test_fine_tuning_leaves_int8_weights_alone() -> None:
    method = CrossDistillation(keep=0.5, int8=True)
    run, before = train(method), train(dataclasses.replace(method, fine_tune="none"))
    for (name, value), other in zip(run.student.named_parameters(), before.student.parameters(), strict=True):
        assert value.equal(other) == (value.dim() > 1), name


def test_a_run_goes_on_between_two_layers_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = CrossDistillation(keep=0.5, linear=True)
    whole = train(method, tmp_path / "whole", baselines=["soft"])
    pruned = CrossDistillation._pruned
    calls: list[str] = []

    def stopping(self: Any, name: str, *rest: Any) -> Any:
        calls.append(name)
        if len(calls) == 6:  # the student's second layer, after the four of the baseline
            os.kill(os.getpid(), signal.SIGTERM)
        return pruned(self, name, *rest)

    monkeypatch.setattr(CrossDistillation, "_pruned", stopping)
    with pytest.raises(Interrupted):
        train(method, tmp_path / "cut", baselines=["soft"])
    assert calls == ["3", "7", "10", "12", "3", "7"]
    run = train(method, tmp_path / "cut", baselines=["soft"], resume=True)
    assert calls[6:] == ["10", "12"]
    for name in ("soft", "student"):
        one, other = (load_file(tmp_path / each / f"{name}.safetensors") for each in ("whole", "cut"))
        assert all(one[key].equal(other[key]) for key in one)
    assert run.summary["rows"][-1]["accuracy"] == whole.summary["rows"][-1]["accuracy"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "both"}, "objective should be"),
        ({"mu": 1.5}, "mu should be in"),
        ({"groups": "out"}, "groups should be in or weight"),
        ({"keep": 0}, "keep should be a share in (0, 1]"),
        ({"keep": 1.5}, "keep should be a share in (0, 1]"),
        ({"keep": True}, "keep should be a share"),
        ({"keep": []}, "keep should be a share"),
        ({"keep": [0.5, 0]}, "keep: 1 should have"),
        ({"keep": {"3": float("nan")}}, "keep: 3 should have"),
        ({"keep": {3: 0.5}}, "keep: names of layers should be words, got 3: write it in quotes"),
        ({"budget": {"stars": 1}}, "budget should be"),
        ({"budget": {"flops": 0.5}, "keep": [0.5]}, "budget says what stays of all layers: leave keep out"),
        ({"budget": {"flops": 0.5}, "solver": "proximal"}, "budget says what stays, and so does the penalty"),
        ({"ridge": -1}, "ridge should be"),
        ({"select": "thinet", "groups": "weight"}, "select=thinet is for input channels"),
        ({"activation": True}, "take solver=adam"),
        ({"int8": True, "objective": "none"}, "int8 chooses levels"),
        ({"skip": "3"}, "skip should be a list of names"),
        ({"steps": 0}, "steps should be a whole number"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        CrossDistillation(**fields)


class Shared(nn.Module):
    """A layer in two places, a grouped one, and one whose inputs others read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.grouped, self.both, self.head = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.first(inputs)
        value = self.twice(self.twice(value))
        value = value + self.both(value)
        return self.head(self.grouped(value).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"keep": {"first": 0.5}}, "layer first cannot be pruned: it is the network's first"),
        ({"keep": {"grouped": 0.5}}, "layer grouped cannot be pruned: it is grouped"),
        ({"keep": {"twice": 0.5}}, "layer twice cannot be pruned: it is grouped, is used in several places"),
        ({"keep": {"both": 0.5}}, "layer both cannot be pruned: it is a 1x1 convolution"),
        ({"keep": {"head": 2}}, "layer head cannot be pruned: it is linear; linear=true"),
        ({"keep": {"haed": 2}}, "no layer 'haed'; did you mean 'head'?"),
        ({"keep": {"head": 50}, "linear": True, "groups": "weight"}, "layer head has 16 groups, not 50"),
        ({"keep": [0.5, 0.5, 0.5], "groups": "weight"}, "keep has 3 entries for 1 layers: give one for each of both"),
        ({"skip": ["hed"], "linear": True}, "skip: there is no layer 'hed'; did you mean 'head'?"),
        ({}, "no layer to prune"),
        ({"budget": {"flops": 0.5}}, "no layer to prune"),
    ],
)
def test_layers_that_cannot_be_pruned_are_named(method: dict[str, Any], words: str) -> None:
    with pytest.raises(PykdError, match=re.escape(words)):
        compressed(CrossDistillation(**method), Shared().eval())


def test_a_network_without_a_layer_to_prune_is_refused_before_a_run() -> None:
    with pytest.raises(PykdError, match="no layer to prune"):
        CrossDistillation().prepare(Shared(), [Shared()], INPUTS[:1])


@pytest.mark.parametrize("groups", ["in", "weight"])
@pytest.mark.parametrize("how", [{}, {"solver": "adam", "steps": 30}, {"int8": True}, {"objective": "none"}])
def test_a_teacher_that_is_not_finite_is_refused_by_the_layer(groups: str, how: dict[str, Any]) -> None:
    method = CrossDistillation(groups=groups, **how)
    for name, words in (("3.weight", "its weights are"), ("1.bias", "its inputs are")):
        teacher = network()
        teacher.get_parameter(name).data.view(-1)[0] = float("nan")
        if (name, method.objective) == ("1.bias", "none"):  # which needs no inputs
            continue
        with pytest.raises(PykdError, match=f"layer 3: {words} not finite"):
            compressed(method, teacher)


@pytest.mark.parametrize(
    "how",
    [{}, {"groups": "weight"}, {"select": "thinet"}, {"select": "lasso"}, {"int8": True}, {"solver": "adam"}],
    ids=str,
)
def test_where_no_image_reaches_a_layer_it_keeps_the_teachers_weights(how: dict[str, Any]) -> None:
    teacher = network()
    for parameter in teacher[1].parameters():
        nn.init.zeros_(parameter)
    student = compressed(CrossDistillation(**how), teacher)
    mine, its = (each[3].weight.detach() for each in (student, teacher))  # type: ignore[index]
    left = mine != 0
    assert 420 <= left.sum() <= 432
    size = its.flatten(1).abs().amax(1).view(-1, 1, 1, 1) / 127 if "int8" in how else torch.full_like(its[:, :1], 1e-6)
    assert ((mine - its).abs() <= 0.51 * size)[left].all()


def test_a_penalty_on_a_layer_that_no_image_reaches() -> None:
    teacher = network()
    for parameter in teacher[1].parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(PykdError, match=r"layer 3: a penalty of 0\.001 leaves nothing of it"):
        compressed(CrossDistillation(solver="proximal"), teacher)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("groups", ["in", "weight"])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_networks_of_other_dtypes(groups: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    method = dataclasses.replace(CrossDistillation(groups=groups, **how), steps=60)
    teacher = network()
    expected = compressed(method, teacher)(INPUTS)
    student = compressed(method, teacher.to(dtype), INPUTS.to(dtype))
    torch.testing.assert_close(student(INPUTS.to(dtype)).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("groups", ["in", "weight"])
@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
def test_the_layout_of_the_weights_does_not_matter(groups: str, how: dict[str, Any]) -> None:
    method = dataclasses.replace(CrossDistillation(groups=groups, linear=True, **how), steps=60)
    teacher = network()
    expected = compressed(method, teacher)
    other = copy.deepcopy(teacher).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in other:
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.T.contiguous().T
    found = compressed(method, other)
    assert kept(found) == kept(expected)
    assert distance(found, teacher) < 1.1 * distance(expected, teacher)  # of equals another may be kept


class Changing(nn.Module):
    """A network that changes the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs.mul_(1.5))  # type: ignore[no-any-return]


def test_a_network_that_changes_its_inputs() -> None:
    inputs = INPUTS.clone()
    compressed(CrossDistillation(), Changing().eval(), inputs)
    assert inputs.equal(INPUTS)


def in_place(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, bias=bias), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, 4, bias=bias),
    )  # fmt: skip


def test_outputs_that_are_written_over_cannot_be_matched() -> None:
    teacher = in_place(True)
    student = compressed(CrossDistillation(), teacher)
    torch.testing.assert_close(remove_dead(student, INPUTS[:1])(INPUTS), student(INPUTS))
    with pytest.raises(PykdError, match="build the network with inplace=False"):
        compressed(CrossDistillation(fine_tune="features"), teacher)


def test_int8_of_a_network_without_biases_is_not_fine_tuned() -> None:
    networks: dict[str, Any] = {"teacher": lambda: in_place(False), "student": lambda: in_place(False)}
    assert train(CrossDistillation(int8=True, fine_tune="none"), **networks).summary["rows"][-1]["accuracy"] > 0.25
    with pytest.raises(PykdError, match="int8 leaves nothing to be fine-tuned"):
        train(CrossDistillation(int8=True), **networks)


def test_a_budget_of_bytes_counts_int8_where_that_is_asked_for() -> None:
    teacher = network()

    def size(of: nn.Module, values: str) -> int:
        file = pykd.deploy.tracing.described(of, INPUTS[:1], values=values)
        return len(pykd.deploy.model_file.to_bytes(file))

    limit = size(teacher, "int8") - 200
    student = compressed(CrossDistillation(budget={"bytes": limit}, int8=True, linear=True), teacher)
    assert limit - 400 < size(student, "int8") <= limit


def test_singular_least_squares_name_the_layer() -> None:
    with pytest.raises(PykdError, match="layer 7: its least squares have many solutions"):
        compressed(CrossDistillation(ridge=0.0, keep={"7": 0.9}), network(), INPUTS[:2])


def test_a_penalty_that_leaves_nothing_names_the_layer() -> None:
    with pytest.raises(PykdError, match="layer 3: a penalty of 1e\\+06 leaves nothing"):
        compressed(CrossDistillation(solver="proximal", penalty=1e6), network())


def test_another_network_than_the_teachers_is_refused() -> None:
    with pytest.raises(PykdError, match="give the student the teacher's network"):
        CrossDistillation().prepare(nn.Linear(3, 2), [nn.Linear(4, 2)], torch.zeros(1, 3))


def test_plans_of_shares_and_numbers() -> None:
    teacher = network()
    student = compressed(CrossDistillation(keep=[2, 0.25]), teacher)
    assert remove_dead(student, INPUTS[:1]).get_submodule("3").weight.shape[1] == 2
    assert remove_dead(student, INPUTS[:1]).get_submodule("7").weight.shape[1] == 3
    student = compressed(CrossDistillation(keep={"12": 3}, linear=True), teacher)
    assert kept(student) == {**kept(teacher), "12.weight": 12}


@pytest.mark.parametrize("what", ["parameters", "flops", "bytes"])
@pytest.mark.parametrize("groups", ["in", "weight"])
def test_a_budget_is_kept(groups: str, what: str) -> None:
    teacher = network()
    student = compressed(CrossDistillation(budget={what: 0.6}, groups=groups, linear=True), teacher)
    assert sum(kept(student).values()) < sum(kept(teacher).values())
    cost = {
        "parameters": lambda of: sum(int(value.count_nonzero()) for value in remove_dead(of, INPUTS[:1]).parameters()),
        "flops": lambda of: flops(remove_dead(of, INPUTS[:1]), INPUTS[:1]),
        "bytes": lambda of: len(pykd.deploy.model_file.to_bytes(pykd.deploy.tracing.described(of, INPUTS[:1]))),
    }[what]
    if groups == "in" or what != "flops":
        assert cost(student) <= 0.6 * cost(teacher) * (1 + 1e-3)


def test_the_feature_loss_is_relative_and_zero_for_the_teacher() -> None:
    teacher = network()
    method = CrossDistillation(objective="none", fine_tune="features", keep=1.0)
    trained = method.prepare(copy.deepcopy(teacher), [teacher], INPUTS[:1])
    frozen = FrozenTeacher(copy.deepcopy(teacher))
    batch = Batch(INPUTS, LABELS, torch.tensor(0), 0, [lambda: frozen(INPUTS)], teachers=[frozen])
    assert method.loss(trained, batch) == 0
    trained.get_submodule("network.12").bias.data.zero_()  # type: ignore[union-attr, operator]
    trained.get_submodule("network.12").weight.data.zero_()  # type: ignore[union-attr, operator]
    assert method.loss(trained, batch).item() == pytest.approx(1.0)


def test_settings_are_plain_data() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(KNOWN)))["objective"] == "convex"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver", ["exact", "adam", "proximal"])
@pytest.mark.parametrize("groups", ["in", "weight"])
def test_a_run_on_the_gpu_prunes_as_on_the_cpu(groups: str, solver: str) -> None:
    method = CrossDistillation(groups=groups, solver=solver, steps=300, linear=True, penalty=1e-2)
    here, there = (train(method, device=device).student for device in ("cpu", "cuda"))
    assert all(value.is_cuda for value in there.parameters())
    if solver != "proximal":
        assert kept(here) == kept(there)
    method = dataclasses.replace(method, fine_tune="none")
    teacher = network()
    ours, theirs = compressed(method, teacher), compressed(method, copy.deepcopy(teacher).cuda(), INPUTS.cuda()).cpu()
    assert distance(theirs, teacher) < 1.5 * distance(ours, teacher) + 1e-6
