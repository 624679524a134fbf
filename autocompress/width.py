"""How wide the network is: keep-counts of its channel groups, what they cost, and how to share a
budget out among them.

Channels go first, ranks are then cut on what remains. So a choice of keep-counts is given to
`ChannelSpace`, which tells the layers that remain; their ranks are `space.SearchSpace`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocompress.channels import KeptChannels
from autocompress.damage import EVEN, Yardstick, weighted
from autocompress.importance import ChannelLadder
from autocompress.layers import Cost, LayerSpec, without_channels

Kept = Mapping[str, int]
"""Channel group to how many of its channels remain; a group that keeps all is absent."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelOption:
    """One keep-count of a group; error and lean are comparable with those of `space.Option`."""

    keep: int
    fraction: float
    error: float
    lean: float = 0.0


@dataclass(frozen=True)
class ChannelSpace:
    """Which keep-counts each channel group has, and what they cost.

    Attributes:
        ladders: The groups that have keep-counts, in execution order.
        layers: All layers through which groups run or that may be transformed, by name.
        cost_of: The cost of a layer, whole or without some channels.
        yardstick: Makes the damages of the layer table comparable.
        full: The baseline's cost.
        count: What a cost counts for the allocator.
    """

    ladders: Mapping[str, ChannelLadder]
    layers: Mapping[str, LayerSpec]
    cost_of: Callable[[LayerSpec], Cost] = field(compare=False)
    yardstick: Yardstick
    full: Cost
    count: Callable[[Cost], int] = field(compare=False)

    @cached_property
    def options(self) -> Mapping[str, tuple[ChannelOption, ...]]:
        """Group to its options; the first keeps all channels, the others are fewest first."""
        found = {}
        for name, ladder in self.ladders.items():
            own = [ChannelOption(ladder.group.channels, 1.0, 0.0)]
            for choice in ladder.choices:
                error, lean = self.yardstick.error(choice), self.yardstick.lean(choice)
                own.append(ChannelOption(choice.keep, choice.fraction, error, lean))
            found[name] = tuple(own)
        return found

    def channels(self, kept: Kept) -> dict[str, KeptChannels]:
        """Keep-counts as a plan has them: the most important channels remain."""
        return {name: self.ladders[name].kept(keep) for name, keep in sorted(kept.items())}

    def remaining(self, kept: Kept) -> dict[str, LayerSpec]:
        """All layers without the removed channels."""
        gone_in: dict[str, int] = {}
        gone_out: dict[str, int] = {}
        for name, keep in kept.items():
            group = self.ladders[name].group
            for member in group.members:
                removed = (group.channels - keep) * member.repeat
                if member.side != "out":
                    gone_in[member.layer] = gone_in.get(member.layer, 0) + removed
                if member.side != "in":
                    gone_out[member.layer] = gone_out.get(member.layer, 0) + removed
        found = {}
        for name, layer in self.layers.items():
            fewer_in, fewer_out = gone_in.get(name, 0), gone_out.get(name, 0)
            if fewer_in or fewer_out:
                layer = without_channels(
                    layer, layer.in_channels - fewer_in, layer.out_channels - fewer_out
                )
            found[name] = layer
        return found

    def cost(self, kept: Kept) -> Cost:
        """Cost of the network without the removed channels."""
        params, macs, ms = self.full.params, self.full.macs, self.full.ms
        for name, layer in self.remaining(kept).items():
            if layer is self.layers[name]:
                continue
            before, after = self.cost_of(self.layers[name]), self.cost_of(layer)
            params -= before.params - after.params
            macs -= before.macs - after.macs
            if ms is not None and before.ms is not None and after.ms is not None:
                ms -= before.ms - after.ms
        for name, keep in kept.items():
            ladder = self.ladders[name]
            params -= ladder.params_each * (ladder.group.channels - keep)
        return Cost(params, macs, ms)

    def nearest(self, fractions: Mapping[str, float]) -> dict[str, int]:
        """The keep-counts that shares of the channels mean: the next at or above each."""
        kept = {}
        for name, own in self.options.items():
            wanted = [o for o in own[1:] if o.fraction >= fractions.get(name, 1.0) - 1e-9]
            if wanted:
                kept[name] = min(wanted, key=lambda option: option.fraction).keep
        return kept

    def pick(self, channels: Mapping[str, KeptChannels]) -> dict[str, int]:
        """The keep-counts of a plan."""
        return {name: len(part.kept) for name, part in channels.items() if name in self.options}

    def damage(self, kept: Kept, impact: float = EVEN) -> float:
        """Sum of the squared errors of keep-counts; `impact` as in `space.Knobs`."""
        return sum(weighted(self._option(n, keep), impact) ** 2 for n, keep in kept.items())

    def _option(self, name: str, keep: int) -> ChannelOption:
        own = self.options[name]
        return next((option for option in own if option.keep == keep), own[0])

    @cached_property
    def _grid(self) -> tuple[Floats, Floats, Floats]:
        """Cost, error and lean of each group's options, where all other groups keep all."""
        shape = len(self.options), max(map(len, self.options.values()), default=0)
        cost, error, tilt = np.full(shape, np.inf), np.full(shape, np.inf), np.zeros(shape)
        for i, (name, own) in enumerate(self.options.items()):
            for j, option in enumerate(own):
                kept = {name: option.keep} if j else {}
                cost[i, j] = self.count(self.cost(kept))
                error[i, j], tilt[i, j] = option.error, option.lean
        return cost, error, tilt

    def allocate(
        self,
        target: float,
        sharpness: float = 2.0,
        weights: Mapping[str, float] | None = None,
        impact: float = EVEN,
    ) -> dict[str, int]:
        """The keep-counts with the least sum of weighted errors at a cost of `target`.

        One price of cost decides for all groups. Their savings are those in the whole network,
        while together they save less, as a layer's cost is a product of two widths: the price is
        bisected for the true cost.

        Args:
            target: Cost of the network without the removed channels, in the objective's unit.
            sharpness: Exponent of the error.
            weights: Natural logarithm of the error weight of single groups, by name.
            impact: Exponent of the impact in the damage, as in `space.Knobs`.
        """
        names = list(self.options)
        if not names or target >= self.count(self.full):
            return {}
        cost, error, tilt = self._grid
        own = np.array([(weights or {}).get(name, 0.0) for name in names])
        damage = (error * np.exp(own[:, None] + (impact - EVEN) * tilt)) ** sharpness

        def decide(strength: float) -> dict[str, int]:
            chosen = (damage + math.exp(strength) * cost).argmin(axis=1)
            return {
                name: self.options[name][place].keep
                for name, place in zip(names, chosen, strict=True)
                if place
            }

        low, high = -40.0, 10.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.count(self.cost(decide(middle))) > target:
                low = middle
            else:
                high = middle
        return decide(high)

    def scatter(self, kept: Kept, rng: np.random.Generator) -> dict[str, int]:
        """`kept` with one group moved anywhere on its ladder."""
        names = list(self.options)
        name = names[int(rng.integers(len(names)))]
        own = self.options[name]
        place = int(rng.integers(len(own)))
        others = {group: keep for group, keep in kept.items() if group != name}
        return {**others, name: own[place].keep} if place else others

    def lighten(
        self,
        kept: Kept,
        target: float,
        rng: np.random.Generator,
        noise: float = 0.0,
        impact: float = EVEN,
    ) -> dict[str, int]:
        """`kept` with one group after the other made narrower until the network costs `target`.

        Each move is the one that saves the most for each unit that it adds to the sum of squared
        errors; what it saves beyond the target does not count.

        Args:
            kept: Where to start.
            target: Cost of the network without the removed channels to come down to.
            rng: Draws the noise.
            noise: Spread of a logarithm that is added to the groups' ratios.
            impact: Exponent of the impact in the damage, as in `space.Knobs`.
        """
        moved = dict(kept)
        lots = {name: math.exp(noise * rng.normal()) for name in self.options}
        here = self.count(self.cost(moved))
        while here > target:
            best: tuple[float, str, int] | None = None
            for name, own in self.options.items():
                now = self._option(name, moved.get(name, own[0].keep))
                below = [option for option in own[1:] if option.keep < now.keep]
                if not below:
                    continue
                option = max(below, key=lambda o: o.keep)
                cost = self.count(self.cost({**moved, name: option.keep}))
                saved = here - max(cost, target)
                added = max(weighted(option, impact) ** 2 - weighted(now, impact) ** 2, 1e-9)
                ratio = lots[name] * saved / added
                if saved > 0 and (best is None or ratio > best[0]):
                    best = ratio, name, option.keep
            if best is None:
                break
            moved[best[1]] = best[2]
            here = self.count(self.cost(moved))
        return moved
