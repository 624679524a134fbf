"""What a task's metric is called, in which unit it is, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """The scale of a metric. Delta, and every drop, is on it.

    A drop is by how much a network is worse than the baseline: positive where it is worse,
    whichever way is better.

    Attributes:
        name: What the metric is called: "accuracy", "mIoU", "RMSE".
        unit: Of its values: "%", "px", "°C"; "" for none. Differences of percentages are points.
        higher_is_better: False for errors.
    """

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    @property
    def difference_unit(self) -> str:
        """The unit of differences: "points" for percentages."""
        return "points" if self.unit == "%" else self.unit

    @property
    def title(self) -> str:
        """The name as it begins a sentence: "Accuracy", "mIoU", "RMSE"."""
        return self.name.capitalize() if self.name.islower() else self.name

    @property
    def drop_name(self) -> str:
        """What the drop is called, with its unit: "accuracy drop (points)"."""
        unit = self.difference_unit
        return f"{self.name} drop" + (f" ({unit})" if unit else "")

    def drop(self, before: float, after: float) -> float:
        """By how much `after` is worse than `before`."""
        return before - after if self.higher_is_better else after - before

    def value(self, value: float) -> str:
        """A value in words: "91.20 %", "0.4127", "1.83 px"."""
        if self.unit == "%":
            return f"{value:.2f} %"
        return f"{value:.4g} {self.unit}".rstrip()

    def number(self, difference: float) -> str:
        """A difference without its unit: "0.43", "0.0213"."""
        return f"{difference:.2f}" if self.unit == "%" else f"{difference:.3g}"

    def difference(self, difference: float) -> str:
        """A difference in words: "0.43 points", "0.0213", "0.21 px"."""
        return f"{self.number(difference)} {self.difference_unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The scale as plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Scale:
        """The inverse of `to_dict`; accuracy where nothing is known."""
        return cls(**data) if data else cls()


ACCURACY = Scale()
