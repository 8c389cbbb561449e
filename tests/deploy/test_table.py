"""Device results as a table and a figure: every figure in its place, nothing lost, nothing invented."""

import copy
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pykd.deploy import table
from pykd.errors import PykdError


def run(p50: float, *, engine: str = "pykd", form: str = "sparse", device: str = "cuda", **other: object) -> dict:
    """A run with round figures that follow from its latency."""
    energy = {"total": p50 / 100, "above_idle": p50 / 400}
    return {
        "engine": engine,
        "form": form,
        "device": device,
        "precision": "float16",
        "threads": 1,
        "batch": 1,
        "latency_us": {"mean": p50, "min": p50, "p50": p50, "p90": p50, "p95": p50, "p99": 2 * p50, "runs": 1000},
        "repeats_p50_us": [p50] * 3,
        "rows_per_second": 1e6 / p50,
        "peak_memory_bytes": 1e6 * p50,
        "weight_bytes": 1000,
        "power": {"source": "ina3221", "rails": ["VDD_IN"], "scope": "module", "millijoules_per_row": energy},
        "clocks_mhz": {"cpu": {"min": 729, "max": 1728}},
        "throttled": False,
        "missing": [],
        **other,
    }


def record(*runs: dict, mode: str | None = "MAXN_SUPER", emulated: bool | None = False, **model: object) -> dict:
    """A device result of an Orin Nano."""
    return {
        "pykd_device_result": 1,
        "pykd": "0.1.0",
        "time": "2026-11-22T10:00:00Z",
        "machine": {
            "name": "NVIDIA Jetson Orin Nano Developer Kit",
            "processor": "ARM Cortex-A78AE",
            "l4t": "36.4.3",
            "jetpack": "6.2",
            "power_mode": None if mode is None else {"name": mode, "id": 2},
            "cores": 6,
            "emulated": emulated,
            "missing": [],
        },
        "model": {"file": "student.pykd.safetensors", "sha256": "ab" * 32, "bytes": 100_000, "dense_bytes": 1_066_000}
        | model,
        "check": {"rows": 64, "largest_difference": 1e-6, "tolerance": 1e-4, "equal": True},
        "runs": list(runs),
    }


SPARSE, DENSE, TENSORRT = run(40.0), run(100.0, form="dense"), run(60.0, engine="tensorrt", form="dense")
TENSORRT |= {"threads": None, "peak_memory_bytes": None, "power": None, "missing": ["trtexec says no power"]}


@pytest.fixture
def files(tmp_path):
    """Writes device results; returns their paths."""

    def write(*records: object) -> list[str]:
        paths = [tmp_path / f"{index}.json" for index in range(len(records))]
        for path, each in zip(paths, records, strict=True):
            path.write_text(each if isinstance(each, str) else json.dumps(each))
        return [str(path) for path in paths]

    return write


def shown(capsys, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """The table's rows, each by its titles, and what stands below."""
    assert table.main(arguments) == 0
    text = capsys.readouterr().out
    body, _, below = text.partition("\n\n")
    titles, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()]
    assert {len(line) for line in lines} == {len(titles)}
    found = [dict(zip(titles, line, strict=True)) for line in lines]
    for before, each in pairwise(found):
        if not each["device"]:
            each |= {name: before[name] for name in ("device", "model")}
    return found, below


def test_every_figure(files, capsys):
    (sparse, dense, tensorrt), below = shown(capsys, *files(record(SPARSE, TENSORRT, DENSE)))
    assert sparse == {
        "device": "NVIDIA Jetson Orin Nano Developer Kit, JetPack 6.2, L4T 36.4.3, power mode MAXN_SUPER",
        "model": "student.pykd.safetensors",
        "run": "pykd sparse, cuda, float16",
        "batch": "1",
        "latency p50, us": "40.0 (2.50x, TensorRT 1.50x)",
        "latency p99, us": "80.0 (2.50x, TensorRT 1.50x)",
        "rows a second": "25,000 (2.50x, TensorRT 1.50x)",
        "energy a row in all, mJ": "0.4 (2.50x)[^1]",
        "energy a row above idle, mJ": "0.1 (2.50x)[^1]",
        "peak memory, MB": "40.0",
        "file, bytes": "100,000 (10.66x)",
        "answers": "equal",
    }
    assert (dense["run"], dense["latency p50, us"]) == ("pykd dense, cuda, float16", "100.0 (TensorRT 0.60x)")
    assert dense["file, bytes"] == tensorrt["file, bytes"] == "1,066,000"
    assert (tensorrt["run"], tensorrt["latency p50, us"]) == ("TensorRT, cuda, float16", "60.0")
    assert (dense["answers"], tensorrt["answers"]) == ("equal", "not checked")
    assert tensorrt["energy a row in all, mJ"] == tensorrt["peak memory, MB"] == "not measured[^2]"
    assert "[^1]: Power of VDD_IN (module), by ina3221.\n[^2]: Not measured: trtexec says no power\n" in below


