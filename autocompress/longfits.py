"""The long fine-tunings of a study: which were ordered, and what they came to.

Each is a trial of an Optuna study of its own, "<name>-finals", so that any worker can carry it out:
the network of a trial of the search, its parent, is fine-tuned as long as the winner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.slots import bring_back, withdraw
from autocompress.training import Recipe
from autocompress.trials import LENGTH, NAME, PARENT, RATE, SEED, WEIGHTS, counted, lost, stage_of

LOST = 2.0
"""A network whose fine-tuning failed has lost so many times what the gate allows."""

Order = tuple[str, int]
"""The trial that is to be fine-tuned at length, "<stage>/<number>", and with which seed."""


@dataclass(frozen=True)
class LongFit:
    """One long fine-tuning that has ended.

    Attributes:
        trial: Whose network it was, "<stage>/<number>".
        seed: Of the training.
        epochs: Its length, in passes over the training data.
        learning_rate: The peak of its schedule.
        before: The drop that the trial had, on the metric's scale.
        after: The drop that the network came to.
        bound: Upper confidence bound of that.
        weights: The artifact of the network's weights; None where the fine-tuning failed, which
            counts as a large drop.
        seconds: How long it took.
    """

    trial: str
    seed: int
    epochs: float
    learning_rate: float
    before: float
    after: float
    bound: float
    weights: str | None
    seconds: float

    def of_recipe(self, recipe: Recipe) -> bool:
        """Whether it was done as the winner's is now, which may be continued in another way."""
        own = (self.epochs, self.learning_rate)
        return own == (recipe.final_epochs, recipe.final_learning_rate)


def order(
    finals: Study, orders: Sequence[Order], recipe: Recipe, most: int | None = None
) -> list[Order]:
    """Let long fine-tunings wait for a worker, but for those that were ordered before.

    Only for the process that conducts the study, which has brought back those that were cut off.

    Args:
        finals: The study that holds them.
        orders: What is wanted, the most urgent first.
        recipe: How they are fine-tuned.
        most: How many of them, at most; None for all.

    Returns:
        Those that are new.
    """
    known = {_key(trial.user_attrs) for trial in counted(finals)}
    found = {one: _attrs(one, recipe) for one in orders}
    new = [one for one, attrs in found.items() if _key(attrs) not in known][:most]
    for one in new:
        finals.add_trial(create_trial(state=TrialState.WAITING, user_attrs=found[one]))
    return new


def _attrs(one: Order, recipe: Recipe) -> dict[str, Any]:
    label, seed = one
    return {
        NAME: f"{label} at length, seed {seed}",
        PARENT: label,
        SEED: seed,
        LENGTH: recipe.final_epochs,
        RATE: recipe.final_learning_rate,
    }


def withdraw_others(finals: Study, recipe: Recipe) -> list[FrozenTrial]:
    """Take back what was ordered with another length or learning rate than the winner's now.

    Only for the process that conducts the study.

    Returns:
        What waited, or was cut off and would have come again.
    """
    bring_back(finals)
    now = (recipe.final_epochs, recipe.final_learning_rate)
    waiting = finals.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    others = [t for t in waiting if (t.user_attrs[LENGTH], t.user_attrs[RATE]) != now]
    return withdraw(finals, others)


def _key(attrs: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(attrs[name] for name in (PARENT, SEED, LENGTH, RATE))


def long_fits(
    finals: Study, studies: Mapping[str, Study], delta: float, gate: float
) -> list[LongFit]:
    """Those that have ended, in the order in which they were ordered.

    Args:
        finals: The study that holds them.
        studies: The Optuna studies of the search by stage.
        delta: The tolerance, on the metric's scale.
        gate: The drop at which a trial stops.
    """
    ended = [trial for trial in counted(finals) if trial.state.is_finished()]
    if not ended:
        return []
    trials = {stage: study.get_trials(deepcopy=False) for stage, study in studies.items()}
    found = []
    for one in ended:
        stage, number = stage_of(one.user_attrs[PARENT]), one.user_attrs[PARENT].split("/")[1]
        found.append(_read(one, trials[stage][int(number)].values[0], delta, LOST * gate))
    return found


def _read(trial: FrozenTrial, before: float, delta: float, failed: float) -> LongFit:
    attrs, came = trial.user_attrs, trial.state == TrialState.COMPLETE
    duration = trial.duration
    return LongFit(
        trial=attrs[PARENT],
        seed=attrs[SEED],
        epochs=attrs[LENGTH],
        learning_rate=attrs[RATE],
        before=before,
        after=trial.values[0] if came else failed,
        bound=lost(trial, delta) if came else failed,
        weights=attrs[WEIGHTS] if came else None,
        seconds=0.0 if duration is None else round(duration.total_seconds(), 2),
    )


def by_trial(fits: Sequence[LongFit], recipe: Recipe) -> dict[str, list[list[LongFit]]]:
    """Of each trial its long fine-tunings, those of one length and learning rate together.

    Those that were done as the winner's is now come first, then the longest. Of the others those
    that failed are left out.

    Args:
        fits: Those that have ended.
        recipe: How the winner is fine-tuned now, which may have been changed.
    """
    found: dict[str, dict[tuple[float, float], list[LongFit]]] = {}
    for fit in sorted(fits, key=lambda fit: (fit.of_recipe(recipe), fit.epochs), reverse=True):
        if fit.weights is not None or fit.of_recipe(recipe):
            kinds = found.setdefault(fit.trial, {})
            kinds.setdefault((fit.epochs, fit.learning_rate), []).append(fit)
    return {label: list(kinds.values()) for label, kinds in found.items()}


def mean_bound(fits: Sequence[LongFit]) -> float:
    """The mean bound of a network's long fine-tunings."""
    return mean(fit.bound for fit in fits)
