"""benchmarks/gpu.sh, with stand-ins for the card, its compiler and its tools: what it runs, writes and says.

Not here: what the parts do on a card.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ["nvidia-smi", "nvcc", "python3", "compute-sanitizer", "cmake", "ctest"]
# A stand-in writes down its call; FAIL and HANG name calls by their words, and what pytest is asked to write is there.
STAND_IN = r"""#!/usr/bin/env bash
call="${0##*/} $*"
echo "$call" | head -n 1 >>"$CALLS"
echo "said by ${call%% *}"
for word in "$@"; do
  [[ $word == --benchmark-json=* ]] && echo '{}' >"${word#*=}"
done
[[ -n ${HANG:-} && $call == *$HANG* ]] && sleep 60
[[ -z ${FAIL:-} || $call != *$FAIL* ]]
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs a copy of the script, which lies in a tree without .git, beside stand-ins."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tree" / "benchmarks").mkdir(parents=True)
    script = Path(shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "tree" / "benchmarks"))
    (tmp_path / "tree" / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "tree" / "tests" / "ops" / "test_a_gpu.py").write_text("pytestmark = pytest.mark.gpu\n")
    (tmp_path / "tree" / "tests" / "test_b.py").write_text("def test_b(): pass\n")

    def run(*parts, **settings):
        calls = tmp_path / "calls"
        calls.write_text("")
        settings = {"OUT": str(tmp_path / "out"), "PYKD_REVISION": "abc1234", "CALLS": str(calls)} | settings
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYKD_", "OUT"))}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [script, *parts],
            cwd=tmp_path,
            env=kept | {"PATH": path, "PYKD_SITE": str(tmp_path / "site")} | settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr, calls.read_text()

    run.out = tmp_path / "out"
    return run


def outcomes(summary):
    return dict(re.findall(r"^(\w+) +\d+ s  (.*)$", summary, re.MULTILINE))


def test_all_parts_run_in_order_and_leave_their_files(gpu):
    code, said, _, calls = gpu()
    assert code == 0, said
    places = [calls.index(word) for word in ("nvcc --version", "pip install", "-m pytest", "ctest", "--benchmark-only")]
    assert places == sorted(places)
    assert "_(mem|race)check$" in calls and "table.py" in calls
    texts = {"facts.txt", "build.txt", "test.txt", "sanitize.txt", "bench.txt", "summary.txt"}
    assert {file.name for file in gpu.out.iterdir()} == texts | {"gpu.json", "gpu.md"}
    for name in texts:
        assert re.match(
            rf"# {name[:-4]} of revision abc1234 on said by nvidia-smi, \d{{4}}-", (gpu.out / name).read_text()
        )
    for name in texts - {"summary.txt"}:
        assert "said by" in (gpu.out / name).read_text().partition("\n")[2]
    assert (gpu.out / "gpu.md").read_text() == "said by python3\n"
    summary = (gpu.out / "summary.txt").read_text()
    assert said.endswith(summary)
    assert outcomes(summary) == dict.fromkeys(["facts", "build", "test", "sanitize", "bench"], "went well")


def test_the_tests_of_a_card_are_chosen_and_pykd_is_not_imported_from_the_tree(gpu):
    _, _, _, calls = gpu("test", PYKD_SELECT="opcheck")
    (call,) = [line for line in calls.splitlines() if "-m pytest" in line]
    assert "-m gpu -k opcheck" in call and "--import-mode importlib" in call
    assert "tests/ops/test_a_gpu.py" in call and "test_b.py" not in call


def test_what_is_asked_for_most_is_measured_first(gpu):
    benchmarks = gpu.out.parent / "tree" / "benchmarks"
    for name in ("block_norm", "distillation_loss", "vocabulary_gpu"):
        (benchmarks / f"test_{name}.py").write_text("@pytest.mark.gpu\n")
    (benchmarks / "test_of_a_cpu.py").write_text("")
    _, _, _, calls = gpu("bench")
    (call,) = [line for line in calls.splitlines() if "--benchmark-only" in line]
    files = re.findall(r"benchmarks/test_(\w+)\.py", call)
    first = ["vocabulary_gpu", "linear_distillation_loss", "sparse_gpu", "distillation_loss"]
    assert files == [*first, "block_norm"]
    assert all((ROOT / "benchmarks" / f"test_{name}.py").exists() for name in first)


