"""The loop: trains one stage after another, saves where it stands, and goes on from there with the same bits."""

import copy
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from torch import Tensor, nn

from pykd.config import Training
from pykd.errors import Interrupted, PykdError
from pykd.training.batches import Rows, Source
from pykd.training.checkpoint import Checkpoints, Position, Saved
from pykd.training.measure import accuracy
from pykd.training.processes import is_sharded, put_state, shared, whole_state
from pykd.training.progress import Reporter
from pykd.training.run_folder import RunFolder, put_weights, weights
from pykd.training.stage import Batch, Stage, Starting, derive
from pykd.training.teacher import TeacherLogits

# A look at the losses waits for the device; a question to the other processes waits for them.
STEPS_BETWEEN_CHECKS = 50
SECONDS_BETWEEN_QUESTIONS = 0.5
# Work of less than this is not worth a checkpoint at the end of an epoch.
SHORTEST_EPOCH_SECONDS = 1.0

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Signals:
    """Remembers the first SIGINT or SIGTERM; the second ends the process at once.

    Args:
        repeated: a launcher sends its signal again and kills by itself: only the first counts.
    """

    def __init__(self, *, repeated: bool = False) -> None:
        self.received = 0
        self._repeated = repeated

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catches signals where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and not self._repeated:
            os._exit(128 + number)
        self.received = self.received or number


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``steps``.

    >>> [round(learning_rate(Training(lr=1.0, warmup=0.5), step, 4), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(training.warmup * steps)
    if step < warm:
        return training.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if training.schedule == "cosine":
        return training.lr * 0.5 * (1 + math.cos(math.pi * done))
    if training.schedule == "flat_linear":
        return training.lr * min(1.0, 2 * (1 - done))
    if training.schedule == "step":
        return training.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return training.lr


def _optimizer(training: Training, parameters: list[nn.Parameter], *, fused: bool) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay, "fused": fused}
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=training.momentum, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer](parameters, **common)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``put_state``, after a look at the options: those of any other optimiser would be taken over."""

    def options(group: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in group.items() if name not in ("lr", "fused")}

    own = optimizer.state_dict()["param_groups"]
    if [options(group) for group in state["param_groups"]] != [options(group) for group in own]:
        raise ValueError(f"its optimiser is no {type(optimizer).__name__} with the options of this one")
    groups = [{**group, "lr": its["lr"]} for group, its in zip(own, state["param_groups"], strict=True)]
    put_state(optimizer, {**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        if any(isinstance(value, Tensor) and value.shape not in (parameter.shape, ()) for value in values.values()):
            raise ValueError("its optimiser is that of another network")


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, as plain data and tensors."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "python": random.getstate(),
        "numpy": numpy,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


@dataclass
class Context:
    """What the stages of one run share.

    Args:
        accelerator: the only one.
        classes: number of logits.
        holdout: decides which epoch's weights are kept.
        example: inputs of one row, as networks take them.
        seed: with a stage's ``stream``, the epoch and the step it decides every random number.
        reporter: tells how it goes.
        signals: that ask to stop.
        out: path of the run's folder; without one nothing is saved.
        folder: the folder itself, in the main process.
        checkpoints: in the folder.
        checkpoint_seconds: longest time between two of them.
        augment: changes a batch of inputs, in stages whose training says so.
        identity: what a checkpoint must agree with to be of this run.
    """

    accelerator: Accelerator
    classes: int
    holdout: Source
    example: Tensor
    seed: int
    reporter: Reporter
    signals: Signals
    out: Path | None = None
    folder: RunFolder | None = None
    checkpoints: Checkpoints | None = None
    checkpoint_seconds: float = 30.0
    augment: Augment | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # results of the stages that are over

    def stop_if_asked(self) -> None:
        """Raises ``Interrupted`` where a signal has come: what the run needs to go on is saved."""
        received = self.signals.received
        if self.accelerator.num_processes > 1:
            received = int(self.accelerator.gather(torch.tensor([received], device=self.accelerator.device)).max())
        if received:
            raise Interrupted(received, self.out)


class Fit:
    """Trains ``stage.module`` and leaves it with the weights of the epoch that did best on the held-out rows.

    Where the stage's method converts it, what is trained is another module, and ``stage.module`` is made of it.

    Args:
        run: what the stages share.
        stage: what to train, and how.
        teachers: give the logits that the stage's loss may ask for.
        saved: a checkpoint of this stage to go on from.

    Raises:
        PykdError: nothing to train, or weights of another network in ``saved``.
    """

    def __init__(
        self, run: Context, stage: Stage, teachers: Sequence[TeacherLogits], saved: Saved | None = None
    ) -> None:
        self._run = run
        self._stage = stage
        self._training = stage.training
        self._teachers = teachers
        self._frozen = [each.teacher for each in teachers]
        self._device = run.accelerator.device
        self._rank, self._world = run.accelerator.process_index, run.accelerator.num_processes
        self._batches = stage.train.batches(
            self._training.batch_size, shuffle=stage.train.shuffle, rank=self._rank, world=self._world
        )
        self._steps = len(self._batches)
        self._starting = stage.converting if isinstance(stage.converting, Starting) else None
        self._epochs = 0 if self._starting and not self._starting.trains else self._training.epochs
        self._keep_best = stage.classifies and (stage.converting is None or stage.converting.keep_epoch == "best")
        self._sharded = is_sharded(run.accelerator)
        # BatchNorm over all rows of a batch, wherever they are; torch has it on CUDA alone.
        self._synced = self._world > 1 and self._device.type == "cuda"
        self._copied = stage.converting is None and (self._sharded or self._synced)
        self._module = (copy.deepcopy(stage.module) if self._copied else stage.module).to(self._device)
        if stage.converting is not None:
            set_seed(derive(run.seed, "prepare", stage.name) % 2**32)
            networks = [each.teacher.module for each in teachers]
            first = {} if stage.first is None else {"first": stage.first.to(self._device)}
            self._module = stage.converting.prepare(stage.module, networks, run.example.to(self._device), **first)
            self._module.to(self._device)
        if self._synced:
            self._module = nn.SyncBatchNorm.convert_sync_batchnorm(self._module)  # type: ignore[no-untyped-call]
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if not parameters:
            raise PykdError(f"{stage.name} has no trainable parameters: set requires_grad on those to train")
        fused = self._device.type in ("cpu", "cuda") and not self._sharded  # torch divides no fused SGD
        self._optimizer = _optimizer(self._training, parameters, fused=fused)
        self._network = self._module
        if self._world > 1:
            self._network = shared(run.accelerator, self._module, self._optimizer)
        self._parameters: list[nn.Parameter] = self._optimizer.param_groups[0]["params"]
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._training.mixed_precision == "fp16")
        self._losses = torch.zeros(self._steps, dtype=torch.float64, device=self._device)
        self._loss_of = self._losses.unbind()  # views, made once
        self._checked = 0  # losses before this one are finite
        self._random: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}
        self._at = Position(stage.name, finished=run.finished, identity=run.identity)
        if saved is not None:
            self._restore(saved)
        self._begun = time.perf_counter() - self._at.seconds
        self._saved_at = self._asked_at = time.monotonic()
        self._steps_between, self._unasked = 1, 0  # steps from one question to the other processes to the next

    def run(self) -> None:
        """Trains the epochs that are left.

        Raises:
            PykdError: a loss that is not finite, or a file that cannot be written.
            Interrupted: a signal came; the run was saved.
        """
        at, reporter = self._at, self._run.reporter
        try:
            if self._starting is not None and not at.epoch and not at.step:
                self._start(self._starting)
            reporter.start(self._stage.name, self._epochs, self._steps, at.epoch * self._steps + at.step)
            while at.epoch < self._epochs:
                self._epoch()
        finally:
            reporter.stop()
        if self._keep_best or self._copied:
            trained = self._stage.module if self._copied else self._module
            put_weights(trained, self._best if self._keep_best else weights(self._module), "best epoch")
        result: dict[str, Any] = {"seconds": at.seconds, "best_epoch": at.best_epoch}
        if self._stage.converting is not None:
            result["facts"] = self._stage.converting.finish(self._module, self._stage.module)
            for sentence in result["facts"].get("warnings", []):
                reporter.say(f"{self._stage.name}: {sentence}")
        if self._run.folder is not None:
            result["sha256"] = self._run.folder.write_weights(self._stage.name, self._stage.module)
        self._run.finished = {**self._run.finished, self._stage.name: result}
        if self._world > 1:
            self._run.accelerator.free_memory()

    def _start(self, method: Starting) -> None:
        at, run, train = self._at, self._run, self._stage.train
        parts = [train.normalized(each.inputs.to(self._device)) for each in train.batches(train.large_batch)]
        teachers = [each.teacher.module for each in self._teachers]
        if at.started and self._rank < len(self._random):
            set_random_state(self._random[self._rank])
        steps = method.start(self._module, teachers, torch.cat(parts), at.started)
        for at.started, of in steps:
            run.reporter.before(self._stage.name, at.started, of)
            self._save_or_stop(run.checkpoint_seconds)
        if self._world > 1:
            for value in self._module.state_dict().values():
                broadcast(value)
        run.reporter.stop()
        at.seconds = time.perf_counter() - self._begun

    def _epoch(self) -> None:
        at, stage = self._at, self._stage
        draw = (self._run.seed, stage.stream, at.epoch)
        generator = torch.Generator().manual_seed(derive(*draw, "noise"))
        seeds = torch.randint(-(2**63), 2**63 - 1, (self._steps,), generator=generator).to(self._device).unbind()
        set_seed(derive(*draw, "global", self._rank) % 2**32)
        batches = self._batches.read(derive(*draw, "order"), at.step)
        if at.step and self._rank < len(self._random):
            set_random_state(self._random[self._rank])
        self._module.train()
        for step, rows in enumerate(batches, at.step):
            self._step(step, rows, seeds[step])
            at.step = step + 1
            self._after_step()
        self._check_losses()
        self._end_epoch()

    def _step(self, step: int, rows: Rows, seed: Tensor) -> None:
        training, stage = self._training, self._stage
        rate = learning_rate(training, self._at.epoch * self._steps + step, training.epochs * self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        if self._at.epoch == 0:
            stage.train.check_labels(rows.labels, self._run.classes)
        inputs = rows.inputs.to(self._device, non_blocking=True)
        if self._run.augment is not None and training.augment:
            inputs = self._augmented(inputs, rows, step, self._run.augment)
        inputs = stage.train.normalized(inputs)
        labels = rows.labels.to(self._device, non_blocking=True)
        rows = Rows(inputs, labels, rows.positions, rows.offset, rows.weight, rows.total)
        parts = max(1, min(training.accumulate, rows.total // self._world))  # the same on every process
        for index in range(parts):
            part = rows if parts == 1 else rows.part(index, parts)
            share = part.weight / part.total
            positions = None if training.augment else part.positions
            teach = [partial(teacher, part.inputs, positions) for teacher in self._teachers]
            batch = Batch(
                part.inputs,
                part.labels,
                seed,
                part.offset,
                teach,
                epoch=self._at.epoch,
                epochs=training.epochs,
                train_rows=stage.train.rows if stage.train.by_row else self._steps * rows.total,
                teachers=self._frozen,
            )
            with nullcontext() if index == parts - 1 else self._run.accelerator.no_sync(self._network):
                with self._precision():
                    loss = stage.loss(self._network, batch)
                # Gradients are averaged over the processes; the loss is a mean over the rows of the part.
                factor = share * self._world
                self._scaler.scale(loss if factor == 1 else loss * factor).backward()
            self._loss_of[step].add_(loss.detach(), alpha=share)
        if training.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, training.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _augmented(self, inputs: Tensor, rows: Rows, step: int, augment: Augment) -> Tensor:
        """A row is changed in the same way whichever process holds it: its numbers are drawn for the global batch."""
        draw = derive(self._run.seed, self._stage.stream, self._at.epoch, "augment", step)
        generator = torch.Generator().manual_seed(draw)
        if self._world == 1:
            return augment(inputs, generator)
        mine = slice(rows.offset, rows.offset + len(inputs))
        batch = inputs.new_zeros(rows.total, *inputs.shape[1:])
        batch[mine] = inputs
        return augment(batch, generator)[mine]

    def _precision(self) -> AbstractContextManager[Any]:
        if self._training.mixed_precision == "no":
            return nullcontext()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[self._training.mixed_precision]
        return torch.autocast(self._device.type, dtype)

    def _after_step(self) -> None:
        at = self._at
        if at.step - self._checked >= STEPS_BETWEEN_CHECKS:
            self._check_losses()
        self._run.reporter.step(at.epoch, at.step, lambda: float(self._losses[at.step - 1]))
        self._unasked += 1
        if self._world == 1 or self._unasked >= self._steps_between:
            self._save_or_stop(self._run.checkpoint_seconds)

    def _save_or_stop(self, seconds: float, *, always: bool = False) -> None:
        """Saves if the last checkpoint is older than ``seconds``, or a signal has come; stops if one has.

        Every process comes here after the same step and takes the same decision.
        """
        stop = self._run.signals.received
        due = always or time.monotonic() - self._saved_at >= seconds
        if self._world > 1:
            now = time.monotonic()
            step = (now - self._asked_at) / max(1, self._unasked)
            asked = torch.tensor([[stop, due, step]], device=self._device)
            stop, due, step = self._run.accelerator.gather(asked).amax(0).tolist()
            if self._unasked:  # else no step was timed, but the held-out rows
                self._steps_between = max(1, int(SECONDS_BETWEEN_QUESTIONS / step))
            self._asked_at, self._unasked = now, 0
        if stop or due:
            self._check_losses()
            self._save()
        if stop:
            raise Interrupted(int(stop), self._run.out)

    def _save(self) -> None:
        at, run = self._at, self._run
        if run.out is None:
            return
        at.seconds = time.perf_counter() - self._begun
        states = gather_object([random_state()])
        losses = run.accelerator.reduce(self._losses.clone()).cpu()
        model = weights(self._module) if self._sharded or run.folder is not None else {}
        optimizer = whole_state(self._optimizer)
        if run.folder is not None and run.checkpoints is not None:
            at.metrics_offset = run.folder.metrics_offset()
            state = {
                "optimizer": optimizer,
                "scaler": self._scaler.state_dict(),
                "losses": losses,
                "random": states,
            }
            run.checkpoints.save(Saved(at, model, self._best, state))
        run.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def _restore(self, saved: Saved) -> None:
        at = self._at = saved.position
        for values in (saved.best, saved.model):
            if values or values is saved.model:
                put_weights(self._module, values, "the checkpoint")
        try:
            if at.epoch > self._epochs or at.step > self._steps:
                where = f"step {at.step} of {self._steps} after epoch {at.epoch} of {self._epochs}"
                raise ValueError(f"it stands in {where}")
            _load_optimizer(self._optimizer, saved.state["optimizer"])
            self._scaler.load_state_dict(saved.state["scaler"])
            if self._run.accelerator.is_main_process:  # they are a sum over the processes
                self._losses.copy_(saved.state["losses"])
            self._random = saved.state["random"]
            if self._rank < len(self._random):
                set_random_state(self._random[self._rank])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise PykdError(
                f"the checkpoint of {self._stage.name} does not fit this run ({str(error).splitlines()[0]}): "
                "start again with another --out"
            ) from error
        self._best = saved.best
        self._checked = self._at.step

    def _check_losses(self) -> None:
        at = self._at
        losses = self._run.accelerator.reduce(self._losses[self._checked : at.step].clone())
        if not bool(losses.isfinite().all()):
            step = self._checked + int(losses.isfinite().logical_not().nonzero()[0])
            raise self._not_finite(f"the loss is not finite in step {step + 1} of epoch {at.epoch + 1}")
        self._checked = at.step

    def _not_finite(self, what: str) -> PykdError:
        lr = self._training.lr
        first = "make sure that the teacher gives finite values, or " if self._teachers else ""
        return PykdError(
            f"{self._stage.name}: {what}: {first}start again with a lower learning rate, "
            f"e.g. lr={lr / 10:g} instead of {lr:g}"
        )

    def _end_epoch(self) -> None:
        at, run = self._at, self._run
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters):
            raise self._not_finite(f"the weights are not finite after epoch {at.epoch + 1}")
        if self._world > 1:
            for buffer in self._module.buffers():
                broadcast(buffer)
        score = None
        if self._stage.classifies:
            correct, rows = accuracy(
                self._module, run.holdout, run.accelerator, partial(self._save_or_stop, run.checkpoint_seconds)
            )
            score = correct / rows
        # Of equal epochs the last: it has trained longest.
        if not self._keep_best or score is None or score >= at.best_accuracy:
            at.best_accuracy, at.best_epoch = -1.0 if score is None else score, at.epoch + 1
            self._best = weights(self._module) if self._keep_best else {}
        losses = run.accelerator.reduce(self._losses.clone())
        at.seconds = time.perf_counter() - self._begun
        row = {
            "stage": self._stage.name,
            "epoch": at.epoch + 1,
            "step": (at.epoch + 1) * self._steps,
            "loss": float(losses.mean()),
            "holdout_accuracy": score,
            "lr": self._optimizer.param_groups[0]["lr"],
            "seconds": round(at.seconds, 3),
        }
        run.metrics.append(row)
        if run.folder is not None:
            run.folder.append_metrics(row)
        run.reporter.epoch(row, self._epochs)
        at.epoch, at.step, self._checked = at.epoch + 1, 0, 0
        self._losses.zero_()
        self._save_or_stop(min(SHORTEST_EPOCH_SECONDS, run.checkpoint_seconds), always=at.epoch == self._epochs)
