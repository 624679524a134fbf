"""What a terminal shows: all that matters on 80 columns, more where there is more room."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console, RenderableType

from autocompress.scale import ACCURACY, Scale
from autocompress.screen import Panel, comparison_table, trial_line
from autocompress.tally import Facts, Tally

FACTS = Facts(98.61, {"params": 14.3, "macs": 3.63, "latency": 1.13}, 7.0, "4 layers: 4 svd")


@dataclass
class Row:
    metric: str
    unit: str
    before: float | None
    after: float | None
    ratio: float | None


class HandClock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def drawn(what: RenderableType, width: int, height: int = 25) -> list[str]:
    """The lines on a terminal of that size, which has no more columns to show."""
    console = Console(file=io.StringIO(), width=width, height=height, record=True)
    console.print(what)
    return console.export_text().splitlines()


def busy(workers: int = 2, scale: Scale = ACCURACY) -> Tally:
    """A long study with workers, all of whose words are as long as they get."""
    clock = HandClock()
    tally = Tally(clock)
    tally.stage("exploration", 240, 119, 2.0, "params+macs", None, 14.0, scale)
    for number in range(119, 123):
        tally.trial_started(number, "worker 0")
        clock.now += 43000
        tally.trial_finished(number, 0.35, 4.0 + number % 3, True, FACTS)
    for number in range(workers):
        tally.trial_started(1200 + number, f"worker {number}")
        tally.step("fine-tune", 3.217, 12.5, "loss 0.213, drop 12.04 so far", f"worker {number}")
    tally.step("fine-tune annealing/123 at length", 3.0, 20.0, "", "worker 9")
    return tally


def test_eighty_columns_show_all_that_matters() -> None:
    lines = drawn(Panel(busy()), 80)
    assert max(map(len, lines)) <= 80 and len(lines) == 5
    assert not any("…" in line for line in lines)
    assert "123 of 240 trials, 1d23h elapsed, about 65d04h left" in lines[0]
    assert "trial 1200" in lines[1]
    assert "fine-tune 3.22 of 12.5, loss 0.213, drop 12.04 so far" in lines[1]
    assert "annealing/123 at length 3 of 20" in lines[3]
    assert "params+macs 6.00x, drop 0.35 of 2.00 allowed (exploration 119)" in lines[4]


def test_two_hundred_columns_show_more() -> None:
    lines = drawn(Panel(busy()), 200)
    assert max(map(len, lines)) <= 200
    assert "worker 0" in lines[1] and "worker 1" in lines[2]
    for word in ("MACs 3.63x", "latency 1.13x", "98.61 %", "4 layers: 4 svd"):
        assert word in lines[4]
    assert "▁" in drawn(Panel(rising()), 200)[-1]


def rising() -> Tally:
    """A study that got better."""
    tally = Tally(HandClock())
    tally.stage("exploration", 9, 0, 2.0, "params", None, 0.0, ACCURACY)
    for number in range(3):
        tally.trial_finished(number, 0.5, 2.0 + number, True)
    return tally


def test_the_panel_follows_a_window_that_changes_its_size() -> None:
    panel = Panel(busy(workers=7))
    assert len(drawn(panel, 200)) > len(drawn(panel, 80, height=8))
    low = drawn(panel, 80, height=8)
    assert len(low) <= 8 and any("and 4 more" in line for line in low)
    assert max(len(line) for line in drawn(panel, 40)) <= 40


def test_ended_trials_stand_below_each_other() -> None:
    tally = rising()
    lines = [
        trial_line(tally, number, words, best, True, FACTS, width)
        for number, words, best in (
            (3, ["drop 0.35 <= 2.00", "params 4.14x"], False),
            (12, ["drop 1.04, not surely within 2.00", "params 13.0x"], True),
        )
        for width in (80, 200)
    ]
    narrow, wide = [str(line) for line in lines[::2]], [str(line) for line in lines[1::2]]
    assert narrow[0].index("params") == narrow[1].index("params")
    assert narrow[1].endswith("best so far") and max(map(len, narrow)) <= 80
    assert wide[0].index("MACs") == wide[1].index("MACs") and "4 layers: 4 svd" in wide[0]


def test_a_reason_gets_the_room_of_the_columns() -> None:
    words = ["drop 65.28 > 2.00", "params 30.7x", "stopped: 65.28 points lost"]
    line = str(trial_line(rising(), 3, words, False, False, FACTS, 80))
    assert line == "exploration 3   drop 65.28 > 2.00  params 30.7x  stopped: 65.28 points lost"


def test_comparison_table() -> None:
    rows = [
        Row("params", "M", 0.272474, 0.0541, 5.0365),
        Row("latency", "ms", None, None, None),
        Row("accuracy", "%", 92.31, 91.6, None),
    ]
    lines = drawn(comparison_table(rows), 80)
    assert lines[0].split() == ["metric", "unit", "before", "after", "ratio"]
    assert lines[1].split() == ["params", "M", "0.272", "0.054", "5.04x"]
    assert lines[2].split() == ["latency", "ms", "-", "-", "-"]
    assert lines[3].split() == ["accuracy", "%", "92.31", "91.60", "-"]
