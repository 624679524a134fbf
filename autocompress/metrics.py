"""Metrics: how good a network's outputs are, in a form from which intervals can be told.

A metric looks at a batch and keeps records of it, and makes one value of all records. Whatever the
value is (a mean, an mIoU, an mAP), leaving some records out tells how much it depends on the images
that happened to be there, so that delta can be kept surely for any metric.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from autocompress.batch import Batch, part_of, samples_in, tensors_in, to_device
from autocompress.errors import ConfigError
from autocompress.scale import ACCURACY, Scale

Records = Any
"""What a metric keeps of samples: a tensor with a row for each, or a tuple. It can be sliced."""

PARTS = 8
"""Into so many parts at most a batch is split for metrics that give one value for many samples."""


@runtime_checkable
class Metric(Protocol):
    """How good a network's outputs are."""

    @property
    def scale(self) -> Scale:
        """Its name, its unit and which way is better."""
        ...

    def observe(self, output: Any, batch: Batch) -> Records:
        """The records of a batch."""
        ...

    def join(self, parts: Sequence[Records]) -> Records:
        """The records of several batches as one, on the CPU.

        Raises:
            ConfigError: If a score is not allowed, which is named.
        """
        ...

    def value(self, records: Records) -> float:
        """The metric's value over some records, at least one."""
        ...

    def condense(self, records: Records) -> Records:
        """Fewer records that come to the same value, alone and together with others."""
        ...


ScoreFunction = Callable[[Any, Batch], Tensor]
"""`score(output, batch)` gives a number for each sample, or for each of its parts (pixels)."""


