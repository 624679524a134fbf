"""Scoring a network, and giving it batch-norm statistics of its own; nothing is fitted here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt
from statistics import NormalDist, stdev
from typing import Any

import torch
from scipy.special import stdtrit
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.batch import Batch, samples_in
from autocompress.errors import AutocompressError
from autocompress.metrics import MeanScore, Metric, Records
from autocompress.task import Loader, Task, batches, correct

JACKKNIFE_GROUPS = 20
"""Of a metric that is no mean, the interval is told by leaving out one group of samples after the
other."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a loader showed.

    Attributes:
        records: What the metric kept of the samples, in the loader's order.
        metric: Makes a value of them.
        samples: Number of samples; None for one for each record.
    """

    records: Records
    metric: Metric = MeanScore(correct)
    samples: int | None = None

    @cached_property
    def score(self) -> float:
        """The metric's value: accuracy in percent by default."""
        return self.metric.value(self.records)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.records) if self.samples is None else self.samples

    def first(self, count: int) -> Evaluation:
        """The evaluation of the samples in the first `count` records."""
        if count >= len(self.records):
            return self
        return Evaluation(self.records[:count], self.metric)

    @cached_property
    def without(self) -> Sequence[float]:
        """The metric's values over all samples but one group's, for each group.

        Groups are interleaved, so that they are alike even where samples are in order of class.
        """
        groups = min(JACKKNIFE_GROUPS, len(self.records))
        if groups < 2:
            return ()
        parts = [self.metric.condense(self.records[index::groups]) for index in range(groups)]
        return [
            self.metric.value(self.metric.join([*parts[:index], *parts[index + 1 :]]))
            for index in range(groups)
        ]


def evaluate(
    model: nn.Module,
    task: Task,
    loader: Loader,
    batch_count: int | None = None,
    watch: Callable[[Any, Batch], None] | None = None,
) -> Evaluation:
    """Score `model` on the first `batch_count` batches of `loader` (all for None), in float32.

    `watch(output, batch)` is called after each batch.
    """
    was_training = model.training
    metric, records, samples = task.measure, [], 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches(loader, task.device, batch_count):
                output = task.forward(model, batch)
                records.append(metric.observe(output, batch))
                if watch is not None:
                    watch(output, batch)
                samples += samples_in(batch)
    finally:
        model.train(was_training)
    return Evaluation(metric.join(records), metric, samples)


def recalibrate(model: nn.Module, task: Task, batch_count: int = 50) -> None:
    """Replace the batch-norm statistics by the plain mean over training batches.

    A changed layer changes what its batch norm sees; this costs no gradient and ranks candidates
    well (EagleEye, Li et al. 2020, arXiv 2007.02491).
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for batch in task.calibration_batches(batch_count):
                task.forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)


def metric_drop(baseline: Evaluation, compressed: Evaluation) -> float:
    """By how much the compressed network is worse than the baseline, on the metric's scale.

    Both are of the same samples; where the baseline has more, its first ones count. Rounded, so
    that a drop of exactly delta is not above it.

    Raises:
        AutocompressError: If it is not a finite number.
    """
    before = baseline.first(len(compressed.records)).score
    drop = compressed.metric.scale.drop(before, compressed.score)
    if not isfinite(drop):
        raise AutocompressError(
            f"The metric ({compressed.metric.scale.name}) came to {compressed.score} after "
            f"{before}, so that the drop is {drop}."
        )
    return round(drop, 9)


def drop_bound(baseline: Evaluation, compressed: Evaluation, confidence: float) -> float:
    """Upper end of a one-sided confidence interval of the drop, on the metric's scale.

    Args:
        baseline: Where it has more samples, its first ones count.
        compressed: Of the same samples.
        confidence: Probability that the drop on new data is below the bound; 0.5 for the measured
            drop itself.
    """
    drop = metric_drop(baseline, compressed)
    if confidence == 0.5:
        return drop
    _, bound = _interval(baseline.first(len(compressed.records)), compressed, confidence)
    return round(max(drop, bound), 9)


def paired_drop(baseline: Evaluation, compressed: Evaluation) -> tuple[float, float, float]:
    """The drop and its 95 % confidence interval, both networks on the same samples.

    Returns:
        Drop, lower and upper end, on the metric's scale; positive where the compressed network is
        worse.
    """
    if len(baseline.records) != len(compressed.records):
        raise ValueError(
            f"Paired scores must have one length, got {len(baseline.records)} and "
            f"{len(compressed.records)}."
        )
    drop = metric_drop(baseline, compressed)
    low, high = _interval(baseline, compressed, 0.975)
    return drop, min(low, drop), max(high, drop)


def _interval(
    baseline: Evaluation, compressed: Evaluation, confidence: float
) -> tuple[float, float]:
    """Confidence interval of the drop, each side of which holds with `confidence`.

    For scores of 0 and 1 it is Agresti and Min's (2005, Statistics in Medicine 24:729), which adds
    half a sample to each cell of the 2 x 2 table and so stays honest when few samples differ; for
    other scores it is the normal interval of the paired differences. For a metric that is no mean
    it is that of the delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17:521),
    with Student's distribution.
    """
    metric = baseline.metric
    if not isinstance(metric, MeanScore):
        return _jackknife(baseline, compressed, confidence)
    width = NormalDist().inv_cdf(confidence)
    sign = metric.factor * metric.scale.drop(1.0, 0.0)
    difference = sign * (baseline.records.double() - compressed.records.double())
    count = len(difference)
    both = torch.cat([baseline.records, compressed.records])
    if bool(((both == 0) | (both == 1)).all()):
        lost, won = int((difference > 0).sum()), int((difference < 0).sum())
        centre = (lost - won) / (count + 2)
        spread = sqrt(lost + won + 1 - (lost - won) ** 2 / (count + 2)) / (count + 2)
        centre, spread = metric.factor * centre, metric.factor * spread
    else:
        centre = float(difference.mean())
        spread = float(difference.std()) / sqrt(count) if count > 1 else float("inf")
    return centre - width * spread, centre + width * spread


def _jackknife(
    baseline: Evaluation, compressed: Evaluation, confidence: float
) -> tuple[float, float]:
    scale = baseline.metric.scale
    drop = scale.drop(baseline.score, compressed.score)
    pairs = zip(baseline.without, compressed.without, strict=True)
    drops = [scale.drop(before, after) for before, after in pairs]
    groups = len(drops)
    if groups < 2 or not all(map(isfinite, drops)):
        return float("-inf"), float("inf")
    error = stdev(drops) * (groups - 1) / sqrt(groups)
    width = float(stdtrit(groups - 1, confidence)) * error
    return drop - width, drop + width
