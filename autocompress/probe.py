"""A probe of how this network is fine-tuned best: a learning rate and a length, by short runs.

Rates and lengths that suit one network and data set lose points on another, and every trial of a
study pays for a wrong one. So a study begins with short runs on copies of one candidate: first at a
few learning rates, then at doubling lengths, until another doubling would win back little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import linear_regression
from time import perf_counter
from typing import Any

import torch
from optuna.study import Study
from torch import nn

from autocompress.allocator import Knobs, budget_range, decode
from autocompress.answers import Answers
from autocompress.batch import samples_in
from autocompress.config import FinetuneConfig
from autocompress.errors import ConfigError, TrainingDiverged
from autocompress.evaluation import Evaluation, evaluate, metric_drop, recalibrate
from autocompress.gates import gate_batches
from autocompress.objective import RECALIBRATION_BATCHES, Bench
from autocompress.space import SearchSpace
from autocompress.surgery import apply_plan
from autocompress.task import Task, batches
from autocompress.training import OnStep, Recipe, fit

PROBE = "probe"
"""User attribute of the exploration: what its probe measured and chose."""
DAMAGE, LOOKS = 8.0, 5
"""The probe's candidate has lost about this many times delta before fine-tuning, as trials that end
near delta have: 5 to 20 times on digits, Fashion-MNIST and CIFAR-10. So many are looked at."""
SLIGHT = 0.005
"""Of a smaller delta than this share of the baseline's score no candidate could be told."""
FIRST_STEPS = 50
"""Batches in the shortest runs."""
DOUBLINGS = 3
"""At most; so a trial has at most 400 steps. The whole probe takes 250 to some 900 of them: as much
as five trials where they are short, two where they are long."""
FIRST_RATE, RATE_FACTOR, RATE_LIMITS = 0.01, 3.0, (1e-5, 1.0)
"""Where the search for the learning rate starts, its steps, and where it ends."""
WORTH = 0.25
"""A doubling that wins back less than this share of delta is not worth its time."""
PROBE_IMAGES = 2000
"""About how many validation images a run is judged by."""


@dataclass(frozen=True)
class ProbeRun:
    """One short run.

    Attributes:
        epochs: Its length, in passes over the training data.
        learning_rate: Peak of its schedule.
        loss: On validation images; infinite if it diverged.
        drop: Drop on the same images, on the metric's scale.
    """

    epochs: float
    learning_rate: float
    loss: float
    drop: float

    @property
    def diverged(self) -> bool:
        """Whether its loss is not finite."""
        return math.isinf(self.loss)


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        epochs: Length of a trial, in passes over the training data.
        learning_rate: Peak of its schedule.
        runs: What that is concluded from; the first is the candidate before fine-tuning.
        seconds: Time spent.
    """

    epochs: float
    learning_rate: float
    runs: tuple[ProbeRun, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; None for the loss of runs that diverged."""
        runs = [{**asdict(run), "loss": None if run.diverged else run.loss} for run in self.runs]
        return {**asdict(self), "runs": runs}

    def __str__(self) -> str:
        runs = ", ".join(
            f"{run.drop:.3g} at {run.learning_rate:g} for {run.epochs:.2g}" for run in self.runs[1:]
        )
        return (
            f"Probe: learning rate {self.learning_rate:g} and {self.epochs:.2g} epochs for a trial "
            f"(lost: {self.runs[0].drop:.3g} before, {runs}; {self.seconds:.0f} s)."
        )


def settle(bench: Bench, space: SearchSpace, finetune: FinetuneConfig, study: Study) -> Recipe:
    """How the study fine-tunes: as its file says, and where that is left open as a probe tells.

    The probe is kept on the study, so that it is made once.

    Args:
        bench: The baseline and the data.
        space: Where the probe's candidate is taken from.
        finetune: The study file's settings.
        study: The exploration.
    """
    gate = bench.finetune.gate
    if finetune.epochs is not None and finetune.learning_rate is not None:
        return Recipe.from_config(finetune, gate=gate)
    stored = study.user_attrs.get(PROBE)
    if stored is None:
        bench.display.stage("probe", 1)

        def on_step(done: float, total: float, loss: float) -> None:
            bench.display.step("probe", done, total, f"loss {loss:.3f}")

        found = probe(
            _damaged(bench, space),
            bench.task,
            teacher=bench.baseline.model,
            answers=bench.answers,
            distillation=finetune.distillation,
            delta=bench.delta,
            seed=bench.seed,
            epochs=finetune.epochs,
            learning_rate=finetune.learning_rate,
            on_step=on_step,
        )
        bench.display.say(str(found))
        stored = found.to_json()
        study.set_user_attr(PROBE, stored)
    return Recipe.from_config(finetune, stored["epochs"], stored["learning_rate"], gate)


def _damaged(bench: Bench, space: SearchSpace) -> nn.Module:
    """A recalibrated candidate that fine-tuning has something to mend on; found by bisection."""
    task, (low, high) = bench.task, budget_range(space)
    target = DAMAGE * max(bench.delta, SLIGHT * abs(bench.baseline.val.score))
    best: tuple[float, nn.Module] | None = None
    for _ in range(LOOKS):
        budget = math.sqrt(low * high)
        here, picked = decode(space, Knobs(budget))
        plan = here.plan(picked)
        model = apply_plan(bench.baseline.model, plan, bench.cache).to(task.device)
        recalibrate(model, task, RECALIBRATION_BATCHES)
        drop = metric_drop(bench.baseline.val, evaluate(model, task, task.val, gate_batches(task)))
        if best is None or abs(drop - target) < best[0]:
            best = abs(drop - target), model
        low, high = (budget, high) if drop > target else (low, budget)
    assert best is not None
    return best[1]


