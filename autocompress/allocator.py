"""How a budget becomes a plan: a few knobs, and the layer table, decide for every layer and group.

Every saving has a price, what it is predicted to break for each unit of cost, and a plan is made at
one price for all: of channels and of ranks, in all layers. `Knobs` tilt what the layer table says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from autocompress.damage import EVEN, weighted
from autocompress.space import Figures, Floats, Option, SearchSpace
from autocompress.width import ChannelSpace

RULES = ("knapsack", "minmax")
STAGES = 4
"""The network's depth is cut into this many parts, each with an error weight of its own."""

TILT = 0.75
"""Largest natural logarithm of an error weight. The table's errors are good: at twice this, more
than half of a study's proposals were lost before fine-tuning."""

ALONE = 1.0
"""Error weight of channels, as a natural logarithm, from which on ranks alone are cut; from its
negative on channels alone are removed, as far as these can save so much."""

CLOSE = 0.985
"""A network that costs this share of its budget is near enough: ranks fill the rest."""
STEP, FAR, NARROW = 0.7, 150.0, 0.02
"""How the price is sought, as a natural logarithm: in steps, ever longer, until one is too low
and one too high, never beyond, and then between them until they are as near as that."""
GUESS = 20.0
"""The logarithm of one over the price to begin with, where no layer has ranks to be cut."""
SWEEPS = 2
"""How often all groups are gone through at one price; the next one begins where this one ended."""


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
        layers: Natural logarithm of the error weight of single layers, by name, and of channel
            groups, as "<group>.channels"; 0 for the others.
        channels: Natural logarithm of the error weight of removing channels, beside that of cutting
            ranks. At `ALONE` ranks do all of it, at its negative channels.
        impact: Exponent of a choice's impact in its damage, that of the squared error being the
            rest of 1. Which predicts a network's loss best differs from network to network.
    """

    budget: float
    rule: str = "knapsack"
    sharpness: float = 2.0
    stages: tuple[float, ...] = (0.0,) * STAGES
    methods: Mapping[str, float] | None = None
    layers: Mapping[str, float] | None = None
    channels: float = 0.0
    impact: float = EVEN

    @staticmethod
    def distributions(space: SearchSpace) -> dict[str, FloatDistribution]:
        """Optuna's distributions of the knobs; not of the rule, as the knapsack wins, nor of the
        single layers."""
        low, high = budget_range(space)
        found = {
            "budget": FloatDistribution(low, high, log=True),
            "sharpness": FloatDistribution(1.0, 3.0),
            "impact": FloatDistribution(0.0, 1.0),
        }
        for stage in range(STAGES):
            found[f"stage_{stage}"] = FloatDistribution(-TILT, TILT)
        if len(space.methods) > 1:
            for method in space.methods:
                found[f"method_{method}"] = FloatDistribution(-TILT, TILT)
        if space.width is not None and space.options:
            found["channel_weight"] = FloatDistribution(-ALONE, ALONE)
        return found

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Knobs:
        """The knobs of one point of `distributions`, with a rule and layers where there are any."""
        return cls(
            budget=params["budget"],
            rule=params.get("rule", "knapsack"),
            sharpness=params["sharpness"],
            stages=tuple(params[f"stage_{stage}"] for stage in range(STAGES)),
            methods={k[7:]: v for k, v in params.items() if k.startswith("method_")},
            layers=dict(params.get("layers", {})),
            channels=params.get("channel_weight", 0.0),
            impact=params.get("impact", EVEN),
        )

    def to_params(self, space: SearchSpace) -> dict[str, Any]:
        """The inverse of `from_params`, moved into the distributions' ranges."""
        params: dict[str, Any] = {"budget": self.budget, "rule": self.rule}
        params |= {"sharpness": self.sharpness, "impact": self.impact}
        params |= {f"stage_{stage}": value for stage, value in enumerate(self.stages)}
        methods = self.methods or {}
        known = self.distributions(space)
        params |= {key: methods.get(key[7:], 0.0) for key in known if key.startswith("method_")}
        if "channel_weight" in known:
            params["channel_weight"] = self.channels
        for key, distribution in known.items():
            if isinstance(distribution, FloatDistribution):
                params[key] = min(max(params[key], distribution.low), distribution.high)
        return params | {"layers": dict(self.layers or {})}


