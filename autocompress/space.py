"""The search space, and how a few knobs become a plan for every layer.

A trial's parameters are what a person means: `<layer>.transform` and `<layer>.rank_fraction`.
`SearchSpace` turns them into a plan and back. `allocate` turns one budget into a choice for each
layer through the layer table; `Knobs` are the few numbers that steer it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from autocompress.plan import Plan
from autocompress.sensitivity import Choice, LayerTable

KEEP = "keep"
RULES = ("knapsack", "minmax")
STAGES = 4
"""The network's depth is cut into this many parts, each with an error weight of its own."""

TILT = 0.75
"""Largest natural logarithm of an error weight. The table's errors are good: at twice this, more
than half of a study's proposals were lost before fine-tuning."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One choice for one layer; `choice` is None for leaving it as it is.

    Its error is the root of the choice's impact: errors of different layers can be compared.
    """

    choice: Choice | None
    cost: int
    error: float
    method: str

    @property
    def fraction(self) -> float:
        """Its place on the ladder of its method; 1 for leaving the layer alone."""
        return 1.0 if self.choice is None else self.choice.fraction


@dataclass(frozen=True)
class SearchSpace:
    """Which options each layer has.

    Attributes:
        options: Layer name to its options; the first is always to keep the layer.
        fixed_cost: Cost of everything that no option changes, in the unit of the options' costs.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed_cost: int

    @classmethod
    def from_table(cls, table: LayerTable, objective: str, total: int) -> SearchSpace:
        """The whole space of a layer table.

        Args:
            table: The layer table.
            objective: "params", "size", "macs" or "latency"; the first two are spent in
                parameters, the others in MACs.
            total: The baseline's cost in that unit.
        """
        unit = cost_unit(objective)
        options: dict[str, tuple[Option, ...]] = {}
        for layer in table.layers:
            choices = table.choices.get(layer.name, ())
            if not choices:
                continue
            keep = Option(None, getattr(layer.cost, unit), 0.0, KEEP)
            options[layer.name] = (
                keep,
                *(Option(c, getattr(c, unit), c.impact**0.5, c.transform.name) for c in choices),
            )
        return cls(options, total - sum(own[0].cost for own in options.values()))

    @cached_property
    def baseline_cost(self) -> int:
        """Cost of the network with nothing changed."""
        return self.fixed_cost + sum(own[0].cost for own in self.options.values())

    @cached_property
    def least_cost(self) -> int:
        """Cost of the smallest network in the space."""
        return self.fixed_cost + sum(min(o.cost for o in own) for own in self.options.values())

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The transforms that occur, without "keep"."""
        return tuple(sorted({o.method for own in self.options.values() for o in own} - {KEEP}))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of all parameters."""
        found: dict[str, BaseDistribution] = {}
        for name, own in self.options.items():
            methods = list(dict.fromkeys(option.method for option in own))
            fractions = [option.fraction for option in own if option.choice is not None]
            found[f"{name}.transform"] = CategoricalDistribution(methods)
            found[f"{name}.rank_fraction"] = FloatDistribution(min(fractions), 1.0)
        return found

    def suggest(self, trial: Trial) -> Plan:
        """Ask the trial's sampler for every parameter and build the plan."""
        params: dict[str, Any] = {}
        for key, distribution in self.distributions().items():
            if isinstance(distribution, CategoricalDistribution):
                params[key] = trial.suggest_categorical(key, distribution.choices)
            elif isinstance(distribution, FloatDistribution):
                params[key] = trial.suggest_float(key, distribution.low, distribution.high)
        return self.plan(self.nearest(params))

    def nearest(self, params: Mapping[str, Any]) -> dict[str, Option]:
        """The options that trial parameters mean: on each ladder the next rank at or above."""
        picked: dict[str, Option] = {}
        for name, own in self.options.items():
            method, fraction = params[f"{name}.transform"], params[f"{name}.rank_fraction"]
            same = [option for option in own if option.method == method]
            above = [option for option in same if option.fraction >= fraction - 1e-9]
            picked[name] = min(above or same[-1:], key=lambda option: option.fraction)
        return picked

    def params(self, picked: Mapping[str, Option]) -> dict[str, Any]:
        """The trial parameters that mean `picked`; the inverse of `nearest`."""
        found: dict[str, Any] = {}
        for name, option in picked.items():
            found[f"{name}.transform"] = option.method
            found[f"{name}.rank_fraction"] = option.fraction
        return found

    def plan(self, picked: Mapping[str, Option]) -> Plan:
        """The plan of one option for each layer."""
        return Plan({n: o.choice.transform for n, o in picked.items() if o.choice is not None})

    def pick(self, plan: Plan) -> dict[str, Option]:
        """The options of a plan; a rank that is not on the ladder becomes its largest."""
        picked: dict[str, Option] = {}
        for name, own in self.options.items():
            transform = plan.layers.get(name)
            if transform is None:
                picked[name] = own[0]
                continue
            exact = [o for o in own if o.choice is not None and o.choice.transform == transform]
            same = [o for o in own if o.method == transform.name]
            picked[name] = (exact or same[-1:] or own[:1])[0]
        return picked

    def neighbour(
        self, picked: Mapping[str, Option], rng: np.random.Generator
    ) -> dict[str, Option]:
        """`picked` with one layer moved to the option that costs a little less or more."""
        name = str(rng.choice(list(picked)))
        own = sorted(self.options[name], key=lambda option: option.cost)
        place = own.index(picked[name]) + (1 if rng.random() < 0.5 else -1)
        return {**picked, name: own[min(max(place, 0), len(own) - 1)]}

    def cost(self, picked: Mapping[str, Option]) -> int:
        """Cost of the whole network."""
        return self.fixed_cost + sum(option.cost for option in picked.values())

    def narrow(self, parents: Sequence[Plan], band: float = 0.4) -> SearchSpace:
        """The part of the space around some plans.

        For each layer: the parents' transforms, and of the others the one with the least error at
        a parent's cost; fractions at most `band` above or below; always the parents themselves.
        Where a parent keeps the layer, the mildest quarter of each ladder.
        """
        picks = [self.pick(parent) for parent in parents]
        narrowed: dict[str, tuple[Option, ...]] = {}
        for name, own in self.options.items():
            wanted: set[int] = {0}
            for pick in picks:
                wanted |= _around(own, pick[name], band)
            narrowed[name] = tuple(o for i, o in enumerate(own) if i in wanted)
            if len(narrowed[name]) == 1:
                narrowed[name] = own[:1] + own[-1:]
        return SearchSpace(narrowed, self.fixed_cost)


