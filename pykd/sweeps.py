"""Sweeps: runs of one recipe whose settings Optuna chooses, for the best value of something that a run measures.

A sweep's folder holds a run folder for each trial, ``trial-0000/seed-0`` and so on, and:

- ``sweep.json``: all that the sweep knows, written whole whenever a trial begins or ends, so that it can go on.
    - ``recipe`` and ``changes``, as on the command line, and ``settings``, what they come to; ``sampler``;
      ``environment``;
    - ``space``: for each key either ``choices``, or ``low``, ``high``, ``log`` and ``int``;
    - ``objective``: its ``key``, ``direction`` ("maximize" or "minimize") and ``min_accuracy`` (or null);
    - ``trials``, each with its ``number``, ``values`` by key, ``objective`` and ``holdout_accuracy`` (both null until
      they are known), ``failed`` (why, or null) and ``run``, its folder seen from the sweep's;
    - ``best``: the number of the best trial, or null;
    - ``importance``: each key's share in what the objective varies by, or null.
- ``sweep.md``: the same as a table, the best trial first; ``sweep.svg``: the objective over each key.

Optuna's study is made anew of the record for every trial, whose sampler's seed is made of the recipe's and the trial's
number: a sweep that was broken off chooses as one that was not, where its trials come one after another.
"""

import fcntl
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykd import config as recipes
from pykd import grids, runs
from pykd._files import write_atomically, writing
from pykd._svg import LOOKS, svg
from pykd.config import Config, ConfigError, lies_in, nearest
from pykd.errors import PykdError
from pykd.jobs import Jobs
from pykd.report.tables import ran_with, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

