"""The search space, and how a few knobs become a plan for every layer.

A trial's parameters are what a person means: `<layer>.transform`, `<layer>.rank_fraction` and, of
channel groups, `<group>.channels`. `SearchSpace` turns them into a plan and back. `allocate` turns
one budget into a choice for each layer through the layer table, `decode` into one for each channel
group, too; `Knobs` are the few numbers that steer them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from autocompress.costs import spend
from autocompress.damage import EVEN, Yardstick, weighted
from autocompress.layers import Cost, LayerSpec
from autocompress.plan import Plan
from autocompress.sensitivity import Choice, LayerTable
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import Transform
from autocompress.width import ChannelSpace, Kept

KEEP = "keep"
LEAST_FRACTION = 1 / 16
"""The smallest rank fraction of a layer that may have fewer channels than the table's."""

REMEMBERED = 256
"""Choices of channels whose layers' options are kept in memory."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One choice for one layer; `choice` is None for leaving it as it is.

    Its error is the root of the choice's damage, 1 for the worst choice of all: errors of different
    layers can be compared. `lean` tells how much more the impact makes of it than the squared error
    (`damage.Yardstick`).
    """

    choice: Choice | None
    cost: int
    error: float
    method: str
    lean: float = 0.0

    @property
    def fraction(self) -> float:
        """Its place on the ladder of its method; 1 for leaving the layer alone."""
        return 1.0 if self.choice is None else self.choice.fraction


@dataclass(frozen=True)
class Figures:
    """What a layer's options cost and break, as arrays of one length.

    Attributes:
        errors: `Option.error`.
        leans: `Option.lean`.
        costs: `Option.cost`.
        methods: Where each option's method is among `names`.
        names: The methods.
    """

    errors: Floats
    leans: Floats
    costs: Floats
    methods: NDArray[np.intp]
    names: tuple[str, ...]

    @classmethod
    def of(cls, options: Sequence[Option]) -> Figures:
        """The figures of some options."""
        names = tuple(dict.fromkeys(option.method for option in options))
        places = {name: place for place, name in enumerate(names)}
        return cls(
            np.array([option.error for option in options]),
            np.array([option.lean for option in options]),
            np.array([float(option.cost) for option in options]),
            np.array([places[option.method] for option in options]),
            names,
        )


