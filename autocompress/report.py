"""One HTML file about one study: what came out, at what price, and what happened to each layer.

The report reads `result.json` and the two Optuna studies; it measures nothing and needs no GPU.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
import markupsafe
import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from autocompress.layers import Cost
from autocompress.plan import from_spans
from autocompress.scale import ACCURACY, Scale
from autocompress.trials import within_delta

Outcome = Literal["feasible", "infeasible", "stopped", "failed", "unfinished"]

OBJECTIVES = {
    "params": ("params", "Parameters", "fewer parameters"),
    "size": ("size_bytes", "Size", "smaller"),
    "macs": ("macs", "MACs", "fewer MACs"),
    "latency": ("latency_ms", "Latency", "faster"),
    "params+macs": ("share", "Parameters and MACs, mean share", "fewer parameters and MACs"),
}
"""Objective -> key in the metrics of a trial, axis title, words of the headline."""

_LEGEND = {
    "feasible": "within the allowed drop",
    "infeasible": "not surely within it",
    "stopped": "stopped early",
}
# Near to Okabe-Ito, readable on white and on black; the shape says the same as the colour.
_COLOURS = {"feasible": "#2a86c4", "infeasible": "#d55e00", "stopped": "#8a8a8a"}
_SYMBOLS = {
    ("feasible", "exploration"): "circle",
    ("feasible", "annealing"): "diamond",
    ("infeasible", "exploration"): "circle-open",
    ("infeasible", "annealing"): "diamond-open",
    ("stopped", "exploration"): "x-thin",
    ("stopped", "annealing"): "cross-thin",
}


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


def plan_layers(plan: Mapping[str, Any] | str | None) -> Mapping[str, Mapping[str, Any]]:
    """Layer -> its transform with ranks, of a plan as JSON text or as the parsed object."""
    layers: Mapping[str, Mapping[str, Any]] = _parsed(plan).get("layers", {})
    return layers


def plan_channels(plan: Mapping[str, Any] | str | None) -> Mapping[str, tuple[int, int]]:
    """Channel group -> how many of its channels remain, and how many there were."""
    groups: Mapping[str, Mapping[str, Any]] = _parsed(plan).get("channels", {})
    return {
        name: (sum(1 for _ in from_spans(row["kept"])), int(row["of"]))
        for name, row in groups.items()
    }


def _parsed(plan: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    parsed: Mapping[str, Any] | None = json.loads(plan) if isinstance(plan, str) else plan
    return parsed or {}


def channels_lost(plan: Mapping[str, Any] | str | None) -> Mapping[str, dict[str, int]]:
    """Layer -> how many of its channels, on the sides "in" and "out", a plan removes."""
    lost: dict[str, dict[str, int]] = {}
    counts = plan_channels(plan)
    for name, row in _parsed(plan).get("channels", {}).items():
        kept, full = counts[name]
        for layer, side, _, repeat in row["members"]:
            for each in ("in", "out") if side == "both" else (side,):
                own = lost.setdefault(layer, {"in": 0, "out": 0})
                own[each] += (full - kept) * repeat
    return lost


def transform_text(transform: Mapping[str, Any]) -> str:
    """ "tucker2 (rank_in 16, rank_out 24)"."""
    fields = [f"{k} {_plain(v)}" for k, v in transform.items() if k != "transform"]
    return f"{transform.get('transform', '?')} ({', '.join(fields)})"


def plan_summary(plan: Mapping[str, Any] | str | None) -> str:
    """ "7 layers: 4 tucker2, 3 svd; 2 channel groups: 40 of 64 channels"."""
    layers, channels = plan_layers(plan), plan_channels(plan)
    parts = []
    if layers:
        counts = Counter(str(choice.get("transform", "?")) for choice in layers.values())
        kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        parts.append(f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'}: {kinds}")
    if channels:
        kept, full = map(sum, zip(*channels.values(), strict=True))
        groups = "channel group" if len(channels) == 1 else "channel groups"
        parts.append(f"{len(channels)} {groups}: {kept} of {full} channels")
    return "; ".join(parts) or "no layer changed"


def quantity(value: float | None, metric: str, scale: Scale = ACCURACY) -> str:
    """A metric in the unit that a person reads, such as "272 k" or "4.31 ms"; "–" for None.

    Args:
        value: In the unit of `metric`'s name: a count, bytes, ms, or that of the task's metric for
            score and drop.
        metric: A key of a trial's metrics.
        scale: Of the task's metric.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if metric == "score":
        return scale.value(value)
    if metric == "drop":
        return scale.number(value)
    if metric == "share":
        return f"{value:.2f} %"
    if metric == "latency_ms":
        return f"{_digits(value)} ms"
    unit = "B" if metric in ("size_bytes", "memory_bytes") else ""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{_digits(value / size)} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def write_report(
    result: Mapping[str, Any],
    exploration: optuna.Study | None,
    annealing: optuna.Study | None,
    path: Path,
) -> Path:
    """Write the report as one self-contained HTML file, which replaces an older one in one step.

    Args:
        result: The parsed `result.json`.
        exploration: The study of stage 1, if it was run.
        annealing: The study of stage 2, if it was run.
        path: Of the HTML file. The commands in the report name `best/` beside it.
    """
    studies = {
        stage: study
        for stage, study in (("exploration", exploration), ("annealing", annealing))
        if study is not None
    }
    view = _View.read(result, studies)
    template = files("autocompress").joinpath("templates/report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figure = pareto_figure(view.trials, view.delta, view.objective, view.baseline_cost, view.scale)
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="pareto-plot",
        config={"displayModeBar": False, "responsive": True, "plotlyServerURL": ""},
    )
    page: str = environment.from_string(template).render(
        study=str(result.get("study", "")),
        objective=view.objective,
        metric=view.scale.name,
        headline=_headline(view),
        comparison=_comparison(view),
        compatible=_compatible(view),
        second=_second(view),
        int8=_int8(view),
        judged_in_int8=_judged_in_int8(view),
        plot=markupsafe.Markup(plot),
        outside=_outside(view.trials, view.delta),
        counts=Counter(trial.outcome for trial in view.trials),
        layers=(layers := _layers(view)),
        channels=any(row["channels"] for row in layers),
        left_groups=view.facts.get("left_groups") or {},
        trials=[_trial_cells(trial, view.scale) for trial in view.trials],
        phases=_phases(view),
        best_folder=str(path.parent / "best"),
        facts=_facts(view),
        settings=_flatten(result.get("config") or {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside, then renamed: a reader never sees half a file.
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


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
    changed: int


@dataclass(frozen=True)
class _View:
    """What all sections of the report read."""

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

    @classmethod
    def read(cls, result: Mapping[str, Any], studies: Mapping[str, optuna.Study]) -> _View:
        delta = float(result["delta"])
        objective = str(result.get("objective", "params"))
        key = OBJECTIVES[objective][0]
        baseline = result.get("baseline") or {}
        chosen = (result.get("best") if result.get("met") else None) or result.get("nearest")
        cost = _metrics_of_profile(baseline.get("profile"), baseline.get("profile")).get(key)
        records = {stage: study.get_trials(deepcopy=False) for stage, study in studies.items()}
        front = {id(t) for t in pareto_trials(t for ts in records.values() for t in ts)}
        trials = [
            _trial_view(trial, stage, delta, key, cost, id(trial) in front)
            for stage, found in records.items()
            for trial in found
        ]
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
        )


def pareto_figure(
    trials: Sequence[TrialView],
    delta: float,
    objective: str,
    baseline_cost: float | None,
    scale: Scale = ACCURACY,
) -> Any:
    """The plotly figure: drop on validation data against cost, both stages.

    Args:
        trials: Of all stages; those without a drop or a cost are not drawn.
        delta: Allowed drop.
        objective: Key of `OBJECTIVES`.
        baseline_cost: In the unit of the objective.
        scale: Of the metric that drops are of.
    """
    metric, title, _ = OBJECTIVES[objective]
    drawn = [t for t in trials if t.drop is not None and t.cost is not None and t.cost > 0]
    figure = go.Figure()
    for (kind, stage), symbol in reversed(_SYMBOLS.items()):
        points = [t for t in drawn if (t.outcome, t.stage) == (kind, stage)]
        if points:
            figure.add_trace(
                go.Scatter(
                    x=[t.drop for t in points],
                    y=[t.cost for t in points],
                    mode="markers",
                    name=f"{stage}: {_LEGEND[kind]}",
                    marker=_marker(kind, symbol),
                    text=[_hover(t, metric, scale) for t in points],
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    front = sorted((t for t in drawn if t.on_front), key=lambda t: t.drop or 0.0)
    if front:
        figure.add_trace(
            go.Scatter(
                x=[t.drop for t in front],
                y=[t.cost for t in front],
                mode="lines",
                name="Pareto front",
                line={"color": _COLOURS["feasible"], "width": 1.5, "shape": "hv"},
                hoverinfo="skip",
            )
        )
    if baseline_cost:
        figure.add_trace(
            go.Scatter(
                x=[0.0],
                y=[baseline_cost],
                mode="markers",
                name="baseline",
                marker={"symbol": "star", "size": 14, "color": "#c08a00"},
                text=[f"baseline<br>{quantity(baseline_cost, metric)}"],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    figure.add_vline(x=delta, line={"color": "#8a8a8a", "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        x=delta,
        y=1,
        yref="paper",
        text=f"allowed drop {scale.number(delta)}",
        showarrow=False,
        xanchor="left",
        yanchor="top",
        xshift=5,
    )
    costs = [cost for cost in (baseline_cost, *(t.cost for t in drawn)) if cost]
    figure.update_layout(**_layout(title, scale.drop_name, _x_range(trials, delta)))
    figure.update_yaxes(**_cost_axis(costs, baseline_cost, metric))
    return figure


def _marker(kind: str, symbol: str) -> dict[str, Any]:
    line = {"color": _COLOURS[kind], "width": 1.5}
    size = 7 if kind == "stopped" else 9
    return {"symbol": symbol, "size": size, "color": _COLOURS[kind], "line": line}


def _layout(title: str, drop_name: str, x_range: tuple[float, float]) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    title_style = {"font": {"size": 13}, "standoff": 14}
    return {
        "template": "none",
        "height": 500,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"family": "system-ui, sans-serif", "size": 13},
        # Above the plot it grows away from the axis title when a narrow screen breaks it up.
        "legend": {
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.03,
            "x": 0,
            "xanchor": "left",
            "traceorder": "reversed",
            "font": {"size": 12},
        },
        "hoverlabel": {
            "bgcolor": "#222222",
            "bordercolor": "#222222",
            "font": {"color": "#ffffff"},
            "align": "left",
        },
        "xaxis": {
            "title": {"text": drop_name, **title_style},
            "range": x_range,
            "automargin": True,
            "zeroline": False,
            "gridcolor": "#dddddd",
        },
        "yaxis": {
            "title": {"text": f"{title} (compression ratio)", **title_style},
            "automargin": True,
            "zeroline": False,
            "gridcolor": "#dddddd",
        },
    }


def _cost_axis(costs: Sequence[float], baseline_cost: float | None, metric: str) -> dict[str, Any]:
    """A logarithmic cost axis whose ticks are compression ratios, equal steps of which matter."""
    if not costs or not baseline_cost:
        return {"type": "linear", "rangemode": "tozero"}
    low, high = math.log10(min(costs)), math.log10(max(costs))
    pad = max(0.04, 0.06 * (high - low))
    ladder = [0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024]
    shown = [r for r in ladder if low - pad <= math.log10(baseline_cost / r) <= high + pad]
    while len(shown) > 10:
        shown = shown[::2]
    return {
        "type": "log",
        "range": (low - pad, high + pad),
        "tickvals": [baseline_cost / r for r in shown],
        "ticktext": [f"{quantity(baseline_cost / r, metric)} ({r:g}x) " for r in shown],
    }


def _x_range(trials: Sequence[TrialView], delta: float) -> tuple[float, float]:
    """Drops from a little below the least to where the decision is made, not to the worst trial."""
    drops = sorted(t.drop for t in trials if t.drop is not None and t.outcome == "infeasible")
    near = [drop for drop in drops if drop <= 4 * (delta or 0.5)]
    feasible = [t.drop for t in trials if t.drop is not None and t.outcome == "feasible"]
    right = max([1.6 * (delta or 0.5), *near, *(drops[:1]), *feasible])
    left = min([0.0, *feasible])
    pad = 0.06 * (right - left)
    return (left - pad, right + pad)


def _outside(trials: Sequence[TrialView], delta: float) -> int:
    right = _x_range(trials, delta)[1]
    return sum(t.drop is not None and t.cost is not None and t.drop > right for t in trials)


def _hover(trial: TrialView, metric: str, scale: Scale) -> str:
    lines = [
        f"<b>{trial.stage} {trial.number}</b>",
        f"drop {'–' if trial.drop is None else scale.difference(trial.drop)}",
        f"{quantity(trial.cost, metric)}, {_ratio(trial.ratio)}",
        html.escape(trial.plan),
    ]
    if trial.reason:
        lines.append(html.escape(_shorten(trial.reason, 70)))
    return "<br>".join(lines)


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
        changed=len(plan_layers(plan)),
    )


def _headline(view: _View) -> dict[str, Any]:
    """The first screen: one sentence with the ratio, one on the metric, and six figures."""
    before, scale = _baseline_metrics(view), view.scale
    if view.chosen is None:
        return {
            "title": "No compressed model",
            "met": False,
            "verdict": "No trial has finished, so there is nothing to compare.",
            "test": "",
            "figures": [],
        }
    chosen = view.chosen
    after = _metrics(view, chosen)
    key, _, words = OBJECTIVES[view.objective]
    ratio = _divide(before.get(key), after.get(key))
    drop = _drop(chosen)
    where = f"{chosen.get('stage', '')} trial {chosen.get('trial', '')}".strip()
    met = bool(view.result.get("met"))
    if met:
        if drop is not None and drop < 0:
            verdict = (
                f"{scale.title} on validation data is better by {scale.difference(-drop)}; a drop "
                f"of {scale.number(view.delta)} was allowed ({where})."
            )
        else:
            verdict = (
                f"{scale.title} on validation data is worse by {quantity(drop, 'drop', scale)} of "
                f"the allowed {scale.difference(view.delta)} ({where})."
            )
    else:
        verdict = (
            f"No plan kept the drop in {scale.name} within {scale.difference(view.delta)}. The "
            f"nearest is {where} with {'–' if drop is None else scale.difference(drop)} on "
            "validation data."
        )
    latency = (view.baseline.get("profile") or {}).get("latency")
    names = {
        "params": "parameters",
        "size_bytes": "size",
        "macs": "MACs",
        "latency_ms": latency_label(latency).replace("Latency", "latency"),
        "memory_bytes": "memory",
    }
    figures = [
        (_ratio(_divide(before.get(k), after.get(k))), name, _arrow(before.get(k), after.get(k), k))
        for k, name in names.items()
        if _divide(before.get(k), after.get(k)) is not None
    ]
    bound, confidence = chosen.get("val_drop_bound"), view.result.get("confidence")
    if bound is not None and confidence is not None and confidence > 0.5:
        verdict += (
            f" With a confidence of {100 * confidence:g} % the drop on new images is at most "
            f"{scale.difference(bound)}{', in int8' if _judged_in_int8(view) else ''}."
        )
    title = f"{_ratio(ratio)} {words}" if ratio else "Compressed model"
    if view.result.get("val_seen"):
        verdict += (
            " The baseline has probably been trained on the validation images, so that the drop "
            "on them is larger than on new ones."
        )
    return {
        "title": title if met else "Not within the allowed drop",
        "met": met,
        "verdict": verdict,
        "test": _test_sentence(view, chosen),
        "figures": figures,
    }


def _test_sentence(view: _View, chosen: Mapping[str, Any]) -> str:
    before, after = view.baseline.get("test_score"), chosen.get("test_score")
    if before is None or after is None:
        return ""
    scale = view.scale
    drop = chosen.get("test_drop", scale.drop(before, after))
    reads = view.result.get("test_reads", 1)
    when = "read once at the end" if reads == 1 else f"read {reads} times as trials were added"
    text = f"On test data, {when}: {scale.value(before)} → {scale.value(after)}, "
    text += f"a drop of {scale.difference(drop)}"
    interval = chosen.get("test_drop_interval")
    if interval is None:
        return text + "."
    low, high = interval
    count = chosen.get("test_images")
    images = f"{count:,} images" if count else "images"
    interval = f"{_signed(low, scale)} to {_signed(high, scale)}"
    text += f" (95 % interval {interval}, paired on the same {images})."
    if low <= view.delta < high and view.result.get("met"):
        text += f" The interval reaches beyond the allowed {scale.number(view.delta)}."
    elif low > view.delta:
        allowed = scale.number(view.delta)
        text += f" That is more than the allowed {allowed}, which held on validation data."
    return text


def _comparison(view: _View) -> dict[str, Any]:
    """Rows of the before/after table: label and, per column, value and ratio."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    scale = view.scale
    base = _baseline_metrics(view)
    base["score"] = view.baseline.get("val_score", base.get("score"))
    base["test"] = view.baseline.get("test_score")
    stage_best = (view.result.get("stage_best") or {}).get("exploration")
    if stage_best:
        name = f"best of exploration (trial {stage_best.get('trial')})"
        columns.append((name, dict(stage_best.get("metrics") or {})))
    if view.chosen is not None:
        after = _metrics(view, view.chosen)
        after["score"] = view.chosen.get("val_score", after.get("score"))
        after["test"] = view.chosen.get("test_score")
        where = f"{view.chosen.get('stage')} trial {view.chosen.get('trial')}"
        columns.append((f"{'final' if view.result.get('met') else 'nearest'} ({where})", after))
    labels = [
        (f"{scale.title}, validation", "score"),
        (f"{scale.title}, test", "test"),
        ("Parameters", "params"),
        ("Size", "size_bytes"),
        ("MACs, one image", "macs"),
        (latency_label((view.baseline.get("profile") or {}).get("latency")), "latency_ms"),
        ("Memory, one image", "memory_bytes"),
    ]
    rows = []
    for label, key in labels:
        unit = "score" if key == "test" else key
        if base.get(key) is None and all(found.get(key) is None for _, found in columns):
            continue
        cells = []
        for _, found in columns:
            value = found.get(key)
            if unit == "score":
                known = None not in (value, base.get(key))
                change = _change(value - base[key], scale) if known else ""
            else:
                change = _ratio(_divide(base.get(key), value), missing="")
            cells.append((quantity(value, unit, scale), change))
        rows.append((label, quantity(base.get(key), unit, scale), cells))
    return {"columns": [name for name, _ in columns], "rows": rows}


def _compatible(view: _View) -> list[tuple[str, str, str, str]]:
    """Rows by the published profiler's formulas: label, baseline, final, ratio; none if unknown."""
    before = view.baseline.get("compatible")
    after = (view.chosen or {}).get("compatible")
    if not before or not after:
        return []
    labels = {
        "params_m": "Total Parameters, M",
        "size_mb": "Model Size, MB",
        "macs_g": "Computational Complexity, GMACs",
        "memory_mb": "Memory Footprint, MB",
    }
    return [
        (label, f"{before[k]:.4f}", f"{after[k]:.4f}", _ratio(_divide(before[k], after[k])))
        for k, label in labels.items()
    ]


def latency_label(latency: object) -> str:
    """A latency's name with the runtime, batch and threads: "Latency, ONNX Runtime 1.32.0, ..."."""
    if not isinstance(latency, Mapping):
        return "Latency"
    words = [str(latency.get("runtime") or ""), f"batch {latency.get('batch_size')}"]
    if latency.get("threads"):
        words.append(f"{latency['threads']} thread{'' if latency['threads'] == 1 else 's'}")
    return "Latency, " + ", ".join(word for word in words if word)


def _second(view: _View) -> str:
    second = view.result.get("second")
    if not second:
        return ""
    key, _, words = OBJECTIVES[view.objective]
    base = _baseline_metrics(view)
    ratio = _ratio(_divide(base.get(key), _metrics(view, second).get(key)))
    drop = _drop(second)
    return (
        f"Second best: {second.get('stage')} trial {second.get('trial')}, {ratio} {words}, "
        f"drop {'–' if drop is None else view.scale.difference(drop)} on validation data."
    )


def _judged_in_int8(view: _View) -> bool:
    """Whether trials and finalists were judged by their int8 files."""
    return bool(((view.result.get("config") or {}).get("search") or {}).get("int8"))


def _int8(view: _View) -> dict[str, Any] | None:
    """The int8 file beside the float32 files: a sentence and rows; None if none was asked for."""
    found = view.result.get("int8")
    if not found:
        return None
    if not found.get("met"):
        return {"verdict": f"There is no int8 file within delta: {found.get('reason')}", "rows": []}
    where, scale = f"{found.get('stage')} trial {found.get('trial')}", view.scale
    method = str(found.get("calibration"))
    if found.get("rounded_epochs"):
        method += f", {found['rounded_epochs']:g} epochs of quantization-aware fine-tuning"
    verdict = (
        f"{found.get('file')} holds {where} in int8 ({method}). Its {scale.name} on validation "
        f"data is worse by {scale.difference(found['val_drop'])}, at most "
        f"{scale.number(found['val_drop_bound'])} at the study's confidence"
    )
    tested = found.get("test_drop")
    if tested is not None:
        low, high = found["test_drop_interval"]
        verdict += (
            f"; on test data by {_signed(tested, scale)} (95 % interval {_signed(low, scale)} to "
            f"{_signed(high, scale)})"
        )
    return {"verdict": verdict + ".", "rows": _int8_rows(found)}


def _int8_rows(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Size and latency of the baseline's file, the float32 file and the int8 file."""
    names = ("baseline", "float32", "int8")
    sizes = found.get("size_bytes") or {}
    times = found.get("onnx_latency") or {}
    rows = []
    for label, metric, values in (
        ("ONNX file", "size_bytes", sizes),
        (
            latency_label(times.get("int8")),
            "latency_ms",
            {name: latency.get("median_ms") for name, latency in times.items()},
        ),
    ):
        if values:
            cells = [quantity(values.get(name), metric) for name in names]
            ratios = [_divide(values.get(name), values.get("int8")) for name in names[:2]]
            rows.append((label, [*cells, *(_ratio(ratio) for ratio in ratios)]))
    return rows


def layer_rows(
    facts: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    chosen: Mapping[str, Any],
    errors: Mapping[str, float],
) -> list[dict[str, Any]]:
    """What was done to each layer of the baseline, or why it was left alone.

    Args:
        facts: A study's attributes: "layers" (specs), "left_alone" (reasons), "bounds" (in words).
        baseline: The baseline's profile.
        chosen: A network's entry in `result.json`: its "plan" and, as far as known, "profile".
        errors: Layer name to the relative error of its outputs as it was cut.

    Returns:
        For each layer, in order of definition: "name"; "shape" in words; "transform" as in the plan
        and its "error", or None for both and the reason "why" it was left alone; the "bound" that
        the study file sets, in words; "channels", how many remain, in words; "params" and "macs",
        `[before, after]`, None where not known.
    """
    lost = channels_lost(chosen.get("plan"))
    plan = plan_layers(chosen.get("plan"))
    before = (baseline or {}).get("layers") or ()
    after = (chosen.get("profile") or {}).get("layers") or ()
    specs = {str(layer["name"]): layer for layer in facts.get("layers") or ()}
    left_alone = facts.get("left_alone") or {}
    order = {str(layer["name"]): i for i, layer in enumerate(before)}
    rows = []
    for name in sorted({**specs, **plan, **left_alone}, key=lambda n: order.get(n, len(order))):
        was, now = _layer_cost(before, name), _layer_cost(after, name)
        channels = _channels_text(specs.get(name), lost.get(name))
        why = left_alone.get(name, "only its channels became fewer" if channels else KEPT)
        rows.append(
            {
                "name": name,
                "shape": _shape(specs.get(name)),
                "transform": plan.get(name),
                "why": None if name in plan else why,
                "channels": channels,
                "bound": (facts.get("bounds") or {}).get(name, ""),
                "error": errors.get(name) if name in plan else None,
                "params": [cost["params"] if cost else None for cost in (was, now)],
                "macs": [cost["macs"] if cost else None for cost in (was, now)],
            }
        )
    return rows


KEPT = "the search kept it"


def _channels_text(layer: Mapping[str, Any] | None, lost: Mapping[str, int] | None) -> str:
    """ "12 of 16 in, 24 of 32 out"; "" where all remain."""
    if layer is None or lost is None:
        return ""
    return ", ".join(
        f"{layer[f'{side}_channels'] - lost[side]} of {layer[f'{side}_channels']} {side}"
        for side in ("in", "out")
        if lost[side]
    )


def _layers(view: _View) -> list[dict[str, str]]:
    """The cells of each layer's row."""
    if view.chosen is None:
        return []
    profile = view.baseline.get("profile")
    return [
        _layer_cells(row) for row in layer_rows(view.facts, profile, view.chosen, view.layer_errors)
    ]


def _layer_cells(row: Mapping[str, Any]) -> dict[str, str]:
    changed = row["transform"] is not None
    bound = f"; bound: {row['bound']}" if row["bound"] else ""
    return {
        "name": row["name"],
        "shape": row["shape"],
        "channels": row["channels"],
        "params": _count_arrow(row["params"], "params", changed),
        "params_ratio": _ratio(_layer_ratio(*row["params"]), missing=""),
        "macs": _count_arrow(row["macs"], "macs", changed),
        "macs_ratio": _ratio(_layer_ratio(*row["macs"]), missing=""),
        "transform": transform_text(row["transform"]) + bound if changed else "",
        "why": "" if changed else row["why"] + bound,
        "error": "" if row["error"] is None else f"{row['error']:.3f}",
    }


def _layer_cost(layers: Iterable[Mapping[str, Any]], name: str) -> dict[str, int] | None:
    """Params and MACs of a layer, or of the layers that replaced it, which are named under it."""
    found = [x for x in layers if x["name"] == name or str(x["name"]).startswith(name + ".")]
    if not found:
        return None
    return {key: sum(int(x.get(key) or 0) for x in found) for key in ("params", "macs")}


def _layer_ratio(was: int | None, now: int | None) -> float | None:
    return None if was == now else _divide(was, now)


def _count_arrow(counts: Sequence[int | None], key: str, changed: bool) -> str:
    was, now = counts
    if was is None:
        return "–"
    # MACs are long numbers; params stay exact, as people check them against the layer's shape.
    show = f"{was:,}" if key == "params" else quantity(was, key)
    if now is None and changed:
        # The nearest trial of a study that met nothing has a plan and no profile.
        return f"{show} → not profiled"
    if now is None or was == now:
        return show
    return f"{show} → " + (f"{now:,}" if key == "params" else quantity(now, key))


def _shape(layer: Mapping[str, Any] | None) -> str:
    """ "conv 64→128, 3×3, stride 2"."""
    if layer is None:
        return "–"
    channels = f"{layer['in_channels']}→{layer['out_channels']}"
    if layer.get("kind") == "linear":
        return f"linear {channels}"
    height, width = layer["kernel_size"]
    words = [f"conv {channels}", f"{height}×{width}"]
    stride = tuple(layer.get("stride") or (1, 1))
    if stride != (1, 1):
        words.append(
            f"stride {stride[0] if stride[0] == stride[1] else f'{stride[0]}×{stride[1]}'}"
        )
    if layer.get("groups", 1) != 1:
        words.append(f"{layer['groups']} groups")
    return ", ".join(words)


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


def _trial_cells(trial: TrialView, scale: Scale) -> dict[str, str]:
    words = {"feasible": "within", "infeasible": "too large a drop"}
    return {
        "name": f"{trial.stage} {trial.number}",
        "outcome": words.get(trial.outcome, trial.outcome),
        "kind": trial.outcome,
        "front": "on the front" if trial.on_front else "",
        "drop": quantity(trial.drop, "drop", scale),
        "ratio": _ratio(trial.ratio),
        "score": quantity(trial.metrics.get("score"), "score", scale),
        "seconds": _duration(sum(trial.seconds.values())) if trial.seconds else "–",
        "plan": trial.plan,
        "note": "; ".join(
            part for part in (f"from {trial.parent}" if trial.parent else "", trial.reason) if part
        ),
    }


def _phases(view: _View) -> dict[str, list[tuple[str, str, float]]]:
    """Name, time and share of each phase of the study, and of the parts of its trials."""
    parts: Counter[str] = Counter()
    for trial in view.trials:
        parts.update(trial.seconds)
    return {"study": _shares(view.result.get("seconds") or {}), "trials": _shares(parts)}


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    known = {name: value for name, value in seconds.items() if value}
    total = sum(known.values()) or 1.0
    return [(name, _duration(value), 100 * value / total) for name, value in known.items()]


def _facts(view: _View) -> list[tuple[str, str]]:
    facts = [("seed", str(view.result.get("seed", "–")))]
    for key in ("command", "device", "precision", "finished"):
        if view.result.get(key):
            facts.append((key, str(view.result[key])))
    return facts + [(k, str(v)) for k, v in (view.result.get("versions") or {}).items()]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _plain(value)))
    return rows


def _metrics_of_profile(
    profile: Mapping[str, Any] | None, full: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A profile under the names of a trial's metrics; `full` is the baseline's."""
    if not profile:
        return {}
    keys = ("score", "params", "macs", "size_bytes", "memory_bytes")
    metrics = {key: profile.get(key) for key in keys}
    latency = profile.get("latency")
    metrics["latency_ms"] = latency.get("median_ms") if isinstance(latency, Mapping) else None
    if full:
        metrics["share"] = 100 * _cost(profile).share(_cost(full))
    return metrics


def _cost(profile: Mapping[str, Any]) -> Cost:
    return Cost(profile["params"], profile["macs"])


def _metrics(view: _View, found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the winner, the second or the nearest trial, as far as they are known."""
    known = _metrics_of_profile(found.get("profile"), view.baseline.get("profile"))
    return known or dict(found.get("metrics") or {})


def _baseline_metrics(view: _View) -> dict[str, Any]:
    """The baseline's metrics."""
    return _metrics_of_profile(view.baseline.get("profile"), view.baseline.get("profile"))


def _drop(entry: Mapping[str, Any]) -> float | None:
    drop = entry.get("val_drop", (entry.get("metrics") or {}).get("drop"))
    return None if drop is None else float(drop)


def _divide(before: float | None, after: float | None) -> float | None:
    return before / after if before is not None and after else None


def _arrow(before: float | None, after: float | None, metric: str) -> str:
    return f"{quantity(before, metric)} → {quantity(after, metric)}"


def _ratio(value: float | None, missing: str = "–") -> str:
    if value is None:
        return missing
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _change(difference: float, scale: Scale) -> str:
    return f"{_signed(difference, scale)} {scale.difference_unit}".rstrip()


def _signed(value: float, scale: Scale) -> str:
    # A true minus sign lines up with the digits of tabular figures.
    return scale.number(value).replace("-", "−")


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "–" if value is None else str(value)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
