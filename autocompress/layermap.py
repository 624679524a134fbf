"""What became of each layer: rows for a table, and a picture of where the weight was and went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocompress.wording import channels_lost, plan_layers

KEPT = "the search kept it"


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
                "shape": shape_text(specs.get(name)),
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


def _channels_text(layer: Mapping[str, Any] | None, lost: Mapping[str, int] | None) -> str:
    """ "12 of 16 in, 24 of 32 out"; "" where all remain."""
    if layer is None or lost is None:
        return ""
    return ", ".join(
        f"{layer[f'{side}_channels'] - lost[side]} of {layer[f'{side}_channels']} {side}"
        for side in ("in", "out")
        if lost[side]
    )


def _layer_cost(layers: Iterable[Mapping[str, Any]], name: str) -> dict[str, int] | None:
    """Params and MACs of a layer, or of the layers that replaced it, which are named under it."""
    found = [x for x in layers if x["name"] == name or str(x["name"]).startswith(name + ".")]
    if not found:
        return None
    return {key: sum(int(x.get(key) or 0) for x in found) for key in ("params", "macs")}


@dataclass(frozen=True)
class Segment:
    """A stretch of a bar: what a layer weighs, before or after.

    Attributes:
        name: Of the layer; "everything else" for what is in no layer of the table.
        kind: The transform's name, "channels" where only those became fewer, or "kept".
        share: Percent of the whole network before compression.
        text: For a tooltip.
    """

    name: str
    kind: str
    share: float
    text: str


REST = "everything else"


def segments(
    rows: Sequence[Mapping[str, Any]], before: int, after: int, key: str
) -> tuple[list[Segment], list[Segment]]:
    """Two bars on one scale: where the cost was, and where it went.

    Args:
        rows: From `layer_rows`, of a network whose profile is known.
        before: The whole network's cost.
        after: The compressed network's.
        key: "params" or "macs".

    Returns:
        The bar before and the bar after; shares of the first sum up to 100.
    """
    bars: tuple[list[Segment], list[Segment]] = ([], [])
    for bar, index, whole in ((bars[0], 0, before), (bars[1], 1, after)):
        counts = [(row, row[key][index] or 0) for row in rows]
        for row, count in counts:
            text = f"{row['name']}: {count:,} {key}"
            bar.append(Segment(row["name"], kind_of(row), 100 * count / before, text))
        rest = max(0, whole - sum(count for _, count in counts))
        bar.append(Segment(REST, "kept", 100 * rest / before, f"{REST}: {rest:,} {key}"))
    return bars


def kind_of(row: Mapping[str, Any]) -> str:
    """What was done to the layer of a row, in one word: see `Segment`."""
    if row["transform"] is not None:
        return str(row["transform"]["transform"])
    return "channels" if row["channels"] else "kept"


def shape_text(layer: Mapping[str, Any] | None) -> str:
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
