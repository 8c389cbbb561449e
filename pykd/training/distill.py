"""A whole run: teacher, baselines, student, and the table that compares them."""

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import index
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from pykd.config import Config, Training, nearest, teacher_name, training_of
from pykd.data import augment as augment_images
from pykd.errors import PykdError
from pykd.training.batches import Rows, Source
from pykd.training.checkpoint import Checkpoints, Saved
from pykd.training.loop import Augment, Context, Fit, Signals, random_state, set_random_state
from pykd.training.measure import accuracy, describe
from pykd.training.processes import accelerator_for, is_sharded, require_agreement, together
from pykd.training.progress import Reporter
from pykd.training.run_folder import RunFolder, put_weights, read_weights, require_same, weights
from pykd.training.stage import Converting, Method, Preceded, Stage, derive, label_loss
from pykd.training.teacher import LARGEST_CACHE_BYTES, FrozenTeacher, TeacherLogits

Network = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Run:
    """What a run brought.

    Attributes:
        student: trained, in eval mode.
        teachers: frozen, in eval mode.
        summary: what ``summary.json`` holds: a row for each teacher, each baseline and the student.
        metrics: a row an epoch of every stage, as in ``metrics.jsonl``.
        out: the run folder.
    """

    student: nn.Module
    teachers: list[FrozenTeacher]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    out: Path | None

    @property
    def teacher(self) -> FrozenTeacher:
        """The first of the teachers."""
        return self.teachers[0]


