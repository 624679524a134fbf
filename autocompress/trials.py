"""What a trial's constraint says: by how much it missed the tolerance, if at all.

The constraint is the upper confidence bound of the accuracy drop less delta, for a drop that was
measured on a few hundred images may be luck. Everything that asks whether a trial is good enough
asks here, so that search, report and dashboard never disagree.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial, Trial, TrialState


def set_constraint(trial: Trial, value: float) -> None:
    """Record `value <= 0` as the trial's constraint, in points.

    The old list key is what both Optuna 5's samplers and the dashboard read.
    """
    trial.study._storage.set_trial_system_attr(trial._trial_id, "constraints", [value])


def violation(trial: FrozenTrial) -> float:
    """By how many points a trial missed its constraint; 0 or less: not at all.

    A trial without a constraint, which ended before it was known, missed it by infinity.
    """
    return max(trial.constraints.values(), default=float("inf"))


def within_delta(trial: FrozenTrial) -> bool:
    """Whether a trial was carried out to its end and met its constraint."""
    return trial.state == TrialState.COMPLETE and violation(trial) <= 0
