"""What a trial will lose once it is fine-tuned as long as the winner, learned within the study.

A trial's fine-tuning is short and the winner's is long, and what the difference wins back is most
of what there is to win: a ResNet-20 of half the size had lost 1.5 points after one epoch and 0.3
after five more, so a search for what is within delta after one epoch ends at twice the size that
it could have. But how much is won back differs from network to network. So there is a prior for it
by the lengths alone, which what the study itself has seen corrects.

    bound at the end = margin + kept * drop - gained,    margin = bound - drop

`kept` is the share of a trial's drop that is left, and `gained` what every network gains whatever
it had lost (much where the baseline was not trained to its end, or learns from more images now);
both over the steps from the trial's length to the winner's. A rise is kept whole. The margin, which
the confidence asks for, stays: it is that of the images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from optuna.study import Study
from optuna.trial import FrozenTrial

from autocompress.longfits import LongFit, by_trial, mean_bound
from autocompress.training import Recipe
from autocompress.trials import PARENT, has_weights, lost, stage_of

EPOCHS = "epochs"
"""User attribute of a study: passes over the training data in each of its trials."""

RECOVERY = 0.4
"""A fine-tuning `r` times as long leaves `r ** -RECOVERY` of the drop, before more is known: 0.63
at 3.2 times. Measured there: 0.65 on small Fashion-MNIST studies, 0.5 on a CIFAR ResNet-20; at
twice the length 0.55 on digits, and 0.15 to 0.5 on larger Fashion-MNIST studies."""
MOST_TIMES = 30.0
"""Beyond that, and after no fine-tuning at all, the prior expects no more."""
LEAST_KEPT = 0.15
"""No fine-tuning makes us hope for less in one step."""
NEARLY = 1.5
"""A trial that is expected to lose more than this many times delta in the end is of no use."""
LEAST_USEFUL = 2.5
"""Nor is one that lost more than this many times delta, where that is more."""


@dataclass(frozen=True)
class Step:
    """From one length of fine-tuning to the next longer one.

    Attributes:
        longer: How many times as long the next one is.
        pairs: Drops of networks before and after it, in points.
    """

    longer: float
    pairs: tuple[tuple[float, float], ...] = ()

    def learned(self, delta: float) -> tuple[float, float]:
        """The share of a drop that is left, 0 to 1, and what is gained whatever was lost, points.

        Least squares on the pairs. The prior of the share weighs as much as one network that had
        lost delta, and that of the gain, nothing, as much as one network.
        """
        if self.longer <= 1:
            return 1.0, 0.0
        weight = (delta or 1.0) ** 2
        prior = math.pow(self.longer, -RECOVERY)
        # after = kept * drop - gained, where a rise stays and adds to what is after.
        drops = [max(before, 0.0) for before, _ in self.pairs]
        ends = [after - min(before, 0.0) for before, after in self.pairs]
        squares = weight + sum(drop**2 for drop in drops)
        products = weight * prior + sum(d * e for d, e in zip(drops, ends, strict=True))
        counted = 1 + len(drops)
        determinant = squares * counted - sum(drops) ** 2
        gained = max(0.0, (sum(drops) * products - squares * sum(ends)) / determinant)
        kept = (products + gained * sum(drops)) / squares
        return min(1.0, max(LEAST_KEPT, kept)), gained


@dataclass(frozen=True)
class Outlook:
    """What a study expects of its trials.

    Attributes:
        delta: The tolerance, in points.
        steps: Stage to the step that follows its trials, in order; no entry where none does.
        ends: Trials that were fine-tuned at length, "<stage>/<number>", and the bound of the drop
            that they came to, its mean over seeds; where the winner's length is another by now, the
            bound that is expected by that.
    """

    delta: float
    steps: Mapping[str, Step]
    ends: Mapping[str, float] = field(default_factory=dict)

    def learned(self, stage: str) -> tuple[float, float]:
        """Share of a trial's drop that is left in the end, 0 to 1, and what it gains besides."""
        stages = list(self.steps)
        return self._over(stages[stages.index(stage) :] if stage in stages else [])

    def _over(self, stages: Sequence[str]) -> tuple[float, float]:
        """The same over some steps, one after the other."""
        kept, gained = 1.0, 0.0
        for stage in stages:
            share, gain = self.steps[stage].learned(self.delta)
            kept, gained = share * kept, share * gained + gain
        return kept, gained

    def bound(self, stage: str, drop: float, margin: float) -> float:
        """The bound of a drop that is expected in the end, in points.

        Args:
            stage: That of the trial.
            drop: What the trial lost, in points.
            margin: By how much its bound is larger.
        """
        return margin + _after(drop, *self.learned(stage))

    def expected(self, stage: str, trial: FrozenTrial) -> float:
        """The bound that is expected of a finished trial, or that it came to; that of the trial
        itself if it stopped early, for then its drop is no measure."""
        label = f"{stage}/{trial.number}"
        if label in self.ends:
            return self.ends[label]
        after = lost(trial, self.delta)
        if not has_weights(trial) or not math.isfinite(after):
            return after
        return self.bound(stage, trial.values[0], after - trial.values[0])

    def shortfall(self, stage: str, trial: FrozenTrial) -> float:
        """By how many points a finished trial is expected to miss delta; 0 or less: not at all."""
        return self.expected(stage, trial) - self.delta

    def useful(self, stage: str) -> float:
        """The most that a trial may lose to be of any use, in points."""
        kept, gained = self.learned(stage)
        return max(LEAST_USEFUL * self.delta, (NEARLY * self.delta + gained) / kept)

    def having_seen(self, stage: str, before: float, after: float) -> Outlook:
        """The outlook that knows of one more network, fine-tuned as long as the winner.

        Args:
            stage: That of the trial.
            before: What the trial had lost, in points.
            after: What it lost in the end.
        """
        if stage not in self.steps:
            return self
        stages = list(self.steps)
        before = _after(before, *self._over(stages[stages.index(stage) : -1]))
        last = stages[-1]
        step = self.steps[last]
        pairs = (*step.pairs, (before, after))
        return replace(self, steps={**self.steps, last: replace(step, pairs=pairs)})