RECORD = "sweep.json"
ACCURACY = "holdout_accuracy"
MEASURES = (ACCURACY, "parameters", "nonzeros", "bytes", "file_bytes", "latency_ms")  # of a summary's row
SAMPLERS = ("tpe", "random", "grid")
SHARED = ("seed", "data.name", "data.holdout")  # by all trials: they decide which rows are held out
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Axis:
    """The values that one key may have: ``choices``, or a range.

    >>> Axis.read("method.sigma", "0.01:2:log").described()
    {'low': 0.01, 'high': 2.0, 'log': True, 'int': False}
    >>> Axis.read("method.norm", "l1_l2,l1_linf").described()
    {'choices': ['l1_l2', 'l1_linf']}
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    int: bool = False

    @classmethod
    def read(cls, key: str, text: str) -> "Axis":
        """``LOW:HIGH``, with ``:log`` or ``:int`` or both behind it, or ``VALUE,VALUE``, read as YAML.

        Raises:
            ConfigError: it is neither; a range that is empty, or not positive where it is logarithmic.
        """
        said = f"--over {key}={text}"
        if not re.match(rf"\s*{_NUMBER}\s*:", text):
            try:
                choices = recipes.grid([f"{key}={text}"])
            except ConfigError as error:
                raise ConfigError(str(error).replace("--grid", "--over", 1)) from None
            values = tuple(json.loads(choice.partition("=")[2]) for [choice] in choices)
            if any(value in values[:number] for number, value in enumerate(values)):
                raise ConfigError(f"{said}: a value stands there twice")
            return cls(choices=values)
        found = re.fullmatch(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*((?::(?:log|int))*)", text)
        if not found:
            raise ConfigError(f"{said}: write LOW:HIGH, and behind it :log or :int or both")
        low, high = float(found[1]), float(found[2])
        log, whole = "log" in found[3], "int" in found[3]
        if not low < high or not math.isfinite(high - low):
            raise ConfigError(f"{said}: the first number should be below the second")
        if log and low <= 0:
            raise ConfigError(f"{said}: a logarithmic range begins above 0")
        if whole and not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"{said}: a range of whole numbers has whole ends")
        return cls(low=low, high=high, log=log, int=whole)

    @property
    def ends(self) -> Sequence[Any]:
        """The values that are tried on the recipe before any work."""
        return self.choices or [self._number(self.low), self._number(self.high)]

    def _number(self, value: float) -> Any:
        return round(value) if self.int else min(max(float(f"{value:.6g}"), self.low), self.high)

    def described(self) -> dict[str, Any]:
        """For the record."""
        if self.choices:
            return {"choices": list(self.choices)}
        low, high = self.ends
        return {"low": low, "high": high, "log": self.log, "int": self.int}

    def distribution(self) -> "BaseDistribution":
        """Optuna's word for it; a choice is its place, as a value may be a list."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(range(len(self.choices)))
        if self.int:
            return IntDistribution(round(self.low), round(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, parameter: Any) -> Any:
        """What Optuna's parameter stands for, in six digits."""
        return self.choices[parameter] if self.choices else self._number(parameter)

    def parameter(self, value: Any) -> Any:
        """The other way round.

        Raises:
            ValueError: no value of the axis.
        """
        if not self.choices and not self.low <= value <= self.high:
            raise ValueError(value)
        return self.choices.index(value) if self.choices else value


@dataclass(frozen=True)
class Objective:
    """What the best trial has most or least of, as its run measures it on the student; never a test accuracy.

    Args:
        key: of a row of the summary.
        direction: "maximize" or "minimize".
        min_accuracy: trials with a smaller held-out accuracy cannot be the best.
    """

    key: str = ACCURACY
    direction: str = "maximize"
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.key not in MEASURES:
            why = "test rows are for no choice" if self.key == "accuracy" else f"unknown measure {self.key!r}"
            raise ConfigError(f"--{self.direction} {self.key}: {why}; {nearest(self.key, MEASURES)}")

    def best(self, trials: Sequence[Mapping[str, Any]]) -> int | None:
        """The number of the best trial; of equal ones the first."""
        sign = 1 if self.direction == "minimize" else -1
        known = [each for each in trials if each["objective"] is not None]
        found = [each for each in known if each[ACCURACY] >= (self.min_accuracy or 0)]
        return min(found, key=lambda each: (sign * each["objective"], each["number"]))["number"] if found else None


class Sweep:
    """A sweep of a recipe.

    Args:
        recipe: its name or file.
        over: ``key=axis`` assignments, see :meth:`Axis.read`.
        changes: assignments for every trial; students alone are trained unless they name ``baselines``.
        objective: what the best trial has.
        sampler: one of ``SAMPLERS``; a grid takes choices alone.

    Raises:
        ConfigError: a wrong axis, key or value, in one sentence.
        PykdError: Optuna is missing.
    """

    def __init__(
        self, recipe: str, over: Sequence[str], changes: Sequence[str], objective: Objective, sampler: str
    ) -> None:
        from pykd.training.run_folder import FREE_SETTINGS

        self._recipe, self._changes = recipe, ["baselines=[]", *changes]
        self._objective, self._sampler = objective, sampler
        self._space: dict[str, Axis] = {}
        for each in over:
            key, equals, text = (part.strip() for part in each.partition("="))
            if not key or not equals:
                raise ConfigError(f"--over {each}: write KEY=LOW:HIGH or KEY=VALUE,VALUE, e.g. method.alpha=0.1:0.9")
            if same := [own for own in self._space if lies_in(key, own) or lies_in(own, key)]:
                raise ConfigError(f"--over {each}: {same[0]} is varied already: leave one of them out")
            if same := [own for own in (*SHARED, *FREE_SETTINGS) if lies_in(own, key)]:
                why = "decides nothing about a student" if same[0] in FREE_SETTINGS else "says which rows are held out"
                raise ConfigError(f"--over {each}: {same[0]} {why}, so that no trial could be better for it")
            self._space[key] = Axis.read(key, text)
        for change in (each.partition("=")[0].strip() for each in changes):
            if any(lies_in(change, key) for key in self._space):
                raise ConfigError(f"--set {change}: it is what the sweep varies: leave it out")
        if sampler == "grid" and (ranges := [key for key, axis in self._space.items() if not axis.choices]):
            raise ConfigError(f"--over {ranges[0]}: a grid takes choices, e.g. {ranges[0]}=0.1,0.5")
        self._base = self._config({key: axis.ends[0] for key, axis in self._space.items()})
        first = {key: axis.ends[0] for key, axis in self._space.items()}
        self._tried = [self._config({**first, key: value}) for key, axis in self._space.items() for value in axis.ends]
        grids.check_methods([("", config) for config in self._tried])
        if sampler != "grid":
            _optuna()
        anywhere = self._base.data.model_copy(update={"root": None, "download": False})
        self.record: dict[str, Any] = {
            "recipe": recipe,
            "changes": grids.deciding(changes),
            "settings": self._base.model_copy(update={"data": anywhere}).model_dump(mode="json"),
            "space": {key: axis.described() for key, axis in self._space.items()},
            "objective": {
                "key": objective.key,
                "direction": objective.direction,
                "min_accuracy": objective.min_accuracy,
            },
            "sampler": sampler,
            "environment": {},
            "trials": [],
            "best": None,
            "importance": None,
        }

    def _config(self, values: Mapping[str, Any]) -> Config:
        return recipes.load(
            self._recipe, [*self._changes, *(f"{key}={json.dumps(value)}" for key, value in values.items())]
        )

    def run(self, out: Path, trials: int, *, resume: bool, jobs: int, threads: int, device: str | None) -> None:
        """Does trials until there are so many, and first those that were begun; writes the record after each.

        Raises:
            PykdError: ``out`` holds another sweep, or none where it should; every trial failed.
        """
        if resume and not (out / RECORD).exists():
            raise PykdError(f"{out} holds no sweep: leave --resume out to start one")
        self._check_networks()
        with self._locked(out):
            if resume:
                self._go_on(out)
            elif (out / RECORD).exists():
                raise PykdError(f"{out} holds a sweep by now: continue it with --resume, or give another --out")
            self._go(out, trials, jobs=jobs, threads=threads, device=device)

    def _go(self, out: Path, trials: int, *, jobs: int, threads: int, device: str | None) -> None:
        if self._sampler == "grid":
            trials = min(trials, math.prod(len(axis.choices) for axis in self._space.values()))
        mine: list[dict[str, Any]] = self.record["trials"]
        waiting = [each for each in mine if each["objective"] is None]
        total, done = max(trials, len(mine)), len(mine) - len(waiting)
        with Jobs(jobs, threads=threads, device=device, out=out, runs=total, done=done) as going:
            self._write(out)
            while waiting or going.busy or len(mine) < trials:
                while going.free and (waiting or len(mine) < trials):
                    if not waiting:
                        waiting.append(self._ask(out))
                    trial, config = waiting[0], self._configs(out)[waiting[0]["number"]]
                    source = grids.missing_teacher(config, out)
                    if source in going.busy:
                        break
                    waiting.pop(0)
                    if source:
                        self._tell(trial, out, PykdError(f"{source} has not trained its teacher"))
                        continue
                    if going.alone:
                        going.say(f"[{trial['number'] + 1}/{total}] {out / trial['run']}: {_worded(trial['values'])}")
                    going.start(config, out / trial["run"], resume=True)
                for folder, error in going.ended():
                    trial = mine[int(folder.parent.name.removeprefix("trial-"))]
                    self._tell(trial, out, error)
                    done += 1
                    found = trial["failed"] or f"{self._objective.key} {_shown(trial['objective'])}"
                    going.say(f"[{done}/{total}] {trial['run']}: {_worded(trial['values'])}: {found}")
        if failed := [each["failed"] for each in mine if each["failed"]]:
            sentence = f"{len(failed)} of {len(mine)} trials failed, the first: {failed[0]}"
            if len(failed) == len(mine):
                raise PykdError(sentence)
            going.say(f"pykd: {sentence}; --resume tries them again")

    @contextmanager
    def _locked(self, out: Path) -> Iterator[None]:
        """No other process sweeps in ``out``."""
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            lock = (out / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PykdError(f"another sweep is working in {out}: wait for it or give another --out") from None
            except OSError:  # a file system without locks
                pass
            yield

    def _check_networks(self) -> None:
        """Raises for data that cannot be read, and for a student that cannot be built with an end of an axis."""
        from pykd import data

        grids.check_data([self._base])
        splits = data.load(self._base.data, seed=self._base.seed)
        for config in self._tried:
            runs.network(config.student, "student", splits)()

    def _go_on(self, out: Path) -> None:
        from pykd.training.run_folder import require_same

        try:
            recorded = json.loads((out / RECORD).read_bytes())
            same = {key: recorded[key] for key in ("settings", "space", "objective", "sampler")}
            require_same(same, {key: self.record[key] for key in same}, str(out))
            self.record |= {"environment": recorded["environment"], "trials": list(recorded["trials"])}
            for number, each in enumerate(self.record["trials"]):
                for key, value in each["values"].items():
                    self._space[key].parameter(value)
                mine = each["number"] == number and each["run"] == self._run(number)
                known = [each[key] for key in ("objective", ACCURACY) if each["objective"] is not None]
                if not (mine and len(each["values"]) == len(self._space) and all(map(math.isfinite, known))):
                    raise ValueError(f"trial {number}")
            self._sum_up()
            markdown(self.record)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise PykdError(f"{out / RECORD} cannot be read: put it back, or give another --out") from error

    def _configs(self, out: Path) -> dict[int, Config]:
        """The settings of every trial: of those that would train equal teachers, the first that has not failed does."""
        order = sorted(self.record["trials"], key=lambda each: bool(each["failed"]))
        planned = [(Path(each["run"]).parts[0], self._config(each["values"])) for each in order]
        shared = grids.with_shared_teachers(planned, out)
        return {each["number"]: config for each, (_, config) in zip(order, shared, strict=True)}

    def _ask(self, out: Path) -> dict[str, Any]:
        number = len(self.record["trials"])
        if self._sampler == "grid":
            combined = itertools.product(*(axis.choices for axis in self._space.values()))
            values = dict(zip(self._space, next(itertools.islice(combined, number, None)), strict=True))
        else:
            asked = self._study(number).ask({key: axis.distribution() for key, axis in self._space.items()})
            values = {key: axis.value(asked.params[key]) for key, axis in self._space.items()}
        trial = {"number": number, "values": values, "objective": None, ACCURACY: None, "failed": None}
        trial["run"] = self._run(number)
        self.record["trials"].append(trial)
        self._write(out)
        return trial

    def _run(self, number: int) -> str:
        return f"trial-{number:04}/seed-{self._base.seed}"

    def _study(self, number: int) -> Any:
        """Optuna's view of the record, about to choose the values of the trial ``number``."""
        from pykd.training.stage import derive

        optuna = _optuna()
        seed = derive(self._base.seed, "trial", number) % 2**32
        sampler = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self._sampler](seed=seed)
        study = optuna.create_study(direction=self._objective.direction, sampler=sampler)
        state = optuna.trial.TrialState
        for each in self.record["trials"]:
            known = each["objective"] is not None
            short = 0.0 if not known else (self._objective.min_accuracy or 0.0) - each[ACCURACY]
            study.add_trial(
                optuna.trial.create_trial(
                    state=state.COMPLETE if known else state.FAIL if each["failed"] else state.RUNNING,
                    value=each["objective"],
                    params={key: axis.parameter(each["values"][key]) for key, axis in self._space.items()},
                    distributions={key: axis.distribution() for key, axis in self._space.items()},
                    constraints={ACCURACY: short} if known and self._objective.min_accuracy is not None else None,
                )
            )
        return study

    def _tell(self, trial: dict[str, Any], out: Path, error: PykdError | None) -> None:
        folder = out / trial["run"]
        trial["failed"] = error and str(error)
        if error is None:
            row = json.loads((folder / "summary.json").read_bytes())["rows"][-1]
            trial["objective"], trial[ACCURACY] = row[self._objective.key], row[ACCURACY]
            if trial["objective"] is None:
                why = row.get("file_reason") or "its network says none"
                trial["failed"] = f"{folder} has no {self._objective.key}: {why}"
            self.record["environment"] = self.record["environment"] or ran_with(
                json.loads((folder / "environment.json").read_bytes())
            )
        self._sum_up()
        self._write(out)

    def _sum_up(self) -> None:
        self.record["best"] = self._objective.best(self.record["trials"])
        self.record["importance"] = self._importance()

    def _importance(self) -> dict[str, float] | None:
        known = [each["objective"] for each in self.record["trials"] if each["objective"] is not None]
        if self._sampler == "grid" or len(self._space) < 2 or len(known) < 4 or len(set(known)) < 2:
            return None
        found = _optuna().importance.get_param_importances(self._study(0))
        return {key: found[key] for key in self._space if key in found}

    def _write(self, out: Path) -> None:
        write_atomically(out / RECORD, (json.dumps(self.record, indent=2) + "\n").encode())
        write_atomically(out / "sweep.md", f"{markdown(self.record)}\n".encode())


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise PykdError("optuna is missing: run pip install 'pykd[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _worded(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def markdown(record: Mapping[str, Any]) -> str:
    """The table of a ``record``, the best trial first, and how to read it."""
    objective, space = record["objective"], list(record["space"])
    made_of = [record["recipe"], *(f"--set {each}" for each in record["changes"])]
    ran = "".join(f", {name} {value}" for name, value in record["environment"].items())
    wanted = f"{objective['direction']} {objective['key']}"
    if objective["min_accuracy"] is not None:
        wanted += f" where {ACCURACY} is at least {objective['min_accuracy']:g}"
    parts = [f"{', '.join(f'`{each}`' for each in made_of)}; {wanted}, sampler {record['sampler']}{ran}."]
    sign = 1 if objective["direction"] == "minimize" else -1
    order = sorted(
        record["trials"],
        key=lambda each: (
            each["number"] != record["best"],
            each["objective"] is None,
            (each[ACCURACY] or 0) < (objective["min_accuracy"] or 0),
            sign * (each["objective"] or 0),
            each["number"],
        ),
    )
    measures = list(dict.fromkeys([objective["key"], ACCURACY]))
    lines = [["trial", *space, *measures, "run"]]
    for each in order:
        found = ["" if value is None else _shown(value) for value in (each["objective"], each[ACCURACY])]
        found[0] = found[0] or ("failed" if each["failed"] else "unfinished")
        cells = [_shown(each["values"][key]) for key in space]
        name = f"{each['number']} (best)" if each["number"] == record["best"] else str(each["number"])
        lines.append([name, *cells, *found[: len(measures)], each["run"]])
    parts.append(table(lines))
    notes = ["Held-out rows chose; test rows did not. One run a trial: a difference may be that of another seed."]
    if record["importance"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in record["importance"].items())
        notes.append(f"Of what the objective varies by, as PED-ANOVA has it: {shares}.")
    if record["best"] is None and any(each["objective"] is not None for each in record["trials"]):
        notes.append(f"No trial has a held-out accuracy of {objective['min_accuracy']:g}.")
    if record["best"] is not None:
        best = record["trials"][record["best"]]["values"]
        words = " ".join(f"--set '{each}'" for each in record["changes"])
        chosen = " ".join(f"--set '{key}={json.dumps(value)}'" for key, value in best.items())
        notes.append(f"The best again, with its baselines: `pykd distill {record['recipe']} {words} {chosen}`.")
    return "\n\n".join([*parts, " ".join(" ".join(notes).split())])


def figure(record: Mapping[str, Any]) -> bytes:
    """The objective over each key, a mark a trial and a larger one for the best, as SVG.

    Raises:
        ImportError: matplotlib is missing.
    """
    trials = [each for each in record["trials"] if each["objective"] is not None]
    objective = record["objective"]["key"]

    def draw(figure: "Figure") -> None:
        for number, (key, axis) in enumerate(record["space"].items()):
            axes = figure.add_subplot(1, len(record["space"]), number + 1)
            choices = axis.get("choices")
            for each in trials:
                value, best = each["values"][key], each["number"] == record["best"]
                axes.plot(
                    choices.index(value) if choices else value,
                    each["objective"],
                    LOOKS[best][1],
                    color=LOOKS[best][0],
                    markersize=7 if best else 4,
                    zorder=2 + best,
                )
            if choices:
                axes.set_xticks(range(len(choices)), [_shown(each) for each in choices])
            elif axis["log"]:
                axes.set_xscale("log")
            axes.set_xlabel(key)
            axes.grid(linewidth=0.3, alpha=0.5)
        figure.axes[0].set_ylabel(objective)
        figure.suptitle(f"{record['recipe']}: {record['objective']['direction']} {objective}", fontsize=10)

    return svg((3.2 * max(2, len(record["space"])), 3.2), draw)
