"""Where a trial stops because it can't come near delta any more, learned from the study's trials.

A trial is looked at on part of the validation data before it is fine-tuned, and again at some
rungs on the way. What it has lost there is compared with what earlier trials of the stage had lost
at the same place and had lost in the end. Optuna's pruners compare drops among trials, and would
stop all that compress more than others do; and they don't serve studies of two objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from autocompress.batch import samples_in
from autocompress.evaluation import Evaluation, evaluate, metric_drop
from autocompress.scale import Scale
from autocompress.task import Task

GATE_IMAGES = 1000
"""About how many validation images a gate looks at."""

RUNGS = (1 / 3, 2 / 3)
"""Shares of a trial's length at which it is looked at, besides its beginning."""

LIKE = 0.5
"""Earlier trials that had lost at least this share of what a trial has lost are like it."""
ENOUGH = 3
"""How many trials like it must have been carried out before one is stopped."""
SLACK = 0.5
"""A trial may keep, of what it has lost, as little as this share of the least that any trial like
it kept."""


def usual_gate(scale: Scale, score: float, delta: float) -> float:
    """The drop before fine-tuning at which a trial stops, where the study file doesn't say.

    50 points; on another scale than percentages half of the baseline's score, or nine times that
    of an error, but ten times delta at least: a score near 0 says nothing of what may be lost.
    """
    if scale.unit == "%":
        return max(50.0, delta)
    return max(abs(score) * (0.5 if scale.higher_is_better else 9.0), 10 * delta)


@dataclass(frozen=True)
class Record:
    """What a trial that was carried out to its end had lost on its way.

    Attributes:
        early: Drop before fine-tuning and at each rung, on the gate's images.
        lost: Upper confidence bound of the drop at its end.
    """

    early: Sequence[float]
    lost: float


def least_loss(records: Sequence[Record], place: int, drop: float) -> float | None:
    """The least that a trial may lose at its end, by all that is known; None if too little is.

    Args:
        records: Trials of the same stage, and so of the same length.
        place: 0 for before fine-tuning, then 1 for the first rung and so on.
        drop: What the trial has lost there.

    Returns:
        `SLACK` times the share of its early drop that the luckiest of the trials like it
        kept, of `drop`.
    """
    if drop <= 0:
        return None
    known = [record for record in records if len(record.early) > place]
    like = [record for record in known if record.early[place] >= LIKE * drop]
    if len(like) < ENOUGH:
        return None
    kept = min(record.lost / record.early[place] for record in like)
    return SLACK * kept * drop


class Gate:
    """Looks at a trial's network before fine-tuning and at rungs, and may stop the trial.

    Args:
        task: Gives the validation data.
        baseline: The baseline's scores on them.
        records: How earlier trials of the stage went.
        most: The most that may be lost before fine-tuning.
        useful: A trial that loses more than this at its end is of no use.
        drops: What it had lost at the places where it was looked at before it was cut off.

    Attributes:
        drops: What the network had lost before fine-tuning and at each rung so far.
        reason: Why the trial was stopped, if it was.
        lost: What then counts as lost.
    """

    def __init__(
        self,
        task: Task,
        baseline: Evaluation,
        records: Sequence[Record],
        *,
        most: float,
        useful: float,
        drops: Sequence[float] = (),
    ) -> None:
        self._task, self._baseline, self._records = task, baseline, records
        self._most, self._useful = most, useful
        self._batches = gate_batches(task)
        self.drops: list[float] = list(drops)
        self.reason: str | None = None
        self.lost = 0.0

    def closes(self, model: nn.Module, place: int) -> bool:
        """Whether the trial must stop here.

        Args:
            model: Its network.
            place: 0 for before fine-tuning, then 1 for the first rung and so on.
        """
        early = evaluate(model, self._task, self._task.val, self._batches)
        drop = metric_drop(self._baseline, early)
        self.drops[place:] = [drop]
        when = f"after {100 * RUNGS[place - 1]:.0f} % of the" if place else "before"
        scale = self._task.scale
        words = f"{scale.difference(drop)} lost {when} fine-tuning"
        least = least_loss(self._records, place, drop)
        if place == 0 and drop > self._most:
            self.reason = f"{words} > gate {self._most:.4g}"
        elif least is not None and least > self._useful:
            self.reason = (
                f"{words}: earlier trials tell that {scale.number(least)} or more would remain"
            )
        self.lost = max(drop, least or 0.0)
        return self.reason is not None


def gate_batches(task: Task) -> int:
    """How many validation batches make about `GATE_IMAGES`."""
    size = max(1, samples_in(next(iter(task.val))))
    return max(1, min(len(task.val), -(-GATE_IMAGES // size)))
