"""Plotly figures of a study: the Pareto front, and what was found when."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autocompress.costs import OBJECTIVES
from autocompress.scale import ACCURACY, Scale
from autocompress.view import Moment, TrialView, history
from autocompress.wording import quantity, ratio_text, shorten

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
        objective: Key of `costs.OBJECTIVES`.
        baseline_cost: In the unit of the objective.
        scale: Of the metric that drops are of.
    """
    goal = OBJECTIVES[objective]
    metric, title = goal.metric, goal.title
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
    figure.update_layout(
        **_layout(f"{title} (compression ratio)", scale.drop_name, _x_range(trials, delta))
    )
    figure.update_yaxes(**_cost_axis(costs, baseline_cost, metric))
    return figure


def history_figure(
    trials: Sequence[TrialView], objective: str, scale: Scale = ACCURACY
) -> Any | None:
    """The plotly figure: ratios of the trials and the best so far, by trial and by time.

    Args:
        trials: Of both stages; those that have not ended are not drawn.
        objective: Key of `costs.OBJECTIVES`.
        scale: Of the metric that drops are of.

    Returns:
        The figure; None where no trial has ended.
    """
    moments = history(trials)
    if not moments:
        return None
    goal = OBJECTIVES[objective]
    metric, title = goal.metric, goal.title
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, axis in ((1, [float(m.count) for m in moments]), (2, [m.minutes for m in moments])):
        for trace in _history_traces(moments, axis, metric, scale, named=column == 1):
            figure.add_trace(trace, row=1, col=column)
    layout = _layout(f"{title} (compression ratio)", "trials that ended", None)
    ratios = [m.trial.ratio for m in moments if m.trial.ratio is not None]
    ticks = _ratio_ticks(min(ratios, default=1.0), max(ratios, default=1.0))
    y_axis = layout["yaxis"] | {"type": "log", "tickvals": ticks}
    y_axis["ticktext"] = [f"{tick:g}x " for tick in ticks]
    x_axis = layout["xaxis"]
    figure.update_layout(
        **layout
        | {
            "height": 380,
            "yaxis": y_axis,
            "yaxis2": {key: y_axis[key] for key in ("type", "tickvals", "gridcolor", "zeroline")},
            "xaxis2": x_axis | {"title": x_axis["title"] | {"text": "minutes of trials"}},
        }
    )
    return figure


def _history_traces(
    moments: Sequence[Moment], axis: Sequence[float], metric: str, scale: Scale, named: bool
) -> list[Any]:
    """Marks for the trials, and a line for the best so far."""
    traces = []
    for (kind, stage), symbol in _SYMBOLS.items():
        points = [
            (x, m)
            for x, m in zip(axis, moments, strict=True)
            if (m.trial.outcome, m.trial.stage) == (kind, stage) and m.trial.ratio is not None
        ]
        if points:
            traces.append(
                go.Scatter(
                    x=[x for x, _ in points],
                    y=[m.trial.ratio for _, m in points],
                    mode="markers",
                    name=f"{stage}: {_LEGEND[kind]}",
                    marker=_marker(kind, symbol) | {"size": 7},
                    text=[_hover(m.trial, metric, scale) for _, m in points],
                    hovertemplate="%{text}<extra></extra>",
                    showlegend=named,
                )
            )
    best = [(x, m.best) for x, m in zip(axis, moments, strict=True) if m.best is not None]
    if best:
        traces.append(
            go.Scatter(
                x=[x for x, _ in best],
                y=[ratio for _, ratio in best],
                mode="lines",
                name="best within the allowed drop so far",
                line={"color": _COLOURS["feasible"], "width": 2, "shape": "hv"},
                hoverinfo="skip",
                showlegend=named,
            )
        )
    return traces


_LADDER = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """At most ten round ratios between two."""
    shown = [ratio for ratio in _LADDER if 0.97 * low <= ratio <= 1.03 * high]
    while len(shown) > 10:
        shown = shown[::2]
    return shown or [round(low, 2)]


def _marker(kind: str, symbol: str) -> dict[str, Any]:
    line = {"color": _COLOURS[kind], "width": 1.5}
    size = 7 if kind == "stopped" else 9
    return {"symbol": symbol, "size": size, "color": _COLOURS[kind], "line": line}


def _layout(title: str, drop_name: str, x_range: tuple[float, float] | None) -> dict[str, Any]:
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
            **({} if x_range is None else {"range": x_range}),
            "automargin": True,
            "zeroline": False,
            "gridcolor": "#dddddd",
        },
        "yaxis": {
            "title": {"text": title, **title_style},
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
    shown = _ratio_ticks(baseline_cost / 10**high, baseline_cost / 10**low)
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


def outside(trials: Sequence[TrialView], delta: float) -> int:
    """How many trials lie to the right of what `pareto_figure` shows."""
    right = _x_range(trials, delta)[1]
    return sum(t.drop is not None and t.cost is not None and t.drop > right for t in trials)


def _hover(trial: TrialView, metric: str, scale: Scale) -> str:
    lines = [
        f"<b>{trial.stage} {trial.number}</b>",
        f"drop {'–' if trial.drop is None else scale.difference(trial.drop)}",
        f"{quantity(trial.cost, metric)}, {ratio_text(trial.ratio)}",
        html.escape(trial.plan),
    ]
    if trial.reason:
        lines.append(html.escape(shorten(trial.reason, 70)))
    return "<br>".join(lines)
