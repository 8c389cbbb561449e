"""The operator in a plain PyTorch loop: a small network learns the noisy logits of a larger one."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from pykd.ops import logit_regression


def fit(network: nn.Module, loss, rows: int, epochs: int, lr: float) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(rows).split(32):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    train = 1400

    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    fit(teacher, lambda batch: nn.functional.cross_entropy(teacher(images[batch]), labels[batch]), train, 20, 1e-3)
    with torch.no_grad():
        logits = teacher(images)

    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    fit(
        student,
        lambda batch: logit_regression(student(images[batch]), logits[batch], sigma=0.5, alpha=0.8),
        train,
        epochs=30,
        lr=1e-2,
    )

    for name, network in (("teacher", teacher), ("student", student)):
        accuracy = (network(images[train:]).argmax(1) == labels[train:]).float().mean()
        print(f"{name}: {accuracy:.1%} of the test digits, {sum(p.numel() for p in network.parameters()):,} parameters")


if __name__ == "__main__":
    main()