@dataclass(frozen=True)
class MeanScore:
    """The mean of a number for each sample; accuracy is one, and the default.

    Attributes:
        score: Gives the numbers; those of a sample's parts (pixels) are averaged.
        scale: Of the mean.
        factor: The mean is multiplied by it: 100 makes percentages of shares.
        limits: Between which each number must lie; None for any.
    """

    score: ScoreFunction
    scale: Scale = ACCURACY
    factor: float = 100.0
    limits: tuple[float, float] | None = (0.0, 1.0)

    def observe(self, output: Any, batch: Batch) -> Tensor:
        """`n` numbers, float32, where the output is.

        Raises:
            ConfigError: If the function gives something else.
        """
        scores = self.score(output, batch)
        count = samples_in(batch)
        if not isinstance(scores, Tensor) or not scores.numel() or scores.numel() % count:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
            raise ConfigError(
                f"The metric must return a tensor with a score for each of the {count} samples, "
                f"not their mean; got {got}. (For a metric that is no mean over samples, give an "
                "autocompress.TorchMetric.)"
            )
        return scores.detach().float().reshape(count, -1).mean(dim=1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """`n` numbers on the CPU.

        Raises:
            ConfigError: If one is not a finite number, or beyond the limits.
        """
        # One look at all of them: each look would wait for the GPU.
        found = torch.cat(list(parts)).cpu()
        wrong = ~found.isfinite()
        if self.limits is not None:
            wrong |= (found < self.limits[0]) | (found > self.limits[1])
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            rule = (
                "be finite numbers"
                if self.limits is None
                else f"lie between {self.limits[0]:g} and {self.limits[1]:g}"
            )
            more = f" and {int(wrong.sum()) - 1} more like it" if wrong.sum() > 1 else ""
            raise ConfigError(
                f"The metric's scores must {rule} ({self.scale.name} is {self.factor:g} times "
                f"their mean), got {float(found[index]):g} for sample {index}{more}."
            )
        return found

    def value(self, records: Tensor) -> float:
        """`factor` times the mean."""
        return self.factor * float(records.double().mean())

    def condense(self, records: Tensor) -> Tensor:
        """The records as they are, for an interval of a mean needs each."""
        return records


Pairs = Callable[[Any, Batch], tuple[Any, Any]]
"""`pairs(output, batch)` gives predictions and targets as a torchmetrics metric's `update` takes
them: tensors, or lists with an entry for each sample."""


class TorchMetric:
    """A metric of torchmetrics (https://lightning.ai/docs/torchmetrics), such as mIoU, mAP or RMSE.

    torchmetrics isn't imported here: whatever has `reset`, `update` and `compute` will do. Of a
    metric whose states are sums or lists, the states of some samples are kept, which are small; of
    any other the predictions and targets, on the CPU.

    Args:
        metric: The metric, e.g. `torchmetrics.JaccardIndex("multiclass", num_classes=21)`; it is
            copied.
        pairs: What its `update` is given; `(output, batch[1])` by default.
        name: What it is called in reports.
        unit: Of its values; "" for none.
        factor: Its values are multiplied by it: 100 where shares are to be shown as percentages.
        higher_is_better: Which way is better; None for what the metric itself says.
        key: Which value counts, where `compute` gives several by name (`"map"`).

    Raises:
        ConfigError: If it can't be used so, or doesn't say which way is better.

    Example:
        >>> TorchMetric(
        ...     JaccardIndex("multiclass", num_classes=21, ignore_index=255),
        ...     pairs=lambda output, batch: (output["out"].argmax(1), batch[1]),
        ...     name="mIoU",
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        metric: Any,
        pairs: Pairs | None = None,
        *,
        name: str | None = None,
        unit: str = "",
        factor: float = 1.0,
        higher_is_better: bool | None = None,
        key: str | None = None,
    ) -> None:
        wanted = ("reset", "update", "compute")
        missing = [function for function in wanted if not hasattr(metric, function)]
        if missing:
            raise ConfigError(
                f"A TorchMetric is made of a metric of torchmetrics; {type(metric).__name__} has "
                f"no {missing[0]}()."
            )
        if higher_is_better is None:
            higher_is_better = getattr(metric, "higher_is_better", None)
        if higher_is_better is None:
            raise ConfigError(
                f"{type(metric).__name__} doesn't say whether more is better; give "
                "higher_is_better=True or False."
            )
        self.scale = Scale(name or type(metric).__name__, unit, bool(higher_is_better))
        self.factor, self.key = factor, key
        self._metric = deepcopy(metric)
        self._metric.reset()
        self._pairs = pairs or outputs_and_labels
        self._merged = _can_be_merged(self._metric)

    def observe(self, output: Any, batch: Batch) -> tuple[Any, ...]:
        """A metric with the state of each of at most `PARTS` parts of the batch.

        Raises:
            ConfigError: If the pairs don't belong to the samples.
        """
        found = self._pairs(output, batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ConfigError(
                "A TorchMetric's pairs must return predictions and targets, got "
                f"{type(found).__name__}."
            )
        count = samples_in(batch)
        for side, what in zip(found, ("predictions", "targets"), strict=True):
            _check_rows(side, what, count)
        parts = min(PARTS, count)
        # torchmetrics decides by the values that it sees at once whether they are logits.
        found = (_as_probabilities(self._metric, found[0]), found[1])
        cut = [[part_of(side, i, parts, count) for side in found] for i in range(parts)]
        if not self._merged:
            return tuple(to_device(part, torch.device("cpu")) for part in cut)
        device = next((value.device for value in tensors_in(found)), torch.device("cpu"))
        records = []
        for part in cut:
            own = deepcopy(self._metric).to(device)
            own.update(*part)
            records.append(own.cpu())
        return tuple(records)

    def join(self, parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """The records of all batches' parts."""
        return tuple(record for part in parts for record in part)

    def condense(self, records: Sequence[Any]) -> tuple[Any, ...]:
        """All in one where states can be merged, else as they are."""
        return (self._whole(records),) if self._merged else tuple(records)

    def _whole(self, records: Sequence[Any]) -> Any:
        """A metric that has seen all the records' samples."""
        if not self._merged:
            whole = deepcopy(self._metric)
            for record in records:
                whole.update(*record)
            return whole
        whole = deepcopy(records[0])
        for record in records[1:]:
            whole.merge_state(record)
        return whole

    def value(self, records: Sequence[Any]) -> float:
        """What the metric makes of all the records' samples together.

        Raises:
            ConfigError: If that is no number.
        """
        with warnings.catch_warnings():
            # A merged metric has seen samples, though its own `update` was not called.
            warnings.filterwarnings("ignore", message=".*`compute` method.*before")
            found = self._whole(records).compute()
        if self.key is not None:
            if not hasattr(found, "keys") or self.key not in found:
                raise ConfigError(
                    f"{self.scale.name} has no value {self.key!r}: it came to {_kind(found)}."
                )
            found = found[self.key]
        try:
            return self.factor * float(found)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"{self.scale.name} must come to one number, got {_kind(found)}; choose one by "
                "key, or average the classes."
            ) from None