def budget_range(space: SearchSpace) -> tuple[float, float]:
    """The least and the largest budget worth a trial, as shares of the baseline's cost.

    Of what the space can save, the largest leaves a tenth; all is never worth it, nor 40 times.
    """
    least = space.least_cost / space.baseline_cost
    low, high = least + 0.005 * (1 - least), least + 0.9 * (1 - least)
    return min(max(low, 1 / 40), 0.99 * high), high


def next_seed(
    space: SearchSpace,
    index: int,
    count: int,
    tried: Sequence[tuple[float, bool]],
    pending: Sequence[float] = (),
) -> Knobs:
    """The next seed along the budget line: bisection for the least budget within delta.

    The seeds beyond the fourth share the least budget found so far out in other ways: by ranks and
    by channels alone, where channels may be removed, by impact alone, then with the front or the
    back of the network spared, and by the largest error.

    Args:
        space: The search space.
        index: Which seed, from 0.
        count: Number of seeds.
        tried: Budget and whether it stayed within delta, of the knapsack's seeds so far.
        pending: Budgets of seeds that other workers try now: the widest gap is halved.
    """
    low, high = budget_range(space)
    least = min((budget for budget, within in tried if within), default=high)
    slope = tuple(0.5 * TILT * (1 - 2 * stage / (STAGES - 1)) for stage in range(STAGES))
    variants = [
        Knobs(least, impact=1.0),
        Knobs(least, stages=slope),
        Knobs(least, stages=slope[::-1]),
        Knobs(least, "minmax"),
    ]
    if space.width is not None and space.options:
        variants = [Knobs(least, channels=ALONE), Knobs(least, channels=-ALONE), *variants]
    variants = variants[: max(0, count - 4)]
    if index >= count - len(variants):
        return variants[index - (count - len(variants))]
    if not tried and not pending:
        return Knobs(min(max(0.25, low), high))
    most = max((budget for budget, within in tried if not within and budget < least), default=low)
    ends = sorted([most, *(budget for budget in pending if most < budget < least), least])
    below, above = max(pairwise(ends), key=lambda gap: gap[1] / gap[0])
    return Knobs(math.sqrt(below * above))


def decode(space: SearchSpace, knobs: Knobs) -> tuple[SearchSpace, dict[str, Option]]:
    """Share a budget out over channel groups and layers.

    Returns:
        The space at the channels that remain, and an option of it for every layer.
    """
    if space.width is None or (knobs.channels >= ALONE and space.options):
        return space, allocate(space, knobs)
    here = space.at(_Market(space, space.width, knobs).kept())
    whole = {name: own[0] for name, own in here.options.items()}
    if knobs.channels <= -ALONE and here.cost(whole) <= knobs.budget * space.baseline_cost:
        return here, whole
    return here, allocate(here, knobs)


