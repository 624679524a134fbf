"""What the user sees while a study runs: a live display on terminals, plain lines elsewhere.

A display is told what happens (`Display`); it computes best-so-far and time left itself. Every
line that stays on the screen also goes to the logger "autocompress", so that a log file has it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autocompress.scale import ACCURACY, Scale

logger = logging.getLogger("autocompress")

Clock = Callable[[], float]

STEP_INTERVAL = 30.0
"""Seconds between two lines of one phase in a plain log."""

MOST_ROWS = 8
"""Trials whose progress is shown at once on a terminal."""

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Display(Protocol):
    """Where the progress of a study goes. All methods are cheap and never raise on odd numbers."""

    def say(self, message: str) -> None:
        """Show a message that stays."""
        ...

    def stage(
        self,
        name: str,
        total: int,
        done: int = 0,
        delta: float | None = None,
        objective: str = "params",
        best: tuple[float, float] | None = None,
        later: float = 0.0,
        scale: Scale = ACCURACY,
    ) -> None:
        """Begin a stage: "baseline", "exploration", "annealing", "final".

        Args:
            name: What the user reads.
            total: Trials of the stage; 0 or 1 where it is one long phase without trials.
            done: Trials that an earlier run has finished.
            delta: Allowed drop, on the metric's scale.
            objective: The cost whose ratio is shown.
            best: Compression ratio and drop of the best trial of earlier runs, if there is one.
            later: What comes after this stage, in trials of the same length.
            scale: Of the metric that drops are of.
        """
        ...

    def trial_started(self, number: int, worker: str = "") -> None:
        """Trial `number` has begun.

        Args:
            number: Of the trial in its study.
            worker: Which worker carries it out; empty for this process.
        """
        ...

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        """A phase such as "fine-tune" is at `done` of `total` (epochs or steps).

        An empty phase means that the worker does nothing any more.
        """
        ...

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> None:
        """A trial has ended.

        Args:
            number: Of the trial in its study.
            drop: Drop, on the metric's scale, if it was measured.
            cost_ratio: Baseline cost / cost of the trial, if it was measured.
            feasible: Whether the trial is complete and surely enough within delta.
            state: Optuna's name, such as "COMPLETE".
            reason: Why it was stopped or failed.
        """
        ...

    def close(self) -> None:
        """Take the display off the screen; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass
class _Row:
    """What a worker, or this process itself, does at the moment."""

    number: int | None = None
    phase: tuple[str, float, float, str] | None = None
    since: float = 0.0


