"""examples/lightning_module.py: the gradient is that of the definition, for accumulated parts and for processes."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pykd import reference, testing

SCRIPT = Path(__file__).parents[1] / "examples" / "lightning_module.py"
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
ROWS = 12


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    pytest.importorskip("lightning", reason="the example needs lightning: pip install '.[examples]'")
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 6, generator=generator).double(), torch.randint(4, (ROWS,), generator=generator)


@pytest.fixture
def module(example: SimpleNamespace) -> Any:
    """With a teacher that batch normalisation and dropout would change, were it not in eval mode."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    plain = type(
        "Plain",
        (example.Distilled,),
        {"configure_optimizers": lambda self: torch.optim.SGD(self.student.parameters(), 1.0)},
    )
    return plain(nn.Linear(6, 4), teacher).double()


def wanted(module: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the definition, of all rows at once in the first step."""
    logits = module.teacher.module.eval()(images).detach()
    how = {"temperature": 4.0, "hard_weight": 0.1, "sigma": 0.5, "alpha": 0.8, "seed": torch.tensor(0)}
    loss = reference.distillation_loss(module.student(images), logits, labels, **how)
    return torch.autograd.grad(loss, list(module.student.parameters()))


def stepped(module: Any, batch: tuple[Tensor, Tensor], *, size: int, **trainer: Any) -> list[Tensor]:
    """How far one optimiser's step at a rate of 1 takes the student."""
    from lightning.pytorch import Trainer

    before = [weight.detach().clone() for weight in module.student.parameters()]
    fit = Trainer(accelerator="cpu", max_steps=1, precision="64-true", **trainer, **QUIET)
    fit.fit(module, DataLoader(TensorDataset(*batch), batch_size=size))
    return [old - weight.detach() for old, weight in zip(before, module.student.parameters(), strict=True)]


@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_step_is_the_definition(module: Any, batch: tuple[Tensor, Tensor], parts: int) -> None:
    teacher = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    expected = wanted(module, *batch)
    grads = stepped(module, batch, size=ROWS // parts, accumulate_grad_batches=parts)
    for grad, other in zip(grads, expected, strict=True):
        testing.assert_matches(grad, other, length=ROWS, magnitude=1.0)
    assert all(value.equal(teacher[name]) for name, value in module.teacher.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in module.teacher.parameters())


def test_processes_step_is_the_definition(module: Any, batch: tuple[Tensor, Tensor]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no threads of OpenMP's
    try:
        # Lightning deals the rows out by this sampler, with the seed of seed_everything or 0.
        order = [row for rank in range(2) for row in DistributedSampler(range(ROWS), 2, rank, seed=0)]
        expected = wanted(module, *(each[order] for each in batch))
        grads = stepped(module, batch, size=ROWS // 2, devices=2, strategy="ddp_fork")
    finally:
        torch.set_num_threads(threads)
    for grad, other in zip(grads, expected, strict=True):
        testing.assert_matches(grad, other, length=ROWS, magnitude=1.0)


def test_checkpoint_is_the_student_alone(example: SimpleNamespace, module: Any) -> None:
    state = module.state_dict()
    assert {name.partition(".")[0] for name in state} == {"student"}
    (group,) = module.configure_optimizers().param_groups
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in module.student.parameters()}
    other = example.Distilled(nn.Linear(6, 4), nn.Linear(6, 4)).double()
    other.load_state_dict(state, strict=other.strict_loading)
    assert all(value.equal(state[name]) for name, value in other.state_dict().items())


def test_script_says_what_the_student_learned(
    example: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    example.main()
    share = capsys.readouterr().out.removeprefix("student: ").partition("%")[0]
    assert float(share) > 80  # a guess is right in 10 %
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
