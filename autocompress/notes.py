"""Notes in the dashboard, in Markdown: one on each study, one on each trial carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.config import StudyConfig
from autocompress.costs import OBJECTIVES
from autocompress.exhibits import PICTURE, artifact_ids, trial_name
from autocompress.process import SEARCHING
from autocompress.scale import Scale
from autocompress.store import STAGES
from autocompress.trials import PARENT, lost
from autocompress.view import TrialView, metrics_of_profile, trial_views
from autocompress.wording import (
    cell,
    latency_label,
    plan_channels,
    plan_layers,
    quantity,
    ratio_text,
    transform_text,
)

OUTCOME = "outcome"
"""User attribute of the exploration: see `outcome_facts`."""
MOST_ON_FRONT = 12
"""Trials of the Pareto front that a study's note lists."""
MOST_LISTED = 100
"""Trials of its own stage that it lists, the latest."""
_OUTCOMES = {
    "feasible": "within delta",
    "infeasible": "not surely within it",
    "stopped": "stopped early",
    "failed": "failed",
    "unfinished": "running or waiting",
}

_METRICS = {
    "score": "",
    "params": "parameters",
    "size_bytes": "size",
    "macs": "MACs",
    "latency_ms": "latency",
    "memory_bytes": "memory",
}


def outcome_facts(summary: Mapping[str, Any], artifacts: Mapping[str, str]) -> dict[str, Any]:
    """What a finished study's note says of its end.

    Args:
        summary: The content of `result.json`.
        artifacts: The study's files in its artifact store, name to id.
    """
    best = summary.get("best") if summary.get("met") else None
    facts: dict[str, Any] = {
        "met": bool(summary.get("met")),
        "finished": summary.get("finished"),
        "artifacts": dict(artifacts),
    }
    if best:
        objective = str(summary["objective"])
        before = metrics_of_profile(summary["baseline"]["profile"], summary["baseline"]["profile"])
        after = metrics_of_profile(best["profile"], summary["baseline"]["profile"], objective)
        key = OBJECTIVES[objective].metric
        facts |= {"label": f"{best['stage']}/{best['trial']}"}
        facts |= {"before": before[key], "after": after[key]}
        kept = ("val_drop", "val_drop_bound", "test_drop", "test_drop_interval", "test_images")
        facts |= {name: best.get(name) for name in kept}
    return facts


@dataclass(frozen=True)
class Board:
    """What the notes of a study's stages speak of.

    Attributes:
        name: The study's name, without the stage.
        ids: Stage to the number of its Optuna study, which is in the dashboard's addresses.
        facts: Attributes of the exploration.
        trials: As they are shown, of all stages.
        records: Stage to its trials.
    """

    name: str
    ids: Mapping[str, int]
    facts: Mapping[str, Any]
    trials: Sequence[TrialView]
    records: Mapping[str, Sequence[FrozenTrial]]

    @classmethod
    def read(cls, studies: Mapping[str, Study]) -> Board | None:
        """The board of the stages that have begun; None while the baseline is being made."""
        first = next(iter(studies.values()))
        facts = first.user_attrs
        if "delta" not in facts:
            return None
        records = {stage: study.get_trials(deepcopy=False) for stage, study in studies.items()}
        objective = str(facts.get("objective", "params"))
        baseline = facts.get("baseline")
        key = OBJECTIVES[objective].metric
        cost = _baseline_metrics(baseline).get(key) if baseline else None
        return cls(
            name=first.study_name.removesuffix(f"-{next(iter(studies))}"),
            ids={stage: study._study_id for stage, study in studies.items()},
            facts=facts,
            trials=trial_views(records, float(facts["delta"]), key, cost),
            records=records,
        )

    @property
    def delta(self) -> float:
        """The allowed drop, on the metric's scale."""
        return float(self.facts["delta"])

    @property
    def objective(self) -> str:
        """Key of `costs.OBJECTIVES`."""
        return str(self.facts.get("objective", "params"))

    @property
    def scale(self) -> Scale:
        """Of the task's metric."""
        return Scale.from_dict(self.facts.get("metric"))

    @property
    def baseline(self) -> Mapping[str, Any]:
        """The baseline's metrics, under the names of a trial's."""
        return _baseline_metrics(self.facts.get("baseline"))

    @property
    def baseline_cost(self) -> float | None:
        """In the objective's unit."""
        cost: float | None = self.baseline.get(OBJECTIVES[self.objective].metric)
        return cost

    @property
    def confidence(self) -> str:
        """How sure the study must be that a drop is within delta: "95 %"."""
        settings = self.facts.get("config") or {}
        default = StudyConfig.model_fields["confidence"].default
        return f"{100 * settings.get('confidence', default):g} %"

    def address(self, label: str) -> str:
        """Where the dashboard shows a trial, "annealing/7"; "" for stages that are not there."""
        stage, _, number = label.partition("/")
        if stage not in self.ids:
            return ""
        return f"/dashboard/studies/{self.ids[stage]}/trials?numbers={number}"

    def link(self, label: str) -> str:
        """A trial's label as a link to it."""
        address = self.address(label)
        return f"[{cell(label)}]({address})" if address else cell(label)


