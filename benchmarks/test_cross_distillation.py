"""Cross distillation of VGG-16 with K = 5 images of CIFAR's size a class, against the authors' steps written plainly.

`plain` is their loop: Adam on the layer's weight, the student's two convolutions of the convex objective and their
backward for the weight in every step, the schedule of hard thresholds, gradients and moments of what went masked, the
rate a tenth after a third of the steps. What a careful engineer does once is done once: the teacher's answers, which no
step changes. `pykd` is the same steps on the layer's quadratic, `pykd exact` its least squares. A case's time has the
layers' inputs in both networks in it; the steps are so many a layer, where the authors have 3000. With 50 images
a step of `plain` multiplies 62 billion times over the twelve layers at any stage of pruning, at 200 to 51 200 places a
layer and two inputs, forwards and backwards. The quadratic, at half of the channels, needs 14 billion: 1 of 26 for
layers of 64 to 256 channels, where A is smaller than the inputs; and 12 of 36 for 512, where the inputs are smaller than
A, and nothing but the channels that went is saved.
"""

from collections.abc import Callable
from functools import cache

import torch
from alternating import Call, in_turns, measure_case, prepared
from torch import Tensor, nn
from torch.nn import functional as F

import pytest
