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

from autocompress.channels import KeptChannels
from autocompress.damage import EVEN, Yardstick, weighted
from autocompress.importance import ChannelLadder
from autocompress.layers import Cost, LayerSpec, without_channels

Kept = Mapping[str, int]
"""Channel group to how many of its channels remain; a group that keeps all is absent."""


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

    @cached_property
    def reach(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """Group to the layers that it runs through: how many input and output channels each of them
        loses with every channel of the group."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, ladder in self.ladders.items():
            own = found.setdefault(name, {})
            for member in ladder.group.members:
                if member.layer in self.layers:
                    inputs, outputs = own.get(member.layer, (0, 0))
                    inputs += member.repeat if member.side != "out" else 0
                    outputs += member.repeat if member.side != "in" else 0
                    own[member.layer] = inputs, outputs
        return found

    def removed(self, group: str, place: int) -> int:
        """How many channels an option of a group removes."""
        own = self.options[group]
        return own[0].keep - own[place].keep

    @cached_property
    def spared(self) -> Mapping[str, tuple[int, ...]]:
        """What each option of a group saves in layers that only pass its channels."""
        found = {}
        for group, own in self.options.items():
            each = self.ladders[group].params_each
            counts = [each * self.removed(group, place) for place in range(len(own))]
            less = [Cost(self.full.params - n, self.full.macs, self.full.ms) for n in counts]
            found[group] = tuple(self.count(self.full) - self.count(cost) for cost in less)
        return found

    def narrowed(self, layer: str, gone_in: int, gone_out: int) -> LayerSpec:
        """A layer that lacks so many input and output channels."""
        key = layer, gone_in, gone_out
        if key not in self._narrowed:
            whole = self.layers[layer]
            self._narrowed[key] = (
                without_channels(whole, whole.in_channels - gone_in, whole.out_channels - gone_out)
                if gone_in or gone_out
                else whole
            )
        return self._narrowed[key]

    @cached_property
    def _narrowed(self) -> dict[tuple[str, int, int], LayerSpec]:
        return {}

    def _cost_without(self, layer: str, gone_in: int, gone_out: int) -> Cost:
        """What a layer costs that lacks so many input and output channels."""
        key = layer, gone_in, gone_out
        if key not in self._costs:
            self._costs[key] = self.cost_of(self.narrowed(layer, gone_in, gone_out))
        return self._costs[key]

    @cached_property
    def _costs(self) -> dict[tuple[str, int, int], Cost]:
        return {}

    def _gone(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """The layers that lost channels: how many input and output channels each."""
        gone: dict[str, tuple[int, int]] = {}
        for name, keep in kept.items():
            count = self.ladders[name].group.channels - keep
            for layer, each in self.reach[name].items():
                inputs, outputs = gone.get(layer, (0, 0))
                gone[layer] = inputs + count * each[0], outputs + count * each[1]
        return gone

    def remaining(self, kept: Kept) -> dict[str, LayerSpec]:
        """All layers without the removed channels."""
        gone = self._gone(kept)
        return {name: self.narrowed(name, *gone.get(name, (0, 0))) for name in self.layers}

    def cost(self, kept: Kept) -> Cost:
        """Cost of the network without the removed channels."""
        params, macs, ms = self.full.params, self.full.macs, self.full.ms
        for name, fewer in self._gone(kept).items():
            before, after = self._cost_without(name, 0, 0), self._cost_without(name, *fewer)
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
        """Sum of the squared errors of keep-counts; `impact` as in `allocator.Knobs`."""
        return sum(weighted(self._option(n, keep), impact) ** 2 for n, keep in kept.items())

    def _option(self, name: str, keep: int) -> ChannelOption:
        own = self.options[name]
        return next((option for option in own if option.keep == keep), own[0])

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
            impact: Exponent of the impact in the damage, as in `allocator.Knobs`.
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