def study_note(board: Board, stage: str) -> str:
    """The note of a stage: the goal, how far it is, the best so far, and how to read the pages."""
    scale, delta = board.scale, board.delta
    other = [
        f"[{name}](/dashboard/studies/{board.ids[name]})"
        if name in board.ids
        else f"{name}, not begun"
        for name in STAGES
        if name != stage
    ]
    judged = " of the int8 file" if (board.facts.get("config") or {}).get("search.int8") else ""
    goal = OBJECTIVES[board.objective].gain
    return "\n".join(
        [
            f"## {cell(board.name)}: {stage}, stage {STAGES.index(stage) + 1} of {len(STAGES)}",
            "",
            f"**Goal:** {goal}, with a drop in {cell(scale.name)} of at most "
            f"{scale.difference(delta)} on validation data{judged}, at {board.confidence} "
            "confidence.  ",
            f"**Trials:** {_counts(board, stage)}.  ",
            f"**Other stage:** {', '.join(other)}.",
            "",
            *_headline(board),
            "",
            *_front(board),
            "### Baseline",
            "",
            *table(("metric", "value"), metric_rows(board.baseline, {}, scale), right=1),
            "",
            *_left_alone(board),
            *_legend(board),
            "",
            *_listed(board, stage),
        ]
    )


def _counts(board: Board, stage: str) -> str:
    """ "24: 3 within delta, 17 not surely, 4 stopped early"."""
    own = [trial.outcome for trial in board.trials if trial.stage == stage]
    parts = [f"{own.count(kind)} {text}" for kind, text in _OUTCOMES.items() if kind in own]
    return f"{len(own)}: {', '.join(parts)}" if own else "none yet"


def _headline(board: Board) -> list[str]:
    """The winner where the study has ended, else the best trial so far."""
    outcome = board.facts.get(OUTCOME)
    if outcome and not board.facts.get(SEARCHING):
        return _ended(board, outcome)
    feasible = [t for t in board.trials if t.outcome == "feasible" and t.cost is not None]
    best = min(feasible, key=lambda t: t.cost or 0.0, default=None)
    if best is None:
        return ["**Best so far:** no trial is surely within delta yet."]
    name = trial_name(best.label, board.objective, best.ratio, best.drop, board.scale)
    return [f"**Best so far:** {board.link(best.label)}{name.removeprefix(best.label)}."]


def _ended(board: Board, outcome: Mapping[str, Any]) -> list[str]:
    scale = board.scale
    files = [
        f"[{cell(name)}](/artifacts/{board.ids['exploration']}/{artifact})"
        for name, artifact in (outcome.get("artifacts") or {}).items()
        if "exploration" in board.ids
    ]
    lines = [f"**Files:** {', '.join(files)}"] if files else []
    if not outcome["met"]:
        return ["**Result:** no network within delta was found.  ", *lines]
    goal = OBJECTIVES[board.objective]
    before, after = outcome["before"], outcome["after"]
    drops = [f"validation {scale.difference(outcome['val_drop'])}"]
    if outcome.get("test_drop") is not None:
        low, high = map(scale.number, outcome["test_drop_interval"])
        drops.append(
            f"test {scale.difference(outcome['test_drop'])} (95 % interval {low} to {high})"
        )
    return [
        f"**Winner:** {board.link(outcome['label'])}, fine-tuned at length: "
        f"**{ratio_text(before / after)} {goal.gain}** ({quantity(before, goal.metric)} → "
        f"{quantity(after, goal.metric)}).  ",
        f"**Drop in {cell(scale.name)}:** {'; '.join(drops)}.  ",
        *lines,
    ]