class _Market:
    """Finds the channels that remain at the price at which the network costs its budget.

    At a price each group in turn takes the keep-count at which what it breaks, what the best ranks
    of its layers break at their widths, and the price of what all of that costs come to least:
    descent by coordinates, from where the last price ended.

    Args:
        space: The whole space.
        width: Its channels.
        knobs: The budget, and the weights.
    """

    def __init__(self, space: SearchSpace, width: ChannelSpace, knobs: Knobs) -> None:
        self._space, self._width, self._knobs = space, width, knobs
        self._tilts = _Tilts(knobs, list(space.options))
        self._offers: dict[tuple[str, int, int], tuple[Floats, Floats]] = {}
        self._best: dict[tuple[str, int, int], tuple[float, float]] = {}
        places = {name: place for place, name in enumerate(width.layers)}
        self._damages: dict[str, list[float]] = {}
        for name, own in width.options.items():
            weight = knobs.channels + (knobs.layers or {}).get(f"{name}.channels", 0.0)
            weight += knobs.stages[places[name] * STAGES // len(places)]
            errors = [math.exp(weight) * weighted(option, knobs.impact) for option in own]
            self._damages[name] = [self._tilts.damage(error) for error in errors]
        self._chosen = dict.fromkeys(width.options, 0)
        self._gone = {name: (0, 0) for name in width.layers}
        whole = sum(width.count(width.cost_of(layer)) for layer in width.layers.values())
        self._fixed = width.count(width.full) - whole

    def kept(self) -> dict[str, int]:
        """The keep-counts; none where the whole network is within the budget."""
        target = self._knobs.budget * self._space.baseline_cost
        found = self._cheapest()
        # The price at which ranks alone would come to the budget is not far off.
        strength = _price(self._space, self._knobs)[0] if self._space.options else -GUESS
        low, dear, high, cheap = -math.inf, 0.0, math.inf, 0.0
        step = STEP
        for _ in range(40):
            cost = self._settle(math.exp(strength))
            if cost > target:
                low, dear = strength, cost
                if math.isfinite(high):
                    self._move_to(found)
            else:
                high, cheap, found = strength, cost, dict(self._chosen)
                if cost >= CLOSE * target:
                    break
            if math.isfinite(low) and math.isfinite(high):
                # Where a line through both ends comes to the budget, but well between them.
                share = (dear - 0.5 * (1 + CLOSE) * target) / (dear - cheap)
                strength = low + min(max(share, 0.15), 0.85) * (high - low)
            else:
                strength += step if math.isfinite(low) else -step
                step *= 2
            if abs(strength) > FAR or high - low < NARROW:
                break
        self._move_to(found)
        if math.isfinite(high):
            self._fill(math.exp(high), target)
        own = self._width.options
        return {name: own[name][place].keep for name, place in self._chosen.items() if place}

    def _cheapest(self) -> dict[str, int]:
        """Each group's fewest channels."""
        own = self._width.options
        return {name: min(range(len(o)), key=lambda i: o[i].keep) for name, o in own.items()}

    def _settle(self, price: float) -> float:
        """Let the groups choose at a price; the network's cost then."""
        self._best.clear()
        for _ in range(SWEEPS):
            before = dict(self._chosen)
            for name in self._chosen:
                self._choose(name, price)
            if self._chosen == before:
                break
        return self._cost(price)

    def _fill(self, price: float, target: float) -> None:
        """Widen single groups while the network still costs at most `target`: where few keep-counts
        save much each, no price comes near the budget."""
        if self._knobs.rule != "knapsack":
            return
        self._best.clear()
        room = target - self._cost(price)
        while True:
            best: tuple[float, float, str, int] | None = None
            for group, own in self._width.options.items():
                now, spared = self._chosen[group], self._width.spared[group]
                wider = [place for place, o in enumerate(own) if o.keep > own[now].keep]
                if not wider:
                    continue
                place = min(wider, key=lambda index: own[index].keep)
                after = self._after(group, place)
                saved = self._damages[group][now] - self._damages[group][place]
                more = float(spared[now] - spared[place])
                for name, gone in after.items():
                    old, new = (self._offer(name, g, price) for g in (self._gone[name], gone))
                    more += new[1] - old[1]
                    saved += (old[0] - price * old[1]) - (new[0] - price * new[1])
                if more <= room and saved > 0 and (best is None or saved > best[0]):
                    best = saved, more, group, place
            if best is None:
                return
            room -= best[1]
            self._move_to({best[2]: best[3]})

    def _cost(self, price: float) -> float:
        """What the network costs with the best ranks at a price."""
        layers = sum(self._offer(name, gone, price)[1] for name, gone in self._gone.items())
        return (
            self._fixed
            + layers
            - sum(self._width.spared[name][place] for name, place in self._chosen.items())
        )

    def _choose(self, group: str, price: float) -> None:
        """Give a group the keep-count that is best while all others keep theirs."""
        best: tuple[float, int] | None = None
        for place, damage in enumerate(self._damages[group]):
            after = self._after(group, place)
            worth = sum(self._offer(name, gone, price)[0] for name, gone in after.items())
            worth -= self._tilts.worth(0.0, self._width.spared[group][place], price)
            worth += self._tilts.worth(damage, 0.0, price)
            if best is None or worth < best[0]:
                best = worth, place
        assert best is not None
        self._gone |= self._after(group, best[1])
        self._chosen[group] = best[1]

    def _after(self, group: str, place: int) -> dict[str, tuple[int, int]]:
        """What a group's layers lack if it has another keep-count: input and output channels."""
        more = self._width.removed(group, place) - self._width.removed(group, self._chosen[group])
        return {
            name: (self._gone[name][0] + more * each[0], self._gone[name][1] + more * each[1])
            for name, each in self._width.reach[group].items()
        }

    def _move_to(self, chosen: Mapping[str, int]) -> None:
        for group, place in chosen.items():
            self._gone |= self._after(group, place)
            self._chosen[group] = place

    def _offer(self, layer: str, gone: tuple[int, int], price: float) -> tuple[float, float]:
        """What the best ranks of a layer that lacks channels are worth at a price, and cost."""
        key = (layer, *gone)
        if key not in self._best:
            if key not in self._offers:
                self._offers[key] = self._ranks(layer, gone)
            damages, costs = self._offers[key]
            worths = self._tilts.worth(damages, costs, price)
            place = int(worths.argmin())
            self._best[key] = float(worths[place]), float(costs[place])
        return self._best[key]

    def _ranks(self, layer: str, gone: tuple[int, int]) -> tuple[Floats, Floats]:
        """Damage and cost of each option of a layer."""
        narrowed = self._width.narrowed(layer, *gone)
        if layer not in self._space.options or self._knobs.channels <= -ALONE:
            return np.zeros(1), np.array([float(self._width.count(self._width.cost_of(narrowed)))])
        assert self._space.rows is not None
        own = self._space.rows.figures(narrowed)
        return self._tilts.damage(self._tilts.errors(layer, own)), own.costs


class _Tilts:
    """The errors of options and what they are worth, as knobs weigh them.

    Args:
        knobs: The weights, the rule and the sharpness.
        names: The layers that have options, in execution order.
    """

    def __init__(self, knobs: Knobs, names: Sequence[str]) -> None:
        self._methods = knobs.methods or {}
        self._by_sum = knobs.rule == "knapsack"
        self._sharpness, self._impact = knobs.sharpness, knobs.impact
        layers = knobs.layers or {}
        self._layers = {
            name: knobs.stages[place * STAGES // len(names)] + layers.get(name, 0.0)
            for place, name in enumerate(names)
        }

    def errors(self, layer: str, own: Figures) -> Floats:
        """The weighted errors of a layer's options."""
        tilts = np.array([self._methods.get(name, 0.0) for name in own.names])
        tilt = self._layers[layer] + tilts[own.methods] + (self._impact - EVEN) * own.leans
        return np.asarray(own.errors * np.exp(tilt))

    def damage(self, error: Any) -> Any:
        """What a weighted error counts: itself where the largest decides."""
        return error**self._sharpness if self._by_sum else error

    def worth(self, damage: Any, cost: Any, price: float) -> Any:
        """What the rule makes least: damage and price of the cost, or the cost of what is within a
        bound of the error, the price."""
        if self._by_sum:
            return damage + price * cost
        return np.where(np.asarray(damage) <= price, cost, np.inf)


def allocate(space: SearchSpace, knobs: Knobs) -> dict[str, Option]:
    """Share a budget out over the layers, at the space's channels.

    The rule's single multiplier (price of cost or bound of error) is found by bisection, so that
    the network costs as much of the budget as the ladders allow.
    """
    return _price(space, knobs)[1] if space.options else {}


def _price(space: SearchSpace, knobs: Knobs) -> tuple[float, dict[str, Option]]:
    """The logarithm of the rule's multiplier, and the options that it makes of the layers."""
    names = list(space.options)
    tilts = _Tilts(knobs, names)
    shape = len(names), max(len(own) for own in space.options.values())
    cost, damage = np.full(shape, np.inf), np.full(shape, np.inf)
    for row, (name, own) in enumerate(space.options.items()):
        figures = Figures.of(own)
        cost[row, : len(own)] = figures.costs
        damage[row, : len(own)] = tilts.damage(tilts.errors(name, figures))
    rows = np.arange(len(names))

    def decide(strength: float) -> NDArray[np.intp]:
        """Option of each layer; the larger `strength`, the cheaper the network."""
        best: NDArray[np.intp] = tilts.worth(damage, cost, math.exp(strength)).argmin(axis=1)
        return best

    room = knobs.budget * space.baseline_cost - space.fixed_cost
    # Errors of layers behind a small scale (ConvNeXt's begins at 1e-6) ask for tiny prices.
    low, high = -100.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        if cost[rows, decide(middle)].sum() > room:
            low = middle
        else:
            high = middle
    picked = zip(names, decide(high), strict=True)
    return high, {name: space.options[name][place] for name, place in picked}