def probe(
    model: nn.Module,
    task: Task,
    *,
    teacher: nn.Module,
    answers: Answers | None = None,
    distillation: float,
    delta: float,
    seed: int,
    epochs: float | None = None,
    learning_rate: float | None = None,
    on_step: OnStep | None = None,
) -> Probe:
    """Find what was left open of a trial's length and learning rate.

    Args:
        model: A candidate that needs fine-tuning; only copies of it are trained.
        task: The data; runs are judged on a part of the validation data, for they are a choice.
        teacher: The baseline.
        answers: What it answered in other runs on this data.
        distillation: Share of the loss that imitates it.
        delta: The tolerance, in points.
        seed: Of all runs.
        epochs: A trial's length, where it is given.
        learning_rate: Its learning rate, likewise.
        on_step: Told about the progress of each run.

    Raises:
        ConfigError: If the task's loss can't be computed on validation data.
        TrainingDiverged: If the loss stayed finite at no learning rate.
    """
    start = perf_counter()
    judge = _Judge(task, teacher)
    runs = [ProbeRun(0.0, 0.0, *judge(model))]

    def run(length: float, rate: float) -> ProbeRun:
        student = deepcopy(model)
        loss, drop = math.inf, math.inf
        try:
            fit(
                student,
                task,
                epochs=length,
                learning_rate=rate,
                seed=seed,
                teacher=teacher,
                answers=answers,
                distillation=distillation,
                on_step=on_step,
            )
            loss, drop = judge(student)
        except TrainingDiverged:
            pass
        runs.append(ProbeRun(length, rate, loss if math.isfinite(loss) else math.inf, drop))
        return runs[-1]

    lengths = _lengths(len(task.train), epochs)
    best = run(lengths[0], learning_rate or FIRST_RATE)
    if learning_rate is None:
        best = _best_rate(best, lambda rate: run(lengths[0], rate))
    if best.diverged:
        raise TrainingDiverged(
            "The loss didn't stay finite at any learning rate from "
            f"{min(one.learning_rate for one in runs[1:]):g} to {runs[1].learning_rate:g}; check "
            "the loss, or set finetune.learning_rate."
        )
    ladder = [best]
    for length in lengths[1:]:
        ladder.append(run(length, best.learning_rate))
        gain, following = _gains(runs[0], ladder)
        if gain > WORTH * delta:
            best = ladder[-1]
        if following <= WORTH * delta:
            break
    length = best.epochs if epochs is None else epochs
    return Probe(length, best.learning_rate, tuple(runs), perf_counter() - start)


def _lengths(steps: int, epochs: float | None) -> list[float]:
    """Doubling lengths, in passes over the training data; just one where a trial's is given."""
    first = FIRST_STEPS / steps
    if epochs is not None:
        return [min(first, epochs or first)]
    return [first * 2**index for index in range(DOUBLINGS + 1)]


def _gains(before: ProbeRun, ladder: Sequence[ProbeRun]) -> tuple[float, float]:
    """What the last doubling won back, and another would if gains go on to fall as they did.

    They are told by the loss, which is less noisy than the metric of few images, and turned into
    drops by the slope of the line through the candidate and its runs.
    """
    losses = [run.loss for run in (before, *ladder)]
    if len(set(losses)) < 2 or not all(map(math.isfinite, losses)):
        return 0.0, 0.0
    points = max(0.0, linear_regression(losses, [run.drop for run in (before, *ladder)]).slope)
    gains = [points * (shorter.loss - longer.loss) for shorter, longer in pairwise(ladder)]
    falling = min(1.0, gains[-1] / gains[-2]) if len(gains) > 1 and gains[-2] > 0 else 1.0
    return gains[-1], gains[-1] * falling


def _best_rate(first: ProbeRun, run: Callable[[float], ProbeRun]) -> ProbeRun:
    """The best rate around the first one: upwards, or else downwards, until it is worse."""
    best = first
    for factor in (1 / RATE_FACTOR,) if first.diverged else (RATE_FACTOR, 1 / RATE_FACTOR):
        while RATE_LIMITS[0] <= best.learning_rate * factor <= RATE_LIMITS[1]:
            found = run(best.learning_rate * factor)
            if found.loss >= best.loss and not best.diverged:
                break
            best = found
        if best is not first:
            break
    return best


class _Judge:
    """Loss and accuracy drop on about `PROBE_IMAGES` validation images."""

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        self._task = task
        size = max(1, samples_in(next(iter(task.val))))
        self._count = -(-PROBE_IMAGES // size)
        _, self._scores = self._pass(teacher)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss, and accuracy drop in points."""
        loss, scores = self._pass(model)
        return loss, metric_drop(self._scores, scores)

    def _pass(self, model: nn.Module) -> tuple[float, Evaluation]:
        task = self._task
        losses: list[float] = []
        metric, records = task.measure, []
        model.eval()
        with torch.no_grad():
            for batch in batches(task.val, task.device, self._count):
                output = task.forward(model, batch)
                records.append(metric.observe(output, batch))
                try:
                    losses += [float(task.loss(output, batch))] * samples_in(batch)
                except Exception as error:
                    raise ConfigError(
                        "The loss can't be computed on validation data, on which a probe judges "
                        f"its runs: {type(error).__name__}: {error}. Give finetune.epochs and "
                        "finetune.learning_rate."
                    ) from error
        return sum(losses) / len(losses), Evaluation(metric.join(records), metric, len(losses))
