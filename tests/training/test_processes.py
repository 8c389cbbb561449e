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


LAUNCHED = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pykd", "distill")


def test_launched_processes_say_once_what_is_wrong(tmp_path: Path) -> None:
    words = ["noisy_teacher-digits", "--set", "student.training.epoch=1", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *LAUNCHED, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("pykd: ")]
    assert len(told) == 1 and "did you mean" in told[0]


def test_launcher_stopped_by_a_signal_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["noisy_teacher-digits", "--out", str(out), "--device", "cpu", "--set", "checkpoint_seconds=0.01"]
    words += ["--set", "teacher.training.epochs=1000000"]
    process = subprocess.Popen(
        [sys.executable, *LAUNCHED, *words], env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any((out / "checkpoints").glob("*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count(f"pykd: interrupted, {out} is saved: continue with --resume") == 1, said
    saved, damaged = Checkpoints(out / "checkpoints", keep=2).newest()
    assert saved is not None and not damaged
    assert len(saved.state["random"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_stopped_by_a_signal_saves_and_says_so(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    options = ["--set", "teacher.training.epochs=1000000", "--set", "checkpoint_seconds=0.01", "--out", str(out)]
    command = [sys.executable, "-m", "pykd", "distill", "noisy_teacher-digits", *options]
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
