"""What the user sees while a study runs: a live display on terminals, plain lines elsewhere.

A display is told what happens (`Display`); it computes best-so-far and time left itself. Every
line that stays on the screen also goes to the logger "autocompress", so that a log file has it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from autocompress.amounts import clean, format_ratio, format_seconds
from autocompress.logs import SHOWN
from autocompress.scale import ACCURACY, Scale
from autocompress.screen import Panel, trial_line
from autocompress.tally import NO_FACTS, Clock, Facts, Tally

logger = logging.getLogger("autocompress")

STEP_INTERVAL = 30.0
"""Seconds between two lines of one phase in a plain log."""


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
        """Begin a stage: "baseline", "exploration", "annealing", "finals".

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
        """A phase such as "fine-tune" is at `done` of `total` (epochs or steps; 0: unknown).

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
        facts: Facts = NO_FACTS,
    ) -> None:
        """A trial has ended.

        Args:
            number: Of the trial in its study.
            drop: Drop, on the metric's scale, if it was measured.
            cost_ratio: Baseline cost / cost of the trial, if it was measured.
            feasible: Whether the trial is complete and surely enough within delta.
            state: Optuna's name, such as "COMPLETE".
            reason: Why it was stopped or failed.
            facts: What else is known of it.
        """
        ...

    def long_fit_ended(self) -> None:
        """A long fine-tuning has ended; `say` tells how."""
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


class PlainDisplay:
    """One line per event and no control codes: for pipes and CI logs.

    Args:
        console: Where the lines go.
        clock: Seconds that only go up.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.console = console or Console()
        self._clock = clock
        self._tally = Tally(clock)
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
        far = f" {done:.4g}/{total:.4g}" if total > 0 else ""
        words = [f"[{tally.counter()}] {trial}{phase}{far}"]
        words += [clean(note)] if note else []
        words += _eta_words(tally)
        self._print("  ".join(words))

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
        facts: Facts = NO_FACTS,
    ) -> None:
        tally = self._tally
        tally.trial_finished(number, drop, cost_ratio, feasible, facts)
        words = tally.outcome(drop, cost_ratio, feasible, state, reason)
        self._print(plain_trial_line(tally, number, words))
        words += _all_facts(tally, facts)
        logger.info("%s", plain_trial_line(tally, number, words), extra=SHOWN)

    def long_fit_ended(self) -> None:
        self._tally.long_fit_ended()

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
        logger.info(text, extra=SHOWN)
        self._print(text)

    def _print(self, text: str) -> None:
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
        self._tally = Tally(clock)
        self._live: Live | None = None

    def say(self, message: str) -> None:
        message = clean(message, lines=True)
        logger.info(message, extra=SHOWN)
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
        logger.info("[%s] %s", self._tally.counter(), "resume" if done else "start", extra=SHOWN)
        if self._live is None:
            self._live = Live(
                Panel(self._tally),
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
        facts: Facts = NO_FACTS,
    ) -> None:
        tally = self._tally
        is_best = tally.trial_finished(number, drop, cost_ratio, feasible, facts)
        words = tally.outcome(drop, cost_ratio, feasible, state, reason)
        known = "  ".join([*words, *_all_facts(tally, facts)])
        logger.info("[%s] trial %d  %s", tally.counter(), number, known, extra=SHOWN)
        line = trial_line(tally, number, words, is_best, feasible, facts, self.console.width)
        # What it is given as one of several things to print loses its own settings.
        self.console.print(line, no_wrap=True, overflow="ellipsis")

    def long_fit_ended(self) -> None:
        self._tally.long_fit_ended()

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


class NullDisplay:
    """Shows nothing; messages still reach the logger. For the Python API."""

    _scale = ACCURACY

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
        self._scale = scale
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
        facts: Facts = NO_FACTS,
    ) -> None:
        tally = Tally(time.monotonic, scale=self._scale)
        words = tally.outcome(drop, cost_ratio, feasible, state, reason) + _all_facts(tally, facts)
        logger.info("trial %d  %s", number, "  ".join(words))

    def long_fit_ended(self) -> None:
        pass

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


def make_display(
    console: Console | None = None, environ: Mapping[str, str] | None = None
) -> Display:
    """A live display on a terminal that can redraw lines, else plain lines.

    Args:
        console: Where it goes; standard output by default.
        environ: The environment variables; by default those of this process.
    """
    console = console or Console()
    return LiveDisplay(console) if can_redraw(console, environ) else PlainDisplay(console)


def can_redraw(console: Console, environ: Mapping[str, str] | None = None) -> bool:
    """Whether lines can be redrawn there: not in a pipe, on a dumb terminal, or in CI, which keeps
    all that is written."""
    environ = os.environ if environ is None else environ
    if not console.is_terminal or console.is_dumb_terminal:
        return False
    if environ.get("CI", "").lower() not in ("", "0", "false") or "GITHUB_ACTIONS" in environ:
        return False
    # These make Rich take a file or a pipe for a terminal: for colours, not for lines redrawn.
    forced = any(environ.get(name) for name in ("FORCE_COLOR", "TTY_COMPATIBLE"))
    return not forced or console.file.isatty()


def plain_trial_line(tally: Tally, number: int, words: Iterable[str]) -> str:
    """An ended trial on one line of a log.

    Args:
        tally: Knows the stage, the best so far and the time left.
        number: Of the trial.
        words: About its end, as `Tally.outcome` gives them.
    """
    best = [] if tally.best is None else [f"best {format_ratio(tally.best[0])}"]
    return "  ".join([f"[{tally.counter()}] trial {number}", *words, *best, *_eta_words(tally)])


def _all_facts(tally: Tally, facts: Facts) -> list[str]:
    """What the log says of an ended trial besides what is on the screen."""
    words = facts.words(tally.scale, tally.objective)
    return words + ([f"by {facts.worker}"] if facts.worker else [])


def _eta_words(tally: Tally) -> list[str]:
    eta = tally.eta()
    return [] if eta is None else [f"eta {format_seconds(eta)}"]


_DISPLAYS: tuple[type[Display], ...] = (LiveDisplay, PlainDisplay, NullDisplay)