@pytest.mark.parametrize("parts", [["sanitize"], ["build", "sanitize"]])
def test_packages_come_as_wheels_once(gpu, parts):
    wheel = gpu.out.parent / "wheels" / "a.whl"
    wheel.parent.mkdir()
    wheel.touch()
    (gpu.out.parent / "bin" / "python3").write_text(
        STAND_IN + '[[ $call != *wheels* ]] || mkdir -p "$PYKD_SITE/wheels"\n'
    )
    _, _, _, calls = gpu(*parts, PYKD_WHEELS=str(wheel.parent))
    assert calls.count(str(wheel)) == 1 and calls.index(str(wheel)) < calls.index("cmake -G Ninja")


def test_what_fails_is_told_and_the_next_part_runs(gpu):
    code, said, _, calls = gpu("test", "sanitize", "facts", FAIL="check$")
    assert code == 1
    assert outcomes(said) == {"test": "went well", "sanitize": "failed with 1", "facts": "went well"}
    assert "nvcc --version" in calls


def test_benchmarks_that_fail_still_have_their_table(gpu):
    code, said, _, _ = gpu("bench", FAIL="--benchmark-only")
    assert code == 1 and outcomes(said) == {"bench": "failed with 1"}
    assert (gpu.out / "gpu.md").exists() and (gpu.out / "gpu.json").exists()


def test_a_part_that_hangs_is_cut_off_and_the_rest_has_no_time(gpu):
    begun = time.monotonic()
    code, said, _, calls = gpu("facts", "bench", "test", HANG="--benchmark-only", PYKD_SECONDS="3")
    assert time.monotonic() - begun < 30
    assert code == 1
    found = outcomes(said)
    assert found["facts"] == "went well" and re.fullmatch(r"cut off after [123] s", found["bench"])
    assert found["test"] == "no time was left" and "said by python3" in (gpu.out / "bench.txt").read_text()
    assert "-q" not in calls.partition("--benchmark-only")[2].partition("\n")[2]


def test_unknown_parts_are_refused(gpu):
    code, said, error, calls = gpu("facts", "fly")
    assert code == 2 and said == "" and calls == ""
    assert error == "gpu.sh: unknown part 'fly'; the parts are facts, build, test, sanitize, bench and all\n"
    assert not gpu.out.exists()


def test_without_a_card_nothing_is_skipped_in_silence(gpu):
    code, said, _, calls = gpu("test", "bench", FAIL="torch finds no card")
    assert code == 1 and outcomes(said) == {"test": "failed with 1", "bench": "failed with 1"}
    assert "pytest" not in calls and not (gpu.out / "gpu.json").exists()


def test_what_the_page_selects_is_there():
    files = [file for folder in ("benchmarks", "tests") for file in (ROOT / folder).rglob("test_*.py")]
    names = [file.stem for file in files if "mark.gpu" in file.read_text()]
    selected = re.findall(r'PYKD_SELECT=(\w+|".+?")', (ROOT / "docs" / "gpu.md").read_text())
    words = {word for each in selected for word in re.findall(r"\w+", each)} - {"or", "and", "not"}
    assert len(words) > 10
    assert [word for word in sorted(words) if not any(word in name for name in names)] == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [ROOT / "benchmarks" / "gpu.sh", ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_tests_of_the_device_cuda_are_marked(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "test_a.py").write_text(
        "import pytest\n@pytest.mark.parametrize('device', ['cpu', 'cuda'])\ndef test_a(device): pass\n"
        "@pytest.mark.gpu\ndef test_b(): pass\ndef test_c(): pass\n"
    )
    words = ["-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, *words, "--rootdir", tmp_path, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert set(re.findall(r"::(.*)", done.stdout)) == {"test_a[cuda]", "test_b"}
