"""What a study can make small: the names of its costs, and how each is counted.

An objective is one cost, or several joined by "+": the mean of their shares of the baseline's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress.layers import Cost
    from autocompress.profiler import Profile

SHARED = ("params", "macs")
"""The costs in the share of a trial whose study makes but one of them small."""


@dataclass(frozen=True)
class Objective:
    """How one objective is shown.

    Attributes:
        metric: Its place in the metrics of a trial.
        title: Of an axis.
        gain: What less of it is, in a headline.
        label: With its unit.
    """

    metric: str
    title: str
    gain: str
    label: str


OBJECTIVES: Mapping[str, Objective] = {
    "params": Objective("params", "Parameters", "fewer parameters", "parameters"),
    "size": Objective("size_bytes", "Size", "smaller", "size (bytes)"),
    "macs": Objective("macs", "MACs", "fewer MACs", "MACs"),
    "latency": Objective("latency_ms", "Latency", "faster", "latency (ms)"),
    "params+macs": Objective(
        "share",
        "Parameters and MACs, mean share",
        "fewer parameters and MACs",
        "parameters and MACs (mean share, %)",
    ),
    "params+latency": Objective(
        "share",
        "Parameters and latency, mean share",
        "fewer parameters and milliseconds",
        "parameters and latency (mean share, %)",
    ),
    "params+macs+latency": Objective(
        "share",
        "Parameters, MACs and latency, mean share",
        "fewer parameters, MACs and milliseconds",
        "parameters, MACs and latency (mean share, %)",
    ),
}
"""All values of a study file's `objective`."""


def is_timed(objective: str) -> bool:
    """Whether networks have to be timed for it."""
    return "latency" in objective.split("+")


def shown_cost(objective: str) -> str:
    """The cost of single layers that stands for it in a picture: "params" or "macs"."""
    return "macs" if objective in ("macs", "latency") else "params"


def mean_share(objective: str, cost: Cost, full: Cost) -> float:
    """Mean share of the objective's costs in those of the baseline, 1 for the baseline itself.

    Parameters and MACs count where the objective is one cost alone; MACs stand for milliseconds
    that were not measured.

    Args:
        objective: Key of `OBJECTIVES`.
        cost: Of a layer or a network.
        full: Of the baseline.
    """
    parts = objective.split("+")
    shares = {"params": cost.params / full.params, "macs": cost.macs / full.macs}
    if cost.ms is None or full.ms is None:
        shares["latency"] = shares["macs"]
    else:
        shares["latency"] = cost.ms / full.ms
    counted = parts if len(parts) > 1 else SHARED
    return sum(shares[part] for part in counted) / len(counted)


def spend(objective: str, cost: Cost, full: Cost) -> int:
    """What a cost counts for the allocator.

    Args:
        objective: "params" and "size" are spent in parameters, "macs" in MACs, several costs in
            billionths of their mean share; "latency" in nanoseconds, where those were measured for
            the baseline, else in MACs.
        cost: Of a layer or a network.
        full: Of the baseline.
    """
    if "+" in objective:
        return round(1e9 * mean_share(objective, cost, full))
    if objective == "latency" and full.ms is not None:
        assert cost.ms is not None, "the layer table has times for all of its rows or for none"
        return round(1e6 * cost.ms)
    return cost.params if objective in ("params", "size") else cost.macs


def cost_of(objective: str, profile: Profile, latency_ms: float | None, full: Profile) -> float:
    """The objective of a whole network in its natural unit.

    That is parameters, bytes, MACs, milliseconds (NaN where they were not measured), or percent of
    `full`, the baseline's profile, for the mean share of several.
    """
    if "+" in objective:
        return share_of(objective, profile, latency_ms, full)
    costs = {
        "params": float(profile.params),
        "size": float(profile.size_bytes),
        "macs": float(profile.macs),
        "latency": math.nan if latency_ms is None else latency_ms,
    }
    return costs[objective]


def share_of(objective: str, profile: Profile, latency_ms: float | None, full: Profile) -> float:
    """`mean_share` of a whole network, in percent; NaN where it wants a time that is not known."""
    if is_timed(objective) and latency_ms is None:
        return math.nan
    cost, baseline = replace(profile.cost, ms=latency_ms), replace(full.cost, ms=full.latency_ms)
    return 100 * mean_share(objective, cost, baseline)
