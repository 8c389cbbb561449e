"""The benchmarks themselves: those for a GPU run where there is none, and their tables say what was measured."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import pykd.reference
from pykd.methods import noisy_teacher
from pykd.nn import VariationalLinear
from pykd.testing import assert_matches, logits

ROOT = Path(__file__).parents[1]


def module(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


table, plain_ops = module("table"), module("plain_ops")


def benchmark(tmp_path, *arguments):
    """The record of a run in a process of its own."""
    file = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--benchmark-quiet", *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    # xdist's workers switch measurements off, and say so to their children.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, f"--benchmark-json={file}", "-p", "no:cacheprovider"],
        cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]
    return json.loads(file.read_text())


def row(implementation, seconds, **info):
    named = {"op": "op", "case": "[2, 3]", "implementation": implementation, "device": "a card", "dtype": "float32"}
    return {"extra_info": {**named, "threads": 1, **info}, "stats": {"median": seconds}}


def record(*benchmarks):
    machine = {"gpu": "a card", "torch": "2", "L2": "60 MB", "python_version": "3"}
    commit = {"id": "0" * 40, "dirty": False}
    return {"benchmarks": benchmarks, "machine_info": machine, "commit_info": commit, "datetime": "2026-01-01T00"}


def test_table_has_the_share_of_the_copy():
    rows = [
        row("pykd", 40e-6, calls=2, bytes=12e6, l2="hot", sm_mhz=1500, celsius=40),
        row("plain", 60e-6, bytes=12e6, l2="hot", sm_mhz=1980, celsius=45),
        row("copy", 12e-6, bytes=8e6, l2="hot"),
        row("pykd", 8e-6, case="[4, 5]"),
        row("copy", 4e-6, case="[4, 5]"),
    ]
    text = table.tables(record(*rows))
    assert "a card, torch 2, L2 60 MB" in text
    assert text.partition("\n")[0].endswith("SM clock 1500 to 1980 MHz, 40 to 45 C. What fits into L2 is hot there.")
    assert "| pykd | plain | copy | MB | fastest peer / pykd | share of copy |" in text
    # 12 MB in 20 us are 0.6 TB/s, and 8 MB in 12 us two thirds of one.
    assert "| [2, 3] | 20.0 | 60.0 | 12.0 | 12.0 | 3.00 | 0.90 |" in text
    assert "| [4, 5] | 8.0 |  | 4.0 |  |  |  |" in text
    assert table.summary([record(*rows)]).splitlines()[0].endswith("| fastest peer / pykd | share of copy |")
    assert table.summary([record(*rows)]).splitlines()[2].endswith("| 3.0 (3.00 to 3.0) | 0.90 (0.90 to 0.90) |")
    assert "share" not in table.summary([record(row("pykd", 1.0), row("copy", 1.0))])


def test_table_of_nothing_has_no_ratio():
    rows = [row("pykd", 1.0, unit="peak MB", value=0.0), row("plain", 1.0, unit="peak MB", value=3.0)]
    assert "| [2, 3] | 0.0 | 3.0 |  |" in table.tables(record(*rows))


def test_gpu_benchmarks_run_on_the_cpu(tmp_path):
    found = benchmark(tmp_path, "-m", "gpu", "-p", "dry_run", "benchmarks")
    tables = table.tables_of(found)
    bandwidth = ["noisy_logits", "logit_regression", "distillation_loss", "block_norm", "block_prox_", "factor_loss"]
    for op in [*bandwidth, "variational_kl"]:
        for dtype in ("float32", "bfloat16"):
            rows = tables[f"{op}, a card, {dtype}"]
            assert any(each.get(table.SHARE, 0) > 0 for each in rows.values())
            assert all(table.SHARE in each for each in rows.values() if "copy" in each)
    infos = [each["extra_info"] for each in found["benchmarks"]]
    sizes = {
        (each["op"], each["case"], each["dtype"]): each["bytes"] for each in infos if each["implementation"] == "copy"
    }
    assert sizes["logit_regression", "[100000, 1000]", "bfloat16"] == 3 * 2 * 10**8
    assert sizes["block_prox_", "[9984, 9984], out, l1_l2", "float32"] == 2 * 4 * 9984**2
    assert Counter(each["l2"] for each in infos if each["case"] == "[128, 10]") == {"hot": 8 + 8 + 6}
    assert all(each["l2"] == "passed through" for each in infos if each["case"] == "[3200, 32000]")
    peaks = tables["distillation_loss, peak MB"]
    assert list(peaks) == [f"[{shape}], no noise, T = {t}" for shape in ("8192, 32000", "4096, 128000") for t in (1, 2)]
    assert all(
        {"pykd", "Liger KL", "Liger JSD", "plain"} <= each.keys() and "copy" not in each for each in peaks.values()
    )
    fused = tables["linear_distillation_loss, peak MB"]
    assert len(fused) == 2
    assert all({"pykd", "pykd, unfused", "plain", "Liger fused JSD, beta 0"} <= each.keys() for each in fused.values())


def test_epochs_run_with_pykd_and_without(tmp_path):
    cases = [
        f"{name}-0-{each}"
        for name in ("noisy_teacher-digits", "cross_distillation-mnist")
        for each in ("pykd", "plain torch")
    ]
    tables = table.tables_of(benchmark(tmp_path, *(f"benchmarks/test_epochs.py::test_epoch[{case}]" for case in cases)))
    rows = tables["epoch, cpu, float32, 1 thread"]
    assert list(rows) == ["noisy_teacher-digits, 41 steps of 32", "cross_distillation-mnist, 1 steps of 50"]
    assert all(each.keys() == {"pykd", "plain torch"} for each in rows.values())


# ---- plain torch in pykd's place -------------------------------------------------------------------------------------


def pair():
    return logits((6, 5), torch.float64, "cpu", seed=0), logits((6, 5), torch.float64, "cpu", seed=1)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("logit_regression", {}),
        ("distillation_loss", {"temperature": 4.0}),
        ("distillation_loss", {"temperature": 2.0, "direction": "reverse"}),
        ("distillation_loss", {"temperature": 2.0, "hard_weight": 0.3, "target": torch.arange(6) % 5}),
        ("factor_loss", {}),
        ("factor_loss", {"p": 2}),
        ("factor_loss", {"reduction": "row"}),
    ],
)
def test_plain_loss_is_the_reference(op, options):
    assert_matches(
        getattr(plain_ops, op)(*pair(), **options), getattr(pykd.reference, op)(*pair(), **options), length=30
    )


@pytest.mark.parametrize("norm", ["l1_l2", "l1_linf"])
def test_plain_block_norm_is_the_reference(norm):
    generator = torch.Generator().manual_seed(0)
    shapes = [((4, 3), (5, 7)), ((4, 6, 3, 3), (2, 2, 3, 3))]
    pairs = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in each] for each in shapes]
    mine, its = map(list, zip(*pairs, strict=True))
    expected = pykd.reference.block_norm(mine, teachers=its, norm=norm)
    assert_matches(plain_ops.block_norm(mine, teachers=its, norm=norm), expected, length=216)


def test_plain_variational_ops_are_the_reference():
    generator = torch.Generator().manual_seed(0)
    theta, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (20_000, 3)))
    log_sigma2 = torch.full_like(theta, -1.0)
    expected = pykd.reference.variational_kl([theta], [log_sigma2])
    assert plain_ops.variational_kl([theta], [log_sigma2]).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(0)
    drawn = [op.variational_linear(x, theta, log_sigma2) for op in (plain_ops, pykd.reference)]
    images = [each.view(1, 3, 100, 200) for each in (x, x)]
    kernels = theta[..., None, None], log_sigma2[..., None, None]
    drawn += [op.variational_conv2d(images[0], *kernels).view(-1, 4) for op in (plain_ops, pykd.reference)]
    deviations = [(each - x @ theta.T).std().item() for each in drawn[:2]]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.02)
    assert drawn[2].std().item() == pytest.approx(drawn[3].std().item(), rel=0.02)


@pytest.mark.parametrize("shape", ["logit", "sample"])
@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_plain_noise_is_spread_as_the_reference(shape, kind):
    torch.manual_seed(0)
    ones, options = torch.ones(20_000, 4), {"sigma": 0.5, "alpha": 0.8, "noise_shape": shape, "noise_kind": kind}
    noise = [op.noisy_logits(ones, **options) - ones for op in (plain_ops, pykd.reference)]
    changed = [(each != 0).any(1).double().mean().item() for each in noise]
    assert changed[0] == pytest.approx(changed[1], abs=0.02)
    assert noise[0].std().item() == pytest.approx(noise[1].std().item(), rel=0.03)
    assert (noise[0].std(1) == 0).all().item() == (shape == "sample")


def test_plain_torch_takes_the_place_of_pykd_and_gives_it_back():
    before = noisy_teacher.logit_regression, VariationalLinear._noisy
    with plain_ops.in_place_of_pykd():
        assert noisy_teacher.logit_regression is plain_ops.logit_regression
        assert VariationalLinear._noisy is plain_ops.variational_linear
    assert (noisy_teacher.logit_regression, VariationalLinear._noisy) == before
