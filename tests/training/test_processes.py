"""Runs in processes of their own: killed and resumed, shared by two, stopped by signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pykd
from pykd.training.checkpoint import Checkpoints

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """One thread, and the package where this process found it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pykd.__file__).parents[1])}


def run(*arguments: str | Path) -> str:
    """Standard output of a Python process that must succeed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(HERE / "digits.py", one)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "digits.py", two)
    whole = torch.load(one / "targets-0.pt")
    halves = [torch.load(two / f"targets-{rank}.pt") for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for (_, targets), (_, upper), (offset, lower) in zip(whole, *halves, strict=True):
        if len(targets) == 1:  # the first process has no row of it, and lends its hands
            torch.testing.assert_close(lower, targets)
        else:
            assert offset == len(upper) == len(targets) // 2
            torch.testing.assert_close(torch.cat([upper, lower]), targets)
    for name in ("teacher", "student"):
        torch.testing.assert_close(
            load_file(two / "run" / f"{name}.safetensors"), load_file(one / "run" / f"{name}.safetensors")
        )


def test_two_processes_train_one_variational_student(tmp_path: Path) -> None:
    changes = ["teacher.training.epochs=1", "student.training={epochs: 1, batch_size: 22, optimizer: sgd, lr: 0.01}"]
    changes += ["method.warmup_end=0", "method.warmup_start=0", "method.norm=l1_l2", "method.lambda_g=0.01"]
    words = ["pykd.cli", "distill", "variational_student-digits", "--device", "cpu"]
    words += [word for each in [*changes, "baselines=[bayesian_compression]"] for word in ("--set", each)]
    run("-m", *words, "--out", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *words, "--out", tmp_path / "two")
    for name in ("bayesian_compression", "student"):
        whole, shared = (load_file(tmp_path / side / f"{name}.safetensors") for side in ("one", "two"))
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)


def test_two_processes_transfer_features_as_one(tmp_path: Path) -> None:
    """Networks without batch normalisation, whose statistics are those of a process's own rows."""
    training = "{epochs: 1, batch_size: 22, accumulate: 2, optimizer: sgd, lr: 0.001}"
    changes = ["method.teacher_at=['4']", "method.student_at=['4']", f"method.paraphraser={training}"]
    changes += ["method.reconstruction=l2", "method.p=2"]  # a gradient that is a sign makes much of rounding
    changes += [f"{who}={{name: modified_lenet, training: {training}}}" for who in ("teacher", "student")]
    words = ["pykd.cli", "distill", "factor_transfer-digits", "--device", "cpu"]
    words += [word for each in [*changes, "baselines=[attention_transfer, fitnet]"] for word in ("--set", each)]
    run("-m", *words, "--out", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *words, "--out", tmp_path / "two")
    for name in ("paraphraser", "attention_transfer", "fitnet", "student"):
        whole, shared = (load_file(tmp_path / side / f"{name}.safetensors") for side in ("one", "two"))
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_stopped_by_a_signal_saves_and_says_so(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    options = ["--set", "teacher.training.epochs=1000000", "--set", "checkpoint_seconds=0.01", "--out", str(out)]
    command = [sys.executable, "-m", "pykd.cli", "distill", "noisy_teacher-digits", *options]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    deadline = time.monotonic() + 120
    while not any((out / "checkpoints").glob("*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1] == f"pykd: interrupted, {out} is saved: continue with --resume"
    saved, damaged = checkpoints.newest()
    assert saved is not None
    assert not damaged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_quits_at_once(number: int) -> None:
    code = f"""
import os
from pykd.training.loop import Signals
signals = Signals()
with signals.caught():
    os.kill(os.getpid(), {number})
    assert signals.received == {number}
    os.kill(os.getpid(), {number})
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number, done.stderr
