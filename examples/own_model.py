"""``pykd.distill`` with networks and a DataLoader of your own: ``python own_model.py [RUN_FOLDER]``.

With a folder the run can be killed at any moment; started again, it goes on where it was.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pykd
from pykd.config import Training


class ConvNet(nn.Module):
    """Any module will do; this one has batch normalisation and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def main() -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    train, test = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])

    run = pykd.distill(
        pykd.methods.NoisyTeacher(alpha=0.8, sigma=0.3),
        teacher=lambda: ConvNet(32),
        student=lambda: ConvNet(2),
        train=DataLoader(train, batch_size=32, shuffle=True),
        test=test,
        teacher_training=Training(epochs=6, lr=2e-3),
        epochs=12,
        lr=1e-2,
        out=sys.argv[1] if len(sys.argv) > 1 else None,
        resume=len(sys.argv) > 1,
    )
    pykd.training.show(run.summary)


if __name__ == "__main__":
    main()
