"""How a terminal shows a study: a few lines at the bottom, a line for each ended trial, tables.

The same for a study that runs in this process and for one that is watched from elsewhere. 80
columns show what matters; wider ones show more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autocompress.amounts import clean, format_number, format_ratio, format_seconds, sparkline
from autocompress.tally import NO_FACTS, Facts, Row, Tally

MOST_ROWS = 8
"""Workers that are shown at once, at most."""
WIDE = 110
"""Columns from which on there is room for more than the necessary."""
LABEL, VERDICT, COST = 16, 34, 14
"""Columns of a trial's label, of what is said of its drop, and of its cost."""
BAR, WIDE_BAR = 10, 20


class Panel:
    """A study's state in a few lines: the stage, who does what, the best so far.

    Args:
        tally: The state, read anew whenever it is drawn.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it for the terminal as it is now, for windows change their size."""
        wide = options.max_width >= WIDE
        # A window that is lower than the panel would scroll at each redrawing.
        most = max(1, min(MOST_ROWS, console.size.height - 4))
        yield Group(self._grid(wide, most), *self._best_lines(options.max_width))

    def _grid(self, wide: bool, most: int) -> Table:
        tally = self._tally
        rows = sorted(tally.rows.items())
        names = wide and any(worker for worker, _ in rows)
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(width=12, no_wrap=True, overflow="ellipsis")
        if names:
            grid.add_column(width=18, no_wrap=True, overflow="ellipsis")
        bar_width = WIDE_BAR if wide else BAR
        grid.add_column(width=bar_width)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        between = [""] if names else []
        title = Text(tally.name, style="bold")
        if tally.has_trials:
            bar: RenderableType = _bar(tally.done, tally.total)
            words = ", ".join([f"{tally.done} of {tally.total} trials", *self._times(wide)])
        else:
            bar, words = "", ", ".join(self._times(wide))
        grid.add_row(title, *between, bar, Text(words))
        for worker, row in rows[:most]:
            label, middle, text = self._row(worker, row, names or not worker)
            grid.add_row(label, *([Text(worker)] if names else []), middle, text)
        if len(rows) > most:
            grid.add_row("", *between, "", f"and {len(rows) - most} more")
        return grid

    def _times(self, wide: bool) -> list[str]:
        tally, eta = self._tally, self._tally.eta()
        words = [f"{format_seconds(tally.elapsed())} elapsed"]
        if wide and tally.elapsed_in_all() > tally.elapsed() + 1:
            words[0] += f" ({format_seconds(tally.elapsed_in_all())} since the start)"
        return words + ([] if eta is None else [f"about {format_seconds(eta)} left"])

    def _row(
        self, worker: str, row: Row, named: bool
    ) -> tuple[RenderableType, RenderableType, RenderableType]:
        label = "" if row.number is None else f"trial {row.number}"
        if row.number is None and not named:
            label = worker
        if row.phase is None:
            return Text(label), "", Text("begins")
        phase, done, total, note = row.phase
        bar: RenderableType = ""
        if total > 0:
            bar = _bar(min(done, total), total)
        return Text(label), bar, Text(phase_words(phase, done, total, note))

    def _best_lines(self, width: int) -> list[RenderableType]:
        tally = self._tally
        if tally.delta is None or (tally.best is None and not tally.total):
            return []
        if tally.best is None:
            text = f"none yet within the allowed drop of {tally.scale.difference(tally.delta)}"
        else:
            ratio, drop = tally.best
            number = tally.scale.number
            text = f"{tally.objective} {format_ratio(ratio)}, drop {number(drop)} of "
            text += number(tally.delta)
            text += f" allowed ({tally.best_trial})" if tally.best_trial else " allowed"
            if width >= WIDE:
                words = [text, *tally.best_facts.words(tally.scale, tally.objective)]
                text = "  ".join(words)
        lines = [Text("best".ljust(14) + text, overflow="ellipsis", no_wrap=True)]
        if width >= WIDE and len(set(tally.history)) > 1:
            room = min(60, width - 60)
            found = f"{sparkline(tally.history, room)}  the best after each trial, from "
            found += f"{format_ratio(tally.history[0])} to {format_ratio(tally.history[-1])}"
            lines.append(Text(" " * 14 + found, overflow="ellipsis", no_wrap=True))
        return list(lines)


def _bar(done: float, total: float) -> ProgressBar:
    # Rich's own red looks like an alarm.
    return ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")


def phase_words(phase: str, done: float, total: float, note: str) -> str:
    """ "fine-tune 0.4 of 1, loss 0.31"."""
    words = f"{phase} {done:.3g} of {total:.3g}" if total > 0 else phase
    return words + (f", {clean(note)}" if note else "")


def trial_line(
    tally: Tally,
    number: int,
    words: Iterable[str],
    is_best: bool,
    feasible: bool,
    facts: Facts = NO_FACTS,
    width: int = 80,
) -> Text:
    """An ended trial on one line, below those before it.

    Args:
        tally: Knows the stage.
        number: Of the trial.
        words: About its end, as `Tally.outcome` gives them.
        is_best: Whether it is the best so far.
        feasible: Whether it is within delta.
        facts: What else is known, for which there is room on wide terminals.
        width: Columns of the terminal.
    """
    parts = list(words)
    line = f"{tally.name} {number}".ljust(LABEL)
    wide = width >= WIDE
    if len(parts) == 2 or (wide and len(parts) > 2):
        line += f"{parts[0].ljust(VERDICT)}  {parts[1].ljust(COST)}  "
        line += ("best so far" if is_best else "").ljust(13)
        more = parts[2:] or (facts.words(tally.scale, tally.objective) if wide else [])
        line += "  ".join(more)
    else:
        # Where a reason is told it gets the room.
        line += "  ".join(parts)
    style = "bold" if is_best else ("" if feasible else "dim")
    return Text(line.rstrip(), style=style, no_wrap=True, overflow="ellipsis")


class ComparisonRow(Protocol):
    """One metric before and after compression, as `profiler.py` makes it."""

    @property
    def metric(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def before(self) -> float | None: ...
    @property
    def after(self) -> float | None: ...
    @property
    def ratio(self) -> float | None: ...


def comparison_table(rows: Iterable[ComparisonRow], title: str | None = None) -> Table:
    """The table before/after; what was not measured is a dash."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    table.add_column("unit", style="dim", no_wrap=True)
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.metric,
            row.unit,
            format_number(row.before),
            format_number(row.after),
            "-" if row.ratio is None else format_ratio(row.ratio),
        )
    return table
