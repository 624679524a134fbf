"""An ended trial as displays show it: ratios, score, time and plan, from what is written on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from autocompress.costs import OBJECTIVES
from autocompress.slots import WORKER
from autocompress.tally import Facts
from autocompress.wording import plan_summary

Costs = Mapping[str, float | None]


def costs_of(profile: Mapping[str, Any]) -> Costs:
    """The costs in a baseline's profile, as `Profile.to_dict` gives it, by their keys in trials."""
    latency = profile.get("latency") or {}
    return {
        "params": profile["params"],
        "size_bytes": profile["size_bytes"],
        "macs": profile["macs"],
        "latency_ms": latency.get("median_ms"),
        "share": 100.0,
    }


def cost_ratio(trial: FrozenTrial, objective: str, baseline: Costs) -> float | None:
    """Baseline / trial of the cost that the study makes small; None if it was not measured."""
    return _ratio(trial, OBJECTIVES[objective].metric, baseline)


def facts_of(trial: FrozenTrial, baseline: Costs) -> Facts:
    """What is known of an ended trial besides its drop.

    Args:
        trial: Of either stage.
        baseline: What its costs are compared with.
    """
    duration = trial.duration
    names = {"params": "params", "macs": "macs", "latency": "latency_ms"}
    ratios = {name: _ratio(trial, key, baseline) for name, key in names.items()}
    return Facts(
        score=trial.user_attrs.get("metrics", {}).get("score"),
        ratios={name: ratio for name, ratio in ratios.items() if ratio is not None},
        seconds=None if duration is None else duration.total_seconds(),
        plan=plan_summary(trial.user_attrs["plan"]) if "plan" in trial.user_attrs else "",
        worker=str(trial.user_attrs.get(WORKER, "")),
    )


def _ratio(trial: FrozenTrial, key: str, baseline: Costs) -> float | None:
    before, after = baseline[key], trial.user_attrs.get("metrics", {}).get(key)
    return before / after if before and after else None
