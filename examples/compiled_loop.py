"""The operator inside ``torch.compile(fullgraph=True)``: the same loss as in eager mode, for the same seeds."""

import torch
from torch import Tensor, nn

from pykd.ops import logit_regression


def main() -> None:
    torch.manual_seed(0)
    inputs, teacher = torch.randn(256, 64), torch.randn(256, 10)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)

    def loss(seed: Tensor) -> Tensor:
        return logit_regression(student(inputs), teacher, sigma=0.5, alpha=0.8, seed=seed)

    compiled = torch.compile(loss, fullgraph=True)
    for step in range(100):
        seed = torch.tensor(step)
        optimizer.zero_grad()
        value = compiled(seed)
        value.backward()
        if step % 25 == 0:
            eager = loss(seed).item()
            print(f"step {step}: compiled {value.item():.5f}, eager {eager:.5f}")
            torch.testing.assert_close(value.item(), eager, rtol=1e-5, atol=1e-6)
        optimizer.step()
    print(f"last loss {value.item():.5f}")


if __name__ == "__main__":
    main()
