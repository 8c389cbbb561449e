"""logit_regression against what a user would write: plain torch with autograd, by hand without it, and both compiled.

All implementations return the loss and the gradient, draw fresh noise at every call and reuse their buffers where they
can.

Floor, a logit: 12 bytes (two read, one written) and, where its row is perturbed, an eighth of a Philox4x32-10 call and
half a Box-Muller pair: 170 instructions for 64 words and 45 for 16 normal values with AVX2, 5.5 a value.
"""

from collections.abc import Callable

import pytest
import torch
from alternating import (
    ALPHA,
    GRAPHED,
    SHAPES,
    SIGMA,
    Call,
    Case,
    autograd,
    bytes_of,
    compiled,
    compiled_into_graphs,
    graphed,
    logit_cases,
    measure,
    measure_on_gpu,
    noisy_plain,
    noisy_to_compile,
    prepared,
    runs,
    runs_on_gpu,
)
from torch import Tensor

from pykd.ops import logit_regression, logit_regression_and_grad

SUFFIX = {"noisy": "", "clean": ", no noise"}

# ---- the peers -------------------------------------------------------------------------------------------------------


def plain(student: Tensor, teacher: Tensor, noisy: bool) -> Tensor:
    """The formula, as one writes it first."""
    teacher = noisy_plain(teacher) if noisy else teacher
    return 0.5 * (student - teacher).square().sum() / len(student)


def by_hand(case: Case, noisy: bool) -> tuple[Tensor, Tensor]:
    """Without autograd, in place, into buffers."""
    target = case.noisy_teacher() if noisy else case.teacher
    flat = torch.sub(case.student, target, out=case.grad).view(-1)
    loss = torch.dot(flat, flat).mul_(0.5 / case.rows)
    return loss, case.grad.mul_(1 / case.rows)


def by_hand_to_compile(student: Tensor, teacher: Tensor, grad: Tensor, noisy: bool) -> Tensor:
    """The same for the compiler, which fuses what it is given and needs no buffers between."""
    difference = student - (noisy_to_compile(teacher) if noisy else teacher)
    grad.copy_(difference * (1 / len(student)))
    return 0.5 * difference.square().sum() / len(student)


def implementations(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    noisy = variant == "noisy"
    noise = {"sigma": SIGMA, "alpha": ALPHA} if noisy else {}

    def hand_compiled(fallback_random: bool) -> Call:
        step = compiled(by_hand_to_compile, fallback_random)
        return lambda: step(case.student, case.teacher, case.grad, noisy)

    calls: dict[str, Callable[[], Call]] = {
        "pykd": lambda: lambda: logit_regression_and_grad(case.student, case.teacher, out=case.grad, **noise),
        "pykd autograd": lambda: autograd(lambda s, t: logit_regression(s, t, **noise), case, case.teacher),
        "by hand": lambda: lambda: by_hand(case, noisy),
        "by hand, compiled": lambda: hand_compiled(False),
        "plain": lambda: autograd(plain, case, case.teacher, noisy),
        "plain, compiled": lambda: autograd(compiled(plain, False), case, case.teacher, noisy),
        "copy": lambda: case.copy(case.bytes * 3 // 2),
    }
    if noisy:
        calls["by hand, compiled, fallback_random"] = lambda: hand_compiled(True)
        calls["plain, compiled, fallback_random"] = lambda: autograd(compiled(plain, True), case, case.teacher, noisy)
        calls["empty op"] = lambda: empty_op(case)
    return calls


def implementations_on_gpu(case: Case, variant: str) -> dict[str, Callable[[], Call]]:
    calls = implementations(case, variant)
    inputs = case.teacher, variant == "noisy"
    calls["plain, compiled, CUDA graphs"] = lambda: autograd(compiled_into_graphs(plain), case, *inputs)
    return calls | graphed({name: calls[name] for name in GRAPHED})


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


@pytest.mark.parametrize(
    "shape, threads, variant, name, block",
    runs(implementations, {"noisy": SHAPES, "clean": SHAPES}, blocks=5, once="empty op"),
)
def test_logit_regression(benchmark, shape, threads, variant, name, block):
    torch.set_num_threads(threads)
    call = prepared(implementations, shape, "cpu", torch.float32, threads, variant, name)
    measure(benchmark, call, "logit_regression", shape, SUFFIX[variant], threads, name, block)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, variant, dtype, name, block", runs_on_gpu(logit_cases(SUFFIX)))
def test_logit_regression_on_gpu(benchmark, shape, variant, dtype, name, block):
    call, moved = prepared(implementations_on_gpu, shape, "cuda", dtype, 1, variant, name), bytes_of(shape, dtype, 3)
    measure_on_gpu(benchmark, call, "logit_regression", shape, SUFFIX[variant], dtype, name, block, bytes=moved)
