"""How the exploration proposes candidates: Optuna samplers over the space's own parameters.

A `PlanSampler` proposes a whole plan and answers Optuna with the parameters of every layer;
`KnobSampler` decodes it from a few knobs through the layer table. All that they remember is on the
trials, so that any process can go on from the database alone.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.allocator import STAGES, Knobs, decode, next_seed
from autocompress.space import Option, SearchSpace
from autocompress.trials import FINISHED, PARENT, counted, violation

KNOBS = "autocompress:knobs"
"""System attribute of a trial: what its plan was decoded from, and the plan's digest."""
REACH = 0.2
"""How far around the best knobs new ones are sought, as a share of their ranges."""

SPREAD = 0.05
MAX_SPREAD = 0.2
"""Spread of the logarithms of single layers' error weights: `SPREAD` times the root of the finished
trials for each layer, at most `MAX_SPREAD`. The first trials follow the layer table."""

SCATTERED = 20
"""Every how-manieth trial after the seeds moves single layers of the best plan by lot. Such moves
are for reach: at every eighth trial the search was a little slower."""

MEMORY = 100
"""How many trials TPE is shown at most, the latest ones near the best. It keeps a proposal in
milliseconds when a study has a thousand trials."""

ATTEMPTS = 16
"""How many plans are tried at most, to find one that the study hasn't."""

Shortfall = Callable[[FrozenTrial], float]


@dataclass(frozen=True)
class Proposal:
    """What a sampler wants to try.

    Attributes:
        space: The space at the channels that remain.
        picked: An option of it for every layer.
        record: What it was decoded from, for the trial's system attribute `KNOBS`.
        parent: "<stage>/<number>" of the trial whose weights the trial inherits; None for none.
    """

    space: SearchSpace
    picked: Mapping[str, Option]
    record: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None