def _around(own: Sequence[Option], parent: Option, band: float) -> set[int]:
    """Indices of the options near `parent`."""
    others = [o for o in own if o.choice is not None]
    if parent.choice is None:
        return {i for i, o in enumerate(own) if o.choice is not None and o.fraction > 0.75}
    rivals = [o for o in others if o.method != parent.method and o.cost <= 1.1 * parent.cost]
    rival = min(rivals, key=lambda o: o.error, default=None)
    centres = [parent] + ([rival] if rival is not None else [])
    return {
        index
        for index, option in enumerate(own)
        for centre in centres
        if option.method == centre.method and abs(option.fraction - centre.fraction) <= band
    }


@dataclass(frozen=True)
class Knobs:
    """The few numbers that a plan is decoded from.

    Attributes:
        budget: Cost of the network as a share of the baseline's.
        rule: How the budget is shared out: "knapsack" (least sum of weighted errors) or "minmax"
            (least largest weighted error, ALDS, Liebenwein et al. 2021, arXiv 2107.11442).
        sharpness: Exponent of the error in the knapsack; 2 is the squared error.
        stages: Natural logarithm of the error weight for each part of the depth.
        methods: Natural logarithm of the error weight of each transform, by name.
    """

    budget: float
    rule: str = "knapsack"
    sharpness: float = 2.0
    stages: tuple[float, ...] = (0.0,) * STAGES
    methods: Mapping[str, float] | None = None

    @staticmethod
    def distributions(space: SearchSpace) -> dict[str, FloatDistribution]:
        """Optuna's distributions of the knobs; the rule is none: the knapsack wins."""
        low, high = budget_range(space)
        found = {
            "budget": FloatDistribution(low, high, log=True),
            "sharpness": FloatDistribution(1.0, 3.0),
        }
        for stage in range(STAGES):
            found[f"stage_{stage}"] = FloatDistribution(-TILT, TILT)
        if len(space.methods) > 1:
            for method in space.methods:
                found[f"method_{method}"] = FloatDistribution(-TILT, TILT)
        return found

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Knobs:
        """The knobs of one point of `distributions`, and of a rule besides."""
        return cls(
            budget=params["budget"],
            rule=params.get("rule", "knapsack"),
            sharpness=params["sharpness"],
            stages=tuple(params[f"stage_{stage}"] for stage in range(STAGES)),
            methods={k[7:]: v for k, v in params.items() if k.startswith("method_")},
        )

    def to_params(self, space: SearchSpace) -> dict[str, Any]:
        """The inverse of `from_params`, moved into the distributions' ranges."""
        params: dict[str, Any] = {"budget": self.budget, "rule": self.rule}
        params["sharpness"] = self.sharpness
        params |= {f"stage_{stage}": value for stage, value in enumerate(self.stages)}
        methods = self.methods or {}
        known = self.distributions(space)
        params |= {key: methods.get(key[7:], 0.0) for key in known if key.startswith("method_")}
        for key, distribution in known.items():
            if isinstance(distribution, FloatDistribution):
                params[key] = min(max(params[key], distribution.low), distribution.high)
        return params