def outputs_and_labels(output: Any, batch: Batch) -> tuple[Any, Any]:
    """The default pairs: the network's outputs, and what the batch has beside the images."""
    return output, batch[1]


def _as_probabilities(metric: Any, predictions: Any) -> Any:
    """A batch's predictions, logits made probabilities where torchmetrics would make them such.

    Its classification metrics take values beyond 0 and 1 for logits; a part of a batch may by
    chance have none.
    """
    kind = type(metric).__name__
    if not isinstance(predictions, Tensor) or not predictions.is_floating_point():
        return predictions
    if bool(((predictions >= 0) & (predictions <= 1)).all()):
        return predictions
    if kind.startswith(("Binary", "Multilabel")):
        return predictions.sigmoid()
    if kind.startswith("Multiclass") and predictions.ndim > 1:
        return predictions.softmax(dim=1)
    return predictions


def _check_rows(side: Any, what: str, count: int) -> None:
    """Refuse predictions or targets that are not one for each sample: they could not be cut apart.

    Raises:
        ConfigError: If so.
    """
    if isinstance(side, Tensor):
        right = side.ndim > 0 and len(side) == count
        got = f"a tensor of shape {tuple(side.shape)}"
    else:
        records = isinstance(side, (list, tuple)) and all(hasattr(one, "keys") for one in side)
        right = not records or len(side) == count
        got = f"a list of {len(side)}" if records else ""
    if not right:
        raise ConfigError(
            f"A TorchMetric's {what} must have a place for each of the {count} samples, got {got}. "
            "Let forward and pairs keep the samples first, and don't flatten pixels."
        )


def _can_be_merged(metric: Any) -> bool:
    """Whether states of some samples each make the state of all of them.

    `merge_state` refuses metrics that need all states for each batch's value, and gets means wrong.
    """
    apart = getattr(metric, "full_state_update", True) is False
    if not apart or not hasattr(metric, "merge_state"):
        return False
    ways = [getattr(way, "__name__", "") for way in getattr(metric, "_reductions", {}).values()]
    return bool(ways) and set(ways) <= {"dim_zero_sum", "dim_zero_cat"}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if hasattr(value, "keys"):
        return f"values by the names {', '.join(map(str, value.keys()))}"
    return type(value).__name__


def as_metric(metric: Metric | ScoreFunction) -> Metric:
    """A metric as it is, or the mean of what a function gives for each sample.

    Raises:
        ConfigError: If it is one of torchmetrics' own, which is called in another way.
    """
    if hasattr(metric, "update") and hasattr(metric, "compute"):
        name = getattr(metric, "__name__", type(metric).__name__)
        raise ConfigError(
            f"metric: {name} is a metric of torchmetrics; give "
            f"autocompress.TorchMetric({name}(...))."
        )
    return metric if isinstance(metric, Metric) else MeanScore(metric)


def check_value(metric: Metric, value: float, where: str) -> None:
    """Refuse a value that is no finite number.

    Raises:
        ConfigError: If so.
    """
    if not isfinite(value):
        raise ConfigError(
            f"The metric ({metric.scale.name}) of {where} is {value}. It must be a finite number; "
            "check it on the baseline's outputs."
        )
