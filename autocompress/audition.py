"""How far children stray from the baseline, by which they are compared before one is fine-tuned.

What a cut breaks is predicted by the layer table, which knows the baseline's weights. A child is
cut from weights that were fine-tuned since, and the predictions miss. So the children themselves
are built and looked at, which takes a small part of a fine-tuning. They are looked at on training
images, and without labels where outputs can be compared: nothing is chosen by validation data here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import nn

from autocompress.batch import Batch, samples_in
from autocompress.evaluation import evaluate, metric_drop, recalibrate
from autocompress.objective import Bench, load_elder
from autocompress.plan import Plan
from autocompress.task import Task

IMAGES = 500
"""About how many training images the children are compared on, and their batch norms recalibrated
with."""


def strays(bench: Bench, parent: str, plans: Sequence[Plan]) -> list[float]:
    """How much farther from the baseline each child is than its parent, before fine-tuning.

    By the distillation loss of its outputs on training images; where the task has none, by the
    metric.

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
        found.append(distance(child) - own)
    bench.auditions += time.perf_counter() - start
    return found


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
