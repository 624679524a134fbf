"""Children are looked at, and so compared, before one of them is fine-tuned.

What a cut breaks is predicted by the layer table, which knows the baseline's weights. A child is
cut from weights that were fine-tuned since, and the predictions miss; so do those of the time that
a whole network takes. So the children themselves are built, run and, where that counts, timed,
which takes a small part of a fine-tuning. They run on training images, and without labels where
outputs can be compared: nothing is chosen by validation data here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import nn

from autocompress.annealing import Look
from autocompress.batch import Batch, samples_in
from autocompress.costs import cost_of, is_timed
from autocompress.errors import AutocompressError
from autocompress.evaluation import evaluate, metric_drop, recalibrate
from autocompress.objective import Bench, load_elder, measure_latency
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.task import Task

IMAGES = 500
"""About how many training images the children are compared on, and their batch norms recalibrated
with."""


def look_at(bench: Bench, parent: str, plans: Sequence[Plan]) -> list[Look]:
    """How far each child strays from the baseline, and what it costs, before fine-tuning.

    It strays by the distillation loss of its outputs on training images; where the task has none,
    by the metric.

    Args:
        bench: Knows the study. The seconds that this takes are added to its `auditions`.
        parent: "<stage>/<number>".
        plans: The children's.

    Raises:
        DamagedArtifact: If the parent's weights can't be read any more.
    """
    start = time.perf_counter()
    elder = load_elder(bench, parent)
    images = _images(bench.task)
    task = replace(bench.task, calibration=images)
    distance = _distance(bench.baseline.model, task, images)
    own = distance(elder.model)
    found = []
    for done, plan in enumerate(plans):
        bench.watch.step()
        bench.show("compare children", done, len(plans))
        child = elder.child(plan).to(task.device)
        recalibrate(child, task, len(images))
        found.append(Look(distance(child) - own, _cost(bench, child)))
    bench.auditions += time.perf_counter() - start
    return found


def _cost(bench: Bench, child: nn.Module) -> float:
    """In the objective's unit; infinite where the child can't be timed, and has to be."""
    latency = None
    if is_timed(bench.objective):
        try:
            timing = measure_latency(bench, child)
        except AutocompressError:
            return math.inf
        latency = None if timing is None else timing.median_ms
    profile = profile_model(child, bench.example, latency=False)
    return cost_of(bench.objective, profile, latency, bench.baseline.profile)


def _images(task: Task) -> list[Batch]:
    """The same training batches for all children."""
    size = max(1, samples_in(next(iter(task.calibrating))))
    return list(task.calibration_batches(-(-IMAGES // size)))


def _distance(
    baseline: nn.Module, task: Task, images: Sequence[Batch]
) -> Callable[[nn.Module], float]:
    """How far a network's outputs are from the baseline's."""
    answers: list[Any] = []
    before = evaluate(baseline, task, images, watch=lambda output, _: answers.append(output))

    def distance(model: nn.Module) -> float:
        known, losses = iter(answers), []

        def compare(output: Any, batch: Batch) -> None:
            if task.distillation is not None:
                losses.append(float(task.distillation(output, next(known))))

        after = evaluate(model, task, images, watch=compare)
        return mean(losses) if losses else metric_drop(before, after)

    return distance