def _front(board: Board) -> list[str]:
    """The Pareto front of both stages, cheapest first."""
    front = sorted((t for t in board.trials if t.on_front), key=lambda t: t.cost or 0.0)
    if not front:
        return []
    rows = [_row(board, t) for t in front[:MOST_ON_FRONT]]
    more = len(front) - MOST_ON_FRONT
    return [
        "### Pareto front of both stages",
        "",
        *table(_heading(board), rows, right=1),
        *([f"\nand {more} more, in the plot."] if more > 0 else []),
        "",
    ]


def _heading(board: Board) -> tuple[str, ...]:
    title = OBJECTIVES[board.objective].title.lower()
    return ("trial", "ratio", title, cell(board.scale.drop_name), "at most")


def _row(board: Board, trial: TrialView) -> tuple[str, ...]:
    scale, metric = board.scale, OBJECTIVES[board.objective].metric
    bound = trial.metrics.get("drop_bound")
    return (
        board.link(trial.label),
        ratio_text(trial.ratio),
        quantity(trial.cost, metric),
        "–" if trial.drop is None else scale.number(trial.drop),
        "–" if bound is None else scale.number(bound),
    )


def _listed(board: Board, stage: str) -> list[str]:
    """The ended trials of a stage under names that say more than their numbers, latest first."""
    ended = [t for t in board.trials if t.stage == stage and t.outcome != "unfinished"]
    if not ended:
        return []
    rows = [(*_row(board, t), _OUTCOMES[t.outcome]) for t in reversed(ended[-MOST_LISTED:])]
    earlier = len(ended) - MOST_LISTED
    return [
        f"### Trials of the {stage}, latest first",
        "",
        *table((*_heading(board), "outcome"), rows, right=1),
        *([f"\nand {earlier} earlier ones."] if earlier > 0 else []),
    ]


def _left_alone(board: Board) -> list[str]:
    left: Mapping[str, str] = board.facts.get("left_alone") or {}
    if not left:
        return []
    rows = [(f"`{cell(name)}`", cell(reason)) for name, reason in left.items()]
    return ["### Layers left alone", "", *table(("layer", "reason"), rows), ""]


def _legend(board: Board) -> list[str]:
    """What the dashboard's own words mean here."""
    scale = board.scale
    return [
        "### How to read these pages",
        "",
        f"- **{cell(scale.drop_name)}**, the first objective: by how much a trial is worse than "
        "the baseline on validation data.",
        f"- **Constraint**: the drop's upper bound at {board.confidence} confidence, less "
        f"delta ({scale.number(board.delta)}). Trials above 0 are *infeasible*, and grey in plots; "
        "*Trials (Selection)* can hide them.",
        "- **Pruned**: stopped early, as earlier trials told that it would not come within delta.",
        "- `<layer>.transform`, `<layer>.rank_fraction`: the decomposition of a layer, and how "
        "much of its full rank is left; `<group>.channels`: the share of channels that remain.",
        f"- `name`, `compression_ratio`: {OBJECTIVES[board.objective].gain} than the baseline by "
        "this factor; `parent`: the trial whose weights it began with.",
        "- Notes are kept up to date while the dashboard runs. One that you change is yours, and "
        "stays as you wrote it.",
    ]


