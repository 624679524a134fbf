"""Scoring a network, and giving it batch-norm statistics of its own; nothing is fitted here."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.errors import AutocompressError
from autocompress.task import Loader, Task, batches, checked_scores, scores_of


@dataclass(frozen=True)
class Evaluation:
    """The scores of one pass over a loader.

    Attributes:
        scores: One score in [0, 1] for each sample, in the loader's order.
    """

    scores: Tensor

    @property
    def accuracy(self) -> float:
        """100 times the mean score, in points."""
        return 100.0 * float(self.scores.double().mean())


def evaluate(
    model: nn.Module, task: Task, loader: Loader, batch_count: int | None = None
) -> Evaluation:
    """Score `model` on the first `batch_count` batches of `loader` (all for None), in float32."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = [
                scores_of(task.forward(model, batch), batch, task.metric)
                for batch in batches(loader, task.device, batch_count)
            ]
    finally:
        model.train(was_training)
    return Evaluation(checked_scores(scores))


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


def accuracy_drop(baseline: Evaluation, compressed: Evaluation) -> float:
    """Accuracy of the baseline less that of the compressed network, in points.

    Both are of the same samples; where the baseline has more, its first ones count. Rounded, so
    that a drop of exactly delta is not above it.

    Raises:
        AutocompressError: If a score is not a finite number.
    """
    count = len(compressed.scores)
    drop = 100.0 * float((baseline.scores[:count].double() - compressed.scores.double()).mean())
    if not isfinite(drop):
        raise AutocompressError(f"The metric gave a score that makes the accuracy drop {drop}.")
    return round(drop, 9)


def drop_bound(baseline: Evaluation, compressed: Evaluation, confidence: float) -> float:
    """Upper end of a one-sided confidence interval of the accuracy drop, in points.

    Args:
        baseline: Where it has more samples, its first ones count.
        compressed: Its scores of the same samples.
        confidence: Probability that the drop on new data is below the bound; 0.5 for the measured
            drop itself.
    """
    drop = accuracy_drop(baseline, compressed)
    first = Evaluation(baseline.scores[: len(compressed.scores)])
    _, bound = _interval(first, compressed, NormalDist().inv_cdf(confidence))
    return drop if confidence == 0.5 else round(max(drop, bound), 9)


def paired_drop(baseline: Evaluation, compressed: Evaluation) -> tuple[float, float, float]:
    """The accuracy drop and its 95 % confidence interval, both networks on the same samples.

    Returns:
        Drop, lower and upper end, in points; positive where the compressed network is worse.
    """
    if len(baseline.scores) != len(compressed.scores):
        raise ValueError(
            f"Paired scores must have one length, got {len(baseline.scores)} and "
            f"{len(compressed.scores)}."
        )
    drop = 100.0 * float((baseline.scores.double() - compressed.scores.double()).mean())
    low, high = _interval(baseline, compressed, NormalDist().inv_cdf(0.975))
    return drop, min(low, drop), max(high, drop)


def _interval(baseline: Evaluation, compressed: Evaluation, width: float) -> tuple[float, float]:
    """Confidence interval of the drop, `width` standard errors to each side, in points.

    For 0/1 scores it is Agresti and Min's (2005, Statistics in Medicine 24:729), which adds half a
    sample to each cell of the 2 x 2 table and so stays honest when few samples differ; for other
    scores it is the normal interval of the paired differences.
    """
    difference = baseline.scores.double() - compressed.scores.double()
    count = len(difference)
    both = torch.cat([baseline.scores, compressed.scores])
    if bool(((both == 0) | (both == 1)).all()):
        lost, won = int((difference > 0).sum()), int((difference < 0).sum())
        centre = (lost - won) / (count + 2)
        spread = sqrt(lost + won + 1 - (lost - won) ** 2 / (count + 2)) / (count + 2)
    else:
        centre = float(difference.mean())
        spread = float(difference.std()) / sqrt(count) if count > 1 else float("inf")
    return 100 * (centre - width * spread), 100 * (centre + width * spread)
