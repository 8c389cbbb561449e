"""examples/hf_trainer.py: the gradient is that of the definition, for accumulated parts and for processes."""

import multiprocessing
import os
import runpy
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pykd import reference, testing

SCRIPT = Path(__file__).parents[1] / "examples" / "hf_trainer.py"
TOKENS = 150
HOW = {"temperature": 2.0, "hard_weight": 0.1}


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    pytest.importorskip("transformers", reason="the example needs transformers: pip install '.[examples]'")
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def samples(example: SimpleNamespace) -> list[dict[str, Tensor]]:
    """Lines of different lengths, so that parts have different numbers of labels."""
    return [{"input_ids": line["input_ids"][: 40 - 6 * i]} for i, line in enumerate(example.lines(6))]


def trainer_of(
    example: SimpleNamespace, samples: list[dict[str, Tensor]], folder: Path, *, sigma: float = 0.0, **how: Any
) -> Any:
    torch.manual_seed(0)
    teacher, student = example.language_model(16, 1).double(), example.language_model(8, 1).double()
    teacher.model.layers[0].self_attn.attention_dropout = 0.5  # it would be seen, were the teacher not in eval mode
    with torch.no_grad():
        for weight in (*teacher.parameters(), *student.parameters()):
            weight.mul_(10)  # as they are they give nearly equal logits
    arguments = example.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **how,
    )
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    data = {"train_dataset": samples, "eval_dataset": samples, "data_collator": example.padded}
    return example.DistillationTrainer(student, arguments, **data, teacher=teacher, sigma=sigma, optimizers=optimizers)


def wanted(trainer: Any, batch: dict[str, Tensor], **noise: Any) -> Tensor:
    """The definition's loss: the mean over all tokens that have another after them."""
    hidden, taught = (
        model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        for model in (trainer.model, trainer.teacher)
    )
    rows = batch["attention_mask"][:, 1:] == 1
    weights = trainer.model.lm_head.weight, trainer.teacher.lm_head.weight
    tokens = hidden[:, :-1][rows], weights[0], taught[:, :-1][rows], weights[1], batch["input_ids"][:, 1:][rows]
    return reference.linear_distillation_loss(*tokens, **HOW, **noise)


def stepped(trainer: Any) -> list[Tensor]:
    """How far one optimiser's step at a rate of 1 takes the student."""
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    return [old - weight.detach() for old, weight in zip(before, trainer.model.parameters(), strict=True)]


def assert_same(grads: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for grad, other in zip(grads, expected, strict=True):
        testing.assert_matches(grad, other, length=TOKENS, magnitude=1.0)


@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_step_is_the_definition(example: SimpleNamespace, samples: Any, tmp_path: Path, parts: int) -> None:
    how = {"per_device_train_batch_size": len(samples) // parts, "gradient_accumulation_steps": parts}
    trainer = trainer_of(example, samples, tmp_path, **how)
    teacher = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    expected = torch.autograd.grad(wanted(trainer, example.padded(samples)), list(trainer.model.parameters()))
    grads = stepped(trainer)
    assert_same(grads, expected)
    assert all(value.equal(teacher[name]) for name, value in trainer.teacher.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in trainer.teacher.parameters())


def test_evaluation_is_the_definition(example: SimpleNamespace, samples: Any, tmp_path: Path) -> None:
    trainer = trainer_of(example, samples, tmp_path, per_device_eval_batch_size=len(samples))
    loss = trainer.evaluate()["eval_loss"]
    testing.assert_matches(
        torch.tensor(loss), wanted(trainer, example.padded(samples)).detach(), length=TOKENS, magnitude=1.0
    )


def test_processes_have_noise_of_their_own(
    example: SimpleNamespace, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, losses = trainer_of(example, samples, tmp_path, sigma=0.5), []
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        torch.manual_seed(7)
        losses.append(trainer.compute_loss(trainer.model, example.padded(samples)))
        torch.manual_seed(7)
        expected = wanted(trainer, example.padded(samples), sigma=0.5, row_offset=rank << 40)
        testing.assert_matches(losses[-1], expected, length=TOKENS, magnitude=1.0)
    assert not losses[0].isclose(losses[1])


def _rank(example: SimpleNamespace, samples: Any, folder: Path, rank: int, port: int) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)  # a forked process has no threads of OpenMP's
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    trainer = trainer_of(example, samples, folder, per_device_train_batch_size=len(samples) // 2, ddp_backend="gloo")
    assert trainer.accelerator.num_processes == 2
    torch.save(stepped(trainer), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_step_is_the_definition(example: SimpleNamespace, samples: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        multiprocessing.get_context("fork").Process(target=_rank, args=(example, samples, tmp_path, rank, port))
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
        each.kill()
    trainer = trainer_of(example, samples, tmp_path)
    expected = torch.autograd.grad(wanted(trainer, example.padded(samples)), list(trainer.model.parameters()))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


def test_script_says_what_the_student_learned(
    example: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    example.main()
    _, _, said = capsys.readouterr().out.partition("student: ")
    counts = torch.bincount(torch.cat([line["input_ids"] for line in example.lines(1000)])).double()
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * frequencies.log()).sum()  # what one loses who knows how frequent each character is
    assert float(said.split()[0]) < entropy - 0.2
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
