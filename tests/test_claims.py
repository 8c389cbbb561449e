"""The page of all claims: it comes from the records, full records count before quick ones, and its commands exist."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from pykd import config as recipes
from pykd.cli import app
from pykd.reproduce import PAPERS
from pykd.reproduce.claims import NOT_TRIED, NOTES, TITLES, page

ROOT = Path(__file__).parents[1]
QUICK = sorted((ROOT / "benchmarks" / "results" / "paper").glob("*.json"))


def test_the_page_comes_from_the_records():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    assert claims.PAGE.read_text() == claims.text(), "run python benchmarks/claims.py --write"


def test_every_paper_has_its_part():
    assert list(TITLES) == list(PAPERS) == list(NOT_TRIED) == list(NOTES)


def test_what_was_not_tried_is_told_by_commands_that_exist():
    found = re.findall("`pykd (.+?)`", str([each[3] for paper in NOT_TRIED.values() for each in paper]))
    assert len(found) == 7
    for command in found:
        name, first, *rest = shlex.split(command.replace("\\'", "'"))
        assert name in get_command(app).commands
        data = [each.removeprefix("data.name=") for each in rest if each.startswith("data.name=")]
        recipes.load("-".join([first, *data]), [each for each in rest if "=" in each and "," not in each and not data])


def test_a_full_record_counts_before_a_quick_one():
    full = json.loads((ROOT / "benchmarks" / "results" / "reproduce" / "noisy_teacher-mnist.json").read_text())
    quick = {**full, "quick": True}
    alone, both = page([("quick.json", quick)]), page([("quick.json", quick), ("full.json", full)])
    assert alone.count("quick: not evidence") == 5 and "From `quick.json`." in alone
    assert "quick: not evidence" not in both and "From `full.json`." in both
    assert both == page([("full.json", full)])


@pytest.mark.parametrize("file", QUICK, ids=lambda file: file.stem)
def test_quick_tables_come_from_their_records(file):
    record = json.loads(file.read_text())
    assert record["quick"] and file.stem == f"{record['paper']}-mnist"
    assert file.with_suffix(".md").read_text() == PAPERS[record["paper"]].markdown(record) + "\n"


def test_all_four_papers_have_a_quick_record():
    assert {file.stem.removesuffix("-mnist") for file in QUICK} == set(PAPERS)
