"""Numbers in rising order as a short text: "0-15,20", as plans keep channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def to_spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)


def from_spans(text: str) -> Iterator[int]:
    """The numbers of "0-3,7", as a plan's JSON has them."""
    for span in text.split(","):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)
