"""One process and several train alike; where one of several fails, all of them end, and the run goes on from there."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ranks
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_processes import environment

from pykd.errors import PykdError
from pykd.training.processes import together

HERE = Path(__file__).parent
EACH_LOGITS, EACH = [*ranks.LOGITS, "parts", "augmented"], [*ranks.LOGITS, *ranks.WHOLE, "parts", "augmented"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and what each process said."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "ranks.py"), str(folder)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


def assert_as_one(folder: Path, how: str, name: str) -> None:
    """The run by several processes has the weights of that by one, but for the order of sums in float64."""
    files = sorted((folder / "one" / name).glob("*.safetensors"))
    assert files
    for file in files:
        torch.testing.assert_close(load_file(folder / how / name / file.name), load_file(file))


@pytest.mark.parametrize("name", EACH)
def test_two_processes_equal_one(done: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, said = done
    assert said["one"] == [None] and said["two"] == [None, None]
    assert_as_one(folder, "two", name)


@pytest.mark.parametrize("name", EACH_LOGITS)
def test_sharded_student_equals_a_whole_one(done: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, said = done
    assert said["fsdp"] == [None, None]
    assert_as_one(folder, "fsdp", name)


def test_what_needs_whole_weights_refuses_fsdp(done: tuple[Path, dict[str, Any]]) -> None:
    _, said = done
    for sentences in said["refused"]:
        assert len(sentences) == len(ranks.WHOLE)
        assert all(
            each.endswith("needs whole weights, and FSDP divides them: leave --use_fsdp out") for each in sentences
        )
    assert said["first version"] == ["FSDP's first version is not supported: add --fsdp_version 2"] * 2


def test_processes_that_disagree_name_what_differs(done: tuple[Path, dict[str, Any]]) -> None:
    _, said = done
    one, other = said["disagreeing"]
    assert one == other
    epochs, rows, labels, sigma, agreed = one
    assert epochs.startswith("process 1 has student.training.epochs = 4, not 3 as process 0: give all processes")
    assert rows.startswith("process 1 has rows = [42, 9, None, 42], not [41, 9, None, 41] as process 0")
    assert labels.startswith("process 1 has labels = [[0, 0, 7, ")
    assert sigma.startswith("process 1 has method.sigma = 1.5, not 0.5 as process 0")
    assert agreed == ""  # the processes are none the worse for it


def test_failure_of_one_process_is_that_of_all(done: tuple[Path, dict[str, Any]]) -> None:
    _, said = done
    label, other = said["label"]
    assert label == other and label.startswith("train has the label 7, and the networks give 3 logits")
    assert said["file"] == ["No such file or directory: one.png", "FileNotFoundError(2, 'No such file or directory')"]
    finite, other = said["nan"]
    assert finite == other and finite.startswith("student: the loss is not finite in step 1 of epoch 2")


def test_process_that_does_not_answer_is_given_up(done: tuple[Path, dict[str, Any]]) -> None:
    _, said = done
    assert said["stopped"] == [
        "another process does not answer: end all of them, and continue with --resume",
        signal.SIGKILL,
    ]


@pytest.mark.parametrize(
    "said, told",
    [
        ("Application timeout caused pair closure", "another process does not answer: end all of them"),
        ("[gloo/transport/tcp/pair.cc:538] Connection closed by peer", "another process has died: see what ended it"),
    ],
)
def test_every_word_of_gloo_is_understood(monkeypatch: pytest.MonkeyPatch, said: str, told: str) -> None:
    """Which of its sentences comes depends on who of its threads is first."""

    def gone() -> None:
        raise RuntimeError("the store")

    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", gone)
    with pytest.raises(PykdError, match=told), together(cast(Accelerator, SimpleNamespace(num_processes=2))):
        raise RuntimeError(said)


@pytest.mark.parametrize("kind, world", [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_killed_or_stopped_and_resumed_gives_the_same_bits(
    done: tuple[Path, dict[str, Any]], kind: str, world: int
) -> None:
    folder, said = done
    died = "another process has died: see what ended it, and continue with --resume"
    assert [each for each in said[f"{kind} {world} SIGKILL"] if each != died] == [signal.SIGKILL]
    interrupted = f"interrupted, {folder / f'{kind}-saved' / str(world)} is saved: continue with --resume"
    assert said[f"{kind} {world} SIGTERM"] == [interrupted] * world
    whole = (folder / f"{kind}-whole" / str(world) / "student.safetensors").read_bytes()
    for how, name in (("killed", "SIGKILL"), ("saved", "SIGTERM")):
        assert said[f"{kind} {world} {name} resumed"] == [""] * world
        assert (folder / f"{kind}-{how}" / str(world) / "student.safetensors").read_bytes() == whole


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_by_another_number_of_processes(done: tuple[Path, dict[str, Any]], kind: str) -> None:
    folder, said = done
    assert said[f"{kind} other resumed"] == [""]
    resumed = load_file(folder / f"{kind}-other" / "student.safetensors")
    torch.testing.assert_close(resumed, load_file(folder / f"{kind}-whole" / "2" / "student.safetensors"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_normalisation_sees_the_rows_of_all_processes(tmp_path: Path) -> None:
    """Over gloo, so that two processes can share a card."""
    command = [sys.executable, str(HERE / "ranks.py"), str(tmp_path), "cuda"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"one": [None], "two": [None, None]}
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    assert "1.0.running_mean" in one
    torch.testing.assert_close(two, one)