@dataclass(frozen=True)
class SearchSpace:
    """Which options each layer has, at one choice of channels.

    Attributes:
        options: Layer name to its options; the first is always to keep the layer.
        fixed_cost: Cost of everything that no option changes, in the unit of the options' costs.
        width: Which channels may be removed; None for none.
        kept: Which were, before the options were made.
        rows: Makes the options of a layer that has lost channels.
        whole: The space with all channels; None in that space itself.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed_cost: int
    width: ChannelSpace | None = None
    kept: Kept = field(default_factory=dict)
    rows: Rows | None = field(default=None, compare=False)
    whole: SearchSpace | None = field(default=None, compare=False)

    @classmethod
    def from_table(cls, table: LayerTable, objective: str, full: Cost) -> SearchSpace:
        """The whole space of a layer table.

        Args:
            table: The layer table.
            objective: Key of `costs.OBJECTIVES`; `costs.spend` counts it.
            full: The baseline's cost.

        A choice that saves nothing is not offered: fewer MACs may well take as much time.
        """
        ranks = (choice for own in table.choices.values() for choice in own)
        channels = (choice for ladder in table.ladders.values() for choice in ladder.choices)
        yardstick = Yardstick.of([*ranks, *channels])

        def count(cost: Cost) -> int:
            return spend(objective, cost, full)

        rows = Rows(table, yardstick, count)
        made = {layer.name: rows(layer) for layer in table.layers if layer.name in table.choices}
        options = {name: own for name, own in made.items() if len(own) > 1}
        fixed = count(full) - sum(own[0].cost for own in options.values())
        ladders = {name: ladder for name, ladder in table.ladders.items() if ladder.choices}
        if not ladders:
            return cls(options, fixed)
        layers = {layer.name: layer for layer in (*table.layers, *table.others)}
        width = ChannelSpace(ladders, layers, table.cost, yardstick, full, count)
        return cls(options, fixed, width, rows=rows)

    def at(self, kept: Kept) -> SearchSpace:
        """The space of the network that has these channels."""
        whole = self.whole or self
        if whole.width is None or not kept:
            return whole
        key = tuple(sorted(kept.items()))
        if key not in whole._remembered:
            assert whole.rows is not None
            layers = whole.width.remaining(kept)
            options = {name: whole.rows(layers[name]) for name in whole.options}
            total = whole.width.count(whole.width.cost(kept))
            fixed = total - sum(own[0].cost for own in options.values())
            if len(whole._remembered) >= REMEMBERED:
                whole._remembered.clear()
            whole._remembered[key] = replace(
                whole, options=options, fixed_cost=fixed, kept=dict(kept), whole=whole
            )
        return whole._remembered[key]

    @cached_property
    def _remembered(self) -> dict[tuple[tuple[str, int], ...], SearchSpace]:
        return {}

    def of_params(self, params: Mapping[str, Any]) -> SearchSpace:
        """The space at the channels that trial parameters mean."""
        if self.width is None:
            return self
        ending = ".channels"
        return self.at(
            self.width.nearest(
                {k.removesuffix(ending): v for k, v in params.items() if k.endswith(ending)}
            )
        )

    def of_plan(self, plan: Plan) -> SearchSpace:
        """The space at the channels that a plan keeps."""
        return self if self.width is None else self.at(self.width.pick(plan.channels))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to choose."""
        return not self.options and self.width is None

    @cached_property
    def baseline_cost(self) -> int:
        """Cost of the network with nothing changed."""
        if self.whole is not None:
            return self.whole.baseline_cost
        return self.fixed_cost + sum(own[0].cost for own in self.options.values())

    @cached_property
    def least_cost(self) -> int:
        """Cost of the smallest network in the space."""
        if self.whole is not None:
            return self.whole.least_cost
        if self.width is not None:
            fewest = {n: min(o.keep for o in own) for n, own in self.width.options.items()}
            here = self.at(fewest)
            return here.fixed_cost + sum(min(o.cost for o in x) for x in here.options.values())
        return self.fixed_cost + sum(min(o.cost for o in own) for own in self.options.values())

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The transforms that occur, without "keep"."""
        return tuple(sorted({o.method for own in self.options.values() for o in own} - {KEEP}))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of all parameters; the same whatever channels were removed."""
        return dict((self.whole or self)._distributions)

    @cached_property
    def _distributions(self) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}
        for name, own in self.options.items():
            methods = list(dict.fromkeys(option.method for option in own))
            fractions = [option.fraction for option in own if option.choice is not None]
            found[f"{name}.transform"] = CategoricalDistribution(methods)
            least = min(fractions)
            if self.width is not None:
                least = min(least, LEAST_FRACTION)
            found[f"{name}.rank_fraction"] = FloatDistribution(least, 1.0)
        for name, groups in (self.width.options if self.width is not None else {}).items():
            shares = [option.fraction for option in groups]
            found[f"{name}.channels"] = FloatDistribution(min(shares), 1.0)
        return found

    def suggest(self, trial: Trial) -> Plan:
        """Ask the trial's sampler for every parameter and build the plan."""
        params: dict[str, Any] = {}
        for key, distribution in self.distributions().items():
            if isinstance(distribution, CategoricalDistribution):
                params[key] = trial.suggest_categorical(key, distribution.choices)
            elif isinstance(distribution, FloatDistribution):
                params[key] = trial.suggest_float(key, distribution.low, distribution.high)
        here = self.of_params(params)
        return here.plan(here.nearest(params))

    def nearest(self, params: Mapping[str, Any]) -> dict[str, Option]:
        """The options that trial parameters mean: on each ladder the next rank at or above.

        A transform that no longer saves anything at this space's channels keeps the layer.
        """
        picked: dict[str, Option] = {}
        for name, own in self.options.items():
            method, fraction = params[f"{name}.transform"], params[f"{name}.rank_fraction"]
            same = [option for option in own if option.method == method]
            above = [option for option in same if option.fraction >= fraction - 1e-9]
            picked[name] = min(above or same[-1:] or own[:1], key=lambda option: option.fraction)
        return picked

    def params(self, picked: Mapping[str, Option]) -> dict[str, Any]:
        """The trial parameters that mean `picked`; the inverse of `nearest`."""
        found: dict[str, Any] = {}
        for name, option in picked.items():
            found[f"{name}.transform"] = option.method
            found[f"{name}.rank_fraction"] = option.fraction
        for name, groups in (self.width.options if self.width is not None else {}).items():
            count = groups[0].keep
            found[f"{name}.channels"] = self.kept.get(name, count) / count
        return found

    def plan(self, picked: Mapping[str, Option]) -> Plan:
        """The plan of one option for each layer, at this space's channels."""
        layers = {n: o.choice.transform for n, o in picked.items() if o.choice is not None}
        return Plan(layers, self.width.channels(self.kept) if self.width is not None else {})

    def errors(self, plan: Plan) -> dict[str, float]:
        """Relative error of each layer that a plan changes, as the layer table has it.

        Where the layer lost channels, it is that of the whole layer at these ranks.
        """
        picked = self.of_plan(plan).pick(plan)
        return {
            name: option.choice.error
            for name, option in picked.items()
            if option.choice is not None and name in plan.layers
        }

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
        if not picked:
            return {}
        name = str(rng.choice(list(picked)))
        own = sorted(self.options[name], key=lambda option: option.cost)
        place = own.index(picked[name]) + (1 if rng.random() < 0.5 else -1)
        return {**picked, name: own[min(max(place, 0), len(own) - 1)]}

    def scatter(self, picked: Mapping[str, Option], rng: np.random.Generator) -> dict[str, Option]:
        """`picked` with a few layers, drawn by lot, moved anywhere on their ladders.

        One layer in half of the cases, two in a quarter and so on: no plan is out of reach.
        """
        names = list(self.options)
        count = min(int(rng.geometric(0.5)), len(names))
        moved = dict(picked)
        for index in rng.choice(len(names), count, replace=False):
            own = self.options[names[index]]
            moved[names[index]] = own[int(rng.integers(len(own)))]
        return moved

    def lighten(
        self,
        picked: Mapping[str, Option],
        target: float,
        rng: np.random.Generator,
        noise: float = 0.0,
        impact: float = EVEN,
    ) -> dict[str, Option]:
        """`picked` with one layer after the other made cheaper, until the network costs `target`.

        Each move is the one that saves the most for each unit that it adds to the sum of squared
        errors; what it saves beyond the target does not count. Mostly one or two are enough.

        Args:
            picked: Where to start.
            target: Cost of the whole network to come down to, as far as the ladders allow.
            rng: Draws the noise.
            noise: Spread of a logarithm that is added to the layers' ratios, so that other moves
                than the best are made.
            impact: Exponent of the impact in the damage, as in `allocator.Knobs`.
        """
        moved = dict(picked)
        lots = {name: math.exp(noise * rng.normal()) for name in self.options}
        missing = self.cost(moved) - target
        while missing > 0:
            best: tuple[float, str, Option] | None = None
            for name, own in self.options.items():
                now = moved[name]
                for option in own:
                    saved = min(now.cost - option.cost, missing)
                    if saved <= 0:
                        continue
                    added = max(weighted(option, impact) ** 2 - weighted(now, impact) ** 2, 1e-9)
                    ratio = lots[name] * saved / added
                    if best is None or ratio > best[0]:
                        best = ratio, name, option
            if best is None:
                break
            missing -= moved[best[1]].cost - best[2].cost
            moved[best[1]] = best[2]
        return moved

    def cost(self, picked: Mapping[str, Option]) -> int:
        """Cost of the whole network."""
        return self.fixed_cost + sum(option.cost for option in picked.values())

    def damage(self, picked: Mapping[str, Option], impact: float = EVEN) -> float:
        """What the network is predicted to lose: the sum of squared errors, of channels, too.

        Args:
            picked: An option for every layer.
            impact: As in `allocator.Knobs`.
        """
        ranks = sum(weighted(option, impact) ** 2 for option in picked.values())
        return ranks + (self.width.damage(self.kept, impact) if self.width is not None else 0.0)

    def narrow(self, parents: Sequence[Plan], band: float = 0.4) -> SearchSpace:
        """The part of the space around some plans.

        For each layer: the parents' transforms, with fractions at most `band` above or below;
        always the parents themselves. Where a parent keeps the layer, the mildest quarter of each
        ladder. A parent's factors were trained, and another transform would undo that: networks
        with such a layer lost 21 to 28 points before fine-tuning (medians), where others lost 5,
        and the errors in the table, which are of untrained layers, say nothing of it.
        """
        return self.around([self.pick(parent) for parent in parents], band)

    def around(self, picks: Sequence[Mapping[str, Option]], band: float) -> SearchSpace:
        """As `narrow`, around options instead of plans."""
        narrowed: dict[str, tuple[Option, ...]] = {}
        for name, own in self.options.items():
            wanted: set[int] = {0}
            for pick in picks:
                wanted |= _around(own, pick[name], band)
            narrowed[name] = tuple(o for i, o in enumerate(own) if i in wanted)
            if len(narrowed[name]) == 1 < len(own):
                narrowed[name] = own[:1] + own[-1:]
        return replace(self, options=narrowed)


