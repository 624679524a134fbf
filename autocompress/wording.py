"""Plans, metrics and times in words, the same in report, dashboard and notes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from autocompress.amounts import format_ratio
from autocompress.scale import ACCURACY, Scale
from autocompress.spans import from_spans


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


def _parsed(plan: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    parsed: Mapping[str, Any] | None = json.loads(plan) if isinstance(plan, str) else plan
    return parsed or {}


def transform_text(transform: Mapping[str, Any]) -> str:
    """ "tucker2 (rank_in 16, rank_out 24)"."""
    fields = [f"{k} {plain(v)}" for k, v in transform.items() if k != "transform"]
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


def cell(text: object) -> str:
    """Text that can't end its cell of a Markdown table, open a tag or become a link."""
    plain_text = " ".join(str(text).split())
    return plain_text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def arrow_text(before: float | None, after: float | None, metric: str) -> str:
    """ "308 k → 7.12 k"."""
    return f"{quantity(before, metric)} → {quantity(after, metric)}"


def ratio_text(value: float | None, missing: str = "–") -> str:
    """Baseline / compressed: "4.31x", "12.3x"; `missing` for None."""
    return missing if value is None else format_ratio(value)


def change(difference: float, scale: Scale) -> str:
    """A difference with its unit: "−0.35 points"."""
    return f"{signed(difference, scale)} {scale.difference_unit}".rstrip()


def signed(value: float, scale: Scale) -> str:
    """A difference with a true minus sign: "−0.35"."""
    # A true minus sign lines up with the digits of tabular figures.
    return scale.number(value).replace("-", "−")


def latency_label(latency: object) -> str:
    """A latency's name with the runtime, batch and threads: "Latency, ONNX Runtime 1.32.0, ..."."""
    if not isinstance(latency, Mapping):
        return "Latency"
    words = [str(latency.get("runtime") or ""), f"batch {latency.get('batch_size')}"]
    if latency.get("threads"):
        words.append(f"{latency['threads']} thread{'' if latency['threads'] == 1 else 's'}")
    return "Latency, " + ", ".join(word for word in words if word)


def duration(seconds: float) -> str:
    """ "42.0 s", "3 min 10 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def plain(value: Any) -> str:
    """A value of a plan as text: "8, 16" for a list, "–" for None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "–" if value is None else str(value)


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and "…" where it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"
