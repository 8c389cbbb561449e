"""A paper's experiment, run: its grid in a folder, the record and the figures of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from pykd import grids, runs
from pykd._files import write_atomically
from pykd.config import Config, ConfigError
from pykd.errors import Interrupted, PykdError
from pykd.jobs import at_once
from pykd.reproduce import PAPERS
from pykd.reproduce.claims import page

RECORD = "reproduce.json"


def run(
    papers: Sequence[str],
    data: Sequence[str],
    changes: Sequence[str],
    out: Path | None,
    *,
    seeds: int | None,
    quick: bool,
    resume: bool,
    jobs: int | None,
    threads: int,
    device: str | None,
) -> None:
    """Runs the experiments of ``papers``, each in the folder of its name where they are several.

    ``out`` then also holds ``claims.md``, the claims of all.

    Raises:
        ConfigError: a wrong data set, key or value, before any work.
        PykdError: the folder is not one to work in; a run failed.
    """
    for paper in papers:  # mistakes are told before a folder is looked for
        grids.check_methods(PAPERS[paper].runs(data, changes, seeds=seeds, out=Path(), quick=quick))
    count = at_once(jobs, threads, device)
    name = papers[0] if len(papers) == 1 else "all"
    out = grids.folder_of(f"reproduce-{name}", out, resume).resolve()
    options: dict[str, Any] = {"seeds": seeds, "quick": quick, "resume": resume}
    failures: list[str] = []
    for paper in papers:
        folder = out if len(papers) == 1 else out / paper
        try:
            _one(paper, data, changes, folder, **options, jobs=count, threads=threads, device=device)
        except (ConfigError, Interrupted):
            raise
        except PykdError as error:  # the other papers go on
            failures.append(str(error))
    files = {f"{paper}/{RECORD}": out / paper / RECORD for paper in papers}
    found = [(name, json.loads(file.read_bytes())) for name, file in files.items() if file.exists()]
    if found and len(papers) > 1:
        write_atomically(out / "claims.md", f"{page(found)}\n".encode())
    if failures:
        raise PykdError("; ".join(failures))


def _one(
    paper: str,
    data: Sequence[str],
    changes: Sequence[str],
    out: Path,
    *,
    seeds: int | None,
    quick: bool,
    resume: bool,
    jobs: int,
    threads: int,
    device: str | None,
) -> None:
    experiment = PAPERS[paper]
    if (sentence := experiment.left_out(seeds, quick)) and runs.is_main_process():
        typer.echo(sentence, err=True)

    def record(finished: grids.Finished) -> dict[str, Any]:
        environment = grids.environment(finished, out)
        return experiment.record(finished, changes=grids.deciding(changes), quick=quick, environment=environment)

    def write(finished: grids.Finished) -> str:
        found = record(finished)
        return grids.write_table(out / RECORD.removesuffix(".json"), experiment.markdown(found), found)

    def draw(finished: grids.Finished) -> None:
        for name, figure in experiment.figures(record(finished)).items():
            write_atomically(out / name, figure)

    planned: list[tuple[str, Config]] = experiment.runs(data, changes, seeds=seeds, out=out, quick=quick)
    planned = grids.with_shared_teachers(planned, out)
    grids.run_all(planned, out, write, resume=resume, jobs=jobs, threads=threads, device=device, draw=draw)
