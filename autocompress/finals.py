"""The end of the search: which trials are fine-tuned at length, and which network is handed out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from optuna.trial import FrozenTrial
from torch import nn

from autocompress.errors import DamagedArtifact
from autocompress.evaluation import Evaluation, evaluate
from autocompress.longfits import LongFit, Order, by_trial, mean_bound
from autocompress.objective import Bench, load_trial_model
from autocompress.outlook import Outlook
from autocompress.plan import Plan
from autocompress.progress import Display
from autocompress.training import Recipe
from autocompress.trials import has_weights, lost, stage_of, within_delta

ROUND = 5
"""How many long fine-tunings there are at most, those with a second seed included, before trials go
on or the search ends. What idle workers begin with both seeds at the same time counts once."""
CLEARLY = 0.97
"""Where one is within delta, only a network that costs less than this share of it is next."""


@dataclass(frozen=True)
class Finalist:
    """A network that may be handed out.

    Attributes:
        label: The trial that it came from.
        model: The network with its final weights.
        plan: What was done to it.
        val: Its scores on the validation data.
        drop: The drop on them that it is judged by, on the metric's scale.
        expected: The drop that new images should show: the mean of all that the plan came to. The
            better of two seeds is chosen on these very images, which flatters it.
        bound: Upper confidence bound of the expected drop.
        epochs: Length of the final fine-tuning that its weights had.
        seeds: The bounds that the final fine-tuning reached, by its seed.
    """

    label: str
    model: nn.Module
    plan: Plan
    val: Evaluation
    drop: float
    expected: float
    bound: float
    epochs: float = 0.0
    seeds: Mapping[int, float] = field(default_factory=dict)


def choose_finalists(
    bench: Bench, labelled: Mapping[str, FrozenTrial], display: Display
) -> list[Finalist]:
    """The cheapest network within delta, and the second cheapest.

    Where there are long fine-tunings, the winner had two, and the mean of their bounds is within
    delta: a plan that meets it by one seed's luck is none. Where a trial was within delta already,
    the weights that it had then are handed out if they are better, unless its long fine-tuning
    tells that it was lucky.

    Args:
        bench: The baseline, the studies of all stages, and the long fine-tunings.
        labelled: "<stage>/<number>" to each trial that has weights.
        display: Told what can't be read.
    """
    finals = Finals.of(bench, labelled)
    found: list[Finalist] = []
    for label in sorted(labelled, key=lambda label: labelled[label].values[1]):
        if len(found) == 2:
            break
        ends = [fit for fit in finals.fits(label) if fit.weights is not None]
        options: list[Finalist] = []
        if finals.met(label):
            options += [one for fit in ends if (one := _after(bench, fit, display)) is not None]
        if _stands(labelled[label], mean_bound(ends) if ends else None, bench.delta):
            options += _before(bench, label, display)
        options = [option for option in options if option.bound <= bench.delta]
        if options:
            found.append(_fair(min(options, key=lambda option: option.bound), ends))
    return found


def _fair(chosen: Finalist, ends: Sequence[LongFit]) -> Finalist:
    """The network that was chosen, and what to expect of it by all that its plan came to."""
    if not ends:
        return chosen
    expected = statistics.mean(fit.after for fit in ends)
    bound = mean_bound(ends)
    if not chosen.epochs:
        expected, bound = _both(chosen.drop, expected), _both(chosen.bound, bound)
    seeds = {fit.seed: fit.bound for fit in ends}
    return replace(chosen, expected=expected, bound=bound, seeds=seeds)


def standing(bench: Bench) -> tuple[float, float] | None:
    """The cheapest network that is surely within delta now: its cost, in the objective's unit, and
    what it leaves of delta, in points; None where none is.

    As `choose_finalists` would hand it out now, though no network is read.
    """
    delta, labelled = bench.delta, candidates(bench)
    finals = Finals.of(bench, labelled)
    found: list[tuple[float, float]] = []
    for label, trial in labelled.items():
        ends = [fit for fit in finals.fits(label) if fit.weights is not None]
        end, own = mean_bound(ends) if ends else None, lost(trial, delta)
        # Weights are chosen by the first figure, and told to lose the second.
        options = [(fit.bound, mean_bound(ends)) for fit in ends] if finals.met(label) else []
        if _stands(trial, end, delta):
            options.append((own, own if end is None else _both(own, end)))
        options = [option for option in options if option[0] <= delta]
        if options:
            found.append((trial.values[1], min(options)[1]))
    if not found:
        return None
    cost, bound = min(found)
    return cost, delta - bound


def _stands(trial: FrozenTrial, end: float | None, delta: float) -> bool:
    """Whether a trial is within delta as it is.

    Of many trials near delta some are within by luck; where one's long fine-tuning came to a bound
    (None: it had none), the mean of both must be within.
    """
    bound = lost(trial, delta)
    return within_delta(trial) and (end is None or _both(bound, end) <= delta)


def _both(own: float, end: float) -> float:
    """What a trial's own weights and its long fine-tuning tell together, of a drop or a bound."""
    return (own + end) / 2


