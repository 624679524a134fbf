"""A study as report and dashboard show it: trials, their outcomes, what was found when.

Read from `result.json` and the two Optuna studies; nothing is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.costs import OBJECTIVES, mean_share
from autocompress.layers import Cost
from autocompress.scale import Scale
from autocompress.trials import within_delta
from autocompress.wording import plan_summary

Outcome = Literal["feasible", "infeasible", "stopped", "failed", "unfinished"]


def outcome(trial: FrozenTrial) -> Outcome:
    """What became of a trial; feasible means complete and within delta at the confidence."""
    if trial.state == TrialState.COMPLETE:
        return "feasible" if within_delta(trial) else "infeasible"
    if trial.state == TrialState.PRUNED:
        return "stopped"
    return "failed" if trial.state == TrialState.FAIL else "unfinished"


def pareto_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The feasible trials that no other feasible trial beats, by rising drop.

    Args:
        trials: With values (drop, cost); any states, of one or more studies.
    """
    feasible = [trial for trial in trials if outcome(trial) == "feasible"]
    front: list[FrozenTrial] = []
    for trial in sorted(feasible, key=lambda trial: tuple(trial.values)):
        if not front or trial.values[1] < front[-1].values[1]:
            front.append(trial)
    return front


@dataclass(frozen=True)
class TrialView:
    """A trial as the report shows it; cost in the objective's unit, drop on the metric's scale."""

    stage: str
    number: int
    outcome: Outcome
    drop: float | None
    cost: float | None
    ratio: float | None
    on_front: bool
    plan: str
    metrics: Mapping[str, Any]
    seconds: Mapping[str, float]
    parent: str
    reason: str
    started: datetime | None
    ended: datetime | None

    @property
    def label(self) -> str:
        """ "annealing/7", as commands take it."""
        return f"{self.stage}/{self.number}"


@dataclass(frozen=True)
class View:
    """What all sections of the report read.

    Attributes:
        result: The parsed `result.json`.
        delta: Allowed drop, on the metric's scale.
        objective: Key of `costs.OBJECTIVES`.
        baseline: The baseline's part of the result.
        chosen: The winner's part, or that of the nearest trial where nothing met delta.
        baseline_cost: In the objective's unit.
        trials: Of both stages, in order.
        facts: Attributes of a study that has begun: its layers, and which were left alone and why.
        layer_errors: Layer to relative error, of the chosen trial.
        scale: Of the metric.
        importance: See `importances`.
    """

    result: Mapping[str, Any]
    delta: float
    objective: str
    baseline: Mapping[str, Any]
    chosen: Mapping[str, Any] | None
    baseline_cost: float | None
    trials: Sequence[TrialView]
    facts: Mapping[str, Any]
    layer_errors: Mapping[str, float]
    scale: Scale
    importance: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, result: Mapping[str, Any], studies: Mapping[str, Study]) -> View:
        delta = float(result["delta"])
        objective = str(result.get("objective", "params"))
        key = OBJECTIVES[objective].metric
        baseline = result.get("baseline") or {}
        chosen = (result.get("best") if result.get("met") else None) or result.get("nearest")
        cost = metrics_of_profile(baseline.get("profile"), baseline.get("profile")).get(key)
        records = {stage: study.get_trials(deepcopy=False) for stage, study in studies.items()}
        trials = trial_views(records, delta, key, cost)
        attributes = [study.user_attrs for study in studies.values()]
        return cls(
            result=result,
            delta=delta,
            objective=objective,
            baseline=baseline,
            chosen=chosen,
            baseline_cost=cost,
            trials=trials,
            facts=next((a for a in attributes if a.get("layers")), {}),
            layer_errors=_layer_errors(records, chosen),
            scale=Scale.from_dict(result.get("metric")),
            # It takes seconds in large spaces, so it is not told anew where it is known.
            importance=result.get("importance") or importances(studies),
        )


def trial_views(
    records: Mapping[str, Sequence[FrozenTrial]],
    delta: float,
    key: str,
    baseline_cost: float | None,
) -> list[TrialView]:
    """The trials of all stages as they are shown, stage after stage.

    Args:
        records: Trials by stage.
        delta: Allowed drop.
        key: Of the objective in a trial's metrics.
        baseline_cost: In the objective's unit.
    """
    front = {id(t) for t in pareto_trials(t for ts in records.values() for t in ts)}
    return [
        _trial_view(trial, stage, delta, key, baseline_cost, id(trial) in front)
        for stage, found in records.items()
        for trial in found
    ]


@dataclass(frozen=True)
class Moment:
    """The end of a trial, and what was the best by then.

    Attributes:
        trial: The trial.
        count: How many trials had ended, this one too.
        minutes: For how long trials had run by then; pauses of the study don't count.
        best: The highest ratio of a trial within delta so far; None if there is none.
    """

    trial: TrialView
    count: int
    minutes: float
    best: float | None