class Rows:
    """The options of layers, at any number of channels.

    Of a layer that lost channels, a choice breaks what the whole layer's choice of the same ranks
    does, on a line through the table: removing rows and columns of a matrix makes none of its
    singular values larger. It takes as long as the whole layer's choice of as many multiply-adds.
    """

    def __init__(
        self, table: LayerTable, yardstick: Yardstick, count: Callable[[Cost], int]
    ) -> None:
        self._table = table
        self._whole = {layer.name: layer for layer in table.layers}
        self._yardstick = yardstick
        self._count = count
        self._known: dict[LayerSpec, tuple[Option, ...]] = {}
        self._figures: dict[LayerSpec, Figures] = {}

    def __call__(self, layer: LayerSpec) -> tuple[Option, ...]:
        """The options of a layer; the first is to keep it."""
        if layer not in self._known:
            choices, whole = self._table.choices[layer.name], self._whole[layer.name]
            if layer != whole:
                # A method that saves no time for the whole layer is none of the parameter's values.
                offered = {option.method for option in self(whole)}
                narrower = _narrower(layer, choices)
                choices = tuple(c for c in narrower if c.transform.name in offered)
            keep = Option(None, self._count(self._table.cost(layer)), 0.0, KEEP)
            options = [self._option(choice) for choice in choices]
            self._known[layer] = (keep, *(o for o in options if o.cost < keep.cost))
        return self._known[layer]

    def figures(self, layer: LayerSpec) -> Figures:
        """The figures of a layer's options, in the same order."""
        if layer not in self._figures:
            self._figures[layer] = Figures.of(self(layer))
        return self._figures[layer]

    def _option(self, choice: Choice) -> Option:
        cost, method = self._count(choice.cost), choice.transform.name
        error, lean = self._yardstick.error(choice), self._yardstick.lean(choice)
        return Option(choice, cost, error, method, lean)


