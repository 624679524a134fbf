"""A study's report, in HTML for people and in Markdown for repositories.

It is read from `result.json` and the two Optuna studies; nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import optuna

from autocompress.artifacts import write_text
from autocompress.costs import OBJECTIVES
from autocompress.figures import history_figure, outside, pareto_figure
from autocompress.formats import FORMATS, INT8_FILE
from autocompress.layermap import kind_of, layer_rows, segments
from autocompress.predict import script_of
from autocompress.scale import Scale
from autocompress.view import TrialView, View, divide, history, metrics_of_profile
from autocompress.wording import (
    arrow_text,
    cell,
    change,
    duration,
    latency_label,
    quantity,
    ratio_text,
    signed,
    transform_text,
)

PLOT = {"displayModeBar": False, "responsive": True, "plotlyServerURL": ""}
MOST_CLASSES = 12
"""Classes that are shown at once; the others are folded away."""
MOST_IMPORTANT = 12
"""Layers whose importance is shown."""

TRANSFORM_NAMES = {
    "svd": "SVD",
    "spatial_svd": "spatial SVD",
    "tucker2": "Tucker-2",
    "cp": "CP",
    "tt": "tensor train",
    "channels": "fewer channels only",
    "kept": "as it was",
}


def write_report(
    result: Mapping[str, Any],
    exploration: optuna.Study | None,
    annealing: optuna.Study | None,
    path: Path,
) -> Path:
    """Write the report as one self-contained HTML file, and beside it the same in Markdown.

    Each replaces an older one in one step.

    Args:
        result: The parsed `result.json`.
        exploration: The study of stage 1, if it was run.
        annealing: The study of stage 2, if it was run.
        path: Of the HTML file. The commands in the report name `best/` beside it, and lost images
            are read from the files there that the result names.
    """
    studies = {
        stage: study
        for stage, study in (("exploration", exploration), ("annealing", annealing))
        if study is not None
    }
    view = View.read(result, studies)
    content = _content(view, path.parent)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autocompress"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    page = environment.get_template("report.html.j2").render(
        content,
        plot=_plot(_pareto(view), "pareto-plot", with_library=True),
        history_plot=_plot(history_figure(view.trials, view.objective, view.scale), "history-plot"),
        lost_images=_lost_images(view, path.parent),
    )
    write_text(path, page)
    markdown = environment.get_template("report.md.j2").render(content)
    write_text(path.with_suffix(".md"), re.sub(r"\n{3,}", "\n\n", markdown))
    return path


def _content(view: View, folder: Path) -> dict[str, Any]:
    """What both forms of the report say."""
    layers = _layers(view)
    return {
        "study": str(view.result.get("study", "")),
        "objective": view.objective,
        "metric": view.scale.name,
        "headline": _headline(view),
        "comparison": _comparison(view),
        "compatible": _compatible(view),
        "second": _second(view),
        "int8": _int8(view),
        "judged_in_int8": _judged_in_int8(view),
        "outside": outside(view.trials, view.delta),
        "counts": Counter(trial.outcome for trial in view.trials),
        "layers": layers,
        "bars": _bars(view),
        "channels": any(row["channels"] for row in layers),
        "left_groups": view.facts.get("left_groups") or {},
        "trials": [_trial_cells(trial, view.scale) for trial in view.trials],
        "curve": _curve(view),
        "long_fits": _long_fits(view),
        "importance": _importance(view),
        "classes": _classes(view),
        "shown_classes": MOST_CLASSES,
        "phases": _phases(view),
        "pace": _pace(view),
        "folder": str(folder),
        "exported": _exported(view),
        "facts": _facts(view),
        "study_file": study_file(view.result.get("config") or {}),
    }


def _pareto(view: View) -> Any:
    return pareto_figure(view.trials, view.delta, view.objective, view.baseline_cost, view.scale)


def _plot(figure: Any | None, name: str, with_library: bool = False) -> markupsafe.Markup:
    """A figure as HTML, with Plotly itself where that is asked for."""
    if figure is None:
        return markupsafe.Markup("")
    return markupsafe.Markup(
        figure.to_html(full_html=False, include_plotlyjs=with_library, div_id=name, config=PLOT)
    )


def _headline(view: View) -> dict[str, Any]:
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
    goal = OBJECTIVES[view.objective]
    ratio = divide(before.get(goal.metric), after.get(goal.metric))
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
        "latency_ms": "latency",
        "memory_bytes": "memory",
    }
    figures = [
        (
            ratio_text(divide(before.get(k), after.get(k))),
            name,
            arrow_text(before.get(k), after.get(k), k),
            latency_label(latency).partition(", ")[2] if k == "latency_ms" else "",
        )
        for k, name in names.items()
        if divide(before.get(k), after.get(k)) is not None
    ]
    bound, confidence = chosen.get("val_drop_bound"), view.result.get("confidence")
    if bound is not None and confidence is not None and confidence > 0.5:
        verdict += (
            f" With a confidence of {100 * confidence:g} % the drop on new images is at most "
            f"{scale.difference(bound)}{', in int8' if _judged_in_int8(view) else ''}"
        )
        expected = chosen.get("val_drop_expected")
        verdict += "." if expected is None else f"; {scale.number(expected)} is to be expected."
    title = f"{ratio_text(ratio)} {goal.gain}" if ratio else "Compressed model"
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


def _test_sentence(view: View, chosen: Mapping[str, Any]) -> str:
    before, after = view.baseline.get("test_score"), chosen.get("test_score")
    if before is None or after is None:
        return ""
    scale = view.scale
    drop = chosen.get("test_drop", scale.drop(before, after))
    reads = view.result.get("test_reads", 1)
    when = "read once at the end" if reads == 1 else f"read {reads} times as trials were added"
    text = f"On test data, {when}: {scale.value(before)} → {scale.value(after)}, "
    better = drop < 0
    words = f"better by {scale.difference(-drop)}"
    text += words if better else f"a drop of {scale.difference(drop)}"
    interval = chosen.get("test_drop_interval")
    if interval is None:
        return text + "."
    low, high = interval
    count = chosen.get("test_images")
    images = f"{count:,} images" if count else "images"
    interval = f"{signed(low, scale)} to {signed(high, scale)}"
    of_what = " of the drop" if better else ""
    text += f" (95 % interval{of_what} {interval}, paired on the same {images})."
    if low <= view.delta < high and view.result.get("met"):
        text += f" The interval reaches beyond the allowed {scale.number(view.delta)}."
    elif low > view.delta:
        allowed = scale.number(view.delta)
        text += f" That is more than the allowed {allowed}, which held on validation data."
    return text


def _comparison(view: View) -> dict[str, Any]:
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
                difference = change(value - base[key], scale) if known else ""
            else:
                difference = ratio_text(divide(base.get(key), value), missing="")
            cells.append((quantity(value, unit, scale), difference))
        rows.append((label, quantity(base.get(key), unit, scale), cells))
    return {"columns": [name for name, _ in columns], "rows": rows}


def _compatible(view: View) -> list[tuple[str, str, str, str]]:
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
        (label, f"{before[k]:.4f}", f"{after[k]:.4f}", ratio_text(divide(before[k], after[k])))
        for k, label in labels.items()
    ]


def _second(view: View) -> str:
    second = view.result.get("second")
    if not second:
        return ""
    goal = OBJECTIVES[view.objective]
    base = _baseline_metrics(view)
    ratio = ratio_text(divide(base.get(goal.metric), _metrics(view, second).get(goal.metric)))
    drop = _drop(second)
    return (
        f"Second best: {second.get('stage')} trial {second.get('trial')}, {ratio} {goal.gain}, "
        f"drop {'–' if drop is None else change(drop, view.scale)} on validation data."
    )


def _judged_in_int8(view: View) -> bool:
    """Whether trials and finalists were judged by their int8 files."""
    return bool(((view.result.get("config") or {}).get("search") or {}).get("int8"))


def _int8(view: View) -> dict[str, Any] | None:
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
            f"; on test data by {signed(tested, scale)} (95 % interval {signed(low, scale)} to "
            f"{signed(high, scale)})"
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
            ratios = [divide(values.get(name), values.get("int8")) for name in names[:2]]
            rows.append((label, [*cells, *(ratio_text(ratio) for ratio in ratios)]))
    return rows


def _chosen_rows(view: View) -> list[dict[str, Any]]:
    """What was done to each layer of the chosen network."""
    if view.chosen is None:
        return []
    return layer_rows(view.facts, view.baseline.get("profile"), view.chosen, view.layer_errors)


def _layers(view: View) -> list[dict[str, Any]]:
    """The cells of each layer's row, and its part of the largest layer before and after."""
    rows = _chosen_rows(view)
    largest = max((row["params"][0] or 0 for row in rows), default=0) or 1
    return [
        _layer_cells(row)
        | {
            "weight": [100 * (count or 0) / largest for count in row["params"]],
            "kind": kind_of(row),
        }
        for row in rows
    ]


