"""The report: what it says of finished, unfinished and damaged runs, and how a browser shows it."""

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torchvision
from typer.testing import CliRunner

from pykd.cli import app
from pykd.report.found import Found
from pykd.report.page import html, write

TINY = [
    f"--set={setting}"
    for setting in (
        "teacher.widths=[8]",
        "teacher.training.epochs=2",
        "student.widths=[8,8]",
        "student.training.epochs=3",
        "student.training.batch_size=128",
        "teacher.training.batch_size=128",
    )
]
SIGMAS = ("noisy_teacher-digits+method.sigma=0.1", "noisy_teacher-digits+method.sigma=0.9")
MARKUP = '"><img src=x onerror=alert(1)></svg><script>window.hacked=1</script> $\\frac{ & '
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pykd(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def made(*words):
    result = pykd(*words)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """Two variants of two seeds."""
    out = tmp_path_factory.mktemp("report") / "grid"
    sigmas = "--grid=method.sigma=0.1,0.9"
    made("compare", "noisy_teacher-digits", *TINY, "--set=baselines=[alone]", sigmas, "--seeds=2", "--out", out)
    return out


@pytest.fixture(scope="session")
def sparse(tmp_path_factory):
    """A run with variational layers and blocks, and with a report."""
    out = tmp_path_factory.mktemp("report") / "sparse"
    blocks = [
        "--set=teacher.widths=[8,8]",
        "--set=method.groups=[4,4]",
        "--set=method.group_threshold=0.4",
        "--set=baselines=[]",
    ]
    made("distill", "variational_student-digits", *TINY, *blocks, "--report", "--out", out)
    return out


@pytest.fixture
def copy(grid, tmp_path):
    """A grid to do harm to."""
    return Path(shutil.copytree(grid, tmp_path / "copy"))


def section(page, title):
    """The text between one heading of the third order and the next."""
    return re.sub(r"<[^>]+>", " ", page.partition(f"<h3>{title}</h3>")[2].partition("<h3>")[0])


def test_a_grid_is_shown_whole(grid):
    page = html([grid])
    assert "4 runs of 2 variants in" in page
    comparison = page.partition("<h3>Comparison</h3>")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="rowgroup"[^>]*>([^<]+)', comparison) == list(SIGMAS)
    rows = json.loads((grid / "table.json").read_text())["rows"]
    for row in rows:
        assert f"{100 * row['error']['mean']:.2f} ± {100 * row['error']['std']:.2f}" in comparison
    low, high = rows[2]["above_teacher"]["interval"]
    assert f"[{100 * low:+.2f}, {100 * high:+.2f}]" in comparison
    curves = page.partition("<h3>Learning curves</h3>")[2].partition("<h3>")[0]
    assert curves.count("<figure>") == 4
    assert re.search(r'aria-label="Loss by epoch, mean over 2 seeds. teacher: [\d.]+ to [\d.]+ in 2 epochs', curves)
    assert page.count('<span class="bar">') == 6
    assert "pykd compare" not in page  # the runs were started by this test's program
    differs = page.partition("<h3>What differs</h3>")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="col">([^<]+)', differs) == ["run", "method.sigma", "teacher.weights"]
    for name in SIGMAS:
        assert f"{name}: config.yaml of seed 0" in page


def test_the_student_is_asked_anew(grid):
    page = html([grid])
    right, of = map(int, re.search(r"(\d+) of (\d+) right", page).groups())
    summary = json.loads((grid / SIGMAS[0] / "seed-0" / "summary.json").read_text())
    assert (of, right / of) == (355, pytest.approx(summary["rows"][-1]["accuracy"]))
    cells = re.findall(
        r'<td class="(right|wrong)"[^>]*>(\d+)<', page.partition('class="confusion"')[2].split("</table>")[0]
    )
    assert sum(int(number) for kind, number in cells if kind == "right") == right
    assert sum(int(number) for _, number in cells) == of
    sure = [
        float(each)
        for each in re.findall(r'class="quiet">([\d.]+) %</span></li>', page.split("</ul>\n\n</details>")[0])
    ]
    first = sure[:24]
    assert first == sorted(first, reverse=True)
    assert len(re.findall(r'<img alt="Test image \d+: \d, taken for \d" src="data:image/png;base64,', page)) == 48


def test_sparse_networks_are_mapped(sparse):
    page = (sparse / "report.html").read_text()
    assert "blocks of 4x4 kept" in section(page, "What is left of the weights")
    layers = json.loads((sparse / "summary.json").read_text())["rows"][-1]["facts"]["layers"]
    for name, layer in layers.items():
        assert f"layer {name}: {layer['kept']:,} of {layer['weights']:,} weights kept" in page
    assert 'aria-label="Histogram of log alpha of student' in page


def test_two_data_sets_stand_apart(grid, sparse, tmp_path, monkeypatch):
    other = Path(shutil.copytree(sparse, tmp_path / "other"))
    config = (other / "config.yaml").read_text().replace("download: false", "download: true")
    (other / "config.yaml").write_text(config.replace("name: digits", "name: svhn"))
    monkeypatch.setattr(torchvision.datasets.SVHN, "__init__", lambda *_, **__: pytest.fail("fetches data"))
    page = html([grid, sparse, other], changes=[f"data.root={tmp_path}/nowhere"])
    assert re.findall(r'<h2 id="data-\d-title">([^<]+)', page) == ["digits", "svhn"]
    assert "grid/noisy_teacher-digits+method.sigma=0.1" in page
    assert re.search(r'<p class="missing">Not shown: [^<]*nowhere', page), "the data are not there"


def test_a_run_given_twice_counts_once(grid):
    run = grid / SIGMAS[0] / "seed-0"
    assert "4 runs of 2 variants" in html([grid, run])
    assert "1 run in" in html([run])


def test_half_finished_runs_show_what_they_have(copy):
    begun, damaged, older, lost = (copy / sigma / f"seed-{seed}" for sigma in SIGMAS for seed in (0, 1))
    (begun / "summary.json").unlink()
    (begun / "metrics.jsonl").open("a").write('{"stage": "student", "epo')
    (damaged / "summary.json").write_text('{"rows": [{"name": 1}]}')
    huge = b'{"stage": "teacher", "epoch": 1, "loss": 1' + b"0" * 400 + b"}"
    (damaged / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"stage": "teacher", "epoch": 1, "loss": NaN}\n' + huge)
    summary = json.loads((older / "summary.json").read_text())
    for row in summary["rows"]:
        for key in ("bytes", "file_bytes", "latency_ms", "facts", "nonzeros"):
            row.pop(key)
    (older / "summary.json").write_text(json.dumps(summary))
    (older / "environment.json").unlink()
    (lost / "student.safetensors").unlink()
    page = html([copy])
    assert "4 runs of 2 variants, 2 of them unfinished" in page
    assert "unfinished: student, epoch 3" in page and "unfinished: no epoch is done" in page
    assert f"pykd distill {begun}/config.yaml --resume --out {begun}" in page.replace("&#39;", "'").replace("'", "")
    assert "1 of 9 lines of metrics.jsonl cannot be read" in page
    assert "4 of 4 lines of metrics.jsonl" in page
    assert "summary.json holds no table: put it back, or delete it and train again with --resume" in page
    assert "environment.json cannot be read" in page
    assert page.count("no run of this variant is finished") == 1
    (older / "student.safetensors").unlink()
    assert "student.safetensors is missing, so that the student cannot be asked" in html([copy])
    nothing = html([begun])
    assert "nothing to compare" in nothing and nothing.count("<figure>") == 2


@pytest.mark.parametrize(
    ("program", "shown"), [("bin/pykd", "pykd"), ("x/pykd/__main__.py", "pykd"), ("a b.py", "python 'a b.py'")]
)
def test_a_command_is_shown_as_it_is_typed(program, shown):
    run = Found(Path(), "", 0, environment={"argv": [program, "distill"]})
    assert run.command == f"{shown} distill"


def test_runs_of_other_networks_do_not_share_a_row(copy):
    file = copy / SIGMAS[0] / "seed-1" / "summary.json"
    summary = json.loads(file.read_text())
    summary["rows"].pop(1)
    file.write_text(json.dumps(summary))
    assert f"{file.parent} is not in the table" in html([copy])


def test_every_variant_calls_its_networks_by_its_own_names(copy):
    for file in copy.glob(f"{SIGMAS[1]}/*/summary.json"):
        file.write_text(file.read_text().replace("student, noisy teacher", "student, of another method"))
    curves = html([copy]).partition("<h3>Learning curves</h3>")[2].partition("<h3>")[0]
    legend = re.findall(r'--look-(\d)\)" aria-hidden="true">.</span> ([^<]+)<', curves)
    names = ["teacher", "student alone", "student, noisy teacher", "student, of another method"]
    assert legend == list(zip("6012", names, strict=True))
    first, _, second = curves.partition("</details>")
    assert "noisy teacher: " in first and "another method: " in second and "noisy teacher: " not in second


def test_a_run_of_python_s_own_networks(copy):
    run = copy / SIGMAS[0] / "seed-0"
    (run / "config.yaml").write_text("method: {name: NoisyTeacher}\nteacher: {}\nstudent: {}\nseed: 7\n")
    page = html([run])
    assert "own data" in page and "Not shown" in page
    (run / "summary.json").unlink()
    assert "call pykd.distill again with this folder as out and with resume=True" in html([run])


def test_a_hundred_runs_stay_small(grid, tmp_path):
    for number in range(100):
        shutil.copytree(grid / SIGMAS[0] / "seed-0", tmp_path / f"run-{number}")
    for file in tmp_path.glob("*/student.safetensors"):
        file.unlink()
    size = write([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert size == len(page.encode()) < 3_000_000
    assert page.count("<figure>") == 25 and "88 more variants are in the tables alone" in page
    assert page.index("run-9<") < page.index("run-10<")


def test_grids_records_are_shown(tmp_path):
    (tmp_path / "reproduce.md").write_text(f"pykd **0.1**.\n\n| claim | here |\n| --- | --- |\n| {MARKUP} | `1` |\n")
    trials = [
        {
            "number": n,
            "values": {"method.sigma": 10.0**-n, "student.name": MARKUP},
            "objective": value,
            "run": f"trial-{n}",
        }
        for n, value in enumerate((0.9, None, 0.95))
    ]
    sweep = {"recipe": "noisy_teacher-digits", "space": {}, "trials": trials, "best": 2}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    page = html([tmp_path])
    assert '<th scope="col">claim</th>' in page and "<strong>0.1</strong>" in page and "<code>1</code>" in page
    assert '<th scope="row">2 (best)</th>' in page and "3 trials of noisy_teacher-digits" in page
    assert "Objective over method.sigma: 0.9 to 0.95, the best trial (diamond) 0.95 at 0.01." in page
    assert page.count("<figure>") == 3 and "<script" not in page and "<img" not in page
    (tmp_path / "sweep.json").write_text('{"trials": [')
    assert "Not shown" in html([tmp_path])


def said(result, code=1):
    """The one sentence of a command that failed."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("pykd: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


def test_what_is_no_run_is_told(grid, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    assert "empty holds no run: give run folders" in said(pykd("report", grid, tmp_path / "empty", "-o", out))
    assert "nothing is no folder" in said(pykd("report", tmp_path / "nothing", "-o", out))
    assert "table.json is no folder" in said(pykd("report", grid / "table.json", "-o", out))
    assert "cannot write" in said(pykd("report", grid, "-o", tmp_path / "no" / "report.html"))
    assert pykd("report", grid, "-o", tmp_path).exit_code == 2
    assert "did you mean 'root'?" in said(pykd("report", grid, "-o", out, "--set=data.rot=x"), code=2)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert said(pykd("report", grid, "-o", out)).endswith("run pip install 'pykd[report]'")
    assert not out.exists()


@pytest.fixture(scope="session")
def hostile(grid, tmp_path_factory):
    """A grid whose every word would like to be markup."""
    out = tmp_path_factory.mktemp("hostile") / MARKUP.replace("/", "")
    shutil.copytree(grid, out)
    for run in out.glob("*/seed-*"):
        summary = json.loads((run / "summary.json").read_text())
        for row in summary["rows"]:
            row["label"] += MARKUP
        (run / "summary.json").write_text(json.dumps(summary))
        metrics = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(metrics.replace('"alone"', json.dumps(MARKUP)))
        (run / "environment.json").write_text(
            json.dumps({"argv": [MARKUP, "\x00\ud800"], MARKUP: MARKUP, "cpu": [MARKUP]})
        )
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config + f"# {MARKUP}\n")
    (out / SIGMAS[1]).rename(out / MARKUP.replace("/", ""))
    return out


def test_names_stay_names(hostile):
    page = html([hostile])
    assert "<script" not in page
    assert not re.findall(r"<img (?!alt=\"Test image)", page)
    assert "&lt;script&gt;" in page and "$\\frac{" in page


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def pages(grid, sparse, hostile, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    write([grid, sparse], out / "all.html")
    write([hostile], out / "hostile.html")
    return out


OUTLINE = "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(e => Number(e.tagName[1]))"
IDS = "[...document.querySelectorAll('[id]')].map(e => e.id)"
LOST = """[...document.querySelectorAll('[href^="#"],[clip-path]')]
  .map(e => e.getAttribute('href') || e.getAttribute('clip-path').slice(4, -1))
  .filter(id => !document.querySelector(id))"""
WITHOUT_TEXT = """[...document.querySelectorAll('svg,img')]
  .filter(e => (e.getAttribute(e.localName == 'svg' ? 'aria-label' : 'alt') || '').length < 10).length"""
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    if (![...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.localName == 'text' ? style.fill : style.color);
    let ground = element;
    while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
    const [dark, bright] = [light(ink), light(rgba(getComputedStyle(ground).backgroundColor))].sort((a, b) => a - b);
    found.push([(bright + .05) / (dark + .05), element.localName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["all", "hostile"])
def test_a_browser_shows_it(browser, pages, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((pages / f"{name}.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [(pages / f"{name}.html").as_uri()]
    assert page.evaluate("[window.hacked, document.scripts.length]") == [None, 0]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(WITHOUT_TEXT) == 0 and page.locator("svg[role=img]").count() > 4
    levels = page.evaluate(OUTLINE)
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = page.evaluate(IDS)
    assert len(ids) == len(set(ids)) and page.evaluate(LOST) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 300 and [each for each in contrasts if each[0] < 4.5] == []
    page.close()
