"""Numbers, times and other people's text in a terminal."""

from __future__ import annotations

import pytest

from autocompress.amounts import clean, format_number, format_seconds, sparkline


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (42.4, "42s"), (190, "3m10s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (0.00012, "0.00012"), (4.5, "4.500"), (40551424, "40,551,424")],
)
def test_format_number(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_clean() -> None:
    assert clean("a\x1b]0;title\x07\x1b[2Jb\n c\x00") == "ab c"
    assert clean("a\nb", lines=True) == "a\nb"


def test_sparkline_shows_the_last_values_between_their_extremes() -> None:
    assert sparkline([1.0, 4.5, 8.0], 10) == "▁▅█"
    assert sparkline([9.0, 1.0, 2.0], 2) == "▁█"
    assert sparkline([3.0, 3.0], 5) == "▁▁" and sparkline([], 5) == ""