def history(trials: Iterable[TrialView]) -> list[Moment]:
    """The ends of all trials of both stages in order of time."""
    moments: list[Moment] = []
    busy, until, best = 0.0, None, None
    ended = [(t.ended, t) for t in trials if t.ended is not None]
    for end, trial in sorted(ended, key=lambda pair: pair[0]):
        start = trial.started or end
        begin = start if until is None else max(start, until)
        busy += max(0.0, (end - begin).total_seconds())
        until = end if until is None else max(until, end)
        if trial.outcome == "feasible" and trial.ratio is not None:
            best = max(best or 0.0, trial.ratio)
        moments.append(Moment(trial, len(moments) + 1, busy / 60, best))
    return moments


FEWEST_FOR_IMPORTANCE = 10
"""Complete trials below which importances would be noise."""


def importances(studies: Mapping[str, Study]) -> dict[str, dict[str, float]]:
    """How much each layer's choices told apart good from bad trials of the exploration.

    By fANOVA (Hutter et al. 2014, ICML), the shares of a layer's transform, rank and channels added
    up; each column sums up to 1.

    Returns:
        "drop" and "cost" to the shares by layer or channel group, largest first; empty where there
        are fewer than `FEWEST_FOR_IMPORTANCE` complete trials.
    """
    study = studies.get("exploration")
    if study is None:
        return {}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return {}
    return {name: _importance(study, index) for index, name in enumerate(("drop", "cost"))}


def _importance(study: Study, objective: int) -> dict[str, float]:
    shares = get_param_importances(
        study,
        evaluator=FanovaImportanceEvaluator(n_trees=32, seed=0),
        target=lambda trial: trial.values[objective],
    )
    layers: dict[str, float] = defaultdict(float)
    for name, share in shares.items():
        layers[name.rpartition(".")[0]] += float(share)
    return dict(sorted(layers.items(), key=lambda item: -item[1]))


def search_facts(view: View) -> dict[str, Any]:
    """What the search found and when, as plain values for `result.json`.

    Returns:
        "front": the Pareto front, "history": all ends of trials in order of time, "importance".
    """
    return {
        "front": [
            {"trial": t.label, "drop": t.drop, "cost": t.cost, "ratio": t.ratio}
            for t in sorted(view.trials, key=lambda t: t.drop or 0.0)
            if t.on_front
        ],
        "history": [
            {
                "trial": m.trial.label,
                "outcome": m.trial.outcome,
                "drop": m.trial.drop,
                "ratio": m.trial.ratio,
                "best": m.best,
                "minutes": round(m.minutes, 3),
            }
            for m in history(view.trials)
        ],
        "importance": view.importance,
    }


def _trial_view(
    trial: FrozenTrial,
    stage: str,
    delta: float,
    key: str,
    baseline_cost: float | None,
    on_front: bool,
) -> TrialView:
    attributes = trial.user_attrs
    metrics = attributes.get("metrics") or {}
    drop, cost = trial.values if trial.values and len(trial.values) == 2 else (None, None)
    constraints = trial.system_attrs.get("constraints")
    if drop is None and trial.state == TrialState.PRUNED and constraints:
        # A stopped trial has no values; its constraint is the drop at the gate minus delta.
        drop = constraints[0] + delta
    drop = metrics.get("drop") if drop is None else drop
    cost = metrics.get(key) if cost is None else cost
    plan = attributes.get("plan")
    return TrialView(
        stage=stage,
        number=trial.number,
        outcome=outcome(trial),
        drop=drop,
        cost=cost,
        ratio=baseline_cost / cost if baseline_cost and cost else None,
        on_front=on_front,
        plan=plan_summary(plan) if plan else "",
        metrics=metrics,
        seconds=attributes.get("seconds") or {},
        parent=str(attributes.get("parent") or ""),
        reason=str(attributes.get("reason") or ""),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
    )


def _layer_errors(
    records: Mapping[str, Sequence[FrozenTrial]], chosen: Mapping[str, Any] | None
) -> Mapping[str, float]:
    if chosen is None:
        return {}
    for trial in records.get(str(chosen.get("stage")), ()):
        if trial.number == chosen.get("trial"):
            errors: Mapping[str, float] = trial.user_attrs.get("layer_errors") or {}
            return errors
    return {}


def metrics_of_profile(
    profile: Mapping[str, Any] | None, full: Mapping[str, Any] | None, objective: str = "params"
) -> dict[str, Any]:
    """A profile under the names of a trial's metrics.

    Args:
        profile: As `Profile.to_dict` gives it.
        full: The baseline's.
        objective: Key of `costs.OBJECTIVES`; tells what the share is made of.
    """
    if not profile:
        return {}
    keys = ("score", "params", "macs", "size_bytes", "memory_bytes")
    metrics = {key: profile.get(key) for key in keys}
    metrics["latency_ms"] = _milliseconds(profile)
    if full:
        metrics["share"] = 100 * mean_share(objective, _cost(profile), _cost(full))
    return metrics


def _cost(profile: Mapping[str, Any]) -> Cost:
    return Cost(profile["params"], profile["macs"], _milliseconds(profile))


def _milliseconds(profile: Mapping[str, Any]) -> float | None:
    latency = profile.get("latency")
    return latency.get("median_ms") if isinstance(latency, Mapping) else None


def divide(before: float | None, after: float | None) -> float | None:
    return before / after if before is not None and after else None
