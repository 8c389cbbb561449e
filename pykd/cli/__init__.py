"""The command line: ``pykd distill | evaluate | export | run | bench | compare | reproduce | sweep | report | ...``.

Torch and the pipelines are imported inside the commands that need them, so that help and mistakes are told at once.
"""

import os

try:
    import typer

    from pykd import config
    from pykd.cli._app import app
    from pykd.cli._deploy import bench, bundle, export, run
    from pykd.cli._study import compare, report, reproduce, sweep
    from pykd.cli._train import distill, evaluate
except ModuleNotFoundError as error:
    raise SystemExit(f"pykd: {error.name} is missing: run pip install 'pykd[train]'") from error

for command in (distill, evaluate, export, run, bench, bundle, compare, reproduce, sweep, report):
    app.command()(command)


@app.command("recipes")
def list_recipes() -> None:
    """List the packaged recipes."""
    described = config.recipes()
    width = max(map(len, described))
    for name, description in described.items():
        typer.echo(f"{name:{width}}  {description}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, compiled operators, devices, data."""
    from pykd.deploy.doctor import examine

    findings, usable = examine()
    width = max(map(len, findings))
    for topic, finding in findings.items():
        typer.echo(f"{topic:{width}}  {finding}")
    raise typer.Exit(0 if usable else 1)


def main() -> None:
    """The console script ``pykd``."""
    if "RANK" in os.environ:  # torch says there what it thinks of find_unused_parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    app(prog_name="pykd")