def _bars(view: View) -> dict[str, Any]:
    """Where parameters and MACs were and where they went, and the names of what was done."""
    before = view.baseline.get("profile")
    after = (view.chosen or {}).get("profile")
    rows = _chosen_rows(view)
    if not before or not after or not rows:
        return {"rows": [], "legend": []}
    found = []
    for label, key in (("Parameters", "params"), ("MACs", "macs")):
        bars = segments(rows, before[key], after[key], key)
        for words, bar, profile in (("before", bars[0], before), ("after", bars[1], after)):
            found.append((label, words, quantity(profile[key], key), bar))
    used = {segment.kind for *_, bar in found for segment in bar}
    known = [kind for kind in TRANSFORM_NAMES if kind in used]
    others = sorted(used - set(TRANSFORM_NAMES))
    return {
        "rows": found,
        "legend": [(kind, TRANSFORM_NAMES.get(kind, kind)) for kind in (*known, *others)],
    }


def _layer_cells(row: Mapping[str, Any]) -> dict[str, str]:
    changed = row["transform"] is not None
    bound = f"; bound: {row['bound']}" if row["bound"] else ""
    return {
        "name": row["name"],
        "shape": row["shape"],
        "channels": row["channels"],
        "params": _count_arrow(row["params"], "params", changed),
        "params_ratio": ratio_text(_layer_ratio(*row["params"]), missing=""),
        "macs": _count_arrow(row["macs"], "macs", changed),
        "macs_ratio": ratio_text(_layer_ratio(*row["macs"]), missing=""),
        "transform": transform_text(row["transform"]) + bound if changed else "",
        "why": "" if changed else row["why"] + bound,
        "error": "" if row["error"] is None else f"{row['error']:.3f}",
    }