def candidates(bench: Bench) -> dict[str, FrozenTrial]:
    """ "<stage>/<number>" to each trial of all stages that has weights."""
    return {
        f"{stage}/{trial.number}": trial
        for stage, study in bench.studies.items()
        for trial in study.get_trials(deepcopy=False)
        if has_weights(trial)
    }


class Finals:
    """Says which trials should be fine-tuned at length next.

    The cheapest that promise to come within delta by that. What the first ones won back tells what
    others may have lost: after a success a cheaper trial is next, after a failure one that lost
    less. When there is no cheaper one, the success is repeated with a second seed; if that spoils
    it, the search goes on.

    Args:
        labelled: "<stage>/<number>" to each trial that has weights.
        outlook: What is expected of trials.
        seed: The first seed; the second is the next number.
        fits: The long fine-tunings that have ended.
        recipe: How the winner is fine-tuned now. What was fine-tuned in another way may be the
            winner, too, but is wanted again.
    """

    def __init__(
        self,
        labelled: Mapping[str, FrozenTrial],
        outlook: Outlook,
        seed: int,
        fits: Sequence[LongFit],
        recipe: Recipe,
    ) -> None:
        self._labelled, self._outlook = labelled, outlook
        self._seeds = (seed, seed + 1)
        self._known = by_trial(fits, recipe)
        self._fits = {
            label: kinds[0] for label, kinds in self._known.items() if kinds[0][0].of_recipe(recipe)
        }

    @classmethod
    def of(cls, bench: Bench, labelled: Mapping[str, FrozenTrial] | None = None) -> Finals:
        """Those of a study as it is now."""
        known = candidates(bench) if labelled is None else labelled
        return cls(known, bench.outlook, bench.seed, bench.long_fits, bench.finetune)

    def wanted(self, room: int, again: bool = False, sure: bool = False) -> list[Order]:
        """What to fine-tune at length next.

        Args:
            room: How many can be fine-tuned at the same time.
            again: Whether the best is repeated with the second seed, where none is cheaper, or
                there is room left; then so are those that come next, should this one fail, and
                what isn't fine-tuned yet is begun with both seeds.
            sure: Whether only trials count that were within delta before, while none is by its long
                fine-tuning.
        """
        met = self._met_now()
        best = met[0] if met else None
        least = float("inf") if best is None else CLEARLY * self._cost(best)
        most = min(map(self._cost, filter(self.met, self._known)), default=float("inf"))
        sure = sure and best is None
        promising = [
            label
            for label, trial in self._labelled.items()
            if label not in self._fits
            and self._cost(label) < least
            and self._cost(label) <= most
            and (within_delta(trial) if sure else self._promises(label))
        ]
        first, second = self._seeds
        promising = sorted(promising, key=self._cost)[:room]
        orders = [(label, first) for label in promising]
        if again and (best is None or len(self._fits[best]) == 1):
            once = [label for label in met if len(self._fits[label]) == 1]
            orders += [(label, second) for label in [*once, *promising]]
        return orders[:room]

    def unsure(self) -> list[Order]:
        """The second seed of the cheapest that is within delta now, where it had one only."""
        best = self._met_now()[:1]
        return [(label, self._seeds[1]) for label in best if len(self._fits[label]) == 1]

    def fits(self, label: str) -> Sequence[LongFit]:
        """The long fine-tunings by which a trial is judged: of those of one kind that are within
        delta the first, as `by_trial` puts them, else of all."""
        kinds = self._known.get(label, [])
        return next(filter(self._within, kinds), kinds[0] if kinds else ())

    def met(self, label: str) -> bool:
        """Whether a trial is within delta by its long fine-tunings."""
        return self._within(self.fits(label))

    def _within(self, fits: Sequence[LongFit]) -> bool:
        return bool(fits) and mean_bound(fits) <= self._outlook.delta

    def _met_now(self) -> list[str]:
        """The trials that are within delta by long fine-tunings done as the winner's is now, the
        cheapest first."""
        met = [label for label, fits in self._fits.items() if self._within(fits)]
        return sorted(met, key=self._cost)

    def _cost(self, label: str) -> float:
        return float(self._labelled[label].values[1])

    def _promises(self, label: str) -> bool:
        return self._outlook.shortfall(stage_of(label), self._labelled[label]) <= 0


def _before(bench: Bench, label: str, display: Display) -> list[Finalist]:
    """A trial's network as the trial left it; none if its weights can't be read any more."""
    try:
        model, plan = load_trial_model(bench, label)
    except DamagedArtifact as error:
        display.say(f"{label} is passed over: {error}")
        return []
    val = evaluate(model, bench.task, bench.task.val)
    drop, bound = bench.judge(model, val)
    return [Finalist(label, model, plan, val, drop, drop, bound)]


def _after(bench: Bench, fit: LongFit, display: Display) -> Finalist | None:
    """A network after its long fine-tuning; None if its weights can't be read any more."""
    assert fit.weights is not None, "one that is within delta has weights"
    try:
        model, plan = load_trial_model(bench, fit.trial, fit.weights)
    except DamagedArtifact as error:
        display.say(f"{fit.trial} is passed over: {error}")
        return None
    val = evaluate(model, bench.task, bench.task.val)
    seeds = {fit.seed: fit.bound}
    return Finalist(fit.trial, model, plan, val, fit.after, fit.after, fit.bound, fit.epochs, seeds)
