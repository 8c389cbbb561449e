"""Recipes on real CIFAR-10, shrunk to what a processor trains in seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import pykd


def distilled(recipe: str, out: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """The summary's rows by name, and what the command prints."""
    result = pykd("distill", recipe, *(f"--set={each}" for each in settings), "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}, result.stdout


def test_noisy_teacher(cifar10_folder: Path, tmp_path: Path) -> None:
    rows, printed = distilled(
        "noisy_teacher-imagefolder",
        tmp_path / "run",
        f"data.root={cifar10_folder}",
        "teacher={name: shallow_cnn, training: {epochs: 3, batch_size: 32, lr: 1e-3, augment: true}}",
        "student.name=modified_lenet",
        "student.training.epochs=1",
        "student.training.batch_size=32",
    )
    assert {"teacher", "student"} <= set(rows)
    assert rows["teacher"]["accuracy"] > 0.2  # a guess is right once in ten
    assert f"{rows['student']['accuracy']:.2%}" in printed


def test_variational_student(cifar10_folder: Path, tmp_path: Path) -> None:
    """Its networks an eighth and a sixteenth as wide, on few rows."""
    rows, _ = distilled(
        "variational_student-cifar10",
        tmp_path / "run",
        f"data={{name: imagefolder, root: {cifar10_folder}, per_class: 20, augment: crop_flip}}",
        "teacher.width=0.125",
        "teacher.training.epochs=1",
        "student.width=0.0625",
        "student.training.epochs=1",
        "method.warmup_start=0",
        "method.warmup_end=0",
    )
    assert list(rows) == ["teacher", "alone", "kd", "sparse_vd", "kd_sparse_vd", "student"]
    assert len(rows["student"]["facts"]["layers"]) == 15
    assert rows["student"]["nonzeros"] < rows["alone"]["nonzeros"]


def test_factor_transfer(cifar10_folder: Path, tmp_path: Path) -> None:
    """Its own networks, a few steps of each."""
    out = tmp_path / "run"
    rows, _ = distilled(
        "factor_transfer-cifar10",
        out,
        f"data={{name: imagefolder, root: {cifar10_folder}, per_class: 12, augment: crop_flip}}",
        "teacher.training={epochs: 1, batch_size: 64, optimizer: sgd, lr: 0.1, augment: true}",
        "student.training={epochs: 1, batch_size: 64, optimizer: sgd, lr: 0.1, augment: true}",
        "method.paraphraser.epochs=1",
        "baselines=[ft_kd]",
    )
    assert list(rows) == ["teacher", "ft_kd", "student"]
    assert (rows["teacher"]["parameters"], rows["student"]["parameters"]) == (855_770, 272_474)
    losses = {row["stage"]: row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    assert list(losses) == ["teacher", "paraphraser", "ft_kd", "student"]
    assert all(0 < loss < 1e3 for loss in losses.values())


@pytest.mark.parametrize("groups", ["in", "weight"])
def test_cross_distillation(cifar10_folder: Path, tmp_path: Path, groups: str) -> None:
    """VGG-16 an eighth as wide, few of the authors' steps."""
    rows, _ = distilled(
        "cross_distillation-cifar10",
        tmp_path / "run",
        f"data={{name: imagefolder, root: {cifar10_folder}, per_class: 2, augment: crop_flip}}",
        "teacher={name: vgg16, width: 0.125, training: {epochs: 1, batch_size: 64, lr: 1e-3}}",
        "student={name: vgg16, width: 0.125, training: {epochs: 1, batch_size: 64, lr: 1e-5}}",
        f"method.groups={groups}",
        "method.steps=30",
    )
    for name in ("magnitude", "layerwise", "soft", "student"):
        layers = list(rows[name]["facts"]["layers"].values())
        assert layers[0]["sparsity"] == layers[-1]["sparsity"] == 0  # the first convolution, the linear layer
        assert all(each["sparsity"] == 0.5 for each in layers[1:-1])
    assert rows["student"]["file_bytes"] < 0.6 * rows["teacher"]["file_bytes"]
