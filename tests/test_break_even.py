"""The arithmetic of benchmarks/break_even.py."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "break_even.py"


@pytest.fixture
def even():
    spec = importlib.util.spec_from_file_location("break_even", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(density, name, seconds, **info):
    info |= {"op": "sparse_linear", "pattern": "16x16", "dtype": "float16", "density": density, "implementation": name}
    return {"extra_info": info, "stats": {"median": seconds}}


@pytest.mark.parametrize(
    "ratios, expected",
    [
        ({0.1: 0.25, 0.2: 0.5, 0.3: 2.0}, "25%"),  # as far below as above
        ({0.1: 0.5, 0.5: 8.0}, "20%"),  # log 8 = 3 log 2
        ({0.1: 0.5, 0.2: 1.0}, "20%"),
        ({0.05: 0.1, 0.5: 0.9}, "> 50%"),
        ({0.1: 1.5, 0.05: 1.0}, "< 5%"),
    ],
)
def test_where_it_is_even(even, ratios, expected):
    """The ratio's logarithm is linear between densities, in any order; the fastest dense one counts."""
    times = {density: {"pykd": 3 * ratio, "torch": 5.0, "torch compiled": 3.0} for density, ratio in ratios.items()}
    assert even.break_even(times) == expected


def test_table(even):
    """Medians over the blocks, of one call; what has no pattern is another table's."""
    record = {
        "benchmarks": [
            {"extra_info": {"op": "factor_loss", "implementation": "pykd"}, "stats": {"median": 1.0}},
            *(measured(0.1, "pykd", seconds, calls=10) for seconds in (10.0, 90.0, 20.0)),
            measured(0.1, "torch", 4.0),
            measured(0.5, "pykd", 8.0),
            measured(0.5, "torch", 4.0),
            measured(0.5, "torch BSR 16", 1.0),
        ]
    }
    assert even.table(record).splitlines() == [
        "| | 10% | 50% | break-even density |",
        "| --- | ---: | ---: | ---: |",
        "| sparse_linear 16x16, float16 | 2.00 | 0.50 | 30% |",
    ]


def test_what_was_cut_off_is_left_out(even):
    record = {"benchmarks": [measured(0.1, "pykd", 2.0), measured(0.1, "torch", 4.0), measured(0.5, "pykd", 8.0)]}
    assert even.table(record).splitlines()[2:] == ["| sparse_linear 16x16, float16 | 2.00 | > 10% |"]
    assert len(even.table({"benchmarks": [measured(0.1, "torch", 4.0)]}).splitlines()) == 2
