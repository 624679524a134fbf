"""How candidates are proposed: Optuna samplers over the space's own parameters.

`KnobSampler` and `AnnealingSampler` propose whole plans, decoded from a few knobs through the layer
table, and answer Optuna with the parameters of every layer. All that they remember is on the
trials, so that any process can go on from the database alone.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.plan import Plan
from autocompress.space import (
    STAGES,
    Knobs,
    Option,
    SearchSpace,
    allocate,
    next_seed,
)

KNOBS = "autocompress:knobs"
"""System attribute of a trial: the knobs that its plan was decoded from."""
SEED_INDEX = "autocompress:seed_index"
"""System attribute of a trial: which of the seeds it tries."""
PARENT = "parent"
"""User attribute of a trial: "<stage>/<number>" of the trial whose weights it inherits."""
WEIGHTS = "weights"
"""User attribute of a trial that was carried out to its end: the artifact of its weights."""
INTERRUPTED = "interrupted"
"""User attribute of a trial that was cut off from outside; it does not count."""
EXCUSED = "excused"
"""User attribute of a study: numbers of trials that failed by a fault of their surroundings and do
not count either."""

REACH = 0.2
"""How far around the best knobs new ones are sought, as a share of their ranges."""

TILT_NOISE = 0.1
"""Spread of the logarithms of the error weights of a child in annealing. At 0.5 children of a CIFAR
ResNet-20 stood 7 to 14 points lower before fine-tuning than at 0."""

NEARLY = 2.5
"""A trial that lost at most this many times delta may come within it by more fine-tuning."""

AIM = 1.3
"""Drop that annealing aims at, in times delta, where the winner is fine-tuned for longer than a
trial: on a CIFAR ResNet-20 that won back 0.3 of a trial's drop."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def counted(study: Study) -> list[FrozenTrial]:
    """The study's trials without those that were cut off or excused."""
    excused = set(study.user_attrs.get(EXCUSED, ()))
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if INTERRUPTED not in trial.user_attrs and trial.number not in excused
    ]