def test_compared_are_runs_of_one_setting(files, capsys):
    other = {"precision": "float32", "device": "cpu", "threads": 6}
    runs = [SPARSE, run(10.0, form="dense", batch=8), run(20.0, form="dense", precision="float32")]
    runs += [run(30.0, **other), run(90.0, form="dense", **other), run(45.0, **other | {"threads": 1})]
    found, _ = shown(capsys, *files(record(*runs)))
    assert [(each["run"], each["batch"], each["latency p50, us"]) for each in found] == [
        ("pykd sparse, cpu, float32, 1 thread", "1", "45.0"),
        ("pykd sparse, cpu, float32, 6 threads", "1", "30.0 (3.00x)"),
        ("pykd dense, cpu, float32, 6 threads", "1", "90.0"),
        ("pykd sparse, cuda, float16", "1", "40.0"),
        ("pykd dense, cuda, float32", "1", "20.0"),
        ("pykd dense, cuda, float16", "8", "10.0"),
    ]


def test_results_are_merged_in_order_and_without_loss(files, capsys):
    later = record(run(50.0)) | {"time": "2026-11-23T10:00:00Z"}
    other = record(run(70.0), mode="15W")
    records = [record(SPARSE), other, later, record(DENSE, file="student.pykd.safetensors"), record(SPARSE)]
    records.append(record(run(5.0), sha256="cd" * 32))
    found, _ = shown(capsys, *files(*records))
    modes = [each["device"].rpartition(" ")[2] for each in found]
    assert modes == ["MAXN_SUPER"] * 4 + ["15W"]
    assert [(each["model"], each["run"], each["latency p50, us"]) for each in found] == [
        ("student.pykd.safetensors (abababab)", "pykd sparse, cuda, float16 of 2026-11-22T10:00:00Z", "40.0 (2.50x)"),
        ("student.pykd.safetensors (abababab)", "pykd sparse, cuda, float16 of 2026-11-23T10:00:00Z", "50.0 (2.00x)"),
        ("student.pykd.safetensors (abababab)", "pykd dense, cuda, float16", "100.0"),
        ("student.pykd.safetensors (cdcdcdcd)", "pykd sparse, cuda, float16", "5.0"),
        ("student.pykd.safetensors (abababab)", "pykd sparse, cuda, float16", "70.0"),
    ]


def test_a_record_is_compared_with_itself_first(files, capsys):
    first = record(SPARSE, DENSE)
    second = record(run(80.0), run(400.0, form="dense")) | {"time": "2026-11-23T10:00:00Z"}
    found, _ = shown(capsys, *files(first, second))
    assert [each["latency p50, us"] for each in found] == ["40.0 (2.50x)", "80.0 (5.00x)", "100.0", "400.0"]


@pytest.mark.parametrize(("flag", "said"), [(True, "emulated"), (None, "perhaps emulated")])
def test_an_emulated_machine_has_no_times(flag, said, files, capsys, tmp_path):
    (emulated, real), _ = shown(capsys, *files(record(SPARSE, emulated=flag), record(DENSE)))
    assert emulated["device"].endswith(f", {said}")
    assert emulated["latency p50, us"] == f"{said}: no times"
    assert {emulated[metric.title] for metric in table.METRICS[1:]} == {""}
    assert (emulated["file, bytes"], emulated["answers"]) == ("100,000 (10.66x)", "equal")
    assert real["latency p50, us"] == "100.0"
    drawn = table.figure([table.read(tmp_path / "0.json")]).decode()
    assert drawn.count(f"{said}: no times") == 2 and "10.66x" in drawn and "40" not in re.findall(r">([^<]*)<", drawn)


def test_what_is_not_known(files, capsys):
    bare = {"engine": "pykd", "form": "sparse", "device": "cpu", "batch": 1, "missing": []}
    unknown = record(bare, bare | {"throttled": True, "latency_us": {"p50": 3}}, mode=None) | {"check": None}
    nobody = copy.deepcopy(unknown)
    nobody["machine"] = {"emulated": False}
    wrong = record(SPARSE) | {"check": {"equal": False}}
    found, below = shown(capsys, *files(unknown, nobody, wrong))
    assert found[0]["device"].endswith("power mode unknown") and found[2]["device"] == "unknown machine"
    assert [each["answers"] for each in found] == ["not checked"] * 4 + ["**differ**"]
    assert found[0]["latency p50, us"] == found[0]["energy a row in all, mJ"] == "not measured[^1]"
    assert "[^1]: Not measured: the result does not say why\n" in below
    assert found[1]["latency p50, us"] == "3.0[^2]" and "[^2]: The clocks were throttled" in below


def test_names_stay_text(files, capsys, tmp_path):
    hostile = "a|b\n<script>[x](y)$\\frac{$\u202e\ud800" + "z" * 200
    given = record(run(1.0, precision=hostile, missing=[hostile], power=None), file=hostile, mode=hostile)
    (row,), below = shown(capsys, *files(given))
    name = r"a\|b?\<script\>\[x\](y)$\\frac{$??" + "z" * 200
    assert row["model"] == name and f"Not measured: {name}\n" in below
    drawn = table.figure([table.read(tmp_path / "0.json")])
    assert "a|b?<script>[x](y)$\\frac{$??zz" in "".join(ElementTree.fromstring(drawn).itertext())