def distill(
    method: Method,
    *,
    teacher: Network | Sequence[Network],
    student: Network,
    train: Any,
    test: Any = None,
    holdout: Any = 0.1,
    teacher_train: Any = None,
    teacher_training: Training | Sequence[Training | None] | None = None,
    training: Training | None = None,
    baselines: Sequence[str] = ("alone", "clean"),
    out: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str | None = None,
    augment: Augment | None = None,
    checkpoint_seconds: float = 30.0,
    keep_checkpoints: int = 2,
    cache_logits: bool = True,
    config: Config | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run:
    """Trains the teachers if asked, then one student by ``method`` and one by each baseline, and compares them.

    The epoch with the best accuracy on the held-out rows is kept, the last of equal ones, or the last of all where the
    method makes the student sparser to its end; test rows are for the last table alone. Killed at any moment, a run
    with ``out`` goes on with ``resume=True`` from its last checkpoint, on the CPU with the same bits.

    Args:
        method: e.g. ``pykd.methods.NoisyTeacher()``.
        teacher: a module, or a function that makes one; or a list of several, called teacher, teacher-2, teacher-3 and
            so on: each is built and trained with random numbers of its own, so that the same function listed again
            makes another teacher.
        student: a module that gives as many logits, or a function that makes one. It is trained in place; a baseline
            trains a copy that begins with the same weights.
        train: a Dataset or DataLoader of (inputs, label) or (inputs, label, index). An index says that the sample is
            the same in every epoch, and the teacher's logits are then computed once. A loader's own batch size counts
            where ``training`` sets none.
        test: the same, for the table; without it the table shows the held-out accuracy.
        holdout: a share of the rows of ``train`` in (0, 1), or a Dataset or DataLoader of its own.
        teacher_train: what teachers learn from where that is not ``train``, a Dataset or DataLoader; with it,
            ``holdout`` should be one, too.
        teacher_training: how to train every teacher, or a list with an entry for each; None for a teacher that is
            trained already.
        training: how to train the student and the baselines.
        baselines: names of ``method.comparisons()``.
        out: the run folder; nothing is written without one.
        seed: decides initial values of functions' modules, order, noise and the held-out rows.
        resume: continue the run in ``out``, if there is one.
        device: ``"cpu"``, ``"cuda"``, or None for the best there is.
        augment: changes every row of a batch of inputs, given a generator, in stages whose training says ``augment``;
            it gets the pixels, uint8, where ``train`` is a data set of ``pykd.data``.
        checkpoint_seconds: longest time between two checkpoints.
        keep_checkpoints: how many stay.
        cache_logits: keep the teacher's logits in memory where samples carry an index.
        config: the recipe this comes from: recorded in the run folder; its ``checkpoint_seconds``,
            ``keep_checkpoints``, ``cache_logits`` and ``data.augment`` count.
        about: what a model file says beside the network, in the words of :func:`pykd.deploy.export`: it counts in the
            table's bytes of that file.
        progress: bars on a terminal, lines elsewhere, on standard error.
        overrides: fields of ``training``: ``epochs=5``, ``lr=1e-2``, ...

    Raises:
        PykdError: anything wrong with the arguments, the data, the folder or the loss, in one sentence.
        Interrupted: a signal came; the run was saved.

    Example:
        >>> import pykd
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
        >>> run = pykd.distill(pykd.methods.NoisyTeacher(), teacher=nn.Linear(4, 2), student=nn.Linear(4, 2),
        ...     train=data, teacher_training=pykd.config.Training(epochs=1), epochs=1, progress=False, device="cpu")
        >>> [row["name"] for row in run.summary["rows"]]
        ['teacher', 'alone', 'clean', 'student']
    """
    if resume and out is None:
        raise PykdError("resume=True needs out=, the folder of the run to continue")
    if isinstance(method, type) or not hasattr(method, "comparisons"):
        raise PykdError(f"method should be a method such as pykd.methods.NoisyTeacher(), got {method!r}")
    teachers, teacher_trainings = _listed(teacher, teacher_training)
    if config is not None and len(config.teachers) != len(teachers):
        raise PykdError(f"config has {len(config.teachers)} teachers and teacher {len(teachers)}: give the same number")
    for name, given in [("training", training), *(("teacher_training", each) for each in teacher_trainings)]:
        if not isinstance(given, (Training, type(None))):
            raise PykdError(f"{name} should be a pykd.config.Training, got {type(given).__name__}")
    if not hasattr(seed, "__index__"):
        raise PykdError(f"seed should be a whole number, got {seed!r}")
    seed = index(seed)  # numpy's integers, too, decide the same as Python's and are recorded
    if keep_checkpoints < 1 or not checkpoint_seconds >= 0:
        raise PykdError("keep_checkpoints should be at least 1 and checkpoint_seconds not negative")
    training = _overridden(training, overrides)
    if config is not None:
        checkpoint_seconds, keep_checkpoints = config.checkpoint_seconds, config.keep_checkpoints
        cache_logits = config.cache_logits
        augment = augment or partial(_augment, config.data.augment)
    if teacher_train is not None and isinstance(holdout, (int, float)):
        raise PykdError("teacher_train needs the held-out rows as holdout=, a Dataset or a DataLoader")
    accelerator = accelerator_for(device)
    signals = Signals(repeated=accelerator.num_processes > 1)
    before = random_state()
    with ExitStack() as cleanup:
        cleanup.enter_context(together(accelerator))
        cleanup.callback(set_random_state, before)
        cleanup.enter_context(signals.caught())
        source = Source.of(train, "train")
        if isinstance(holdout, (int, float)):
            source, held_out = source.split(holdout, seed)
        else:
            held_out = Source.of(holdout, "holdout")
        tested = None if test is None else Source.of(test, "test")
        teacher_source = source if teacher_train is None else Source.of(teacher_train, "teacher_train")
        training = _sized(training, source.batch_size)
        teacher_trainings = [each and _sized(each, source.batch_size) for each in teacher_trainings]
        example = next(iter(held_out.batches(1)))
        example = dataclasses.replace(example, inputs=held_out.normalized(example.inputs))
        sources = teacher_source, source
        plan = _plan(method, teachers, student, baselines, teacher_trainings, training, sources, example, seed)
        if augment is None and any(stage.training.augment for stage in plan.stages):
            raise PykdError("training.augment is set: give augment=, a function of (inputs, generator)")
        if is_sharded(accelerator):
            _require_no_whole_weights(plan)
        settings = _settings(config, method, baselines, teacher_trainings, training, seed)
        context = Context(
            accelerator=accelerator,
            classes=plan.classes,
            holdout=held_out,
            example=example.inputs[:1],
            seed=seed,
            reporter=Reporter(visible=progress and accelerator.is_main_process),
            signals=signals,
            out=None if out is None else Path(out),
            checkpoint_seconds=checkpoint_seconds,
            augment=augment,
            identity={
                **settings,
                **{
                    f"{name} network": _fingerprint(module, values=how is None)
                    for (name, module), how in zip(plan.teachers.items(), teacher_trainings, strict=True)
                },
                "student network": _fingerprint(plan.student, values=False),
                "cache_logits": cache_logits,
                "rows": [part and part.rows for part in (source, held_out, tested, teacher_source)],
            },
        )
        if accelerator.num_processes > 1:
            require_agreement(
                {
                    **context.identity,
                    "out": out and str(out),
                    "resume": resume,
                    "cache_logits": cache_logits,
                    "pykd": _version(),
                    "torch": torch.__version__,
                    "labels": [_some_labels(part) for part in (source, held_out, tested, teacher_source) if part],
                }
            )
        found = _Found()
        if context.out is not None:
            found = _on_main(accelerator, lambda: _open(context, plan, settings, resume, keep_checkpoints, cleanup))
        if found.summary is None:
            frozen = _train(context, plan, found, cache_logits)
            summary = _summarise(context, plan, settings, tested, example.inputs[:1], about)
            if context.folder is not None:
                context.folder.finish(summary)
            context.stop_if_asked()
        else:
            for name, values in found.weights.items():
                put_weights(plan.networks[name], values, f"{name}.safetensors")
            frozen, summary = [FrozenTeacher(module) for module in plan.teachers.values()], found.summary
        return Run(plan.student.eval(), frozen, summary, context.metrics, context.out)


@dataclass(frozen=True)
class _Plan:
    """The networks by name in the table's order, the labels of their rows, and how they come to their weights."""

    teachers: dict[str, nn.Module]
    networks: dict[str, nn.Module]  # the teachers, too
    labels: dict[str, str]
    stages: list[Stage]
    classes: int

    @property
    def student(self) -> nn.Module:
        return self.networks["student"]


@dataclass(frozen=True)
class _Found:
    """What a run folder holds of an earlier start."""

    summary: dict[str, Any] | None = None
    saved: Saved | None = None
    weights: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)  # of finished stages
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def _listed(
    teacher: Network | Sequence[Network], training: Training | Sequence[Training | None] | None
) -> tuple[Sequence[Network], Sequence[Training | None]]:
    """Every teacher, and how each is trained."""
    teachers = teacher if isinstance(teacher, Sequence) else [teacher]
    trainings = training if isinstance(training, Sequence) else [training] * len(teachers)
    if not teachers:
        raise PykdError("teacher is an empty list: give at least one network")
    if len(trainings) != len(teachers):
        raise PykdError(
            f"teacher_training has {len(trainings)} entries for {len(teachers)} teachers: give one for each"
        )
    return teachers, trainings


