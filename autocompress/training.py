"""The only training loop: it trains the baseline, fine-tunes trials and finishes the winner."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autocompress.answers import VIEWS, Answers
from autocompress.batch import Batch, samples_in, to_device
from autocompress.capture import WARM_UP, CapturedGradient, Gradient
from autocompress.checkpoint import Checkpoint
from autocompress.config import FinetuneConfig
from autocompress.distributed import (
    ask_first,
    mean_over_group,
    rank,
    share_buffers,
    share_state,
    shared_gradient,
    world,
)
from autocompress.errors import ConfigError, TrainingDiverged
from autocompress.evaluation import recalibrate
from autocompress.kernels import fast_kernels
from autocompress.models import load_state
from autocompress.random_numbers import OwnNumbers
from autocompress.task import (
    Loader,
    Task,
    TrainingLoop,
    by_cross_entropy,
    call_on_images,
    logit_distillation,
)

logger = logging.getLogger("autocompress")

MAX_GRADIENT_NORM = 5.0
"""A freshly factored layer can send one huge gradient; longer ones are scaled to this length."""

FINAL_LENGTH = 10.0
"""How many times as long as a trial the winner is fine-tuned, where the study file doesn't say."""

LAST_BATCHES = 20
"""Batch norm's running mean lags behind the weights: after a short run its statistics are those of
networks that no longer exist, so they are taken anew on this many batches. On digits, 42 steps at a
learning rate of 0.01 end with 2.3 points lost so, and with 3.7 otherwise (three seeds)."""

WORTH_CAPTURING = 20
"""Steps in the shortest run for which a CUDA graph is recorded, which takes as long as a few."""

LOOK_STEPS = 10
LOOK_SECONDS = 1.0
"""`fit` looks at the loss, and whether to go on, after so many steps, or about so many seconds."""

Hopeless = Callable[[int], bool]
"""Called at each rung as `hopeless(rung)`, from 1; where it says so, the run ends there."""
OnStep = Callable[[float, float, float], None]
"""Called as `on_step(epochs done, epochs in all, loss)`."""


@dataclass(frozen=True)
class Recipe:
    """How networks are fine-tuned: the study file's settings, with nothing left open.

    Attributes:
        epochs: Passes over the training data in a trial of the exploration.
        final_epochs: The same for the winner.
        learning_rate: Peak of a trial's schedule.
        final_learning_rate: The same for the winner.
        distillation: Share of the loss that imitates the baseline.
        gate: Drop before fine-tuning, on the metric's scale, at which a trial stops.
    """

    epochs: float
    final_epochs: float
    learning_rate: float
    final_learning_rate: float
    distillation: float
    gate: float

    @classmethod
    def from_config(
        cls,
        finetune: FinetuneConfig,
        epochs: float = 1.0,
        learning_rate: float = 0.01,
        gate: float = 50.0,
    ) -> Recipe:
        """The settings, and for those left open what follows from a length and a learning rate.

        Args:
            finetune: The study file's settings.
            epochs: A trial's length, where the file leaves it open.
            learning_rate: A trial's learning rate, likewise.
            gate: The gate, likewise.
        """
        epochs = epochs if finetune.epochs is None else finetune.epochs
        rate = learning_rate if finetune.learning_rate is None else finetune.learning_rate
        final_epochs, final_rate = finetune.final_epochs, finetune.final_learning_rate
        if final_epochs is None:
            final_epochs = FINAL_LENGTH * epochs
        if final_rate is None:
            # Longer fine-tuning stands more.
            final_rate = 2 * rate if final_epochs >= 4 * epochs else rate
        gate = gate if finetune.gate is None else finetune.gate
        return cls(epochs, final_epochs, rate, final_rate, finetune.distillation, gate)


@dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did.

    Attributes:
        steps: Batches that were learned from.
        loss: Mean loss over the last tenth of them.
        images_per_second: Images learned from, per second.
        seconds: Time spent on them, without that at rungs and for checkpoints.
        stopped: Whether it ended at a rung.
    """

    steps: int
    loss: float
    images_per_second: float
    seconds: float
    stopped: bool = False


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
    teacher: nn.Module | None = None,
    answers: Answers | None = None,
    distillation: float = 0.0,
    on_step: OnStep | None = None,
    rungs: Sequence[float] = (),
    hopeless: Hopeless | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Train `model` in place on the task's training data.

    Where the task has a training loop of its own, that does it: without rungs and checkpoints.

    The processes of a group (`join_group`) train it together: each calls `fit` alike, and ends with
    the same weights. `on_step`, `hopeless` and `checkpoint` count on rank 0 only.

    Args:
        model: The network; moved to the task's device, left in evaluation mode, with batch-norm
            statistics of its last weights (save where a rung ended the run). In between its kernels
            are channels last, which trains faster.
        task: Data, loss, optimizer and schedule.
        epochs: Length, in passes over the training data; fractions allowed.
        learning_rate: Peak of the schedule.
        seed: Fixes the order of the data (where the loader can be reseeded) and dropout.
        teacher: The baseline, for distillation.
        answers: What the teacher answered in other runs on this data; it is asked only about what
            is new there, where the loader can tell. Where steps are captured as CUDA graphs or
            shared by a group, and where None is given, it is asked about everything.
        distillation: Share of the distillation loss in the whole, 0 to 1.
        on_step: Told about the progress, every ten steps or about once a second. If it raises
            KeyboardInterrupt, a checkpoint is saved first.
        rungs: Shares of the length, 0 to 1, rising, at which `hopeless` is asked.
        hopeless: Whether to end at a rung; it may evaluate the network.
        checkpoint: Keeps the state of the run now and then. If it holds one of a run with this
            seed, length, learning rate and network, the run goes on from there. On the CPU in
            float32 it ends with the very weights of a run that was never interrupted, where the
            order of the data follows from the seed.

    Raises:
        TrainingDiverged: If the loss stops being finite.
    """
    steps = round(epochs * len(task.train))
    if steps < 1:
        return FitResult(0, float("nan"), 0.0, 0.0)
    if task.training is not None:
        return _fit_by(task.training, model, task, epochs, learning_rate, seed, teacher, on_step)
    model.to(task.device).train()
    if teacher is not None:
        teacher.to(task.device).eval()
    optimizer = task.optimizer(model, learning_rate)
    scheduler = task.scheduler(optimizer, learning_rate, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if teacher is None or not distillation or world() > 1 or _can_be_captured(task):
        answers = None
    loss = _loss(model, task, teacher, distillation, answers)
    marks = {max(1, round(share * steps)): rung for rung, share in enumerate(rungs, 1)}
    with (
        torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []),
        fast_kernels(model, task.device, task.amp_dtype),
    ):
        # Dropout differs from process to process.
        torch.manual_seed(seed + rank())
        data = _Data(task.train, seed, None if answers is None else VIEWS)
        progress = _Progress(model, optimizer, scheduler, data, task.device, learning_rate, steps)
        progress.resume(checkpoint)
        look = _Look(progress, epochs, marks, on_step, hopeless, checkpoint)
        with _learning(model, task, loss, parameters, steps - progress.step) as gradient:
            look.begin()
            while progress.step < steps and not look.stopped:
                batch = next(data)
                optimizer.zero_grad(set_to_none=True)
                progress.losses.append(gradient(batch))
                nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                optimizer.step()
                scheduler.step()
                progress.images += samples_in(batch)
                progress.step += 1
                if progress.step == look.next:
                    look()
            tail = progress.tail().mean().item()
    model.eval()
    if not look.stopped:
        recalibrate(model, task, LAST_BATCHES)
    share_buffers(model)
    speed = progress.images / progress.seconds
    return FitResult(progress.step, tail, speed, progress.seconds, look.stopped)


