"""Figures: what they show, that they are the same every time, and what they say where they cannot be."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

from pykd.errors import PykdError
from pykd.report import compared, error_against_bytes, error_against_k, log_alpha, sparsity
from pykd.report.figures import LOOKS

FACTS = {
    "log_alpha_edges": [-20, 0, 20],
    "layers": {
        "fc1": {"weights": 12, "kept": 3, "threshold": 3.0, "log_alpha": [3, 9]},
        "fc2": {"weights": 4, "kept": 4},
    },
}


def rows(file_bytes=(100, 120), runs=("r+method.lambda_g=0.1", "r+method.lambda_g=1")):
    known = {"parameters": 10, "nonzeros": 10, "bytes": 25_600, "latency_ms": 0.1, "seconds": 1.0}
    finished = {}
    for number, run in enumerate(runs):
        finished[run] = []
        for seed, size in enumerate(file_bytes):
            teacher = {"name": "teacher", "label": "teacher", "accuracy": 0.99, **known}
            sizes = [(f"name {each}", size and size * (number + 1) + each) for each in range(3)]
            students = [
                {"name": name, "label": f"{name} & more", "accuracy": 0.97 - number / 100, **known, "file_bytes": own}
                for name, own in sizes
            ]
            finished[run].append({"seed": seed, "rows": [teacher, *students]})
    return compared(finished)


def by_k(least=0.01, most=0.3, networks=9):
    """Rows of a teacher and so many networks, whose errors over K go from most to least."""
    errors = {str(k): {"0": 0.9 * error, "1": 1.1 * error} for k, error in ((1, most), (2, most / 2), (50, least))}
    students = [{"name": name, "label": f"{name} & more"} for name in ("student", *map(str, range(networks - 1)))]
    return [{**row, "error": errors} for row in ({"name": "teacher", "label": "teacher"}, *students)]


def texts(svg):
    """All words in a figure."""
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "student.safetensors"
    large = np.zeros((300, 12), np.float32)
    large[7, 5] = 1.0
    conv = np.ones((2, 3, 2, 2), np.float32)
    save_file({"10.weight": conv, "2.weight": large, "2.bias": np.ones(300, np.float32)}, file)
    return file


def test_error_against_bytes_shows_every_network_and_the_lines():
    said = texts(error_against_bytes(rows()))
    assert {f"name {each} & more" for each in range(3)} <= set(said)
    assert {"teacher, 25,600 bytes dense", "64x", "256x", "bytes of the model file", "test error, %"} <= set(said)
    assert said.count("lambda_g=0.1") == said.count("lambda_g=1") == 3


def test_a_network_that_the_grid_does_not_change_is_one_mark():
    same = rows(runs=("r+a=1",))
    twice = [{**row, "run": run} for run in ("r+a=1", "r+a=2") for row in same]
    assert "a=1" not in texts(error_against_bytes(twice))


def test_error_against_k_shows_every_network_over_k():
    said = texts(error_against_k(by_k(), "mnist, structured"))
    assert said[:3] == ["1", "2", "50"], "K where there are runs, and nowhere else"
    legend = ["teacher", "student & more", *(f"{number} & more" for number in range(8))]
    assert said[-len(legend) :] == legend
    assert {"mnist, structured", "K, images of each class", "test error, %"} <= set(said)


def test_error_against_k_is_logarithmic_where_errors_differ_much():
    def marked(**errors):
        return {text for text in texts(error_against_k(by_k(**errors), "")) if text and text.isdigit()}

    assert {"1", "2", "5", "10", "20"} <= marked(least=0.01)
    assert "15" in marked(least=0.05) and "15" in marked(least=0.0)


def test_no_two_of_many_networks_look_alike():
    svg = error_against_k(by_k(networks=14), "").decode()
    lines = set(re.findall(r'style="fill: none; (stroke-dasharray: [^;]+; stroke-dashoffset: 0; )?stroke: (#\w+)', svg))
    assert len({colour for dashes, colour in lines if dashes}) == len(LOOKS)


def test_log_alpha_shows_the_variational_layers():
    said = texts(log_alpha(FACTS, "student, seed 0"))
    assert {"student, seed 0", "layer fc1: 3 of 12 weights kept", "log alpha", "threshold"} <= set(said)
    assert not [text for text in said if "fc2" in text]


def test_sparsity_shows_the_layers_in_their_order(weights):
    said = texts(sparsity(weights, ["2", "10"], "student", (3, 2, 2)))
    headings = [text for text in said if text.startswith(("layer", "pixels"))]
    assert headings == [
        "pixels read by the first layer",
        "layer 2: 1 of 3,600 weights kept",
        "layer 10: 24 of 24 weights kept",
    ]
    assert "input, kernel position" in said
    assert "pixels read by the first layer" not in texts(sparsity(weights, ["10"], "student", (3, 2, 2)))


@pytest.mark.parametrize("name", ["error_against_bytes", "error_against_k", "log_alpha", "sparsity"])
def test_same_data_same_bytes(name, weights):
    draw = {
        "error_against_bytes": lambda: error_against_bytes(rows()),
        "error_against_k": lambda: error_against_k(by_k(), "mnist"),
        "log_alpha": lambda: log_alpha(FACTS, "student"),
        "sparsity": lambda: sparsity(weights, ["2", "10"], "student", (3, 2, 2)),
    }[name]
    svg = draw()
    assert svg == draw()
    assert b"fill: #ffffff" in svg, "a ground of its own"


def test_what_cannot_be_shown_is_said(weights, tmp_path):
    with pytest.raises(PykdError, match="no network has a model file"):
        error_against_bytes(rows(file_bytes=(None,)))
    with pytest.raises(PykdError, match="mnist: there is no network beside the teacher"):
        error_against_k(by_k(networks=0)[:1], "mnist")
    with pytest.raises(PykdError, match="no layer is variational"):
        log_alpha({**FACTS, "layers": {}}, "student")
    with pytest.raises(PykdError, match=r"a layer in it: 'fc\.weight'"):
        sparsity(weights, ["fc"], "student")
    with pytest.raises(PykdError, match="no layer to show"):
        sparsity(weights, [], "student")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00")
    with pytest.raises(PykdError, match=r"cannot read .*broken"):
        sparsity(tmp_path / "broken.safetensors", ["2"], "student")


def test_a_missing_matplotlib_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^figures need matplotlib: run pip install 'pykd\[report\]'$"):
        log_alpha(FACTS, "student")