def _layer_ratio(was: int | None, now: int | None) -> float | None:
    return None if was == now else divide(was, now)


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


def _trial_cells(trial: TrialView, scale: Scale) -> dict[str, str]:
    words = {"feasible": "within", "infeasible": "too large a drop"}
    return {
        "name": f"{trial.stage} {trial.number}",
        "outcome": words.get(trial.outcome, trial.outcome),
        "kind": trial.outcome,
        "front": "on the front" if trial.on_front else "",
        "drop": quantity(trial.drop, "drop", scale),
        "ratio": ratio_text(trial.ratio),
        "score": quantity(trial.metrics.get("score"), "score", scale),
        "seconds": duration(sum(trial.seconds.values())) if trial.seconds else "–",
        "plan": trial.plan,
        "note": "; ".join(
            part for part in (f"from {trial.parent}" if trial.parent else "", trial.reason) if part
        ),
    }


def _long_fits(view: View) -> list[dict[str, str]]:
    """The long fine-tunings, in the order in which they were ordered."""
    ratios = {f"{trial.stage}/{trial.number}": trial.ratio for trial in view.trials}

    def cells(fit: Mapping[str, Any]) -> dict[str, str]:
        came = fit["weights"] is not None
        within = "within" if fit["bound"] <= view.delta else "too large a drop"
        return {
            "name": fit["trial"].replace("/", " "),
            "ratio": ratio_text(ratios.get(fit["trial"])),
            "seed": str(fit["seed"]),
            "epochs": f"{fit['epochs']:g}",
            "before": signed(fit["before"], view.scale),
            "after": signed(fit["after"], view.scale) if came else "–",
            "bound": signed(fit["bound"], view.scale) if came else "–",
            "outcome": within if came else "failed",
            "seconds": duration(fit["seconds"]),
        }

    return [cells(fit) for fit in view.result.get("long_fits") or ()]


def _curve(view: View) -> list[tuple[str, str, str, str]]:
    """Each trial that was the best so far when it ended: count, minutes, trial, ratio."""
    rows, best = [], 0.0
    for moment in history(view.trials):
        if moment.best is not None and moment.best > best:
            best = moment.best
            when = duration(60 * moment.minutes)
            rows.append((str(moment.count), when, moment.trial.label, ratio_text(best)))
    return rows


def _importance(view: View) -> list[tuple[str, float, float]]:
    """Layer, its share in the differences of the drop and of the cost, percent."""
    drop, cost = (view.importance.get(name) or {} for name in ("drop", "cost"))
    layers = sorted({*drop, *cost}, key=lambda n: -(drop.get(n, 0) + cost.get(n, 0)))
    rows = [(n, 100 * drop.get(n, 0), 100 * cost.get(n, 0)) for n in layers[:MOST_IMPORTANT]]
    return [row for row in rows if max(row[1:]) >= 0.5]


def _classes(view: View) -> list[dict[str, str]]:
    """The cells of each class's row, the class that lost most first."""
    return [
        {
            "name": str(row["name"]),
            "images": f"{row['images']:,}",
            "before": f"{row['before']:.1f} %",
            "after": f"{row['after']:.1f} %",
            "change": _points(row["after"] - row["before"]),
            "worse": "worse" if row["after"] < row["before"] else "",
            "lost": str(row["lost"]),
            "won": str(row["won"]),
        }
        for row in (view.chosen or {}).get("classes") or ()
    ]


