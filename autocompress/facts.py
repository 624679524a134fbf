"""An ended trial as displays show it: ratios, score, time and plan, from what is written on it."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from autocompress.profiler import Profile
from autocompress.slots import WORKER
from autocompress.tally import Facts
from autocompress.view import OBJECTIVES
from autocompress.wording import plan_summary


def cost_ratio(trial: FrozenTrial, objective: str, baseline: Profile) -> float | None:
    """Baseline / trial of the cost that the study makes small; None if it was not measured."""
    key = OBJECTIVES[objective][0]
    cost = trial.user_attrs.get("metrics", {}).get(key)
    costs = {**baseline.to_dict(), "latency_ms": baseline.latency_ms, "share": 100.0}
    return costs[key] / cost if cost and costs[key] else None


def facts_of(trial: FrozenTrial, baseline: Profile) -> Facts:
    """What is known of an ended trial besides its drop.

    Args:
        trial: Of either stage.
        baseline: The costs that its own are compared with.
    """
    metrics = trial.user_attrs.get("metrics", {})
    before = {
        "params": baseline.params,
        "macs": baseline.macs,
        "latency": baseline.latency_ms,
    }
    after = {
        "params": metrics.get("params"),
        "macs": metrics.get("macs"),
        "latency": metrics.get("latency_ms"),
    }
    duration = trial.duration
    return Facts(
        score=metrics.get("score"),
        ratios={k: full / after[k] for k, full in before.items() if full and after[k]},
        seconds=None if duration is None else duration.total_seconds(),
        plan=plan_summary(trial.user_attrs["plan"]) if "plan" in trial.user_attrs else "",
        worker=str(trial.user_attrs.get(WORKER, "")),
    )