def trial_note(board: Board, view: TrialView, trial: FrozenTrial) -> str:
    """The note of an ended trial: before and after, its layers; or why it has none."""
    if trial.state != TrialState.COMPLETE:
        return _unfinished_note(board, view, trial)
    scale, attributes = board.scale, trial.user_attrs
    verdict = "**within**" if view.outcome == "feasible" else "**not surely within**"
    lines = [
        f"## {_title(board, view)}",
        "",
        f"{scale.title} drop {scale.difference(trial.values[0])}, at most "
        f"{scale.number(lost(trial, board.delta))} at {board.confidence} confidence: {verdict} "
        f"the allowed {scale.number(board.delta)}.",
        "",
        *_won(board, view),
        *_parent(board, attributes),
    ]
    rows = metric_rows(board.baseline, view.metrics, scale)
    lines += [*table(("metric", "before", "after", "ratio"), rows, right=1), ""]
    files = artifact_ids(trial.system_attrs)
    if PICTURE in files:
        place = f"/artifacts/{board.ids[view.stage]}/{trial._trial_id}/{files[PICTURE]}"
        lines += [f"![The layers, before and after]({place})", ""]
    lines += _plan(attributes)
    lines += [
        "To have it as files:",
        "",
        f"```\npython -m autocompress.study export {cell(board.name)} --trial {view.label}\n```",
    ]
    return "\n".join(lines)


def _unfinished_note(board: Board, view: TrialView, trial: FrozenTrial) -> str:
    what = "Stopped early" if view.outcome == "stopped" else "Failed"
    return "\n".join(
        [
            f"## {_title(board, view)}",
            "",
            f"**{what}:** {cell(view.reason or 'no reason is known')}.",
            "",
            *_parent(board, trial.user_attrs),
            *_plan(trial.user_attrs),
        ]
    )


def _title(board: Board, view: TrialView) -> str:
    return cell(trial_name(view.label, board.objective, view.ratio, None, board.scale))


def _won(board: Board, view: TrialView) -> list[str]:
    outcome = board.facts.get(OUTCOME) or {}
    if outcome.get("label") != view.label:
        return []
    drop = board.scale.difference(outcome["val_drop"])
    return [f"**The winner.** Fine-tuned at length, its drop on validation data is {drop}.", ""]


def _parent(board: Board, attributes: Mapping[str, Any]) -> list[str]:
    parent = attributes.get(PARENT)
    return [f"It began with the weights of {board.link(str(parent))}.", ""] if parent else []


def _plan(attributes: Mapping[str, Any]) -> list[str]:
    errors = attributes.get("layer_errors") or {}
    rows = [
        (
            f"`{cell(name)}`",
            cell(transform_text(transform)),
            f"{errors[name]:.3f}" if name in errors else "–",
        )
        for name, transform in plan_layers(attributes.get("plan")).items()
    ]
    groups = plan_channels(attributes.get("plan"))
    kept = [(f"`{cell(name)}`", f"{left} of {of}") for name, (left, of) in groups.items()]
    lines = []
    if rows:
        lines += ["### Decomposed layers", ""]
        lines += [*table(("layer", "transform", "error of its outputs"), rows, right=2), ""]
    if kept:
        lines += ["### Channels left", "", *table(("group", "channels"), kept, right=1), ""]
    return lines or ["No layer was changed.", ""]


def _baseline_metrics(baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """The baseline's profile, which has its score too, under the names of a trial's metrics."""
    if not baseline:
        return {}
    latency = {"latency": baseline["latency"]} if baseline.get("latency") else {}
    return metrics_of_profile(baseline, baseline) | latency


def metric_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], scale: Scale
) -> list[tuple[str, ...]]:
    """Rows (metric, before), with (after, ratio) too if `after` holds anything."""
    rows: list[tuple[str, ...]] = []
    for key, label in _METRICS.items():
        was, now = before.get(key), after.get(key)
        if was is None and now is None:
            continue
        if key == "latency_ms" and isinstance(before.get("latency"), Mapping):
            label = latency_label(before["latency"]).replace("Latency", "latency")
        if key == "score":
            label = cell(scale.name)
        row: tuple[str, ...] = (label, quantity(was, key, scale))
        if after:
            ratio = ratio_text(was / now) if was and now and key != "score" else ""
            row += (quantity(now, key, scale), ratio)
        rows.append(row)
    return rows


def table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None
) -> list[str]:
    """Lines of a table; columns from `right` on hold numbers."""
    marks = [
        "---:" if right is not None and column >= right else "---" for column in range(len(heading))
    ]
    lines = [heading, marks, *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
