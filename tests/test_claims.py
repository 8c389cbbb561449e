"""The page of all claims: it comes from the records, full records count before quick ones, and its commands exist."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from pykd import config as recipes
from pykd import grids
from pykd.cli import app
from pykd.reproduce import PAPERS
from pykd.reproduce.claims import NOTES, TITLES, page

ROOT = Path(__file__).parents[1]
QUICK = sorted((ROOT / "benchmarks" / "results" / "paper").glob("*.json"))


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_comes_from_the_records(claims):
    assert claims.PAGE.read_text() == claims.text(), "run python benchmarks/claims.py --write"


def test_every_paper_has_its_part(claims):
    assert list(TITLES) == list(PAPERS) == list(claims.NOT_TRIED) == list(claims.REMARKS) == list(NOTES)


def test_what_was_not_tried_is_told_by_commands_that_exist(claims):
    found = re.findall("`pykd (.+?)`", " ".join(each[3] for paper in claims.NOT_TRIED.values() for each in paper))
    assert len(found) == 8
    for command in found:
        name, *words = shlex.split(command)
        given = get_command(app).commands[name].make_context(name, words).params
        changes = given["assignments"] or []
        if name == "reproduce":
            [data] = [each.removeprefix("data.name=") for each in changes]
            planned = PAPERS[given["paper"]].runs([data], [], seeds=None, out=Path())
        elif name == "compare":
            planned = grids.plan(given["recipe"], given["grid"], changes, given["seeds"])
        else:
            planned = [("", recipes.load(given["recipe"], changes))]
        grids.check_methods(planned)


def test_a_full_record_counts_before_a_quick_one():
    full = json.loads((ROOT / "benchmarks" / "results" / "reproduce" / "noisy_teacher-mnist.json").read_text())
    quick = {**full, "quick": True}
    alone, both = page([("quick.json", quick)]), page([("quick.json", quick), ("full.json", full)])
    assert alone.count("quick: not evidence") == 5 and "From `quick.json`." in alone
    assert "quick: not evidence" not in both and "From `full.json`." in both
    assert both == page([("full.json", full)])
    assert "not reproduced" not in both, "what a user did not run is not known"


@pytest.mark.parametrize("file", QUICK, ids=lambda file: file.stem)
def test_quick_tables_come_from_their_records(file):
    record = json.loads(file.read_text())
    assert record["quick"] and file.stem == f"{record['paper']}-mnist"
    assert file.with_suffix(".md").read_text() == PAPERS[record["paper"]].markdown(record) + "\n"


def test_all_four_papers_have_a_quick_record():
    assert {file.stem.removesuffix("-mnist") for file in QUICK} == set(PAPERS)
