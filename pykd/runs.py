"""What a recipe is made into: its method, networks and data, the run of them, and the run's folder.

Torch and the pipelines are imported inside the functions that need them.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import pykd
from pykd import config as recipes
from pykd.config import Config, ConfigError, Network
from pykd.errors import PykdError

if TYPE_CHECKING:
    from torch.nn import Module

    from pykd.data import Splits
    from pykd.training import Run

RUNS = Path("runs")


def fresh(name: str) -> Path:
    """A new folder for a run of the recipe ``name``."""
    if "RANK" in os.environ:
        raise ConfigError("several processes need one folder: give --out")
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest(name: str, until: str | None = None) -> Path:
    """The newest folder of a recipe's runs that does not hold the file ``until``."""
    mine = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
    folders = [path for path in RUNS.glob("*") if mine.fullmatch(path.name) and not (until and (path / until).exists())]
    if not folders:
        raise PykdError(f"{RUNS} holds no unfinished run of {name}: leave --resume out to start one, or give --out")
    return max(folders)


def stored(folder: Path, changes: Sequence[str] = ()) -> Config:
    """The settings of the run in ``folder``, with ``changes``."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise PykdError(f"{folder} is not a run folder: it holds no config.yaml")
    return recipes.load(str(file), changes)


def continued(out: Path, config: Config, changes: Sequence[str]) -> Config:
    """The settings to resume ``out`` with: its own, unless the command line changes some."""
    own = stored(out)
    for key, mine, its in (
        ("method.name", config.method["name"], own.method["name"]),
        ("data.name", config.data.name, own.data.name),
    ):
        if mine != its:
            raise PykdError(f"{out} is a run of another recipe, with {key} {its}, not {mine}: give another --out")
    return stored(out, changes)


def located(run: Path, assignments: Sequence[str]) -> tuple[Path, str | None, Config]:
    """The run folder that ``run`` is or lies in, the network whose weights it is, and the run's settings."""
    if not run.is_file():
        return run, None, stored(run, assignments)
    config = stored(run.parent, assignments)
    if run.stem not in (names := labels(config)):
        raise ConfigError(f"{run} is none of a run's weights: {', '.join(f'{each}.safetensors' for each in names)}")
    return run.parent, run.stem, config


def labels(config: Config) -> dict[str, str]:
    """The networks of a run, and what a table calls them."""
    student = method(config)
    found = {name: name for name in config.teachers}
    found |= {name: each.label for name, each in student.comparisons().items() if name in config.baselines}
    return found | {"student": student.label}


def weights_file(folder: Path, role: str) -> Path:
    """Where a run keeps the network ``role``."""
    return folder / f"{role}.safetensors"


def method(config: Config) -> Any:
    """The student's method."""
    from pykd.methods import METHODS

    fields = dict(config.method)
    return recipes.construct(recipes.choose(METHODS, fields.pop("name"), "method.name"), fields, "method")


def network(described: Network, key: str, splits: "Splits") -> "Callable[[], Module]":
    """Makes the network, with its weights where the recipe names a file of them."""
    from pykd.models import NETWORKS
    from pykd.training import load_weights

    factory = recipes.choose(NETWORKS, described.name, f"{key}.name")

    def make() -> "Module":
        shape = {"in_shape": splits.in_shape, "classes": splits.classes}
        module = recipes.construct(factory, described.arguments, key, **shape)
        if described.weights:
            load_weights(module, described.weights)
        return module

    return make


def finished_network(config: Config, role: str, file: Path, splits: "Splits") -> "Module":
    """The network ``role`` with the weights in ``file``."""
    described = config.teachers.get(role, config.student)
    return network(described.model_copy(update={"weights": str(file)}), role, splits)()


def about(config: Config, splits: "Splits") -> dict[str, Any]:
    """What a model file says beside the network."""
    anywhere = config.data.model_copy(update={"root": None, "download": False})
    settings = config.model_copy(update={"data": anywhere}).to_yaml()
    recipe = hashlib.sha256(settings.encode()).hexdigest()[:16]
    origin = {"method": config.method["name"], "seed": config.seed, "recipe": recipe, "data": config.data.name}
    return {"normalization": splits.train.normalize, "class_names": splits.class_names, "provenance": origin}


def distill(config: Config, out: Path, *, resume: bool, device: str | None) -> "Run":
    """The run of a recipe, see :func:`pykd.distill`."""
    from pykd import data

    student_method = method(config)
    splits = data.load(config.data, seed=config.seed)
    return pykd.distill(
        student_method,
        teacher=[
            network(config.teacher, "teacher", splits),
            *(network(each, f"more_teachers.{n}", splits) for n, each in enumerate(config.more_teachers)),
        ],
        student=network(config.student, "student", splits),
        train=splits.train,
        teacher_train=splits.teacher_train,
        holdout=splits.holdout,
        test=splits.test,
        teacher_training=[None if each.weights else each.training for each in config.teachers.values()],
        training=config.student.training,
        baselines=config.baselines,
        out=out,
        seed=config.seed,
        resume=resume,
        device=device,
        config=config,
        about=about(config, splits),
    )


def tell(sentence: str) -> None:
    """Says on standard error what went wrong; of several processes the first that has the sentence does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from datetime import timedelta

        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        key = f"pykd/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{sentence}"
        with suppress(RuntimeError):  # the launcher has died
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            if TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5)).add(key, 1) > 1:
                return
    typer.echo(f"pykd: {sentence}", err=True)


def is_main_process() -> bool:
    """Whether this process writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"