class PlanSampler(BaseSampler):
    """A sampler that proposes whole plans and answers with the parameters of every layer.

    A subclass implements `propose`. Where the study has the plan already, another is proposed; if
    that is known too, layers drawn by lot move, to neighbouring ranks first, until the plan is new.
    A plan is claimed, in the trial's system attribute, before the study is read again: of two
    workers that claim the same plan at once at least one sees the other's claim, and gives way.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._independent = RandomSampler(seed=seed)

    @abstractmethod
    def propose(
        self, others: Sequence[FrozenTrial], number: int, attempt: int, rng: np.random.Generator
    ) -> Proposal:
        """A plan for trial `number`, given all other trials that count.

        `attempt` counts from 0 how many proposals for this trial were known already.
        """

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The whole space: a plan is proposed at once."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the proposed plan."""
        proposal = Proposal(self._space, {})
        others = _others(study, trial)
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng(trial_seed(self._seed, trial.number, attempt))
            if attempt < ATTEMPTS // 4:
                proposal = self.propose(others, trial.number, attempt, rng)
            else:
                # In a corner of the space all neighbours may be known.
                proposal = _moved(proposal, far=attempt >= ATTEMPTS // 2, rng=rng)
            digest = proposal.space.plan(proposal.picked).digest
            if digest in known_plans(others) and attempt < ATTEMPTS - 1:
                continue
            self._claim(study, trial, proposal, digest)
            others = _others(study, trial)
            if digest not in known_plans(others):
                break
        return proposal.space.params(proposal.picked)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A random value, for a parameter that is not in the space."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _claim(self, study: Study, trial: FrozenTrial, proposal: Proposal, digest: str) -> None:
        storage, trial_id = study._storage, trial._trial_id
        if proposal.parent is not None:
            storage.set_trial_user_attr(trial_id, PARENT, proposal.parent)
        storage.set_trial_system_attr(trial_id, KNOBS, {**proposal.record, "plan": digest})


class KnobSampler(PlanSampler):
    """Exploration: TPE over about a dozen knobs, after seeds along the budget line.

    The seeds find by bisection the least budget that promises to end within delta. Later trials
    have a budget just under that, for a larger one can't win and a far smaller one is wasted, and
    other knobs within reach of that trial's, where TPE chooses once it knows a few trials there.
    (Over the whole range TPE went to the corners, of which it knew nothing, and lost trial after
    trial.) Eleven knobs decoded through a cheap table of layer errors found in 30 trials what TPE
    over the parameters of 30 layers did not find in 300.

    Two things take a study beyond what eleven knobs can say. Each layer has a deviation of its own,
    that of the best trial and a random step, which is larger the more trials are finished: so
    deviations that helped are kept and added to. And now and then a trial is the best plan with a
    few layers moved anywhere, so that no plan is out of reach.

    Args:
        space: The search space.
        seed: The study's seed.
        seed_count: How many trials along the budget line come first.
        shortfall: By how many points a finished trial is expected to miss delta in the end; 0 or
            less: it promises to be within. By default what it missed its constraint by.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        seed_count: int = 8,
        shortfall: Shortfall = violation,
    ) -> None:
        super().__init__(space, seed)
        self._seed_count = seed_count
        self._shortfall = shortfall

    def propose(
        self, others: Sequence[FrozenTrial], number: int, attempt: int, rng: np.random.Generator
    ) -> Proposal:
        """Decode the next seed, or what TPE makes of the finished trials."""
        seed = self._next_seed(others, number)
        if seed is not None and attempt < 2:
            return self._decoded(seed[1], seed=seed[0])
        known = [t for t in others if t.state in FINISHED and t.constraints and _record(t)]
        best = self._best(known)
        if seed is not None:  # its plan is known: the seed counts as tried
            return self._decoded(self._near(best, known, others, rng), seed=seed[0])
        if best is not None and self._shortfall(best) <= 0 and number % SCATTERED == 0:
            return self._scattered(best, rng)
        return self._decoded(self._near(best, known, others, rng))

    def _decoded(self, knobs: Knobs, **more: Any) -> Proposal:
        here, picked = decode(self._space, knobs)
        return Proposal(here, picked, knobs.to_params(self._space) | more)

    def _next_seed(self, others: Sequence[FrozenTrial], number: int) -> tuple[int, Knobs] | None:
        """The first seed that no trial has tried; a trial that was cut off gives its seed back.

        Trials that began before this one and have no plan yet will take the seeds before it.
        """
        taken = {_record(other).get("seed") for other in others}
        free = [index for index in range(self._seed_count) if index not in taken]
        if not free:
            return None
        before = [t for t in others if t.state == TrialState.RUNNING and t.number < number]
        waiting = sum(not _record(t) for t in before)
        if waiting >= len(free):
            return None
        seeds = [t for t in others if _is_plain_seed(t)]
        pending = [float(_record(t)["budget"]) for t in seeds if t.state == TrialState.RUNNING]
        tried = self._budgets(seeds)
        for index in free[:waiting]:
            pending.append(next_seed(self._space, index, self._seed_count, tried, pending).budget)
        index = free[waiting]
        return index, next_seed(self._space, index, self._seed_count, tried, pending)

    def _scattered(self, best: FrozenTrial, rng: np.random.Generator) -> Proposal:
        """The best plan with a few layers moved anywhere; a cheaper one, if a few draws find it."""
        here = self._space.of_params(best.params)
        old = Proposal(here, here.nearest(best.params))
        new = old
        for _ in range(8):
            new = _moved(old, far=True, rng=rng)
            if new.space.cost(new.picked) < here.cost(old.picked):
                break
        knobs = {k: v for k, v in _record(best).items() if k != "seed"}
        knobs["budget"] = new.space.cost(new.picked) / self._space.baseline_cost
        return replace(new, record=knobs | {"rule": "scattered"})

    def _near(
        self,
        best: FrozenTrial | None,
        known: Sequence[FrozenTrial],
        others: Sequence[FrozenTrial],
        rng: np.random.Generator,
    ) -> Knobs:
        """Knobs near the best trial's, for a network that is a little cheaper."""
        ranges = Knobs.distributions(self._space)
        budget = ranges.pop("budget")
        low, high = budget.low, budget.high
        centre: dict[str, Any] = {key: (one.low + one.high) / 2 for key, one in ranges.items()}
        if best is not None:
            centre = _record(best)
            low, high = (0.82, 0.97) if self._shortfall(best) <= 0 else (1.0, 1.25)
            low, high = low * centre["budget"], high * centre["budget"]
        near = {key: _around(centre[key], full) for key, full in ranges.items()}
        running = [t for t in others if t.state == TrialState.RUNNING and _record(t)]
        params = _ask([*known, *running], near, rng, self._shortfall)
        params["budget"] = float(np.clip(rng.uniform(low, high), budget.low, budget.high))
        layers = list(self._space.options)
        if self._space.width is not None:
            layers += [f"{name}.channels" for name in self._space.width.options]
        spread = min(MAX_SPREAD, SPREAD * (len(known) / len(layers)) ** 0.5)
        old: Mapping[str, float] = centre.get("layers", {})
        params["layers"] = {n: old.get(n, 0.0) + rng.normal(0.0, spread) for n in layers}
        return Knobs.from_params(params)

    def _best(self, known: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The trial of the least budget that promises to be within delta; if there is none, the
        nearest to it."""
        met = [t for t in known if self._shortfall(t) <= 0]
        if met:
            return min(met, key=lambda t: float(_record(t)["budget"]))
        return min(known, key=self._shortfall, default=None)

    def _budgets(self, trials: Sequence[FrozenTrial]) -> list[tuple[float, bool]]:
        """Budget of each finished trial and whether it promises to be within delta."""
        return [
            (_record(t)["budget"], self._shortfall(t) <= 0)
            for t in trials
            if t.state in FINISHED and t.constraints
        ]


def _moved(proposal: Proposal, far: bool, rng: np.random.Generator) -> Proposal:
    """A proposal with single layers moved to neighbouring ranks, or `far`: anywhere.

    Where channels may be removed, half of the moves are a channel group's, and always anywhere.
    """
    here, picked = proposal.space, proposal.picked
    if here.width is not None and (not picked or rng.random() < 0.5):
        there = here.at(here.width.scatter(here.kept, rng))
        return replace(proposal, space=there, picked=there.nearest(here.params(picked)))
    move = here.scatter if far else here.neighbour
    return replace(proposal, picked=move(picked, rng))


def _ask(
    trials: Sequence[FrozenTrial],
    near: Mapping[str, FloatDistribution],
    rng: np.random.Generator,
    shortfall: Shortfall,
) -> dict[str, Any]:
    """What TPE makes of the finished and running trials whose knobs lie in `near`."""
    sampler = TPESampler(n_startup_trials=5, seed=int(rng.integers(2**31)))
    inner = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    inside = (trial for trial in reversed(trials) if _lies_in(near, _record(trial)))
    for trial in reversed(list(islice(inside, MEMORY))):
        inner.add_trial(
            optuna.create_trial(
                state=trial.state,
                values=trial.values,
                params={key: _record(trial)[key] for key in near},
                distributions=dict(near),
                constraints={name: shortfall(trial) for name in trial.constraints},
            )
        )
    return dict(inner.ask(dict(near)).params)


def _lies_in(near: Mapping[str, FloatDistribution], record: Mapping[str, Any]) -> bool:
    if record["rule"] != "knapsack":
        return False
    return all(key in record and one.low <= record[key] <= one.high for key, one in near.items())


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    return [other for other in counted(study) if other.number != trial.number]


def known_plans(trials: Sequence[FrozenTrial]) -> set[str | None]:
    """Digests of the plans that trials have claimed, or tried without this sampler."""
    claimed = {_record(trial).get("plan") for trial in trials}
    return claimed | {trial.user_attrs.get("plan_digest") for trial in trials}


def _record(trial: FrozenTrial) -> dict[str, Any]:
    found: dict[str, Any] = trial.system_attrs.get(KNOBS, {})
    return found


def _around(centre: float, full: FloatDistribution) -> FloatDistribution:
    """The part of a range that is within reach of a point in it."""
    reach = REACH * (full.high - full.low)
    middle = min(max(centre, full.low), full.high)
    return FloatDistribution(max(full.low, middle - reach), min(full.high, middle + reach))


def _is_plain_seed(trial: FrozenTrial) -> bool:
    record = _record(trial)
    steered = any(record.get(f"stage_{stage}") != 0.0 for stage in range(STAGES))
    return record.get("rule") == "knapsack" and "seed" in record and not steered


def make_sampler(
    name: str,
    space: SearchSpace,
    seed: int,
    existing: int,
    trials: int,
    shortfall: Shortfall = violation,
    worker: int = 0,
) -> BaseSampler:
    """The exploration's sampler by its name in the study file.

    Args:
        name: "knobs", or "tpe", "gp", "nsga2", "random" over the raw parameters.
        space: The search space.
        seed: The study's seed.
        existing: Trials already there. Optuna's own samplers start anew with every process; one
            seed for all would make a resumed study repeat its first proposals.
        trials: Planned number of trials; half of them, at most 8, are seeds of "knobs".
        shortfall: As `KnobSampler` has it; the other samplers go by the trials' constraints.
        worker: Tells the processes of a study apart, whose lots must differ.
    """
    if name == "knobs":
        return KnobSampler(space, seed, max(1, min(8, trials // 2)), shortfall)
    own = trial_seed(seed, existing, worker)
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
