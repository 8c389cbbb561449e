"""How many kernels the losses launch at the sizes of a small network, counted by torch's profiler on a card."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pykd import ops
from pykd.testing import DEVICES, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a build with CUDA"),
]


def launched(call):
    """The names of the kernels of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return [each.name for each in record.events() if each.device_type == DeviceType.CUDA and "Mem" not in each.name]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("op", ["noisy_logits", "logit_regression", "distillation_loss"])
def test_one_launch_forward_and_at_most_one_backward(op, classes):
    student, teacher = (logits((128, classes), torch.float32, "cuda", seed=i) for i in (0, 1))
    noise = {"sigma": 0.5, "alpha": 0.5, "seed": torch.tensor(5, device="cuda")}
    leaf = student.requires_grad_()
    tensors = (leaf,) if op == "noisy_logits" else (leaf, teacher)
    call = getattr(ops, op)
    call(*tensors, **noise).sum().backward()  # what happens once has happened
    values = []
    forward = launched(lambda: values.append(call(*tensors, **noise)))
    assert len(forward) == 1 and "pykd" in forward[0]
    gradient = torch.ones_like(values[0])
    backward = launched(lambda: values[0].backward(gradient))
    assert sum("pykd" in name for name in backward) <= 1