@dataclass
class _Tally:
    """What a display knows about the stage; the arithmetic of both displays."""

    clock: Clock
    name: str = ""
    total: int = 0
    done: int = 0
    later: float = 0.0
    delta: float | None = None
    objective: str = "params"
    scale: Scale = ACCURACY
    best: tuple[float, float] | None = None
    best_trial: str = ""
    stage_start: float | None = None
    first_trial: float | None = None
    last_end: float | None = None
    finished: int = 0
    rows: dict[str, _Row] = field(default_factory=dict)

    def stage(
        self,
        name: str,
        total: int,
        done: int,
        delta: float | None,
        objective: str,
        best: tuple[float, float] | None,
        later: float,
        scale: Scale,
    ) -> None:
        if (delta, objective) != (self.delta, self.objective) and delta is not None:
            # What was best under another tolerance or objective says nothing here.
            self.best, self.best_trial = None, ""
            self.delta, self.objective, self.scale = delta, objective, scale
        if best is not None and (self.best is None or best[0] > self.best[0]):
            self.best, self.best_trial = best, ""
        self.name, self.total, self.done, self.later = name, total, done, later
        self.stage_start = self.clock()
        self.first_trial = self.last_end = None
        self.finished = 0
        # The workers go on.
        self.rows.pop("", None)

    def trial_started(self, number: int, worker: str) -> None:
        if self.first_trial is None:
            self.first_trial = self.clock()
        self.rows[worker] = _Row(number)

    def step(self, phase: str, done: float, total: float, note: str, worker: str) -> None:
        if not phase:
            self.rows.pop(worker, None)
            return
        row = self.rows.setdefault(worker, _Row())
        if row.phase is None or row.phase[0] != phase or done < row.phase[1]:
            row.since = self.clock()
        row.phase = (phase, done, total, note)

    def trial_finished(
        self, number: int, drop: float | None, cost_ratio: float | None, feasible: bool
    ) -> bool:
        """Count the trial; True if it is the best so far."""
        self.rows = {worker: row for worker, row in self.rows.items() if row.number != number}
        self.done += 1
        self.finished += 1
        self.last_end = self.clock()
        if not feasible or drop is None or cost_ratio is None:
            return False
        if self.best is not None and cost_ratio <= self.best[0]:
            return False
        self.best, self.best_trial = (cost_ratio, drop), f"{self.name} {number}"
        return True

    def elapsed(self) -> float:
        return 0.0 if self.stage_start is None else self.clock() - self.stage_start

    def eta(self) -> float | None:
        """Seconds left to the end of the study; None while nothing is known.

        The mean counts from the first start to the last end, so that trials of several workers
        that overlap are counted right.
        """
        if self.finished and self.first_trial is not None and self.last_end is not None:
            mean = (self.last_end - self.first_trial) / self.finished
            spent = self.clock() - self.last_end
            left = max(0, self.total - self.done) + self.later
            return max(0.0, mean * left - min(spent, mean))
        row = self.rows.get("")
        if not self.has_trials and row is not None and row.phase is not None and row.phase[1] > 0:
            _, done, total, _ = row.phase
            return max(0.0, (self.clock() - row.since) / done * (total - done))
        return None

    @property
    def has_trials(self) -> bool:
        """Whether the stage counts trials; "baseline" and "final" are one long phase."""
        return self.total > 1 or self.first_trial is not None or self.finished > 0

    def counter(self) -> str:
        return f"{self.name} {self.done}/{self.total}" if self.has_trials else self.name

    def outcome(
        self,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> list[str]:
        """The words about one finished trial."""
        words = []
        if drop is not None:
            words.append(f"drop {self.scale.number(drop)}{self._verdict(drop, feasible)}")
        if cost_ratio is not None:
            words.append(f"{self.objective} {format_ratio(cost_ratio)}")
        if state != "COMPLETE" or reason:
            word = {"COMPLETE": "", "PRUNED": "stopped", "FAIL": "failed"}.get(state, state.lower())
            words.append(": ".join(part for part in (word, clean(reason or "")) if part))
        return words

    def _verdict(self, drop: float, feasible: bool) -> str:
        if self.delta is None:
            return ""
        allowed = self.scale.number(self.delta)
        if drop > self.delta:
            return f" > {allowed}"
        return f" <= {allowed}" if feasible else f", not surely within {allowed}"


class PlainDisplay:
    """One line per event and no control codes: for pipes and CI logs.

    Args:
        console: Where the lines go.
        clock: Seconds that only go up.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.console = console or Console()
        self._clock = clock
        self._tally = _Tally(clock)
        self._began = clock()
        self._last_steps: dict[str, float] = {}

    def say(self, message: str) -> None:
        self._line(message)

    def stage(
        self,
        name: str,
        total: int,
        done: int = 0,
        delta: float | None = None,
        objective: str = "params",
        best: tuple[float, float] | None = None,
        later: float = 0.0,
        scale: Scale = ACCURACY,
    ) -> None:
        self._tally.stage(name, total, done, delta, objective, best, later, scale)
        self._began = self._clock()
        self._last_steps.clear()
        words = [f"[{self._tally.counter()}]", "start" if not done else "resume"]
        if delta is not None:
            words.append(f"allowed drop {scale.difference(delta)}")
        self._line("  ".join([" ".join(words[:2]), *words[2:]]))

    def trial_started(self, number: int, worker: str = "") -> None:
        self._tally.trial_started(number, worker)
        self._last_steps[worker] = self._clock()

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        tally = self._tally
        tally.step(phase, done, total, note, worker)
        now = self._clock()
        if not phase or now - self._last_steps.get(worker, self._began) < STEP_INTERVAL:
            return
        self._last_steps[worker] = now
        number = tally.rows[worker].number
        trial = "" if number is None else f"trial {number}  "
        trial = f"{worker}  {trial}" if worker else trial
        words = [f"[{tally.counter()}] {trial}{phase} {done:.4g}/{total:.4g}"]
        words += [clean(note)] if note else []
        words += _eta_words(tally)
        self._line("  ".join(words))

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> None:
        tally = self._tally
        tally.trial_finished(number, drop, cost_ratio, feasible)
        words = tally.outcome(drop, cost_ratio, feasible, state, reason)
        if tally.best is not None:
            words.append(f"best {format_ratio(tally.best[0])}")
        words += _eta_words(tally)
        self._line(f"[{tally.counter()}] " + "  ".join(words))

    def close(self) -> None:
        """Nothing is on the screen that could be taken off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _line(self, text: str) -> None:
        text = clean(text, lines=True)
        logger.info(text)
        # soft_wrap: a log has no width, and a wrapped line is two events to grep.
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class LiveDisplay:
    """A few calm lines at the bottom of a terminal, one for each worker; finished trials scroll
    away above them.

    Args:
        console: The terminal.
        clock: Seconds that only go up.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.console = console or Console()
        self._tally = _Tally(clock)
        self._live: Live | None = None

    def say(self, message: str) -> None:
        message = clean(message, lines=True)
        logger.info(message)
        self.console.print(message, markup=False, highlight=False, emoji=False)

    def stage(
        self,
        name: str,
        total: int,
        done: int = 0,
        delta: float | None = None,
        objective: str = "params",
        best: tuple[float, float] | None = None,
        later: float = 0.0,
        scale: Scale = ACCURACY,
    ) -> None:
        self._tally.stage(name, total, done, delta, objective, best, later, scale)
        logger.info("[%s] %s", self._tally.counter(), "resume" if done else "start")
        if self._live is None:
            self._live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()

    def trial_started(self, number: int, worker: str = "") -> None:
        self._tally.trial_started(number, worker)

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        # Only remembered here: the live thread draws four times a second whatever comes in.
        self._tally.step(phase, done, total, note, worker)

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> None:
        tally = self._tally
        is_best = tally.trial_finished(number, drop, cost_ratio, feasible)
        words = "  ".join(tally.outcome(drop, cost_ratio, feasible, state, reason))
        line = f"{tally.name} {number}".ljust(16) + words + ("  best so far" if is_best else "")
        logger.info("[%s] trial %d  %s", tally.counter(), number, words)
        style = "bold" if is_best else ("" if feasible else "dim")
        self.console.print(Text(line, style=style), no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def render(self) -> RenderableType:
        """The lines at the bottom, as they are now; 80 columns are enough."""
        tally = self._tally
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=12, no_wrap=True)
        grid.add_column(width=20)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        times = [f"{format_seconds(tally.elapsed())} elapsed"]
        eta = tally.eta()
        times += [] if eta is None else [f"about {format_seconds(eta)} left"]
        if tally.has_trials:
            grid.add_row(
                Text(tally.name, style="bold"),
                ProgressBar(total=tally.total, completed=tally.done, width=20),
                Text(", ".join([f"{tally.done} of {tally.total} trials", *times])),
            )
        else:
            grid.add_row(Text(tally.name, style="bold"), "", Text(", ".join(times)))
        rows = [row for _, row in sorted(tally.rows.items())]
        for row in rows[:MOST_ROWS]:
            grid.add_row(*self._phase_row(row))
        if len(rows) > MOST_ROWS:
            grid.add_row("", "", f"and {len(rows) - MOST_ROWS} more")
        return Group(grid, *self._best_lines())

    def _phase_row(self, row: _Row) -> tuple[RenderableType, RenderableType, RenderableType]:
        label = "" if row.number is None else f"trial {row.number}"
        if row.phase is None:
            return label, "", ""
        phase, done, total, note = row.phase
        bar = ProgressBar(total=max(total, 1e-9), completed=min(done, total), width=20)
        words = f"{phase} {done:.3g} of {total:.3g}" + (f", {clean(note)}" if note else "")
        return Text(label), bar, Text(words)

    def _best_lines(self) -> list[RenderableType]:
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
        return [Text("best".ljust(14) + text, overflow="ellipsis", no_wrap=True)]


class NullDisplay:
    """Shows nothing; messages still reach the logger. For the Python API."""

    def say(self, message: str) -> None:
        logger.info(clean(message, lines=True))

    def stage(
        self,
        name: str,
        total: int,
        done: int = 0,
        delta: float | None = None,
        objective: str = "params",
        best: tuple[float, float] | None = None,
        later: float = 0.0,
        scale: Scale = ACCURACY,
    ) -> None:
        logger.info("[%s %d/%d] %s", name, done, total, "resume" if done else "start")

    def trial_started(self, number: int, worker: str = "") -> None:
        pass

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        pass

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> None:
        words = _Tally(time.monotonic).outcome(drop, cost_ratio, feasible, state, reason)
        logger.info("trial %d  %s", number, "  ".join(words))

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Beside(NullDisplay):
    """The part of a display for work that goes on beside the trials: a row of its own.

    Args:
        display: The display.
        name: The row's name.
    """

    def __init__(self, display: Display, name: str) -> None:
        self._display, self._name = display, name

    def say(self, message: str) -> None:
        self._display.say(message)

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        self._display.step(self._name, done, total, note, self._name)

    def close(self) -> None:
        """Take the row away."""
        self._display.step("", 0, 0, worker=self._name)


def make_display(console: Console | None = None) -> Display:
    """A live display on a terminal that can redraw lines, else plain lines."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return PlainDisplay(console)


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


def _eta_words(tally: _Tally) -> list[str]:
    eta = tally.eta()
    return [] if eta is None else [f"eta {format_seconds(eta)}"]


_DISPLAYS: tuple[type[Display], ...] = (LiveDisplay, PlainDisplay, NullDisplay)
