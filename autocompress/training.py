"""The only training loop: it trains the baseline, fine-tunes trials and finishes the winner."""

from __future__ import annotations

import time
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

from autocompress.capture import WARM_UP, CapturedGradient, Gradient
from autocompress.checkpoint import Checkpoint
from autocompress.config import FinetuneConfig
from autocompress.errors import TrainingDiverged
from autocompress.evaluation import recalibrate
from autocompress.models import load_state
from autocompress.task import (
    Batch,
    Loader,
    Task,
    call_on_images,
    cross_entropy,
    logit_distillation,
    samples_in,
    to_device,
)

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

PATIENCE = 1.0
"""Seconds between two calls of `on_step` at most, where a step is not longer."""

NARROW = 16
"""Floats in the longest vector of a CPU."""

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
        gate: Accuracy drop before fine-tuning, in points, at which a trial stops.
    """

    epochs: float
    final_epochs: float
    learning_rate: float
    final_learning_rate: float
    distillation: float
    gate: float

    @classmethod
    def from_config(
        cls, finetune: FinetuneConfig, epochs: float = 1.0, learning_rate: float = 0.01
    ) -> Recipe:
        """The settings, and for those left open what follows from a length and a learning rate.

        Args:
            finetune: The study file's settings.
            epochs: A trial's length, where the file leaves it open.
            learning_rate: A trial's learning rate, likewise.
        """
        epochs = epochs if finetune.epochs is None else finetune.epochs
        rate = learning_rate if finetune.learning_rate is None else finetune.learning_rate
        final_epochs, final_rate = finetune.final_epochs, finetune.final_learning_rate
        if final_epochs is None:
            final_epochs = FINAL_LENGTH * epochs
        if final_rate is None:
            # Longer fine-tuning stands more.
            final_rate = 2 * rate if final_epochs >= 4 * epochs else rate
        return cls(epochs, final_epochs, rate, final_rate, finetune.distillation, finetune.gate)


@dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did.

    Attributes:
        steps: Batches that were learned from.
        loss: Mean loss over the last tenth of them.
        images_per_second: Images learned from, per second.
        seconds: Time spent, without that at rungs.
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
    distillation: float = 0.0,
    on_step: OnStep | None = None,
    rungs: Sequence[float] = (),
    hopeless: Hopeless | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Train `model` in place on the task's training data.

    Args:
        model: The network; moved to the task's device, left in evaluation mode, with batch-norm
            statistics of its last weights (save where a rung ended the run). In between its kernels
            are channels last, which trains faster.
        task: Data, loss, optimizer and schedule.
        epochs: Length, in passes over the training data; fractions allowed.
        learning_rate: Peak of the schedule.
        seed: Fixes the order of the data (where the loader can be reseeded) and dropout.
        teacher: The baseline, for distillation.
        distillation: Share of the distillation loss in the whole, 0 to 1.
        on_step: Told about the progress after every batch.
        rungs: Shares of the length, 0 to 1, rising, at which `hopeless` is asked.
        hopeless: Whether to end at a rung; it may evaluate the network.
        checkpoint: Keeps the run's state from time to time, and when `on_step` raises a
            KeyboardInterrupt; a run that is there goes on, and its rungs are not asked for again.

    Raises:
        TrainingDiverged: If the loss stops being finite.
    """
    steps = round(epochs * len(task.train))
    if steps < 1:
        return FitResult(0, float("nan"), 0.0, 0.0)
    _lay_out(model.to(task.device), _fastest_format(model, task.device)).train()
    if teacher is not None:
        teacher.to(task.device).eval()
    optimizer = task.optimizer(model, learning_rate)
    scheduler = task.scheduler(optimizer, learning_rate, steps)
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(seed)
        run = _Run(model, task, optimizer, scheduler, _Data(task.train, seed))
        name = {"seed": seed, "steps": steps, "learning_rate": learning_rate}
        kept = None if checkpoint is None else checkpoint.load(name)
        if kept is not None:
            run.restore(kept)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradient = _gradient(model, task, teacher, distillation)
        captured: CapturedGradient | None = None
        if steps >= WORTH_CAPTURING and _can_be_captured(task):
            gradient = captured = CapturedGradient(gradient, parameters)
        marks = {max(1, round(share * steps)): rung for rung, share in enumerate(rungs, 1)}
        stopped = False
        told = time.perf_counter()
        for batch in islice(run.batches(), steps - run.step):
            batch = to_device(batch, task.device)
            optimizer.zero_grad(set_to_none=True)
            loss = gradient(batch)
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            scheduler.step()
            run.count(loss, samples_in(batch))
            if run.step % 10 == 1 or run.step == steps or time.perf_counter() - told > PATIENCE:
                told = time.perf_counter()
                value = float(loss)
                if not isfinite(value):
                    raise TrainingDiverged(
                        f"The loss became {value} at step {run.step} of {steps} with learning rate "
                        f"{learning_rate:g}; lower the learning rate."
                    )
                try:
                    if on_step is not None:
                        on_step(run.step / len(task.train), epochs, value)
                except KeyboardInterrupt:
                    if checkpoint is not None:
                        checkpoint.save(name, run.state())
                    raise
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(name, run.state())
            if hopeless is not None and run.step in marks:
                with run.paused():
                    stopped = hopeless(marks[run.step])
                if stopped:
                    break
        tail = torch.stack(run.losses[-max(1, steps // 10) :]).mean().item()
        seconds = run.seconds()
    if captured is not None:
        captured.release()
    _lay_out(model, torch.contiguous_format).eval()
    if not stopped:
        recalibrate(model, task, LAST_BATCHES)
    return FitResult(run.step, tail, run.images / seconds, seconds, stopped)


class _Data:
    """Batches without end; another process can go on with them where one was.

    Args:
        loader: The batches of one pass.
        seed: The order starts anew from it where the loader allows that.
    """

    def __init__(self, loader: Loader, seed: int) -> None:
        self._loader = loader
        if hasattr(loader, "reseed"):
            loader.reseed(seed)
        self._passes = self._read = 0
        self._random = torch.get_rng_state()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            # What a loader draws by lot it draws from here on.
            torch.set_rng_state(self._random)
            skip = self._read
            for read, batch in enumerate(self._loader, 1):
                self._read = read
                if read > skip:
                    yield batch
            self._passes, self._read = self._passes + 1, 0
            self._random = torch.get_rng_state()

    def state(self) -> dict[str, Any]:
        """Where the batches are."""
        return {"passes": self._passes, "read": self._read, "random": self._random}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there: batches that were read are read again and passed over."""
        if hasattr(self._loader, "reseed"):
            for _ in range(state["passes"]):
                iter(self._loader)
        self._passes, self._read = state["passes"], state["read"]
        self._random = state["random"]


class _Run:
    """What changes while `fit` runs."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        data: _Data,
    ) -> None:
        self._model, self._device = model, task.device
        self._optimizer, self._scheduler, self._data = optimizer, scheduler, data
        self.step, self.images = 0, 0
        self.losses: list[Tensor] = []
        self._random: Mapping[str, Tensor] | None = None
        self._start = time.perf_counter()

    def batches(self) -> Iterator[Batch]:
        """The batches that are left."""
        for batch in self._data:
            if self._random is not None:
                # The batches that were passed over drew fewer lots than the network had.
                self._set_random(self._random)
                self._random = None
            yield batch

    def count(self, loss: Tensor, images: int) -> None:
        """A step is done."""
        self.losses.append(loss)
        self.step += 1
        self.images += images

    def seconds(self) -> float:
        """Time spent, without that in pauses."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time is not counted."""
        begun = time.perf_counter()
        yield
        self._start += time.perf_counter() - begun

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on, as tensors and plain values."""
        random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "data": self._data.state(),
            "random": random,
            "step": self.step,
            "images": self.images,
            "losses": torch.stack(self.losses).cpu(),
            "seconds": self.seconds(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of another process."""
        load_state(self._model, state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._data.restore(state["data"])
        self._random = state["random"]
        self.step, self.images = state["step"], state["images"]
        self.losses = list(state["losses"].to(self._device))
        self._start -= state["seconds"]

    def _set_random(self, random: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(random["cpu"])
        if self._device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self._device)


def _gradient(
    model: nn.Module, task: Task, teacher: nn.Module | None, distillation: float
) -> Gradient:
    """One batch's forward and backward pass, and the teacher's forward pass."""
    imitate = task.distillation
    share = distillation if teacher is not None and imitate is not None else 0.0

    def gradient(batch: Batch) -> Tensor:
        with autocast(task):
            output = _as_float(task.forward(model, batch))
        loss = task.loss(output, batch)
        if share:
            assert teacher is not None and imitate is not None
            with torch.no_grad(), autocast(task):
                target = _as_float(task.forward(teacher, batch))
            loss = (1 - share) * loss + share * imitate(output, target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return gradient


def _can_be_captured(task: Task) -> bool:
    """Whether all of a step but the network is our own code, which a CUDA graph can hold."""
    return (
        task.device.type == "cuda"
        and task.forward is call_on_images
        and task.loss is cross_entropy
        and task.distillation in (None, logit_distillation)
    )


def autocast(task: Task) -> AbstractContextManager[Any]:
    """The task's mixed precision, if any."""
    if task.amp_dtype is None:
        return nullcontext()
    return torch.autocast(task.device.type, dtype=task.amp_dtype)


def fastest_precision(task: Task, steps: int = 4) -> torch.dtype | None:
    """bfloat16 where training this network with it is faster here, else None; measured."""
    if task.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return None

    def seconds(dtype: torch.dtype | None, limit: float = float("inf")) -> float:
        """Of the fastest step; a step beyond the limit is the last one."""
        trial = deepcopy(task.model).to(task.device)
        _lay_out(trial, _fastest_format(trial, task.device)).train()
        amp, task.amp_dtype = task.amp_dtype, dtype
        gradient = _gradient(trial, task, None, 0.0)
        captured: CapturedGradient | None = None
        count = steps
        if _can_be_captured(task):
            gradient = captured = CapturedGradient(gradient, list(trial.parameters()))
            count += WARM_UP + 1
        best = float("inf")
        try:
            for batch in islice(_Data(task.train, 0), count):
                batch = to_device(batch, task.device)
                start = time.perf_counter()
                gradient(batch)
                if task.device.type == "cuda":
                    torch.cuda.synchronize()
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


def _fastest_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, save where that crashes.

    The gradient of a 1 x 1 convolution with a stride and fewer input channels than a vector has
    floats is written beyond its memory by oneDNN, in PyTorch 2.14 on the CPU with channels last.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and device.type == "cpu":
            narrow = module.in_channels // module.groups < NARROW
            if narrow and module.kernel_size == (1, 1) and max(module.stride) > 1:
                return torch.contiguous_format
    return torch.channels_last


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`model` with its images' kernels in a memory format; `nn.Module.to` refuses others beside."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=memory_format)
    return model


def _as_float(output: Any) -> Any:
    return output.float() if isinstance(output, torch.Tensor) else output