class PlanSampler(BaseSampler):
    """A sampler that proposes whole plans and answers with the parameters of every layer.

    A subclass implements `propose`. Where the study has the plan already, another is proposed; if
    that is known too, layers drawn by lot move to a neighbouring rank until the plan is new.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._independent = RandomSampler(seed=seed)

    @abstractmethod
    def propose(
        self, study: Study, trial: FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Option]:
        """An option for every layer."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The whole space: a plan is proposed at once."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the proposed plan."""
        seen = {
            other.user_attrs.get("plan_digest")
            for other in counted(study)
            if other.number != trial.number
        }
        picked: dict[str, Option] = {}
        for attempt in range(16):
            rng = np.random.default_rng(trial_seed(self._seed, trial.number, attempt))
            if attempt < 4:
                picked = self.propose(study, trial, rng)
            else:
                picked = self._space.neighbour(picked, rng)
            if self._space.plan(picked).digest not in seen:
                break
        return self._space.params(picked)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A random value, for a parameter that is not in the space."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


class KnobSampler(PlanSampler):
    """Exploration: TPE over about a dozen knobs, after seeds along the budget line.

    The seeds find the least budget within delta by bisection. Later trials have a budget just
    under that, for a larger one can't win and a far smaller one is wasted, and other knobs within
    reach of that trial's, where TPE chooses once it knows a few trials there. (Over the whole range
    TPE went to the corners, of which it knew nothing, and lost trial after trial.) Eleven knobs
    decoded through a cheap table of layer errors found in 30 trials what TPE over the parameters of
    30 layers did not find in 300. The inner study of the knobs is rebuilt from the trials' system
    attributes whenever a proposal is wanted.
    """

    def __init__(self, space: SearchSpace, seed: int, seed_count: int = 8) -> None:
        super().__init__(space, seed)
        self._seed_count = seed_count

    def propose(
        self, study: Study, trial: FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Option]:
        """Decode the next seed, or what TPE makes of the finished trials."""
        storage, trial_id = study._storage, trial._trial_id
        others = [t for t in counted(study) if t.number != trial.number]
        index = self._next_seed(others)
        own = storage.get_trial_system_attrs(trial_id)
        if index is not None and SEED_INDEX not in own:
            tried = _budgets([t for t in others if _is_plain_seed(t)])
            knobs = next_seed(self._space, index, self._seed_count, tried)
            storage.set_trial_system_attr(trial_id, SEED_INDEX, index)
        else:
            knobs = self._near_the_best(others, study.directions, rng)
        storage.set_trial_system_attr(trial_id, KNOBS, knobs.to_params(self._space))
        return allocate(self._space, knobs)

    def _next_seed(self, others: Sequence[FrozenTrial]) -> int | None:
        """The first seed that no trial has tried; a trial that was cut off gives its seed back."""
        taken = {other.system_attrs.get(SEED_INDEX) for other in others}
        return next((i for i in range(self._seed_count) if i not in taken), None)

    def _near_the_best(
        self,
        others: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
        rng: np.random.Generator,
    ) -> Knobs:
        known = [t for t in others if t.state in FINISHED and t.constraints and _knobs(t)]
        met = [t for t in known if _violation(t) <= 0]
        ranges = Knobs.distributions(self._space)
        budget = ranges.pop("budget")
        if met:
            centre = _knobs(min(met, key=lambda t: float(_knobs(t)["budget"])))
            low, high = 0.82 * centre["budget"], 0.97 * centre["budget"]
        elif known:
            centre = _knobs(min(known, key=_violation))
            low, high = centre["budget"], 1.25 * centre["budget"]
        else:
            centre = {key: (full.low + full.high) / 2 for key, full in ranges.items()}
            low, high = budget.low, budget.high
        near = {key: _around(centre[key], full) for key, full in ranges.items()}
        params = self._ask(known, directions, near, rng)
        params["budget"] = float(np.clip(rng.uniform(low, high), budget.low, budget.high))
        return Knobs.from_params(params)

    def _ask(
        self,
        known: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
        near: Mapping[str, FloatDistribution],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """What TPE makes of the trials whose knobs lie in `near`."""
        sampler = TPESampler(n_startup_trials=5, seed=int(rng.integers(2**31)))
        inner = optuna.create_study(directions=list(directions), sampler=sampler)
        for other in known:
            knobs = _knobs(other)
            if knobs["rule"] != "knapsack":
                continue
            if all(key in knobs and one.low <= knobs[key] <= one.high for key, one in near.items()):
                inner.add_trial(
                    optuna.create_trial(
                        state=other.state,
                        values=other.values,
                        params={key: knobs[key] for key in near},
                        distributions=dict(near),
                        constraints=other.constraints,
                    )
                )
        return dict(inner.ask(dict(near)).params)


@dataclass(frozen=True)
class Parent:
    """A trial whose weights a child may inherit.

    Attributes:
        label: "<stage>/<number>".
        plan: What it did to each layer.
        drop: Its accuracy drop, in points.
        cost: Its cost, in the objective's unit.
    """

    label: str
    plan: Plan
    drop: float
    cost: float


class AnnealingSampler(PlanSampler):
    """Annealing: children of the cheapest trials within the aim, ever nearer to them.

    A child's budget is what would bring its parent's drop to the aim, on a line through the
    finished children: so many points for each halving of the cost. The allocator shares the budget
    out in a narrow band around the parent. Every second child, where there is such a parent, is
    instead one of a cheaper trial of the exploration that missed the aim narrowly: it keeps the
    parent's plan, or nearly so, and is only fine-tuned further, for a trial of the annealing is
    longer than one of the exploration.

    Args:
        space: The space around the exploration's best trials.
        seed: The study's seed.
        delta: The tolerance, in points.
        aim: The drop that children aim at, in points; delta, or more where the winner is
            fine-tuned for longer than they are.
        parents: The exploration's trials that may be parents.
        rounds: The band halves from round to round.
        trials: Number of trials of the whole annealing.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        *,
        delta: float,
        parents: Sequence[Parent],
        aim: float | None = None,
        rounds: int = 3,
        trials: int = 15,
    ) -> None:
        super().__init__(space, seed)
        self._delta = delta
        self._aim = delta if aim is None else aim
        self._parents = list(parents)
        self._rounds = rounds
        self._trials = max(trials, 1)

    def propose(
        self, study: Study, trial: FrozenTrial, rng: np.random.Generator
    ) -> dict[str, Option]:
        """Decode a child of one of the best trials so far."""
        finished = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.state in FINISHED and other.number != trial.number
        ]
        pool = self._parents + [
            Parent(
                f"annealing/{t.number}",
                Plan.from_json(t.user_attrs["plan"]),
                t.values[0],
                t.values[1],
            )
            for t in finished
            if t.state == TrialState.COMPLETE and WEIGHTS in t.user_attrs
        ]
        ripe = self._unfinished(pool, finished, trial.number) if trial.number % 2 == 0 else None
        slope = self._slope(pool, finished)
        parent = ripe or self._choose(pool, slope, rng)
        turn = min(self._rounds - 1, len(finished) * self._rounds // self._trials)
        band = 0.5 / 2**turn
        near = self._space.narrow([parent.plan], band)
        step, picked = 1.0, near.pick(parent.plan)
        if ripe is None:
            step = self._share(parent, slope) * math.exp(rng.normal(0.0, 0.05))
            step = float(np.clip(step, 0.55, 0.97))
            knobs = Knobs(
                budget=near.cost(picked) / near.baseline_cost * step,
                sharpness=float(np.clip(rng.normal(2.0, 0.2), 1.0, 3.0)),
                stages=tuple(rng.normal(0.0, TILT_NOISE, STAGES)),
                methods={method: float(rng.normal(0.0, TILT_NOISE)) for method in near.methods},
            )
            picked = allocate(near, knobs)
        storage, trial_id = study._storage, trial._trial_id
        storage.set_trial_user_attr(trial_id, PARENT, parent.label)
        record = {"step": step, "band": band, "ripening": ripe is not None}
        storage.set_trial_system_attr(trial_id, KNOBS, record)
        return picked

    def _choose(self, pool: Sequence[Parent], slope: float, rng: np.random.Generator) -> Parent:
        """The trial within the aim whose child promises to be the cheapest, at times the second or
        third where theirs promise nearly as much; where none is within the aim, the nearest."""
        promise = {p: p.cost * self._share(p, slope) for p in pool if p.drop <= self._aim}
        if not promise:
            return min(pool, key=lambda p: p.drop)
        best = min(promise.values())
        chosen = sorted((p for p in promise if promise[p] <= 1.1 * best), key=promise.__getitem__)
        odds = np.array([0.6, 0.25, 0.15])[: len(chosen)]
        return chosen[int(rng.choice(len(odds), p=odds / odds.sum()))]

    def _unfinished(
        self, pool: Sequence[Parent], finished: Sequence[FrozenTrial], number: int
    ) -> Parent | None:
        """A trial of the exploration beyond the aim, but not far, that longer fine-tuning may make
        the cheapest one.

        It is the nearest or the cheapest of them, in turn; none that was fine-tuned further before.
        """
        least = min((p.cost for p in pool if p.drop <= self._aim), default=math.inf)
        ripened = {t.user_attrs.get(PARENT) for t in finished if _is_ripened(t)}
        near = [
            p
            for p in self._parents
            if self._aim < p.drop <= NEARLY * self._delta
            and p.cost < 0.97 * least
            and p.label not in ripened
        ]
        if number // 2 % 2 == 0:
            return min(near, key=lambda p: p.drop, default=None)
        return min(near, key=lambda p: (p.cost, p.drop), default=None)

    def _slope(self, pool: Sequence[Parent], finished: Sequence[FrozenTrial]) -> float:
        """Points that a child loses for each unit of the logarithm of what it saves.

        Ridge regression through the origin on the finished children, towards four times delta.
        """
        known = {p.label: p for p in pool}
        least = self._delta or 1.0
        squares = 0.05
        products = 4.0 * least * squares
        for child in finished:
            elder = known.get(child.user_attrs.get(PARENT, ""))
            if child.state != TrialState.COMPLETE or elder is None or _is_ripened(child):
                continue
            saving = math.log(elder.cost / child.values[1])
            products += saving * (child.values[0] - elder.drop)
            squares += saving**2
        return max(products / squares, least)

    def _share(self, parent: Parent, slope: float) -> float:
        """Share of its parent's cost at which a child is expected to reach the aim."""
        return math.exp(min(0.0, parent.drop - self._aim) / slope)


def _is_ripened(trial: FrozenTrial) -> bool:
    """Whether a trial of the annealing has its parent's plan, or nearly so."""
    return bool(_knobs(trial).get("ripening"))


def _budgets(trials: Sequence[FrozenTrial]) -> list[tuple[float, bool]]:
    """Budget of each finished trial and whether it stayed within delta."""
    return [
        (_knobs(t)["budget"], _violation(t) <= 0)
        for t in trials
        if t.state in FINISHED and t.constraints and _knobs(t)
    ]


def _knobs(trial: FrozenTrial) -> dict[str, Any]:
    found: dict[str, Any] = trial.system_attrs.get(KNOBS, {})
    return found


def _violation(trial: FrozenTrial) -> float:
    """By how much a trial missed its constraint; 0 or less: not at all."""
    return max(trial.constraints.values())


def _around(centre: float, full: FloatDistribution) -> FloatDistribution:
    """The part of a range that is within reach of a point in it."""
    reach = REACH * (full.high - full.low)
    middle = min(max(centre, full.low), full.high)
    return FloatDistribution(max(full.low, middle - reach), min(full.high, middle + reach))


def _is_plain_seed(trial: FrozenTrial) -> bool:
    knobs = _knobs(trial)
    steered = any(knobs.get(f"stage_{stage}") != 0.0 for stage in range(STAGES))
    return knobs.get("rule") == "knapsack" and not steered


def make_sampler(
    name: str, space: SearchSpace, seed: int, existing: int, trials: int
) -> BaseSampler:
    """The exploration's sampler by its name in the study file.

    Args:
        name: "knobs", or "tpe", "gp", "nsga2", "random" over the raw parameters.
        space: The search space.
        seed: The study's seed.
        existing: Trials already there. Optuna's own samplers start anew with every process; one
            seed for all would make a resumed study repeat its first proposals.
        trials: Planned number of trials; half of them, at most 8, are seeds of "knobs".
    """
    if name == "knobs":
        return KnobSampler(space, seed, seed_count=max(1, min(8, trials // 2)))
    own = trial_seed(seed, existing, 0)
    if name == "tpe":
        # Independent TPE reads all trials again for every parameter: seconds for 60 of them.
        wide = len(space.distributions()) > 40
        return TPESampler(seed=own, multivariate=True if wide else None)
    if name == "gp":
        return GPSampler(seed=own)
    return NSGAIISampler(seed=own) if name == "nsga2" else RandomSampler(seed=own)


def reads_rejected_as_complete(name: str) -> bool:
    """Whether a sampler learns from rejected trials only if they are told as complete."""
    return name in ("gp", "nsga2")


def trial_seed(seed: int, number: int, attempt: int = 0) -> int:
    """A seed of its own for each trial, the same in every process."""
    digest = hashlib.sha256(f"{seed}/{number}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31)
