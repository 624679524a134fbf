"""What a choice of the layer table is predicted to break, by which choices are compared.

Two predictions are at hand: the squared relative error of what the choice computes, and its impact
on the network's outputs. Either alone ranks plans worse than their geometric mean in most networks
(README, "The layer table"), and which of them deserves the larger exponent differs from network to
network. So the exponent is a knob: a choice carries its damage at even exponents, and a lean by
which it moves with the knob.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

EVEN = 0.5
"""Exponent of the impact at which it counts as much as the squared error."""


class Predicted(Protocol):
    """A choice of the layer table, with its relative error and its impact."""

    @property
    def error(self) -> float: ...

    @property
    def impact(self) -> float: ...


class Weighable(Protocol):
    """An option of the search, with an error and a lean as a `Yardstick` gives them."""

    @property
    def error(self) -> float: ...

    @property
    def lean(self) -> float: ...


@dataclass(frozen=True)
class Yardstick:
    """Makes the damages of one layer table comparable.

    Attributes:
        worst: The largest damage at even exponents.
        centre: The median of `log(root of impact / error)`.
    """

    worst: float = 1.0
    centre: float = 0.0

    @classmethod
    def of(cls, choices: Iterable[Predicted]) -> Yardstick:
        """The yardstick of all choices of a table."""
        known = list(choices)
        leans = [_lean(c) for c in known if c.error > 0 and c.impact > 0]
        worst = max(map(damage, known), default=0.0) or 1.0
        return cls(worst, statistics.median(leans) if leans else 0.0)

    def error(self, choice: Predicted) -> float:
        """Root of the damage at even exponents, 1 for the worst choice of all."""
        return math.sqrt(damage(choice) / self.worst)

    def lean(self, choice: Predicted) -> float:
        """By how much the impact makes more of the choice than the error does, as a logarithm."""
        return _lean(choice) - self.centre if choice.error > 0 and choice.impact > 0 else 0.0


def damage(choice: Predicted) -> float:
    """The geometric mean of the squared relative error and the impact."""
    return choice.error * math.sqrt(choice.impact)


def weighted(option: Weighable, impact: float) -> float:
    """Root of `squared error ** (1 - impact) * impact ** impact`, in the unit of `option.error`.

    Args:
        option: The option.
        impact: Exponent of the impact in the damage, 0 to 1.
    """
    return option.error * math.exp((impact - EVEN) * option.lean)


def _lean(choice: Predicted) -> float:
    return math.log(math.sqrt(choice.impact) / choice.error)
