"""The commands for many runs: compare them, reproduce a paper, search, report."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Literal

import typer

from pykd import config as recipes
from pykd import grids
from pykd.cli._app import Assignments, Device, Jobs, Recipe, Threads
from pykd.config import ConfigError
from pykd.jobs import at_once

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the grid in --out, or the newest one; finished runs stay.")
]


def compare(
    recipe: Annotated[list[str], typer.Argument(help="Packaged recipes or YAML files.")],
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Runs of each: with seed, seed + 1, ...")] = 5,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Run with each of the values; several keys are combined."),
    ] = None,
    assignments: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/compare-<recipe>-<time> by default.")
    ] = None,
    resume: Resume = False,
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Run recipes with several seeds and settings: one table with mean and sample standard deviation.

    The folder holds table.md, table.json and figures: error-bytes.svg, and of the first seed's networks
    log-alpha-*.svg and sparsity-*.svg.

    Teachers that would be trained alike, from one seed, are trained once: the first run's serves the others. So it
    is, too, where data.per_class differs, which cuts the students' rows alone.
    """
    planned = grids.plan(recipe, grid or [], assignments or [], seeds)
    grids.check_methods(planned)
    count = at_once(jobs, threads, device)
    out = grids.folder_of(f"compare-{recipes.recipe_name(recipe[0])}", out, resume).resolve()

    def write(finished: grids.Finished) -> str:
        from pykd.report import compared, markdown
        from pykd.report.tables import ran_with

        record = {
            "recipes": [recipes.recipe_name(each) for each in recipe],
            "changes": grids.deciding(assignments or []),
            "grid": grid or [],
            "environment": ran_with(grids.environment(finished, out)),
            "rows": compared(finished),
        }
        return grids.write_table(out / "table", markdown(record), record)

    planned = grids.with_shared_teachers(planned, out)
    grids.run_all(
        planned,
        out,
        write,
        resume=resume,
        jobs=count,
        threads=threads,
        device=device,
        draw=lambda finished: grids.draw(finished, out),
    )


def reproduce(
    paper: Annotated[
        str, typer.Argument(help="noisy_teacher, variational_student, factor_transfer, cross_distillation, or all")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of every run; data.name=NAME names the data set (mnist by default), or one more.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Runs of each variant: 5 or 3 by default, as the paper's grid has them; 2 if quick."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few variants, 2 seeds and a tenth of the epochs, on digits: does it run?")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/reproduce-<paper>-<time> by default.")
    ] = None,
    resume: Resume = False,
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Run a paper's experiment: its variants with several seeds, and our figures beside its claims.

    Every run is one of a recipe <paper>-<data set>; the variants of a seed learn from the same teacher. With all, the
    folder holds one for each paper, and claims.md.
    """
    from pykd.reproduce import PAPERS
    from pykd.reproduce.experiment import run as run_experiments

    if paper != "all":
        recipes.choose({**PAPERS, "all": None}, paper, "paper")
    key = "data.name="
    data = [each.removeprefix(key) for each in assignments or [] if each.startswith(key)]
    run_experiments(
        list(PAPERS) if paper == "all" else [paper],
        list(dict.fromkeys(data)) or ["digits" if quick else "mnist"],
        [each for each in assignments or [] if not each.startswith(key)],
        out,
        seeds=seeds,
        quick=quick,
        resume=resume,
        jobs=jobs,
        threads=threads,
        device=device,
    )


def sweep(
    recipe: Recipe,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=AXIS",
            help="A key to vary, and its values: LOW:HIGH, behind it :log or :int or both, or VALUE,VALUE; may be "
            "repeated. E.g. method.sigma=0.01:2:log, student.training.epochs=5:50:int.",
        ),
    ],
    assignments: Assignments = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="How many; of a grid all, if they are fewer.")] = 20,
    maximize: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="What to have most of; holdout_accuracy by default.")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="What to have least of instead, e.g. file_bytes.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least held-out accuracy that the best trial may have.")
    ] = None,
    sampler: Annotated[
        Literal["tpe", "random", "grid"], typer.Option(help="Who chooses: Optuna, or all in turn.")
    ] = "tpe",
    seed: Annotated[int | None, typer.Option(help="Of all runs, which share a teacher, and of the choices.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/sweep-<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out, or the newest one; --trials may have grown.")
    ] = False,
    jobs: Jobs = None,
    threads: Threads = 1,
    device: Device = None,
) -> None:
    """Search a recipe's settings for the best student, by its accuracy on the held-out rows; never on test rows.

    Each trial is a run folder; students are trained without baselines unless --set baselines=[...] names some. The
    folder holds sweep.json, sweep.md and sweep.svg. Trials that a signal or a crash ended go on with --resume.
    """
    from pykd import sweeps
    from pykd._files import write_atomically

    if maximize is not None and minimize is not None:
        raise ConfigError("give either --maximize or --minimize")
    if "RANK" in os.environ:
        raise ConfigError("a sweep is one process, with --jobs for more: start it without a launcher")
    measure = sweeps.ACCURACY if maximize is None else maximize
    objective = sweeps.Objective(measure, "maximize", min_accuracy)
    if minimize is not None:
        objective = sweeps.Objective(minimize, "minimize", min_accuracy)
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    planned = sweeps.Sweep(recipe, over, changes, objective, sampler)
    count = at_once(jobs, threads, device)
    out = grids.folder_of(f"sweep-{recipes.recipe_name(recipe)}", out, resume).resolve()
    planned.run(out, trials, resume=resume, jobs=count, threads=threads, device=device)
    typer.echo(sweeps.markdown(planned.record))
    try:
        write_atomically(out / "sweep.svg", sweeps.figure(planned.record))
    except ImportError as error:
        typer.echo(str(error), err=True)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of compare, reproduce or sweep.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", dir_okay=False, help="The file; it is replaced if it is there.")
    ] = Path("report.html"),
    assignments: Assignments = None,
) -> None:
    """Write one HTML file about runs, finished or not: tables, curves, maps of weights, mistakes, commands, settings.

    It needs nothing beside it, and no network. The students are asked again on the test data, which are looked for
    under --set data.root=FOLDER, else where the runs found them.
    """
    write_report(runs, output, assignments or [])


def write_report(places: Sequence[Path], output: Path, changes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from pykd._files import writing
    from pykd.report.page import write

    with writing(output, "write the report again"), TemporaryFile(dir=output.parent):  # before all that takes time
        pass
    with Console(stderr=True).status("reading the runs ...") as status:
        size = write(places, output, changes=changes, say=lambda doing: status.update(f"{escape(doing)} ..."))
    typer.echo(f"{output}: {size:,} bytes", err=True)