def annealing_epochs(recipe: Recipe) -> float:
    """Passes over the training data in a trial of the annealing.

    The geometric mean of an exploration trial's and the winner's, for a plan that misses delta in a
    short trial may meet it at the end: few trials at a middle length tell better which.
    """
    return max(recipe.epochs, math.sqrt(recipe.epochs * recipe.final_epochs))


def outlook_of(
    studies: Mapping[str, Study],
    recipe: Recipe,
    delta: float,
    annealed: bool,
    fits: Sequence[LongFit] = (),
) -> Outlook:
    """What a study expects of its trials by all that it has seen.

    Args:
        studies: The Optuna studies by stage, as far as they exist.
        recipe: The lengths of fine-tuning.
        delta: The tolerance, in points.
        annealed: Whether an annealing follows, or followed, the exploration.
        fits: The long fine-tunings that have ended, of other lengths, too.
    """
    found = Outlook(delta, _steps(studies, recipe, annealed))
    ends = {}
    for label, kinds in by_trial(fits, recipe).items():
        known = [end for fit in kinds[0] if (end := _as_long_as_now(fit, recipe)) is not None]
        # One that failed tells nothing of others.
        for fit in (one for one in known if one.weights is not None):
            found = found.having_seen(stage_of(label), fit.before, fit.after)
        if known:
            ends[label] = mean_bound(known)
    return replace(found, ends=ends)


def _as_long_as_now(fit: LongFit, recipe: Recipe) -> LongFit | None:
    """What a long fine-tuning would have come to at the winner's length of now.

    None where that has the same length, but another learning rate, or is none at all.
    """
    if fit.of_recipe(recipe):
        return fit
    if fit.epochs == recipe.final_epochs or not recipe.final_epochs:
        return None
    kept = max(LEAST_KEPT, math.pow(recipe.final_epochs / fit.epochs, -RECOVERY))
    after = _after(fit.after, kept, 0.0)
    return replace(fit, after=after, bound=after + fit.bound - fit.after)


def _steps(studies: Mapping[str, Study], recipe: Recipe, annealed: bool) -> dict[str, Step]:
    """Stage to the step that follows its trials, by what the trials alone tell."""
    annealing = studies.get("annealing")
    if not annealed and annealing is None:
        return {"exploration": Step(_times(recipe.final_epochs, recipe.epochs))}
    middle = annealing_epochs(recipe)
    if annealing is not None:
        middle = float(annealing.user_attrs.get(EPOCHS, middle))
    return {
        "exploration": Step(_times(middle, recipe.epochs), _ripened(studies)),
        "annealing": Step(_times(recipe.final_epochs, middle)),
    }


def _after(drop: float, kept: float, gained: float) -> float:
    """What a drop comes to."""
    return (kept * drop if drop > 0 else drop) - gained


def _times(longer: float, shorter: float) -> float:
    """How many times as long a fine-tuning is, as far as that is of use."""
    if longer <= shorter:
        return 1.0
    return min(MOST_TIMES, longer / shorter) if shorter > 0 else MOST_TIMES


def _ripened(studies: Mapping[str, Study]) -> tuple[tuple[float, float], ...]:
    """Drops of the exploration's trials whose very plans the annealing fine-tuned further."""
    annealing = studies.get("annealing")
    if annealing is None or "exploration" not in studies:
        return ()
    elders = {f"exploration/{t.number}": t for t in studies["exploration"].get_trials(False)}
    pairs = []
    for trial in annealing.get_trials(deepcopy=False):
        elder = elders.get(trial.user_attrs.get(PARENT, ""))
        if not has_weights(trial) or elder is None:
            continue
        if trial.user_attrs.get("plan_digest") == elder.user_attrs.get("plan_digest"):
            pairs.append((elder.values[0], trial.values[0]))
    return tuple(pairs)
