"""The only training loop: it trains the baseline, fine-tunes trials and finishes the winner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.capture import WARM_UP, CapturedGradient, Gradient
from autocompress.config import FinetuneConfig
from autocompress.errors import TrainingDiverged
from autocompress.evaluation import recalibrate
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradient = _gradient(model, task, teacher, distillation)
    captured: CapturedGradient | None = None
    if steps >= WORTH_CAPTURING and _can_be_captured(task):
        gradient = captured = CapturedGradient(gradient, parameters)
    losses: list[Tensor] = []
    images = 0
    stopped = False
    marks = {max(1, round(share * steps)): rung for rung, share in enumerate(rungs, 1)}
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step, batch in enumerate(islice(_epochs(task.train, seed), steps)):
            batch = to_device(batch, task.device)
            optimizer.zero_grad(set_to_none=True)
            losses.append(gradient(batch))
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            scheduler.step()
            images += samples_in(batch)
            if step % 10 == 0 or step == steps - 1:
                value = float(losses[-1])
                if not isfinite(value):
                    raise TrainingDiverged(
                        f"The loss became {value} at step {step + 1} of {steps} with learning rate "
                        f"{learning_rate:g}; lower the learning rate."
                    )
                if on_step is not None:
                    on_step((step + 1) / len(task.train), epochs, value)
            if hopeless is not None and step + 1 in marks:
                paused = time.perf_counter()
                stopped = hopeless(marks[step + 1])
                start += time.perf_counter() - paused
                if stopped:
                    break
    tail = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
    seconds = time.perf_counter() - start
    if captured is not None:
        captured.release()
    _lay_out(model, torch.contiguous_format).eval()
    if not stopped:
        recalibrate(model, task, LAST_BATCHES)
    return FitResult(len(losses), tail, images / seconds, seconds, stopped)


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
            for batch in islice(_epochs(task.train, 0), count):
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


def _epochs(loader: Loader, seed: int) -> Any:
    """Batches without end; the order starts anew from `seed` where the loader allows it."""
    if hasattr(loader, "reseed"):
        loader.reseed(seed)
    while True:
        yield from loader


def _as_float(output: Any) -> Any:
    return output.float() if isinstance(output, torch.Tensor) else output