def budget_range(space: SearchSpace) -> tuple[float, float]:
    """The least and the largest budget worth a trial, as shares of the baseline's cost.

    Of what the space can save, the largest leaves a tenth; all is never worth it, nor 40 times.
    """
    least = space.least_cost / space.baseline_cost
    low, high = least + 0.005 * (1 - least), least + 0.9 * (1 - least)
    return min(max(low, 1 / 40), 0.99 * high), high


def next_seed(
    space: SearchSpace, index: int, count: int, tried: Sequence[tuple[float, bool]]
) -> Knobs:
    """The next seed along the budget line: bisection for the least budget within delta.

    The seeds beyond the fourth, three at most, share the least budget found so far out in other
    ways: with the front or the back of the network spared, and by the largest error.

    Args:
        space: The search space.
        index: Which seed, from 0.
        count: Number of seeds.
        tried: Budget and whether it stayed within delta, of the knapsack's seeds so far.
    """
    low, high = budget_range(space)
    least = min((budget for budget, within in tried if within), default=high)
    slope = tuple(0.5 * TILT * (1 - 2 * stage / (STAGES - 1)) for stage in range(STAGES))
    variants = [
        Knobs(least, stages=slope),
        Knobs(least, stages=slope[::-1]),
        Knobs(least, "minmax"),
    ][: max(0, count - 4)]
    if index >= count - len(variants):
        return variants[index - (count - len(variants))]
    if not tried:
        return Knobs(min(max(0.25, low), high))
    most = max((budget for budget, within in tried if not within and budget < least), default=low)
    return Knobs(math.sqrt(least * most))


def allocate(space: SearchSpace, knobs: Knobs) -> dict[str, Option]:
    """Share a budget out over the layers.

    The rule's single multiplier (price of cost or bound of error) is found by bisection, so that
    the network costs as much of the budget as the ladders allow.
    """
    names = list(space.options)
    budget = knobs.budget * space.baseline_cost
    weights = np.exp([knobs.stages[i * STAGES // max(len(names), 1)] for i in range(len(names))])
    methods = knobs.methods or {}
    layers: list[tuple[Floats, Floats]] = []
    for name, weight in zip(names, weights, strict=True):
        own = space.options[name]
        cost = np.array([option.cost for option in own], dtype=float)
        error = np.array([o.error * math.exp(methods.get(o.method, 0.0)) for o in own]) * weight
        layers.append((cost, error))

    def decide(strength: float) -> list[int]:
        """Option of each layer; the larger `strength`, the cheaper the network."""
        return [_decide(knobs, strength, cost, error) for cost, error in layers]

    def total(picked: Sequence[int]) -> float:
        spent = sum(cost[index] for (cost, _), index in zip(layers, picked, strict=True))
        return float(space.fixed_cost + spent)

    low, high = -40.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        if total(decide(middle)) > budget:
            low = middle
        else:
            high = middle
    return {name: space.options[name][i] for name, i in zip(names, decide(high), strict=True)}


def _decide(knobs: Knobs, strength: float, cost: Floats, error: Floats) -> int:
    if knobs.rule == "knapsack":
        return int(np.argmin(error**knobs.sharpness + math.exp(strength) * cost))
    allowed = error <= math.exp(strength)
    return int(np.argmin(np.where(allowed, cost, np.inf)))


def cost_unit(objective: str) -> str:
    """The unit that the allocator spends for an objective: "params" or "macs"."""
    return "params" if objective in ("params", "size") else "macs"
