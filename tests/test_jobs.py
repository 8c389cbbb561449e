"""Several runs at once: the bits of one at a time, failures told once, and nothing lost or left behind by a signal."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from test_cli import DIGITS, TINY, pykd, said

from pykd import config as recipes
from pykd import jobs, runs
from pykd.config import ConfigError

GRID = ["compare", DIGITS, *TINY, "--set=baselines=[]", "--set=student.training.optimizer=sgd"]
GRID += ["--grid=student.training.lr=0.01,1e30", "--seeds=2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYKD_DATA", raising=False)


def weights(out):
    return {file.relative_to(out): file.read_bytes() for file in Path(out).rglob("*.safetensors")}


def measured(out):
    """A table's rows without times, and with them the grid's settings."""
    rows = json.loads(Path(out, "table.json").read_text())["rows"]
    return [{key: row[key] for key in ("run", "name", "seeds", "error", "file_bytes", "above_teacher")} for row in rows]


def wait_until(true):
    give_up = time.monotonic() + 120
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def epochs(folder):
    """Those of the student that are done."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [each["epoch"] for each in found if each["stage"] == "student"]


def test_two_at_once_have_the_bits_of_one_at_a_time_and_failures_are_told_once():
    alone, beside = (pykd(*GRID, f"--jobs={count}", "--out", out) for count, out in ((1, "a"), (2, "b")))
    for result in (alone, beside):
        assert result.exit_code == 1
        failures = [line for line in result.stderr.splitlines() if line.startswith("pykd: ")]
        assert len(failures) == 3 and "2 of 4 runs failed" in failures[-1]
    assert weights("a") == weights("b")
    assert len({path for path in weights("b") if path.stem == "student"}) == 2
    assert measured("a") == measured("b")
    shown = [line for line in beside.stderr.splitlines() if line.startswith("[")]
    assert [line.partition("]")[0] for line in shown] == ["[1/4", "[2/4"]
    assert all("% of the held-out rows right" in line for line in shown)
    logs = {file.parent.relative_to("b"): file.read_text() for file in Path("b").rglob(jobs.LOG)}
    assert len(logs) == 4
    assert sum("teacher: epoch 1/1" in log for log in logs.values()) == 2, "one teacher a seed"
    assert sum("pykd: student: the loss is not finite" in log for log in logs.values()) == 2


def test_a_signal_saves_all_and_who_asked_leaves_no_one_behind():
    changes = ["--set=baselines=[]", "--set=student.training.epochs=1000000", "--set=checkpoint_seconds=0.1"]
    folders = [Path("grid", DIGITS, f"seed-{seed}") for seed in (0, 1)]

    def interrupt():
        wait_until(lambda: all(epochs(folder) for folder in folders))
        os.kill(os.getpid(), signal.SIGTERM)

    signaller = threading.Thread(target=interrupt)
    signaller.start()
    result = pykd("compare", DIGITS, *TINY, *changes, "--seeds=2", "--jobs=2", "--out=grid")
    signaller.join()
    assert said(result, 143) == f"pykd: interrupted, {Path('grid').resolve()} is saved: continue with --resume"
    assert all("interrupted" in (folder / jobs.LOG).read_text() for folder in folders)

    worker, before = jobs._Worker(1), epochs(folders[0])
    worker.start(runs.stored(folders[0]), folders[0].resolve(), True, "cpu")
    wait_until(lambda: len(epochs(folders[0])) > len(before))
    worker.process.stdin.close()  # as when the process that asks is killed
    assert worker.process.wait(60) == 128 + signal.SIGTERM
    assert (folders[0] / jobs.LOG).read_text().count("interrupted") == 2
    found = epochs(folders[0])
    assert found == list(range(1, len(found) + 1)), "each once"


def test_a_run_whose_process_dies_fails_alone():
    config = recipes.load(DIGITS, [word.removeprefix("--set=") for word in TINY])
    with jobs.Jobs(2, threads=1, device="cpu", out=Path("out"), runs=1, done=0) as going:
        going.start(config, Path("out/run"), resume=False)
        assert going.busy == [Path("out/run")] and going.free
        os.kill(going._workers[0].process.pid, signal.SIGKILL)
        while not (found := going.ended()):
            pass
        [(folder, error)] = found
        assert folder == Path("out/run")
        assert str(error) == "out/run: its process died (SIGKILL): see log.txt there, and go on with --resume"
        assert going.busy == [] and going._workers == []


def test_as_many_as_there_are_processors_but_one_with_cuda_or_a_launcher(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [jobs.at_once(None, threads, "cpu") for threads in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert jobs.at_once(None, 1, "cpu") == jobs.MOST_BY_DEFAULT
    assert jobs.at_once(12, 1, "cpu") == 12
    assert jobs.at_once(None, 1, "cuda") == 1
    monkeypatch.setenv("RANK", "0")
    assert jobs.at_once(None, 1, "cpu") == jobs.at_once(1, 1, "cpu") == 1
    with pytest.raises(ConfigError, match="--jobs 2: the launcher's processes share each run"):
        jobs.at_once(2, 1, "cpu")


def test_a_launcher_and_jobs_do_not_go_together(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "leave --jobs out" in said(pykd(*GRID, "--jobs=2", "--out=grid"), 2)
    assert not Path("grid").exists()
