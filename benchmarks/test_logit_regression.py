"""logit_regression against what a user would write: plain torch with autograd, by hand without it, and both compiled.

Every case is measured alternately: the implementations follow each other in blocks, each block in another order, so
that a slow moment of the machine falls on all of them. `benchmarks/table.py` takes the medians over the blocks. All
implementations return the loss and the gradient, draw fresh noise at every call and reuse their buffers where they can.

Floor, a logit: 12 bytes (two read, one written) and, where its row is perturbed, an eighth of a Philox4x32-10 call and
half a Box-Muller pair: 170 instructions for 64 words and 45 for 16 normal values with AVX2, 5.5 a value.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor

from pykd.ops import logit_regression, logit_regression_and_grad

SIGMA, ALPHA = 0.5, 0.5
# rows, classes: digits and MNIST, CIFAR-100, ImageNet at two batch sizes, a language model's vocabulary
SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 1000), (64, 32000)]
BLOCKS = 5
Call = Callable[[], object]


class Case:
    """One shape's tensors and buffers; every implementation works on the same."""

    def __init__(self, rows: int, classes: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows + classes)
        self.rows, self.classes = rows, classes
        self.student, self.teacher = (
            torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(2)
        )
        self.leaf = self.student.clone().requires_grad_()
        self.grad, self.noise = torch.empty_like(self.student), torch.empty_like(self.student)
        self.mask = torch.empty(rows, 1, device=device, dtype=dtype)


# ---- the peers -------------------------------------------------------------------------------------------------------


def plain(student: Tensor, teacher: Tensor, noisy: bool) -> Tensor:
    """The formula, as one writes it first."""
    if noisy:
        mask = torch.empty(len(teacher), 1, device=teacher.device, dtype=teacher.dtype).bernoulli_(ALPHA)
        teacher = teacher * (1 + SIGMA * mask * torch.randn_like(teacher))
    return 0.5 * (student - teacher).square().sum() / len(student)


def by_hand(case: Case, noisy: bool) -> tuple[Tensor, Tensor]:
    """Without autograd, in place, into buffers."""
    target = case.teacher
    if noisy:
        target = case.noise.normal_(0, SIGMA).mul_(case.mask.bernoulli_(ALPHA)).mul_(case.teacher).add_(case.teacher)
    flat = torch.sub(case.student, target, out=case.grad).view(-1)
    loss = torch.dot(flat, flat).mul_(0.5 / case.rows)
    return loss, case.grad.mul_(1 / case.rows)


def by_hand_to_compile(student: Tensor, teacher: Tensor, grad: Tensor, noisy: bool) -> Tensor:
    """The same for the compiler, which fuses what it is given and needs no buffers between."""
    if noisy:
        mask = torch.rand(len(teacher), 1, device=teacher.device) < ALPHA
        teacher = torch.where(mask, teacher * (1 + SIGMA * torch.randn_like(teacher)), teacher)
    difference = student - teacher
    grad.copy_(difference * (1 / len(student)))
    return 0.5 * difference.square().sum() / len(student)


def compiled(function: Callable, fallback_random: bool) -> Callable:
    """With `fallback_random`, Inductor calls torch's own generators; its own are slower than eager on a CPU."""
    options = {"fallback_random": True} if fallback_random else None
    return torch.compile(function, options=options, dynamic=False)


def autograd(function: Callable, case: Case, *arguments: object) -> Call:
    return lambda: torch.autograd.grad(function(case.leaf, case.teacher, *arguments), case.leaf)


def implementations(case: Case, noisy: bool) -> dict[str, Callable[[], Call]]:
    noise = {"sigma": SIGMA, "alpha": ALPHA} if noisy else {}
    size = case.student.numel() * case.student.element_size()
    half = size // 2
    bytes_a, bytes_b = (torch.zeros(n, dtype=torch.uint8, device=case.grad.device) for n in (size, half))
    sources = case.student.view(torch.uint8).view(-1), case.teacher.view(torch.uint8).view(-1)[:half]

    def copy() -> None:
        """As many bytes read and written as the op has."""
        bytes_a.copy_(sources[0])
        bytes_b.copy_(sources[1])

    def hand_compiled(fallback_random: bool) -> Call:
        step = compiled(by_hand_to_compile, fallback_random)
        return lambda: step(case.student, case.teacher, case.grad, noisy)

    calls: dict[str, Callable[[], Call]] = {
        "pykd": lambda: lambda: logit_regression_and_grad(case.student, case.teacher, out=case.grad, **noise),
        "pykd autograd": lambda: autograd(lambda s, t: logit_regression(s, t, **noise), case),
        "by hand": lambda: lambda: by_hand(case, noisy),
        "by hand, compiled": lambda: hand_compiled(False),
        "plain": lambda: autograd(plain, case, noisy),
        "plain, compiled": lambda: autograd(compiled(plain, False), case, noisy),
        "copy": lambda: copy,
    }
    if noisy:
        calls["by hand, compiled, fallback_random"] = lambda: hand_compiled(True)
        calls["plain, compiled, fallback_random"] = lambda: autograd(compiled(plain, True), case, noisy)
    return calls


# ---- the floor of autograd -------------------------------------------------------------------------------------------

