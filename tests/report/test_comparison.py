"""The table of a comparison: its figures, and what it leaves out."""

import pytest
from scipy.stats import ttest_rel

from pykd.report import compared, markdown

DENSE = 6400


def summary(seed, student, teacher=0.99, **sizes):
    known = {"parameters": 10, "nonzeros": 10, "bytes": DENSE, "latency_ms": 0.1, "seconds": None}
    rows = [("teacher", "teacher", teacher, known), ("student", "student, KD", student, {**known, **sizes})]
    rows = [{"name": name, "label": label, "accuracy": accuracy, **of} for name, label, accuracy, of in rows]
    return {"seed": seed, "rows": rows}


def record(finished, recipes=("r",)):
    return {"recipes": recipes, "changes": [], "grid": [], "environment": {}, "rows": compared(finished)}


def test_errors_are_compared_with_the_teacher_of_the_same_seed():
    students, teachers = [0.97, 0.98, 0.955], [0.98, 0.985, 0.97]
    runs = [summary(seed, *both) for seed, both in enumerate(zip(students, teachers, strict=True))]
    teacher, student = compared({"r": runs})
    assert teacher["above_teacher"] is None
    assert student["error"]["values"] == [1 - each for each in students]
    assert student["above_teacher"]["points"] == pytest.approx(0.01)
    expected = ttest_rel(teachers, students).confidence_interval(0.95)
    assert student["above_teacher"]["interval"] == pytest.approx(list(expected))
    assert compared({"r": runs[:1]})[1]["above_teacher"]["interval"] is None


def test_a_file_is_compared_with_the_teacher_s_dense_one():
    runs = [summary(seed, 0.9, file_bytes=size) for seed, size in enumerate((64, 100))]
    student = compared({"r": runs})[1]
    assert student["ratio"]["values"] == [100.0, 64.0]
    assert "| 82.0 (64.0 to 100.0) |" in markdown(record({"r": runs}))


def test_non_zeros_are_compared_with_the_teacher_s_parameters():
    runs = [summary(0, 0.9, parameters=7, nonzeros=4), summary(1, 0.9, nonzeros=0)]
    student = compared({"r": runs})[1]
    assert (student["nonzeros"]["values"], student["nonzero_ratio"]["values"]) == ([4, 0], [2.5])
    assert "| 2 (2.5x) " in markdown(record({"r": runs}))


def test_a_network_without_a_model_file_breaks_nothing():
    runs = [summary(0, 0.9, file_bytes=None), summary(1, 0.9, file_bytes=64)]
    student = compared({"r": runs})[1]
    assert (student["n"], student["file_bytes"]["values"], student["ratio"]["mean"]) == (2, [64], 100.0)
    none = markdown(record({"r": runs[:1]}))
    assert "times smaller" not in none and "file" not in none
    assert "| student, KD |" in none


@pytest.mark.parametrize(
    ("recipes", "head", "cells"),
    [
        (["r"], "| change ", ["| a=1 ", "| a=2 "]),
        (["r", "s"], "| run ", ["| r+a=1 ", "| r+a=2 "]),
    ],
)
def test_runs_are_told_apart(recipes, head, cells):
    lines = markdown(record({"r+a=1": [summary(0, 0.9)], "r+a=2": [summary(0, 0.9)]}, recipes)).splitlines()
    assert lines[2].startswith(head)
    assert [any(line.startswith(cell) for line in lines) for cell in cells] == [True, True]