def test_the_figure_shows_what_the_table_shows(files, tmp_path):
    paths = files(record(SPARSE, DENSE, TENSORRT), record(run(33.0), mode="15W"))
    for name in ("a", "b"):
        assert table.main([*paths, "-o", str(tmp_path / f"{name}.md"), "--svg", str(tmp_path / f"{name}.svg")]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    for word in ("MAXN_SUPER", "15W", "pykd sparse, cuda, float16, batch 1", "TensorRT, cuda", "2.50x", "10.66x", "mJ"):
        assert word in text
    assert (tmp_path / "a.md").read_text().startswith("| device | model |")


def broken(*path: str | int, to: object = ...) -> dict:
    """A device result with another value there, or none."""
    given = record(copy.deepcopy(SPARSE))
    *where, last = path
    inner = given
    for key in where:
        inner = inner[key]
    if to is ...:
        del inner[last]
    else:
        inner[last] = to
    return given


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("", "it is not valid JSON"),
        ("[1]", "it should be a JSON object"),
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ("[" * 100_000, "it is not valid JSON"),
        ('{"pykd_device_result": NaN}', "it holds NaN"),
        (json.dumps(record(SPARSE)).replace("40.0", "1" * 5000), "it is not valid JSON"),
        (
            json.dumps(record(SPARSE)).replace("40.0", "1e999"),
            "runs[0].latency_us.p50 should be a number from 0 to 1e+15",
        ),
        ({}, "pykd_device_result should be 1, got None"),
        (broken("pykd_device_result", to=2), "pykd_device_result should be 1, got 2; another pykd may read it"),
        (broken("pykd_device_result", to=True), "pykd_device_result should be 1, got True"),
        (broken("machine"), "it lacks machine"),
        (broken("machine", to=None), "machine should be a JSON object, got None"),
        (broken("machine", "emulated", to=0), "machine.emulated should be true or false, got 0"),
        (broken("machine", "name", to=["x"]), "machine.name should be a text"),
        (broken("model", "bytes", to=-1), "model.bytes should be a number from 0"),
        (broken("model", "bytes", to=10**400), "model.bytes should be a number from 0"),
        (broken("model", "bytes", to=True), "model.bytes should be a number from 0"),
        (broken("model", "file", to="x" * 1001), "model.file should be a text"),
        (broken("runs", to={}), "runs should be a list"),
        (broken("runs", to=[None]), "runs[0] should be a JSON object"),
        (broken("runs", to=[SPARSE] * 1001), "runs should be a list of at most 1000"),
        (broken("runs", 0, "batch"), "it lacks runs[0].batch"),
        (broken("runs", 0, "latency_us", "p50", to="1"), "runs[0].latency_us.p50 should be a number"),
        (broken("runs", 0, "power", "rails"), "it lacks runs[0].power.rails"),
    ],
)
def test_what_is_no_device_result(given, why, files, capsys, tmp_path):
    good, bad = files(record(SPARSE), given)
    (tmp_path / "a.md").write_text("before")
    assert table.main([good, bad, "-o", str(tmp_path / "a.md")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and (tmp_path / "a.md").read_text() == "before"
    assert said.err.startswith(f"pykd.deploy.table: {bad} is no device result: {why}")
    assert said.err.count("\n") == 1 and len(said.err) < 400


def test_files_that_cannot_be_read_or_written(files, capsys, tmp_path, monkeypatch):
    (good,) = files(record(SPARSE))
    for path in (tmp_path, tmp_path / "nothing.json", Path("/dev/zero"), Path("\0")):
        with pytest.raises(PykdError, match=r"is no device result|cannot read"):
            table.read(path)
    with pytest.raises(PykdError, match="No such file"):
        table.read(tmp_path / "nothing.json")
    for option, where in (("-o", tmp_path / "no" / "a.md"), ("--svg", Path("/"))):
        assert table.main([good, option, str(where)]) == 1
    assert "cannot write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert table.main([good, "-o", str(tmp_path / "a.md"), "--svg", str(tmp_path / "a.svg")]) == 1
    assert "pip install 'pykd[report]'" in capsys.readouterr().err
    assert table.main([*files(record()), "--svg", str(tmp_path / "a.svg")]) == 1
    assert "hold no run to show" in capsys.readouterr().err
    assert not [*tmp_path.glob("a.*")]
    before = Path(good).read_bytes()
    twice = str(tmp_path / "a.md")
    for words in ([], [good, "-o", good], [good, "--svg", good], [good, "-o", twice, "--svg", twice]):
        with pytest.raises(SystemExit, match="2"):
            table.main(words)
    assert Path(good).read_bytes() == before


def test_the_command_needs_neither_torch_nor_matplotlib(files):
    program = "import sys, runpy; sys.modules |= dict.fromkeys(['torch', 'matplotlib', 'safetensors'])\n"
    program += "sys.argv[0] = 'table'; runpy.run_module('pykd.deploy.table', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", program, *files(record(SPARSE))], capture_output=True, text=True, check=True
    )
    assert "| pykd sparse, cuda, float16 | 1 | 40.0 |" in result.stdout