def _overridden(training: Training | None, overrides: dict[str, Any]) -> Training:
    for name in overrides:
        if name not in Training.model_fields:
            raise PykdError(f"distill takes no argument {name!r}; {nearest(name, Training.model_fields)}")
    given = {} if training is None else training.model_dump(exclude_unset=True)
    try:
        return training_of({**given, **overrides})
    except ValueError as error:
        raise PykdError(str(error)) from None


def _sized(training: Training, batch_size: int | None) -> Training:
    """A loader's batch size counts where none was asked for."""
    return (
        training
        if batch_size is None or "batch_size" in training.model_fields_set
        else training.model_copy(update={"batch_size": batch_size})
    )


def _augment(kind: str, inputs: Tensor, generator: torch.Generator) -> Tensor:
    return augment_images(inputs, kind, generator)


def _some_labels(source: Source) -> list[int]:
    """Of rows here and there: what tells data sets of one size apart, and does not depend on augmentation."""
    return source.fetch(torch.arange(0, source.rows, -(-source.rows // 16)))[1].tolist()


def _require_no_whole_weights(plan: "_Plan") -> None:
    for stage in plan.stages:
        if stage.converting is not None:
            raise PykdError(
                f"{plan.labels[stage.name]!r} needs whole weights, and FSDP divides them: leave --use_fsdp out"
            )


def _device(module: nn.Module) -> torch.device:
    return next((value.device for value in module.state_dict().values()), torch.device("cpu"))


def _build(network: Network, name: str, seed: int, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    """The module, and the logits it gives: the first call also gives lazy layers their shapes."""
    set_seed(derive(seed, "initial", name) % 2**32)
    module = network if isinstance(network, nn.Module) or not callable(network) else network()
    if not isinstance(module, nn.Module):
        raise PykdError(f"{name} should be a module or a function that makes one, got {type(module).__name__}")
    device = _device(module)
    module.eval()
    with torch.no_grad():
        try:
            logits = module(inputs.to(device))
        except (RuntimeError, ValueError, TypeError) as error:
            shape = list(inputs.shape[1:])
            raise PykdError(f"the {name} cannot take inputs of shape {shape}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PykdError(f"the {name} should give logits of shape [{len(inputs)}, classes], got {got}")
    return module, logits


def _plan(
    method: Method,
    teachers: Sequence[Network],
    student: Network,
    baselines: Sequence[str],
    teacher_trainings: Sequence[Training | None],
    training: Training,
    sources: tuple[Source, Source],
    example: Rows,
    seed: int,
) -> _Plan:
    """Of the ``sources`` the first is for the teachers, the second for the students."""
    comparisons = method.comparisons()
    for name in baselines:
        if name not in comparisons:
            raise PykdError(f"unknown baseline {name!r}; {nearest(name, comparisons)}")
    names = [teacher_name(number) for number in range(len(teachers))]
    built = {name: _build(each, name, seed, example.inputs) for name, each in zip(names, teachers, strict=True)}
    student_module, learnt = _build(student, "student", seed, example.inputs)
    classes = learnt.shape[1]
    for name, (_, taught) in built.items():
        if taught.shape[1] != classes:
            raise PykdError(
                f"the {name} gives {taught.shape[1]} logits and the student {classes}: give both the same classes"
            )
    parameters = {name: {id(value) for value in module.parameters()} for name, (module, _) in built.items()}
    parameters["student"] = {id(value) for value in student_module.parameters()}
    for one, other in itertools.combinations(parameters, 2):
        if parameters[one] & parameters[other]:
            raise PykdError(f"{one} and {other} share parameters: give two networks, e.g. a copy.deepcopy of one")
    modules = {name: module for name, (module, _) in built.items()}
    networks, labels = dict(modules), {name: name for name in names}
    stages = [
        Stage(name, modules[name], label_loss, how, name, sources[0])
        for name, how in zip(names, teacher_trainings, strict=True)
        if how is not None
    ]
    students = {name: comparisons[name] for name in dict.fromkeys(baselines) if comparisons[name] != method}
    methods = {**students, "student": method}
    inputs = example.inputs[:1]
    firsts: dict[object, nn.Module] = {}
    first_of: dict[str, nn.Module] = {}
    for name, how in methods.items():
        if isinstance(how, Preceded):
            set_seed(derive(seed, "first", len(firsts)) % 2**32)
            first = how.first(list(modules.values()), inputs)
            if first.key not in firsts:
                firsts[first.key] = first.module
                own = first.name if len(firsts) == 1 else f"{first.name}-{len(firsts)}"
                own_training = _sized(first.training, sources[1].batch_size)
                stages.append(Stage(own, first.module, first.loss, own_training, own, sources[1], classifies=False))
            first_of[name] = firsts[first.key]
    for name, how in methods.items():
        networks[name] = student_module
        if name != "student":
            networks[name] = _twin(student_module, student, seed, example.inputs)
        labels[name] = how.label
        converting = how if isinstance(how, Converting) else None
        if converting is not None:
            given = {"first": first_of[name]} if name in first_of else {}
            converting.prepare(networks[name], list(modules.values()), inputs.to(_device(student_module)), **given)
        stages.append(
            Stage(name, networks[name], how.loss, training, "student", sources[1], converting, first=first_of.get(name))
        )
    return _Plan(modules, networks, labels, stages, classes)


def _twin(module: nn.Module, network: Network, seed: int, inputs: Tensor) -> nn.Module:
    """Another network with the initial weights of ``module``."""
    if not isinstance(network, nn.Module):
        twin, _ = _build(network, "student", seed, inputs)
        put_weights(twin, weights(module), "student")
        return twin
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise PykdError(
            f"the student cannot be copied for a baseline: give a function that makes one ({error})"
        ) from error


def _settings(
    config: Config | None,
    method: Method,
    baselines: Sequence[str],
    teacher_trainings: Sequence[Training | None],
    training: Training,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides the result and can be said in words, as plain data."""
    own: dict[str, Any] = {"teacher": {}, "student": {}}
    if config is not None:
        own = config.model_dump(mode="json")
    else:
        given: Any = method
        fields: dict[str, Any] = dataclasses.asdict(given) if dataclasses.is_dataclass(method) else {}
        own["method"] = {"name": type(method).__name__, **fields}
        if len(teacher_trainings) > 1:
            own["more_teachers"] = [{} for _ in teacher_trainings[1:]]
    for place, how in zip([own["teacher"], *own.get("more_teachers", [])], teacher_trainings, strict=True):
        if how is not None:
            place["training"] = how.model_dump()
    own["student"]["training"] = training.model_dump()
    own.update(baselines=list(baselines), seed=seed)
    settings: dict[str, Any] = json.loads(json.dumps(own, default=lambda value: type(value).__qualname__))
    return settings


def _fingerprint(module: nn.Module, *, values: bool) -> str:
    """What a network is: its shapes, and with ``values`` its weights, too."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        if values:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{type(module).__name__} with {count:,} parameters ({digest.hexdigest()})"


def _on_main(accelerator: Accelerator, work: Callable[[], _Found]) -> _Found:
    """Runs ``work`` in the main process; the others get what it returns, or the sentence with which it fails."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except PykdError as error:
            result[1] = str(error)
    broadcast_object_list(result)
    if result[1] is not None:
        raise PykdError(result[1])
    found: _Found = result[0]
    return found


def _open(
    context: Context, plan: _Plan, settings: dict[str, Any], resume: bool, keep: int, cleanup: ExitStack
) -> _Found:
    """Opens the run folder and reads how far an earlier start came."""
    assert context.out is not None
    folder = context.folder = RunFolder(context.out, settings, resume=resume)
    cleanup.callback(folder.close)
    if (summary := folder.read_summary()) is not None:
        context.metrics.extend(folder.read_metrics())
        context.reporter.say(f"{context.out} is finished: nothing is left to do")
        return _Found(summary, weights={name: read_weights(folder.weights_file(name)) for name in plan.networks})
    context.checkpoints = Checkpoints(folder.checkpoints, keep)
    saved, damaged = context.checkpoints.newest()
    for sentence in damaged:
        context.reporter.say(f"{sentence}: going on from an older one")
    if saved is None:
        folder.cut_metrics(0)
        for name in plan.teachers.keys() - {stage.name for stage in plan.stages}:
            folder.write_weights(name, plan.teachers[name])
        return _Found()
    require_same(saved.position.identity, context.identity, str(folder.checkpoints))
    folder.cut_metrics(saved.position.metrics_offset)
    finished, stages = saved.position.finished, [stage.name for stage in plan.stages]
    if not {saved.position.stage, *finished} <= set(stages):
        raise PykdError(f"{folder.checkpoints} has stages that this run has not: start again with another --out")
    values = {name: folder.read_checked_weights(name, result.get("sha256")) for name, result in finished.items()}
    return _Found(saved=saved, weights=values, metrics=folder.read_metrics())


def _train(context: Context, plan: _Plan, found: _Found, cache: bool) -> list[FrozenTeacher]:
    saved = found.saved
    context.metrics.extend(found.metrics)
    if saved is not None:
        at = saved.position
        context.finished = at.finished
        context.reporter.say(f"{at.stage}: going on after epoch {at.epoch}, step {at.step}")
    device = context.accelerator.device
    frozen: list[FrozenTeacher] = []
    logits: list[TeacherLogits] = []
    for stage in plan.stages:
        if not frozen and stage.name not in plan.teachers:
            frozen = [FrozenTeacher(module.to(device)) for module in plan.teachers.values()]
            share = LARGEST_CACHE_BYTES // len(frozen) if cache else 0
            stop = context.stop_if_asked
            logits = [TeacherLogits(each, stage.train, device, cache_bytes=share, after_batch=stop) for each in frozen]
        if stage.name in found.weights:
            put_weights(stage.module, found.weights[stage.name], f"{stage.name}.safetensors")
        else:
            context.stop_if_asked()
            here = saved is not None and saved.position.stage == stage.name
            Fit(context, stage, logits, saved if here else None).run()
    return frozen


def _summarise(
    context: Context,
    plan: _Plan,
    settings: dict[str, Any],
    tested: Source | None,
    example: Tensor,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The final table as data; test rows are read here and nowhere else."""
    rows = []
    for name, network in plan.networks.items():
        context.stop_if_asked()
        network.to(context.accelerator.device)
        answers = partial(accuracy, network, accelerator=context.accelerator, after_batch=context.stop_if_asked)
        held_correct, held_rows = answers(context.holdout)
        correct, count = (held_correct, held_rows) if tested is None else answers(tested)
        result = context.finished.get(name, {})
        rows.append(
            {
                "name": name,
                "label": plan.labels[name],
                "accuracy": correct / count,
                "holdout_accuracy": held_correct / held_rows,
                **(describe(network, example, about) if context.accelerator.is_main_process else {}),
                "best_epoch": result.get("best_epoch"),
                "seconds": result.get("seconds"),
                "facts": result.get("facts"),
            }
        )
    summary: list[Any] = [
        {
            "pykd": _version(),
            "method": settings["method"],
            "seed": context.seed,
            "measured_on": "holdout" if tested is None else "test",
            "input_shape": list(example.shape[1:]),
            "rows": rows,
        }
    ]
    broadcast_object_list(summary)
    result_of_main: dict[str, Any] = summary[0]
    return result_of_main


def _version() -> str | None:
    try:
        return version("pykd")
    except PackageNotFoundError:
        return None
