"""One page of what the papers claim, with ours beside it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pykd.report.tables import percent, table
from pykd.reproduce import PAPERS
from pykd.reproduce._paper import effect

TITLES = {
    "noisy_teacher": "Noisy teacher, Sau & Balasubramanian 2016",
    "variational_student": "Variational student, Hegde et al. 2020",
    "factor_transfer": "Factor transfer, Kim et al. 2018",
    "cross_distillation": "Cross distillation, Bai et al. 2019",
}
READING = """\
The published figures are those of abstracts and of summaries; the papers' own tables could not be established, nor most
of their settings: a claim that is not reached here does not refute a paper's. Ours and than are test errors, mean and
sample standard deviation over n seeds, of the two that a claim compares, in its order. The runs of a seed share
teacher, initial weights and rows, so a difference is one of pairs: by how much ours err less, in brackets the 95 %
interval (Student's t) of the mean; of twenty such intervals one misses by chance. Quick runs, a tenth of the epochs
with two seeds, show that all of it runs, and are no evidence."""
NOTES = {
    "noisy_teacher": """\
The best noisy teacher is chosen on the held-out rows. Of several teachers, those beside the first have seen rows that a
seed holds out, and seeds share them: a part of what they gain may be that, and the intervals of these claims are too
narrow.""",
    "variational_student": """\
Smaller: the teacher's dense float32 file divided by the model file that pykd export writes, with indices, biases and
header; the paper's own way to count is not known, nor its loss of accuracy.""",
    "factor_transfer": "Nothing was tuned for one of the rows.",
    "cross_distillation": """\
K images of each class are learnt from. Structured: half of the channels are taken out; unstructured: 90 % of the
weights.""",
}


def page(records: Iterable[tuple[str, Mapping[str, Any]]], more: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        records: each with where it lies, as ``pykd reproduce`` writes it; where one on the same networks and data is
            not quick, quick ones are left out.
        more: what else is to say, by paper.

    Example:
        >>> page([]).splitlines()[0]
        '# Claims'
    """
    records = list(records)
    whole = {(record["paper"], name) for _, record in records if not record["quick"] for name, _ in _tables(record)}
    parts = ["# Claims", READING]
    for paper, title in TITLES.items():
        lines: list[list[str]] = []
        sources = []
        for where, record in records:
            if record["paper"] != paper:
                continue
            before = len(lines)
            for name, rows in _tables(record):
                if not record["quick"] or (paper, name) not in whole:
                    found = PAPERS[paper].claims(name, rows, quick=record["quick"])
                    lines += [[f"{name}: {claim['claim']}", *_cells(claim)] for claim in found]
            if len(lines) > before:
                changed = f", with {', '.join(f'`{each}`' for each in record['changes'])}" if record["changes"] else ""
                sources.append(f"`{where}`{changed}")
        parts.append(f"## {title}")
        if lines:
            head = ["claim", "published", "ours, %", "than, %", "difference", "n", "verdict"]
            parts += [table([head, *lines]), NOTES[paper], f"From {'; '.join(sources)}."]
        if more:
            parts.append(more[paper])
    return "\n\n".join(parts)


def _tables(record: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The rows of a record, by what they are about."""
    if isinstance(record["data"], Mapping):
        return [(name, of["rows"]) for name, of in record["data"].items()]
    return [(f"{of['recipe'].partition('-')[2]}, {of['pruning']}", of["rows"]) for of in record["data"]]


def _cells(claim: Mapping[str, Any]) -> list[str]:
    ours, unit = claim["ours"], {"points": "points", "relative": "% relative", "times": "times"}[claim["kind"]]
    sides = ["", ""] if claim["kind"] == "times" else [percent(side) if side else "" for side in claim["sides"]]
    difference = f"{effect(ours, claim['kind'])} {unit}" if ours else ""
    return [claim["published"], *sides, difference, str(ours["seeds"]) if ours else "0", claim["verdict"]]