def _points(change: float) -> str:
    """ "+0.4", "−8.1", "0.0"."""
    text = f"{change:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def _lost_images(view: View, folder: Path) -> list[dict[str, str]]:
    """The images that were lost, as far as their files are there: data for a tag, and words."""
    found = []
    for row in (view.chosen or {}).get("lost_images") or ():
        path = folder / row["file"]
        if path.is_file():
            found.append(
                {
                    "data": base64.b64encode(path.read_bytes()).decode(),
                    "label": row["label"],
                    "before": f"{100 * row['sure_before']:.0f} %",
                    "guess": row["guess"],
                    "after": f"{100 * row['sure_after']:.0f} %",
                    "index": str(row["index"]),
                }
            )
    return found


def _pace(view: View) -> str:
    pace = view.result.get("pace") or {}
    words = []
    if pace.get("images_per_second"):
        words.append(f"{pace['images_per_second']:,.0f} images a second were learned from")
    if pace.get("overhead") is not None:
        words.append(
            f"{100 * pace['overhead']:.1f} % of a trial's time was neither training nor evaluation"
        )
    return "; ".join(words)


def _exported(view: View) -> list[tuple[str, str, str, str]]:
    """File, size, use and program of each exported file of the winner."""
    sizes = (view.chosen or {}).get("files") or {}
    uses = {
        "model.safetensors": "weights, which autocompress.load() reads",
        **{one.file: one.use for one in FORMATS.values()},
        INT8_FILE: "the ONNX file in int8",
    }
    return [
        (name, quantity(sizes[name], "size_bytes"), use, script_of(name))
        for name, use in uses.items()
        if name in sizes
    ]


def _phases(view: View) -> dict[str, list[tuple[str, str, float]]]:
    """Name, time and share of each phase of the study, and of the parts of its trials."""
    parts: Counter[str] = Counter()
    for trial in view.trials:
        parts.update(trial.seconds)
    return {"study": _shares(view.result.get("seconds") or {}), "trials": _shares(parts)}


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    known = {name: value for name, value in seconds.items() if value}
    total = sum(known.values()) or 1.0
    return [(name, duration(value), 100 * value / total) for name, value in known.items()]


def _facts(view: View) -> list[tuple[str, str]]:
    facts = [("seed", str(view.result.get("seed", "–"))), *_finals(view)]
    for key in ("command", "device", "precision", "finished"):
        if view.result.get(key):
            facts.append((key, str(view.result[key])))
    return facts + [(k, str(v)) for k, v in (view.result.get("versions") or {}).items()]


def _finals(view: View) -> list[tuple[str, str]]:
    """What each long fine-tuning of the winner came to, by its seed."""
    chosen = view.chosen or {}
    bounds = chosen.get("final_bounds") or {}
    if not bounds:
        return []
    ends = ", ".join(f"{signed(b, view.scale)} (seed {seed})" for seed, b in bounds.items())
    own = "" if chosen.get("final_epochs") else "; the weights of the trial itself are better"
    epochs = chosen.get("final_epochs") or view.result.get("final_epochs")
    return [("winner, fine-tuned at length", f"{epochs:g} epochs; drop at most {ends}{own}")]


def study_file(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a study file, which runs the study again.

    Args:
        settings: As `StudyConfig.model_dump(mode="json")` gives them; None stands for what is not
            set, which a study file leaves out.
    """
    return "\n".join(f"{key} = {_toml(value)}" for key, value in _flatten(settings))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and prefix.count(".") == 0 and value:
            rows += _flatten(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            rows.append((f"{prefix}{key}", value))
    return rows


def _toml(value: Any) -> str:
    """A value as TOML writes it on one line."""
    if isinstance(value, Mapping):
        pairs = (f"{key} = {_toml(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # Strings, numbers and booleans look the same in JSON.
    return json.dumps(value, ensure_ascii=False)


def _metrics(view: View, found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the winner, the second or the nearest trial, as far as they are known."""
    full = view.baseline.get("profile")
    known = metrics_of_profile(found.get("profile"), full, view.objective)
    return known or dict(found.get("metrics") or {})


def _baseline_metrics(view: View) -> dict[str, Any]:
    """The baseline's metrics."""
    return metrics_of_profile(view.baseline.get("profile"), view.baseline.get("profile"))


def _drop(entry: Mapping[str, Any]) -> float | None:
    drop = entry.get("val_drop", (entry.get("metrics") or {}).get("drop"))
    return None if drop is None else float(drop)
