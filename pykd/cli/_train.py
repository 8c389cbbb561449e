"""The commands that train and evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pykd import config as recipes
from pykd import runs
from pykd.cli._app import MODEL_FILE, Assignments, Device, Recipe
from pykd.cli._study import write_report
from pykd.errors import PykdError


def distill(
    recipe: Recipe,
    assignments: Assignments = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<recipe>-<time> by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or the recipe's newest unfinished one.")
    ] = False,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Decides initial values, order, noise and held-out rows.")] = None,
    with_report: Annotated[bool, typer.Option("--report", help="Also write report.html into the run folder.")] = False,
) -> None:
    """Train a teacher, its student and the baselines, and compare them in a table.

    Data are looked for under --set data.root=FOLDER, else $PYKD_DATA, else ./data.
    """
    changes = [*(assignments or []), *([] if seed is None else [f"seed={seed}"])]
    config = recipes.load(recipe, changes)
    name = recipes.recipe_name(recipe)
    if not resume:
        out = out or runs.fresh(name)
    elif out is None:
        out = runs.newest(name, "summary.json")
    if resume and (out / "config.yaml").exists():
        config = runs.continued(out, config, changes)
    run = runs.distill(config, out, resume=resume, device=device)
    if runs.is_main_process():
        from pykd.training import show

        show(run.summary)
        typer.echo(f"{out} holds the weights, the metrics and this table", err=True)
        if with_report:
            write_report([out], out / "report.html", changes)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, one safetensors file in it, or a model file.")],
    assignments: Assignments = None,
) -> None:
    """Evaluate a run's networks, or a model file, on the test data anew, on the CPU.

    "bytes" are those of a dense float32 file, "file" those of the model file that pykd export writes; "smaller" is how
    often they go into the dense bytes of the run's teacher.

    A model file outside a run folder needs --set data.name=NAME where it does not name its data itself.
    """
    if run.name.endswith(MODEL_FILE):
        _evaluate_file(run, assignments or [])
        return
    folder, role, config = runs.located(run, assignments or [])

    from pykd import data
    from pykd.training import evaluate as measure

    labels = runs.labels(config)
    files = {each: runs.weights_file(folder, each) for each in ([role] if role else labels)}
    files = {role: file for role, file in files.items() if file.exists()}
    if not files:
        raise PykdError(f"{folder} holds no weights yet: finish the run with --resume --out {folder}")
    splits = data.load(config.data, seed=config.seed)
    about = runs.about(config, splits)
    rows = []
    for role, file in files.items():
        network = runs.finished_network(config, role, file, splits)
        rows.append({"name": role, "label": labels[role], **measure(network, splits.test, about)})
    _show_sizes(rows, folder)


def _evaluate_file(file: Path, assignments: Sequence[str]) -> None:
    from pykd import data, deploy
    from pykd.training import evaluate as measure

    network = deploy.load(file)
    beside = file.parent / "config.yaml"
    if beside.is_file():
        config = runs.stored(file.parent, assignments)
        described, seed = config.data, config.seed
    else:
        described, seed = recipes.load_data(network.model.provenance.get("data"), assignments), 0
    splits = data.load(described, seed=seed)
    row = {"name": file.name, "label": file.name, **measure(network, splits.test)}
    _show_sizes([{**row, "file_bytes": file.stat().st_size, "file_reason": None}], file.parent)


def _show_sizes(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table of networks' sizes beside that of the teacher in ``folder``, where there is one."""
    from pykd.training import show

    if (teacher := runs.weights_file(folder, "teacher")).exists():
        dense = teacher.stat().st_size
        for row in rows:
            row["ratio"] = dense / row["bytes"]
            row["file_ratio"] = row["file_bytes"] and dense / row["file_bytes"]
    show({"measured_on": "test", "rows": rows})
    for row in rows:
        if reason := row.get("file_reason"):
            typer.echo(f"{row['label']} has no model file: {reason}", err=True)