EMPTY_OP = """
#include <torch/extension.h>
using at::Tensor;
using torch::autograd::AutogradContext, torch::autograd::variable_list;
Tensor forward_op(const Tensor& student, const Tensor& teacher) { return at::empty({}, student.options()); }
Tensor backward_op(const Tensor& grad, const Tensor& student) { return at::empty(student.sizes(), student.options()); }
template <typename F> auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
struct Empty : torch::autograd::Function<Empty> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher) {
    static auto op = find<decltype(forward_op)>("pykd_floor::empty");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({student, teacher});
    return op.call(student, teacher);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static auto op = find<decltype(backward_op)>("pykd_floor::empty_backward");
    return {op.call(grads[0], ctx->get_saved_variables()[0]), Tensor()};
  }
};
Tensor autograd_op(const Tensor& student, const Tensor& teacher) { return Empty::apply(student, teacher); }
TORCH_LIBRARY(pykd_floor, m) {
  m.def("empty(Tensor student, Tensor teacher) -> Tensor");
  m.def("empty_backward(Tensor grad, Tensor student) -> Tensor");
}
TORCH_LIBRARY_IMPL(pykd_floor, CPU, m) {
  m.impl("empty", &forward_op);
  m.impl("empty_backward", &backward_op);
}
TORCH_LIBRARY_IMPL(pykd_floor, Autograd, m) { m.impl("empty", &autograd_op); }
"""


def empty_op(case: Case) -> Call:
    """One op that does nothing, forward and backward, and the draw of a seed: what no kernel can save."""
    from torch.utils.cpp_extension import load_inline

    if not hasattr(torch.ops.pykd_floor, "empty"):
        load_inline("pykd_floor", cpp_sources=EMPTY_OP, is_python_module=False, extra_cflags=["-O2"])
    op = torch.ops.pykd_floor.empty.default

    def call() -> object:
        torch.empty((), dtype=torch.int64).random_()
        return torch.autograd.grad(op(case.leaf, case.teacher), case.leaf)

    return call


# ---- the runs --------------------------------------------------------------------------------------------------------


@cache
def case_of(shape: tuple[int, int], device: str, dtype: torch.dtype) -> Case:
    return Case(*shape, device, dtype)


@lru_cache(maxsize=64)
def prepared(shape: tuple[int, int], device: str, dtype: torch.dtype, threads: int, noisy: bool, name: str) -> Call:
    """The callable, compiled for this many threads and warmed up."""
    case = case_of(shape, device, dtype)
    torch._dynamo.reset()
    call = empty_op(case) if name == "empty op" else implementations(case, noisy)[name]()
    for _ in range(5):
        call()
    return call


def names(shape: tuple[int, int], noisy: bool) -> list[str]:
    case = Case(1, 2, "cpu", torch.float32)
    return [*implementations(case, noisy), *(["empty op"] if shape == (128, 10) and noisy else [])]


def runs() -> list[tuple]:
    """All parameters in the order of measurement: the blocks of a case side by side, each in another order."""
    order = []
    for threads in (1, 2):
        for noisy in (True, False):
            for shape in SHAPES:
                all_names = names(shape, noisy)
                for block in range(BLOCKS):
                    turned = all_names[block % len(all_names) :] + all_names[: block % len(all_names)]
                    label = f"{shape[0]}x{shape[1]}-{threads}T-{'noisy' if noisy else 'clean'}"
                    for name in turned:
                        order.append(pytest.param(shape, threads, noisy, name, block, id=f"{label}-{name}-{block}"))
    return order


@pytest.mark.parametrize("shape, threads, noisy, name, block", runs())
def test_logit_regression(benchmark, shape, threads, noisy, name, block):
    torch.set_num_threads(threads)
    call = prepared(shape, "cpu", torch.float32, threads, noisy, name)
    case = f"[{shape[0]}, {shape[1]}]{'' if noisy else ', no noise'}"
    benchmark.group = f"logit_regression {case}, {threads} threads"
    benchmark.extra_info.update(
        op="logit_regression",
        case=case,
        implementation=name,
        device="cpu",
        dtype="float32",
        threads=threads,
        block=block,
    )
    iterations = max(1, min(200, 400_000 // (shape[0] * shape[1])))
    benchmark.pedantic(call, rounds=9, iterations=iterations, warmup_rounds=1)


GPU_SHAPES = [(128, 10), (128, 100), (1024, 1000), (64, 32000), (8192, 32000)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize(
    "name", ["pykd", "pykd autograd", "by hand", "by hand, compiled", "plain", "plain, compiled", "copy"]
)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_logit_regression_on_gpu(benchmark, shape, name, block, dtype):
    case = f"[{shape[0]}, {shape[1]}]"
    benchmark.group = f"logit_regression {case} {dtype}"
    benchmark.extra_info.update(
        op="logit_regression", case=case, implementation=name, device=torch.cuda.get_device_name(),
        dtype=str(dtype).removeprefix("torch."), threads=1, block=block,
    )  # fmt: skip
    call = prepared(shape, "cuda", dtype, 1, True, name)
    iterations = 100 if shape[0] * shape[1] < 1e7 else 10

    def timed() -> None:
        for _ in range(iterations):
            call()
        torch.cuda.synchronize()

    benchmark.extra_info["calls"] = iterations
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)
