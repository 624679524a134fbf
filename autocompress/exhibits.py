"""What people look at in the dashboard: names of trials, their files, and those of a study."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.artifacts import upload_artifact
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study

from autocompress.artifacts import remove_artifact
from autocompress.costs import OBJECTIVES, shown_cost
from autocompress.layermap import kind_of, layer_rows
from autocompress.scale import Scale
from autocompress.wording import quantity, ratio_text, shorten, transform_text

TABLE = "layers.csv"
PICTURE = "layers.svg"
PROFILE = "profile.json"
PLAN = "plan.json"
"""Names of the files; the dashboard shows tables and pictures, and offers the others."""

ARTIFACT = "artifacts:"
"""How system attributes begin that tell of artifacts, as Optuna writes them."""

MOST_BARS = 40
"""Layers with a bar of their own; of a larger network the smaller ones are drawn as one."""

COLOURS = {
    "svd": "#0072b2",
    "spatial_svd": "#56b4e9",
    "tucker2": "#009e73",
    "cp": "#e69f00",
    "tt": "#cc79a7",
    "channels": "#8a6d3b",
    "kept": "#c3cad2",
}
"""Colours of what was done to a layer, those of the report (`templates/report.html.j2`)."""
# Widths of the columns of the picture, in pixels: name, what was done, bar, numbers.
_COLUMNS = (230, 250, 280, 190)
_ROW = 22


def trial_name(
    label: str, objective: str, ratio: float | None, drop: float | None, scale: Scale
) -> str:
    """What a trial is called: "annealing/7: 12.3x fewer parameters, accuracy drop 0.41 points".

    Args:
        label: "annealing/7".
        objective: Key of `costs.OBJECTIVES`.
        ratio: By how much it is cheaper than the baseline; None if not known.
        drop: On the metric's scale; None if not known.
        scale: Of the metric.
    """
    parts = []
    if ratio is not None:
        parts.append(f"{ratio_text(ratio)} {OBJECTIVES[objective].gain}")
    if drop is not None:
        parts.append(f"{scale.name} drop {scale.difference(drop)}")
    return ": ".join(part for part in (label, ", ".join(parts)) if part)


def trial_files(
    plan: str,
    profile: Mapping[str, Any],
    facts: Mapping[str, Any],
    errors: Mapping[str, float],
    objective: str,
) -> dict[str, str]:
    """The files of a trial that was carried out, by name.

    Args:
        plan: As JSON.
        profile: Of the trial's network, with score and latency.
        facts: The study's attributes: baseline, layers, what was left alone and why.
        errors: Layer to the relative error of its outputs as it was cut.
        objective: Tells whether the picture shows parameters or MACs.
    """
    baseline = facts.get("baseline") or {}
    rows = layer_rows(facts, baseline, {"plan": plan, "profile": profile}, errors)
    key = shown_cost(objective)
    whole = (float(baseline.get(key) or 0), float(profile.get(key) or 0))
    return {
        PLAN: plan,
        PROFILE: json.dumps(profile, indent=1),
        TABLE: layer_table(rows),
        PICTURE: layer_picture(rows, key, whole),
    }


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `layer_rows` as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    costs = ["params before", "params after", "MACs before", "MACs after"]
    table.writerow(["layer", "shape", "transform", "why not", "error", "channels", *costs])
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        numbers = ["" if n is None else n for n in (*row["params"], *row["macs"])]
        done = "" if row["transform"] is None else transform_text(row["transform"])
        why = "" if row["transform"] is not None else row["why"]
        table.writerow([row["name"], row["shape"], done, why, error, row["channels"], *numbers])
    return text.getvalue()


def layer_picture(rows: Sequence[Mapping[str, Any]], key: str, whole: tuple[float, float]) -> str:
    """An SVG picture: for each layer a bar of what it cost, and in it what is left.

    Args:
        rows: From `layer_rows`.
        key: "params" or "macs".
        whole: The whole network's cost, before and after.
    """
    bars = _bars(rows, key)
    longest = max((max(bar[2:4]) for bar in bars), default=0.0) or 1.0
    width, height = sum(_COLUMNS) + 30, _ROW * (len(bars) + 2) + 16
    title = f"{'Parameters' if key == 'params' else 'MACs'} of each layer: {_change(*whole, key)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="15" y="{_ROW + 2}" font-weight="bold" fill="#222222">{title}</text>',
    ]
    for index, bar in enumerate(bars):
        lines += _bar(_ROW * (index + 1.6) + 8, *bar, longest, key)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bars(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str, float, float, str]]:
    """Name, what was done, cost before and after, colour; the smallest layers as one."""
    found = [
        (str(row["name"]), _done(row), float(row[key][0] or 0), float(row[key][1] or 0),
         COLOURS.get(kind_of(row), "#444444"))
        for row in rows
    ]  # fmt: skip
    if len(found) <= MOST_BARS:
        return found
    large = set(sorted(range(len(found)), key=lambda i: -found[i][2])[: MOST_BARS - 1])
    small = [bar for i, bar in enumerate(found) if i not in large]
    before, after = sum(bar[2] for bar in small), sum(bar[3] for bar in small)
    rest = (f"{len(small)} smaller layers", "", before, after, COLOURS["kept"])
    return [bar for i, bar in enumerate(found) if i in large] + [rest]


def _bar(
    top: float, name: str, done: str, before: float, after: float, colour: str,
    longest: float, key: str,
) -> list[str]:  # fmt: skip
    first, second, third, _ = _COLUMNS
    x, y = 15 + first + second, top + 15
    full, left = (max(1.0, third * cost / longest) if cost else 0.0 for cost in (before, after))
    return [
        f'<text x="15" y="{y:g}" fill="#222222">{html.escape(shorten(name, 32))}</text>',
        f'<text x="{15 + first}" y="{y:g}" fill="#555555">{html.escape(shorten(done, 36))}</text>',
        f'<rect x="{x}" y="{top + 3:g}" width="{full:.1f}" height="16" fill="#dddddd"/>',
        f'<rect x="{x}" y="{top + 3:g}" width="{left:.1f}" height="16" fill="{colour}"/>',
        f'<text x="{x + third + 10}" y="{y:g}" fill="#222222">{_change(before, after, key)}</text>',
    ]


def _change(before: float, after: float, key: str) -> str:
    if before == after:
        return quantity(before, key)
    ratio = f" ({ratio_text(before / after)})" if after else ""
    return f"{quantity(before, key)} → {quantity(after, key)}{ratio}"


def _done(row: Mapping[str, Any]) -> str:
    """What was done to a layer, in words, or why nothing was."""
    if row["transform"] is not None:
        return transform_text(row["transform"])
    return f"channels: {row['channels']}" if row["channels"] else str(row["why"])


def publish(
    paths: Sequence[Path], studies: Sequence[Study], store: ArtifactStore
) -> dict[str, str]:
    """Put files of a finished study where the dashboard offers them, on all of its stages.

    Each is uploaded once; those of the same names from an earlier end are removed.

    Args:
        paths: The files.
        studies: The Optuna studies that show them.
        store: Their artifact store.

    Returns:
        The name of each file, and its id in the store.
    """
    first = studies[0]
    older = artifact_ids(first._storage.get_study_system_attrs(first._study_id))
    found: dict[str, str] = {}
    for path in paths:
        found[path.name] = upload_artifact(
            artifact_store=store, file_path=str(path), study_or_trial=first
        )
        _replace(studies, found[path.name], older.get(path.name))
        remove_artifact(older.get(path.name), store)
    return found


def _replace(studies: Sequence[Study], fresh: str, old: str | None) -> None:
    """Show an artifact of the first study on the others too, and an older one on none."""
    first, storage = studies[0], studies[0]._storage
    described = storage.get_study_system_attrs(first._study_id)[ARTIFACT + fresh]
    for study in studies:
        if study is not first:
            storage.set_study_system_attr(study._study_id, ARTIFACT + fresh, described)
        if old is not None:
            # As the dashboard itself marks what was deleted.
            storage.set_study_system_attr(study._study_id, ARTIFACT + old, "null")


def artifact_ids(system_attrs: Mapping[str, Any]) -> dict[str, str]:
    """The artifacts that system attributes of a trial or study tell of, file name to id."""
    found = [json.loads(v) for k, v in system_attrs.items() if k.startswith(ARTIFACT)]
    return {meta["filename"]: meta["artifact_id"] for meta in found if meta}
