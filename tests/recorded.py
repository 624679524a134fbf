"""Optuna studies with trials as the conductor records them, made without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

DELTA = 1.0
# drop, params, state
TRIALS = [
    (0.2, 100_000.0, TrialState.COMPLETE),
    (0.7, 50_000.0, TrialState.COMPLETE),
    (0.8, 60_000.0, TrialState.COMPLETE),  # beaten by the one before
    (3.0, 20_000.0, TrialState.COMPLETE),  # infeasible
    (30.0, 10_000.0, TrialState.PRUNED),
]
PLAN = {"version": 1, "layers": {"layer1.0|x": {"transform": "svd", "rank": 12}}}


def describe(study: optuna.Study) -> None:
    """The facts that a study's own process writes first."""
    how = {"runtime": "ONNX Runtime 1.32.0", "batch_size": 1, "threads": 2}
    latency = {"median_ms": 2.5, **how}
    profile = {"params": 270_000, "macs": 41_000_000, "latency": latency}
    study.set_user_attr("baseline", {"score": 92.3, **profile})
    study.set_user_attr("left_alone", {"conv1": "3 input channels <b>"})
    study.set_user_attr("delta", DELTA)
    study.set_user_attr("objective", "params")


def add_trial(
    study: optuna.Study,
    stage: str,
    drop: float,
    params: float,
    state: TrialState = TrialState.COMPLETE,
    plan: Any = PLAN,
    before_end: Callable[[Trial], object] = lambda trial: None,
) -> FrozenTrial:
    """A trial that ended so; `before_end` is called while it still runs."""
    trial = study.ask()
    metrics = {"score": 92.3 - drop, "drop": drop, "drop_bound": drop, "params": params}
    trial.set_user_attr("plan", json.dumps(plan))
    trial.set_user_attr("metrics", metrics)
    trial.set_user_attr("layer_errors", {"layer1.0|x": 0.125})
    trial.set_user_attr("parent", "exploration/3" if stage == "annealing" else None)
    study._storage.set_trial_system_attr(trial._trial_id, "constraints", [drop - DELTA])
    before_end(trial)
    complete = state == TrialState.COMPLETE
    return study.tell(trial, [drop, params] if complete else None, state=state)