def _fit_by(
    loop: TrainingLoop,
    model: nn.Module,
    task: Task,
    epochs: float,
    learning_rate: float,
    seed: int,
    teacher: nn.Module | None,
    on_step: OnStep | None,
) -> FitResult:
    """Train `model` by a loop of the user's, and see that it came to something."""
    if world() > 1:
        raise ConfigError(
            "A training loop of your own trains in one process; start the study without torchrun, "
            "and let the loop itself use several GPUs."
        )
    losses: list[float] = []

    def step(done: float, total: float, loss: float) -> None:
        losses.append(float(loss))
        if on_step is not None:
            on_step(done, total, float(loss))

    model.to(task.device).train()
    if teacher is not None:
        teacher.to(task.device).eval()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(seed)
        loop(
            model,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            teacher=teacher,
            on_step=step,
        )
    seconds = time.perf_counter() - start
    model.to(task.device).eval()
    broken = next((k for k, v in model.named_parameters() if not bool(v.isfinite().all())), None)
    if broken is not None:
        raise TrainingDiverged(
            f"After the training loop '{broken}' holds values that are not finite, with learning "
            f"rate {learning_rate:g}; lower the learning rate."
        )
    recalibrate(model, task, LAST_BATCHES)
    steps = round(epochs * len(task.train))
    images = steps * samples_in(next(iter(task.train)))
    tail = losses[-max(1, len(losses) // 10) :]
    return FitResult(
        steps, sum(tail) / len(tail) if tail else float("nan"), images / seconds, seconds
    )


@dataclass
class _Progress:
    """A run of `fit`, as far as it has come: what its steps change, and what it is.

    Attributes:
        losses: Those that the result is made of, each a part of a batch's in a group.
        step: Batches that were learned from.
        images: Samples in them.
        seconds: Spent on them, as of the last look.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    data: _Data
    device: torch.device
    learning_rate: float
    steps: int
    step: int = 0
    images: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.losses: deque[Tensor] = deque(maxlen=max(1, self.steps // 10))

    def tail(self) -> Tensor:
        """The losses of the last steps, at most a tenth of all, over the whole group."""
        return mean_over_group(torch.stack(list(self.losses)))

    def state(self) -> dict[str, Any]:
        """All of that, as tensors and plain values; every process of a group must ask."""
        on_gpu = self.device.type == "cuda"
        return {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "losses": self.tail(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from rank 0's checkpoint, if it holds one of this run."""
        state = share_state(checkpoint.load(self.run()) if checkpoint and rank() == 0 else None)
        if state is None:
            return
        logger.info("Training goes on after step %d of %d.", state["step"], self.steps)
        self.data.resume(state["data"])
        # Weights are copied into the memory that they have, which CUDA graphs and optimizers know.
        load_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.losses.extend(state["losses"].to(self.device).unbind())
        self.step, self.images = state["step"], state["images"]
        self.seconds = state["seconds"]
        if rank() > 0:
            torch.manual_seed(self.data.seed + rank() + world() * self.step)
            return
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"], self.device)

    def run(self) -> dict[str, Any]:
        """What tells this run's checkpoints from others'."""
        return {
            "seed": int(self.data.seed),
            "steps": self.steps,
            "learning_rate": float(self.learning_rate),
            "network": {
                name: list(value.shape)
                for name, value in self.model.state_dict().items()
                if isinstance(value, Tensor)
            },
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "groups": [len(group["params"]) for group in self.optimizer.param_groups],
        }


class _Look:
    """A look at a run between two steps, at which all that isn't training happens.

    It reads the loss, which waits for the GPU, so there isn't one after every step.

    Attributes:
        next: The step after which the next look is due, counted from 1; the same in each process.
        stopped: Whether a rung ended the run.
    """

    def __init__(
        self,
        progress: _Progress,
        epochs: float,
        marks: Mapping[int, int],
        on_step: OnStep | None,
        hopeless: Hopeless | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._progress, self._epochs, self._marks = progress, epochs, marks
        self._on_step, self._hopeless, self._checkpoint = on_step, hopeless, checkpoint
        self._interrupt: KeyboardInterrupt | None = None
        self.next, self.stopped = 0, False

    def begin(self) -> None:
        """Start the clock."""
        self.next = self._progress.step + 1
        self._first, self._start = self._progress.step, time.perf_counter()

    def __call__(self) -> None:
        """Look, and see to what is due.

        Raises:
            TrainingDiverged: If the loss isn't finite.
            KeyboardInterrupt: As `on_step` raised it; a checkpoint has been saved.
        """
        progress = self._progress
        value = float(mean_over_group(progress.losses[-1]))
        spent = time.perf_counter() - self._start
        progress.seconds += spent
        if not isfinite(value):
            raise TrainingDiverged(
                f"The loss became {value} at step {progress.step} of {progress.steps} with "
                f"learning rate {progress.learning_rate:g}; lower the learning rate."
            )
        pace = spent / (progress.step - self._first)
        found = ask_first(lambda: self._decide(value, pace))
        self.stopped, self.next = found["stopped"], found["next"]
        if found["save"]:
            state = progress.state()
            if self._checkpoint is not None and rank() == 0:
                self._checkpoint.save(progress.run(), state)
        if found["interrupted"]:
            raise self._interrupt or KeyboardInterrupt
        self._first, self._start = progress.step, time.perf_counter()

    def _decide(self, value: float, pace: float) -> dict[str, Any]:
        """What rank 0 says for all processes.

        Args:
            value: The loss.
            pace: Seconds for each step since the last look.
        """
        progress = self._progress
        step, steps = progress.step, progress.steps
        # A rung comes first, so that a run that goes on from here needn't ask again.
        stopped = False
        if self._hopeless is not None and step in self._marks:
            stopped = bool(self._hopeless(self._marks[step]))
        if self._on_step is not None and not stopped:
            try:
                self._on_step(step * self._epochs / steps, self._epochs, value)
            except KeyboardInterrupt as error:
                self._interrupt = error
        interrupted = self._interrupt is not None
        ahead = LOOK_STEPS if pace * LOOK_STEPS <= LOOK_SECONDS else int(LOOK_SECONDS / pace)
        return {
            "stopped": stopped,
            "interrupted": interrupted,
            "save": self._checkpoint is not None
            and not stopped
            and (interrupted or self._checkpoint.due()),
            "next": min(step + max(1, ahead), steps, *(m for m in self._marks if m > step)),
        }


class _Data:
    """Batches without end, with random numbers of their own.

    However many of them the network draws, the order stays: in a run that goes on after it was
    interrupted, and in all processes of a group.

    Args:
        loader: The batches of one pass.
        seed: The order starts anew from it, where the loader allows that or has no numbers itself.
        views: Number of augmented views of each sample, where the loader can limit it.
    """

    def __init__(self, loader: Loader, seed: int, views: int | None = None) -> None:
        self.seed = seed
        self._loader = loader
        if hasattr(loader, "reseed"):
            loader.reseed(seed)
        if views is not None and hasattr(loader, "limit_views"):
            loader.limit_views(views)
        self._numbers = OwnNumbers(seed)
        self._passes = self._read = 0
        self._begun = self._numbers.state
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._numbers.used():
            return self._next()

    def _next(self) -> Batch:
        while True:
            if self._batches is None:
                self._begun = torch.get_rng_state()
                self._batches = iter(self._loader)
            try:
                batch = next(self._batches)
            except StopIteration:
                self._batches, self._read = None, 0
                self._passes += 1
            else:
                self._read += 1
                return batch

    def state(self) -> dict[str, Any]:
        """Where the batches are: passes, batches of the last one, and how that began."""
        return {"passes": self._passes, "read": self._read, "random": self._begun}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was read of the last pass is read again."""
        if hasattr(self._loader, "reseed"):
            for _ in range(state["passes"]):
                next(iter(self._loader), None)
        self._passes, self._numbers.state = state["passes"], state["random"]
        for _ in range(state["read"]):
            next(self)


@contextmanager
def _learning(
    model: nn.Module,
    task: Task,
    loss: Callable[[Batch], Tensor],
    parameters: Sequence[nn.Parameter],
    steps: int,
) -> Iterator[Gradient]:
    """A step's forward and backward pass: shared with other processes, as a CUDA graph, or plain.

    Args:
        model: The network.
        task: Where and how it is trained.
        loss: `loss(batch)` runs it.
        parameters: Those that get gradients.
        steps: How many steps there will be.
    """
    if world() > 1:
        yield shared_gradient(model, loss, task.device)
        return
    gradient = _gradient(loss)
    captured: CapturedGradient | None = None
    if steps >= WORTH_CAPTURING and _can_be_captured(task):
        gradient = captured = CapturedGradient(gradient, parameters)
    try:
        yield lambda batch: gradient(to_device(batch, task.device))
    finally:
        if captured is not None:
            captured.release()


def _loss(
    model: nn.Module,
    task: Task,
    teacher: nn.Module | None,
    distillation: float,
    answers: Answers | None = None,
) -> Callable[[Batch], Tensor]:
    """One batch's loss: the network's forward pass, and the teacher's or what is kept of it."""
    imitate = task.distillation
    share = distillation if teacher is not None and imitate is not None else 0.0

    def ask(batch: Batch) -> Any:
        assert teacher is not None
        with torch.no_grad(), autocast(task):
            return task.forward(teacher, batch)

    def loss_of(batch: Batch) -> Tensor:
        with autocast(task):
            output = _as_float(task.forward(model, batch))
        loss = task.loss(output, batch)
        if share:
            assert imitate is not None
            target = ask(batch) if answers is None else answers.recall(batch, ask, task.amp_dtype)
            target = _as_float(target)
            loss = (1 - share) * loss + share * imitate(output, target)
        return loss

    return loss_of


def _gradient(loss: Callable[[Batch], Tensor]) -> Gradient:
    """A loss with its backward pass."""

    def gradient(batch: Batch) -> Tensor:
        value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return gradient


def _can_be_captured(task: Task) -> bool:
    """Whether all of a step but the network is our own code, which a CUDA graph can hold."""
    return (
        task.device.type == "cuda"
        and task.forward is call_on_images
        and by_cross_entropy(task)
        and task.distillation in (None, logit_distillation)
    )


def autocast(task: Task) -> AbstractContextManager[Any]:
    """The task's mixed precision, if any."""
    if task.amp_dtype is None:
        return nullcontext()
    return torch.autocast(task.device.type, dtype=task.amp_dtype)


def fastest_precision(task: Task, steps: int = 4) -> torch.dtype | None:
    """bfloat16 where training this network with it is faster here, else None; measured.

    Raises:
        TrainingDiverged: If the loss isn't finite at once.
    """
    if task.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return None

    def seconds(dtype: torch.dtype | None, limit: float = float("inf")) -> float:
        """Of the fastest step; a step beyond the limit is the last one."""
        trial = deepcopy(task.model).to(task.device).train()
        amp, task.amp_dtype = task.amp_dtype, dtype
        gradient = _gradient(_loss(trial, task, None, 0.0))
        captured: CapturedGradient | None = None
        count = steps
        if _can_be_captured(task):
            gradient = captured = CapturedGradient(gradient, list(trial.parameters()))
            count += WARM_UP + 1
        best = float("inf")
        try:
            with fast_kernels(trial, task.device, dtype):
                for batch in islice(_Data(task.train, 0), count):
                    batch = to_device(batch, task.device)
                    start = time.perf_counter()
                    loss = gradient(batch)
                    if task.device.type == "cuda":
                        torch.cuda.synchronize()
                    if dtype is None and not bool(loss.isfinite()):
                        raise TrainingDiverged(f"the loss of a first batch is {float(loss)}")
                    elapsed = time.perf_counter() - start
                    best = min(best, elapsed)
                    if elapsed > limit:
                        break
        finally:
            task.amp_dtype = amp
            if captured is not None:
                captured.release()
        return best

    plain = seconds(None)
    try:
        # Processors without bfloat16 emulate it, ten times slower; one such step tells enough.
        half = seconds(torch.bfloat16, limit=3 * plain + 1.0)
    except RuntimeError:  # an operation of this network that bfloat16 hasn't got
        return None
    return torch.bfloat16 if half < 0.9 * plain else None


def _as_float(output: Any) -> Any:
    return output.float() if isinstance(output, torch.Tensor) else output
