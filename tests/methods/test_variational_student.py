"""The variational student: its loss against its formula, what a weight of zero switches off, and a whole run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import pykd
from pykd import reference
from pykd.errors import PykdError
from pykd.methods import METHODS, HintonDistillation, StudentAlone, VariationalStudent
from pykd.methods._variational import facts
from pykd.nn import set_noise, variational_layers
from pykd.training import Batch

ROWS, CLASSES, TRAIN_ROWS = 12, 3, 480
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 6, generator=DRAW)
LABELS = torch.randint(CLASSES, (ROWS,), generator=DRAW)


def perceptron(width: int, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, CLASSES))


TEACHER = perceptron(16, seed=2)


def asked(inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return TEACHER(inputs)


def batch(rows: slice = slice(0, ROWS), *, epoch: int = 9, teach: Any = None) -> Batch:
    inputs = INPUTS[rows]
    teachers = [teach or (lambda: asked(inputs))]
    return Batch(
        inputs, LABELS[rows], torch.tensor(7), rows.start, teachers, epoch=epoch, epochs=10, train_rows=TRAIN_ROWS
    )


def prepared(method: Any, student: nn.Module | None = None) -> nn.Module:
    return method.prepare(student or perceptron(5), [TEACHER], INPUTS[:1]).train()


def formula(method: VariationalStudent, trained: nn.Module, part: Batch, share: float = 1.0) -> Tensor:
    """The loss, term by term."""
    set_noise(trained, part.seed, part.row_offset)
    student, teacher, t = trained(part.inputs), part.teacher_logits, method.temperature
    log_p, log_q = F.log_softmax(teacher / t, -1), F.log_softmax(student / t, -1)
    if method.direction == "reverse":
        log_p, log_q = log_q, log_p
    divergence = (log_p.exp() * (log_p - log_q)).sum() / len(student)
    layers = variational_layers(trained).values()
    kl = reference.variational_kl([each.theta for each in layers], [each.log_sigma2 for each in layers])
    groups = reference.block_norm(
        [each.theta for each in layers],
        groups=method.groups,
        norm=method.norm,
        teachers=[TEACHER[0].weight, TEACHER[2].weight],
    )
    return (
        F.cross_entropy(student, part.labels)
        + method.lambda_t * 2 * t**2 * divergence
        + method.lambda_v * share * kl / TRAIN_ROWS
        + method.lambda_g * groups
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "reverse", "temperature": 3.0, "lambda_t": 2.0},
        {"norm": "l1_l2", "lambda_g": 0.3},
        {"groups": (2, 3), "lambda_g": 0.3, "lambda_v": 0.1},
    ],
    ids=str,
)
def test_loss_is_its_formula(options: dict[str, Any]) -> None:
    method = VariationalStudent(**options)
    trained = prepared(method)
    parameters = list(trained.parameters())
    loss, expected = method.loss(trained, batch()), formula(method, trained, batch())
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "share"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.25), (4, 0.5), (5, 0.75), (6, 1.0), (9, 1.0)]
)
def test_divergence_is_warmed_up(epoch: int, share: float) -> None:
    method = VariationalStudent(warmup_start=0.2, warmup_end=0.6)
    trained = prepared(method)
    torch.testing.assert_close(method.loss(trained, batch(epoch=epoch)), formula(method, trained, batch(), share))


def test_slices_of_a_batch_add_up_to_the_whole() -> None:
    method = VariationalStudent(lambda_g=0.1)
    trained = prepared(method)
    whole = method.loss(trained, batch())
    slices = [slice(0, 5), slice(5, 6), slice(6, ROWS)]
    parts = [method.loss(trained, batch(rows)) * (rows.stop - rows.start) / ROWS for rows in slices]
    torch.testing.assert_close(sum(parts), whole)


def test_without_its_terms_it_is_the_simpler_method_bit_for_bit() -> None:
    method = VariationalStudent(lambda_v=0.0, lambda_g=0.0, lambda_t=1.5, temperature=3.0)
    student = perceptron(5)
    trained = prepared(method, student)
    simple = HintonDistillation(temperature=3.0, hard_weight=0.25)
    assert method.loss(trained, batch()).equal(4 * simple.loss(student, batch()))
    nothing = dataclasses.replace(method, lambda_t=0.0)
    silent = batch(teach=lambda: pytest.fail("asked the teacher"))
    assert nothing.loss(trained, silent).equal(StudentAlone().loss(student, silent))
    assert not variational_layers(trained)
    assert (method.keep_epoch, VariationalStudent().keep_epoch) == ("best", "last")


def test_a_stronger_teacher_leaves_the_loss_of_kd_and_sparse_vd() -> None:
    """The norm of maxima has no gradient where the teacher's weights are larger everywhere."""
    student = perceptron(5)
    for parameter in student.parameters():
        parameter.data.mul_(1e-3)
    with_groups, without = VariationalStudent(lambda_g=1.0), VariationalStudent(lambda_g=0.0)
    gradients = []
    for method in (with_groups, without):
        trained = prepared(method, student)
        gradients.append(torch.autograd.grad(method.loss(trained, batch()), list(trained.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert one.equal(other)


def test_finish_writes_masked_means_and_says_what_is_left() -> None:
    method = VariationalStudent()
    student = perceptron(5)
    before = student[0].weight.clone()
    trained = prepared(method, student)
    first, last = variational_layers(trained).values()
    first.log_sigma2.data.copy_(2 * first.theta.detach().abs().log())  # log alpha = 0
    first.log_sigma2.data[:, 4] += 3.5
    first.log_sigma2.data[2] += 100
    facts = method.finish(trained, student)
    kept = torch.ones(5, 6, dtype=torch.bool)
    kept[:, 4] = kept[2] = False
    assert student[0].weight.equal(before * kept)
    assert student[2].weight.equal(last.theta)
    assert trained.eval()(INPUTS).equal(student(INPUTS))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["layers"]["0"] | {"log_alpha": None} == {
        "shape": [5, 6],
        "weights": 30,
        "kept": 20,
        "sparsity": 1 - 20 / 30,
        "kept_inputs": 5,
        "kept_outputs": 4,
        "threshold": 3.0,
        "log_alpha": None,
    }
    edges, counts = facts["log_alpha_edges"], facts["layers"]["0"]["log_alpha"]
    assert (edges[0], edges[-1], len(edges), len(counts), sum(counts)) == (-20.0, 20.0, 81, 80, 30)
    assert sum(counts[edges.index(-0.5) : edges.index(0.5)]) == 20
    assert counts[edges.index(3.5)] + counts[edges.index(3.0)] == 4
    assert counts[-1] == 6
    assert facts["kl"] > 0
    assert facts["warnings"] == []


def test_all_pruned_layer_is_told_and_harmless() -> None:
    method = VariationalStudent(lambda_g=0.0)
    student = perceptron(5)
    trained = prepared(method, student)
    for layer in variational_layers(trained).values():
        layer.log_sigma2.data.fill_(30.0)
    facts = method.finish(trained, student)
    assert len(facts["warnings"]) == 2
    assert "layer '0' has no weight left" in facts["warnings"][0]
    assert student(INPUTS).isfinite().all()
    assert method.loss(trained, batch()).isfinite()


def test_theta_of_zero_is_harmless() -> None:
    method = VariationalStudent(norm="l1_l2")
    student = perceptron(5)
    student[0].weight.data[1] = 0.0
    student[2].weight.data.zero_()
    trained = prepared(method, student)
    loss = method.loss(trained, batch())
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(trained.parameters())))
    assert method.finish(trained, student)["layers"]["2"]["log_alpha"][-1] == 15


def test_weak_groups_of_the_finished_student_go() -> None:
    method = VariationalStudent(group_threshold=0.5, norm="l1_l2", lambda_v=0.0)
    student = perceptron(5)
    student[0].weight.data[:, 2] = 0.01
    norms = student[0].weight.norm(dim=0)
    facts = method.finish(prepared(method, student), student)
    assert student[0].weight.any(0).equal(norms > 0.5)
    assert facts["kl"] is None
    assert facts["layers"]["0"]["kept_inputs"] == int((norms > 0.5).sum()) < 6


def test_ablations_are_derived_from_the_method() -> None:
    method = VariationalStudent(temperature=5.0, lambda_t=2.0, lambda_v=0.5, lambda_g=0.1, group_threshold=0.2)
    found = method.comparisons()
    assert list(found) == ["alone", "clean", "kd", "sparse_vd", "kd_sparse_vd", "bayesian_compression"]
    weights = {
        name: (each.lambda_t, each.lambda_v, each.lambda_g, each.group_threshold)
        for name, each in found.items()
        if isinstance(each, VariationalStudent)
    }
    assert weights == {"kd": (2.0, 0, 0, 0), "sparse_vd": (0, 0.5, 0, 0), "kd_sparse_vd": (2.0, 0.5, 0, 0)}
    assert found["bayesian_compression"].lambda_v == 0.5
    assert [each.label for each in (found["kd"], found["sparse_vd"], method)] == [
        "student, KD",
        "student, SparseVD",
        "student, KD+SparseVD+BSR",
    ]
    assert METHODS["sparse_vd"](threshold=2.0) == VariationalStudent(lambda_t=0.0, lambda_g=0.0, threshold=2.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0}, "temperature should be finite and above 0, got 0"),
        ({"lambda_t": -1.0}, r"lambda_t should be finite and not negative, got -1\.0"),
        ({"lambda_v": float("nan")}, "lambda_v"),
        ({"lambda_g": "much"}, "lambda_g"),
        ({"group_threshold": float("inf")}, "group_threshold"),
        ({"direction": "both"}, "direction should be forward or reverse, got 'both'"),
        ({"groups": "row"}, "groups should be in, out, kernel or two whole numbers of at least 1, got 'row'"),
        ({"groups": [4, 0]}, "groups"),
        ({"groups": [4]}, "groups"),
        ({"groups": True}, "groups"),
        ({"norm": "l2"}, "norm should be l1_linf or l1_l2"),
        ({"match": "size"}, "match should be order or name"),
        ({"warmup_start": 0.5, "warmup_end": 0.2}, r"warmup_start should not be above warmup_end, got 0\.5 and 0\.2"),
        ({"warmup_end": 1.5}, r"warmup_end should be in \[0, 1\]"),
        ({"threshold": float("inf")}, "threshold should be a finite number, got inf"),
        ({"log_sigma2": None}, "log_sigma2"),
        ({"groups": [2**70, 1]}, "groups"),
        ({"skip": "head"}, "skip should be a list of names, got 'head'"),
        ({"skip": 2}, "skip should be a list of names, got 2"),
    ],
    ids=str,
)
def test_broken_rules_say_which(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VariationalStudent(**options)


def test_the_rival_skips_the_same_layers() -> None:
    rival = VariationalStudent(skip=["0"]).comparisons()["bayesian_compression"]
    assert list(variational_layers(rival.prepare(perceptron(4), [], INPUTS[:1]))) == ["2"]  # type: ignore[attr-defined]


def test_facts_count_the_inputs_of_every_group_of_a_convolution() -> None:
    network = nn.Conv2d(6, 6, 3, groups=3)
    network.weight.data[:2] = 0  # the outputs of the first group
    assert facts(network, network)["layers"][""]["kept_inputs"] == 4


def test_layers_without_a_match_are_told_before_anything_is_trained() -> None:
    data = torch.utils.data.TensorDataset(INPUTS, LABELS)
    teacher = nn.Sequential(perceptron(4), nn.Linear(CLASSES, CLASSES))
    with pytest.raises(PykdError, match=r"cannot be matched .* by order: give match="):
        pykd.distill(VariationalStudent(), teacher=teacher, student=perceptron(4), train=data, progress=False)
    other = pykd.distill(
        VariationalStudent(match={"0": "0.0"}),
        teacher=teacher,
        student=perceptron(4),
        train=data,
        holdout=data,
        progress=False,
        epochs=1,
        baselines=["kd"],
        device="cpu",
    )
    assert [row["name"] for row in other.summary["rows"]] == ["teacher", "kd", "student"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, for a few epochs."""
    from typer.testing import CliRunner

    from pykd.cli import app

    out = tmp_path_factory.mktemp("digits") / "run"
    changes = ["teacher.training.epochs=4", "student.training.epochs=12", "method.warmup_end=0.2"]
    words = ["distill", "variational_student-digits", "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, *(word for change in changes for word in ("--set", change))])
    assert result.exit_code == 0, result.output
    return out


def test_whole_method_on_digits(digits: Path) -> None:
    rows = {row["name"]: row for row in json.loads((digits / "summary.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "alone", "kd", "sparse_vd", "kd_sparse_vd", "bayesian_compression", "student"]
    assert all(row["accuracy"] > 0.8 for row in rows.values()), {name: row["accuracy"] for name, row in rows.items()}
    dense = rows["alone"]["nonzeros"]
    for name in ("sparse_vd", "kd_sparse_vd", "student"):
        assert rows[name]["nonzeros"] < 0.3 * dense, name
        layers = rows[name]["facts"]["layers"]
        stored = load_file(digits / f"{name}.safetensors")
        for layer, fact in layers.items():
            assert (
                fact["kept"]
                == int(stored[f"{layer}.weight"].count_nonzero())
                == fact["weights"] - round(fact["sparsity"] * fact["weights"])
            )
        assert rows[name]["best_epoch"] == 12
    assert rows["teacher"]["facts"] is rows["alone"]["facts"] is None
    assert set(load_file(digits / "student.safetensors")) == set(load_file(digits / "alone.safetensors"))


def test_vgg_is_trained_and_finished() -> None:
    """Batch normalisation, convolutions without bias, and layers of equal kinds in the two networks."""
    student, teacher = (pykd.models.VGG(in_shape=(3, 32, 32), classes=4, width=width) for width in (1 / 32, 1 / 16))
    method = VariationalStudent(lambda_g=0.1, norm="l1_l2", groups="out")
    images, labels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(4)), torch.arange(8) % 4
    trained = method.prepare(student, [teacher.eval()], images[:1]).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for step in range(3):
        rows = Batch(images, labels, torch.tensor(step), 0, [lambda: teacher(images).detach()], 9, 10, 8)
        optimizer.zero_grad()
        method.loss(trained, rows).backward()
        optimizer.step()
    facts = method.finish(trained, student)
    assert student.eval()(images).equal(trained.eval()(images))
    assert len(facts["layers"]) == 15
    assert all(value.isfinite().all() for value in student.state_dict().values())