def _narrower(layer: LayerSpec, choices: Sequence[Choice]) -> Iterator[Choice]:
    """The choices of a layer that lost channels, from those of the whole one."""
    for method in dict.fromkeys(choice.transform.name for choice in choices):
        kind = TRANSFORMS[method]
        if kind.refusal(layer) is not None:
            continue
        known = sorted(
            ((_rank(c.transform), c) for c in choices if c.transform.name == method),
            key=lambda pair: pair[0],
        )
        ranks = [rank for rank, _ in known]
        impacts = np.log([max(choice.impact, 1e-30) for _, choice in known])
        errors = [choice.error for _, choice in known]
        macs = [choice.macs for _, choice in known]
        times = [choice.ms for _, choice in known if choice.ms is not None]
        ladder = kind.ladder(layer)
        own = [_rank(transform) for transform in ladder]
        costs = [transform.cost(layer) for transform in ladder]
        own_errors = np.interp(own, ranks, errors).tolist()
        own_impacts = np.exp(np.interp(own, ranks, impacts)).tolist()
        own_times: list[float | None] = [None] * len(ladder)
        if times:
            wanted = np.array([cost.macs for cost in costs])
            # Beyond the ladder's lower end in proportion, as there is nothing nearer.
            parts = np.minimum(1.0, wanted / min(macs))
            own_times = (parts * np.interp(wanted, macs, times)).tolist()
        for place, (transform, cost) in enumerate(zip(ladder, costs, strict=True)):
            fraction = (place + 1) / len(ladder)
            predicted = own_errors[place], own_impacts[place], own_times[place]
            yield Choice(transform, fraction, cost.params, cost.macs, *predicted)


def _rank(transform: Transform) -> float:
    """The geometric mean of a transform's ranks."""
    assert is_dataclass(transform) and not isinstance(transform, type)
    logs: list[float] = []
    for field_ in fields(transform):
        rank = getattr(transform, field_.name)
        logs += map(math.log, rank if isinstance(rank, tuple) else (rank,))
    return math.exp(math.fsum(logs) / len(logs))


def _around(own: Sequence[Option], parent: Option, band: float) -> set[int]:
    """Indices of the options near `parent`."""
    if parent.choice is None:
        return {i for i, o in enumerate(own) if o.choice is not None and o.fraction > 0.75}
    return {
        index
        for index, option in enumerate(own)
        if option.method == parent.method and abs(option.fraction - parent.fraction) <= band
    }
