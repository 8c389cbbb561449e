"""The distillation loss in a Lightning module: accumulated gradients, mixed precision and any number of processes."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pykd.ops import distillation_loss
from pykd.training import FrozenTeacher


class Distilled(LightningModule):
    """The student learns from the teacher's noisy logits, and from labels."""

    strict_loading = False  # checkpoints are without the teacher

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = FrozenTeacher(teacher)  # in eval mode and without gradients, whatever Lightning does

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        # The noise follows from the step and a row's place in the whole batch, over all processes and all parts whose
        # gradients are accumulated: the same for any number of either, and for a run that is resumed.
        part = index % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.global_rank
        return distillation_loss(
            self.student(images),
            self.teacher(images),
            labels,
            temperature=4.0,
            hard_weight=0.1,
            sigma=0.5,
            alpha=0.8,
            seed=torch.tensor(self.global_step, device=self.device),
            row_offset=part * len(images),
        )

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.student(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), 2e-2)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("teacher.")}


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    train, test = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])

    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(images[:1400]), labels[:1400]).backward()
        optimizer.step()

    module = Distilled(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), teacher)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=12, accumulate_grad_batches=2, precision="bf16-mixed", **quiet)
    # Lightning takes the mean of the parts' losses: parts of one size make it that of the rows.
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True, drop_last=True))
    (result,) = trainer.validate(module, DataLoader(test, batch_size=len(test)), verbose=False)
    print(f"student: {result['accuracy']:.1%} of the test digits")


if __name__ == "__main__":
    main()
