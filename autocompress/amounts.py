"""Numbers, times and other people's text as a terminal or a log shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BARS = "▁▂▃▄▅▆▇█"


def format_number(value: float | None) -> str:
    """Four significant digits, never an exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.01 else f"{value:.5f}"


def format_ratio(value: float) -> str:
    """Baseline / compressed: "4.31x", "12.3x"."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def format_seconds(seconds: float) -> str:
    """ "42s", "3m10s", "2h05m", "3d04h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def clean(text: str, lines: bool = False) -> str:
    """Text without escape sequences and control characters; on one line unless `lines`."""
    text = _CONTROLS.sub(" ", _ESCAPES.sub("", text))
    return text if lines else " ".join(text.split())


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between the least and the largest of them."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)
