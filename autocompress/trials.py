"""What is written on a trial, and what it says: which trials count, and which are good enough.

A trial's constraint is the upper confidence bound of its accuracy drop less delta, for a drop that
was measured on a few hundred images may be luck. Everything that asks whether a trial is good
enough asks here, so that search, report and dashboard never disagree.
"""

from __future__ import annotations

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

PARENT = "parent"
"""User attribute of a trial: "<stage>/<number>" of the trial whose weights it inherits."""
WEIGHTS = "weights"
"""User attribute of a trial that was carried out to its end: the artifact of its weights."""
INTERRUPTED = "interrupted"
"""User attribute of a trial that was cut off from outside, and by what; once it has failed, it does
not count."""
SEED = "seed"
"""User attribute of a trial: the seed of its fine-tuning."""
LENGTH, RATE = "epochs", "learning_rate"
"""User attributes of a long fine-tuning: passes over the training data, and the peak of the
schedule."""
EARLY = "early_drops"
"""User attribute of a trial: its accuracy drop before fine-tuning and at each rung it reached."""
CHECKPOINT = "checkpoint"
"""User attribute of a trial: the artifact of its latest checkpoint."""
NAME = "name"
"""User attribute of a trial: what it is called, for people who read a table of trials."""
RATIO = "compression_ratio"
"""User attribute of a trial: by how much it is cheaper than the baseline, for sorting and plots."""
TRACEBACK = "autocompress:traceback"
"""System attribute of a trial that failed: where, and how that was reached."""
EXCUSED = "excused"
"""User attribute of a study: numbers of trials that failed by a fault of their surroundings and do
not count either."""

EXTRA = "extra_trials"
"""User attribute of the annealing: how many trials it was given beyond those planned."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def counted(study: Study) -> list[FrozenTrial]:
    """The study's trials, those that wait too, without those that were cut off or excused."""
    excused = set(study.user_attrs.get(EXCUSED, ()))
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if not was_cut_off(trial) and trial.number not in excused
    ]


def was_cut_off(trial: FrozenTrial) -> bool:
    """Whether a trial was ended from outside; one that came to its end all the same was not."""
    return trial.state == TrialState.FAIL and INTERRUPTED in trial.user_attrs


def stage_of(label: str) -> str:
    """The stage in a trial's label, "<stage>/<number>"."""
    return label.partition("/")[0]


def has_weights(trial: FrozenTrial) -> bool:
    """Whether a trial was carried out to its end, so that its network can be had."""
    return trial.state == TrialState.COMPLETE and WEIGHTS in trial.user_attrs


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


def lost(trial: FrozenTrial, delta: float) -> float:
    """The upper bound of a finished trial's drop, by which it is judged, in points."""
    return delta + violation(trial)


def within_delta(trial: FrozenTrial) -> bool:
    """Whether a trial was carried out to its end and met its constraint."""
    return trial.state == TrialState.COMPLETE and violation(trial) <= 0
