"""What the pages say: their Python and commands run, their links lead somewhere, their tables come from the records."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import TINY, pykd

from pykd import report
from pykd.reproduce import PAPERS, noisy_teacher
from pykd.reproduce._paper import paired

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
]
NOISY_TEACHER = (ROOT / "docs" / "noisy_teacher.md").read_text()
METHODS = [
    NOISY_TEACHER,
    *(
        (ROOT / "docs" / f"{name}.md").read_text()
        for name in ("variational_student", "factor_transfer", "cross_distillation")
    ),
]
RECORDED = [(*found, page) for page in METHODS for found in re.findall(r"<!-- (compare|reproduce): ([\w-]+) -->", page)]


def commands(page):
    return re.findall(r"^(pykd .+)$", "".join(re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)), re.M)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_runs(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_tables_come_from_the_records():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    records = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    assert records, "run `make bench`"
    for name, text in [
        ("README.md", table.summary(records)),
        ("docs/benchmarks.md", "\n\n".join(map(table.tables, records))),
    ]:
        page = (ROOT / name).read_text()
        assert table.replaced(page, text) == page


def runs(command):
    """What trains; but for the grid of cross distillation, most of an hour, which test_reproduce runs quickly."""
    return command.split()[1] in ("distill", "compare", "reproduce") and command != "pykd reproduce cross_distillation"


@pytest.mark.parametrize("command", [command for page in METHODS for command in commands(page) if runs(command)])
def test_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [] if "--quick" in command or "distill" in command else ["--seeds=1"]
    tiny = TINY
    if re.search("(sparse_vd|factor_transfer|cross_distillation)-", command):  # networks without widths
        tiny = [*(word for word in TINY if "widths" not in word), "--set=data.name=digits"]
    if "factor_transfer-" in command:
        tiny += ["--set=teacher.name=resnet", "--set=teacher.depth=8", "--set=method.paraphraser.epochs=1"]
    if "cross_distillation-" in command:
        tiny += ["--set=teacher.width=0.05", "--set=student.width=0.05"]
    mnist = "(data.name=|variational_student-|factor_transfer-|cross_distillation-)mnist"
    _, *words = shlex.split(re.sub(mnist, r"\1digits", command))
    result = pykd(*words, *tiny, *few)
    assert result.exit_code == 0, result.output
    assert "%" in result.stdout


def test_every_variant_has_its_command():
    text = " ".join(commands(NOISY_TEACHER))
    for variant in noisy_teacher.VARIANTS:
        for change in variant.changes:
            assert change.partition("=")[0] in text or "kd" in change


@pytest.mark.parametrize(("kind", "name", "page"), RECORDED, ids=[f"{kind}-{name}" for kind, name, _ in RECORDED])
def test_tables_of_runs_come_from_the_records(kind, name, page):
    file = ROOT / "benchmarks" / "results" / kind / f"{name}.json"
    markdown = report.markdown if kind == "compare" else PAPERS[name.partition("-")[0]].markdown
    _, _, rest = page.partition(f"<!-- {kind}: {name} -->\n\n")
    shown, end, _ = rest.partition("\n\n<!-- end -->")
    assert end
    assert shown == (markdown(json.loads(file.read_text())) if file.exists() else "Not measured yet.")


def test_fifteen_seeds_in_pairs_say_what_their_record_says():
    record = json.loads((ROOT / "benchmarks" / "results" / "compare" / "cross_distillation-mnist.json").read_text())
    found = []
    for k in (1, 3):
        errors = {
            row["name"]: {str(seed): error for seed, error in enumerate(row["error"]["values"])}
            for row in record["rows"]
            if row["run"].endswith(f"per_class={k}")
        }
        less = paired([errors["student"]], [errors["layerwise"]])
        fewer = sum(errors["student"][seed] < errors["layerwise"][seed] for seed in errors["student"])
        found += [*(round(100 * each, 1) for each in (less["points"], *less["points_interval"])), fewer, less["seeds"]]
    page = (ROOT / "docs" / "cross_distillation.md").read_text()
    said = re.search(
        r"makes ([\d.]+) points \(95 % interval ([\d.]+) to ([\d.]+)\) .* less in (\d+) of (\d+) seeds; "
        r"with three ([\d.]+) \(([\d.]+) to ([\d.]+)\), less in (\d+)\.",
        " ".join(page.split()),
    )
    assert [*map(float, said.groups())] == found[:-1]
