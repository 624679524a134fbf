"""What processes do at the moment, in the database, for those who look from elsewhere.

A worker writes with its heartbeats what it does for its trial; the process that conducts the study
writes its whole tally. Both are system attributes, which no table of a dashboard lists.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Self

from optuna.study import Study
from optuna.trial import FrozenTrial

from autocompress.logs import SHOWN
from autocompress.progress import STEP_INTERVAL, Display
from autocompress.scale import ACCURACY, Scale
from autocompress.screen import phase_words
from autocompress.slots import host_name
from autocompress.tally import NO_FACTS, Facts, Tally

logger = logging.getLogger("autocompress")

DOING = "autocompress:doing"
"""System attribute of a trial that runs: phase, done, total and note, as of the last heartbeat."""
NEWS = "autocompress:news"
"""System attribute of the exploration: a tally with "state", "at", "host" and "process"."""
EVERY = 5.0
"""Seconds between two looks whether there is something new to write."""
AT_LEAST = 30.0
"""Seconds after which the same is written again, as a sign of life."""
SILENT = 90.0
"""Without news for so many seconds the process that conducts a study is taken for gone."""

Phase = tuple[str, float, float, str]
"""What is done, how far, of how much (0: unknown), and a note."""


def doing_of(trial: FrozenTrial) -> Phase | None:
    """What the worker of a running trial said last that it does; None if it said nothing yet."""
    told = trial.system_attrs.get(DOING)
    return None if told is None else (str(told[0]), float(told[1]), float(told[2]), str(told[3]))


class Bulletin:
    """A display that passes on what it is told, and tells the database and the log too.

    It is a context: at its end the database has how the study was left. The display itself stays
    as it is.

    Args:
        display: The display.
        study: The exploration.
        every: Seconds between two looks at what is new.
    """

    def __init__(self, display: Display, study: Study, every: float = EVERY) -> None:
        self._display, self._study, self._every = display, study, every
        self._tally = Tally(time.monotonic)
        self._lock = Lock()
        self._end = Event()
        self._thread = Thread(target=self._run, name="news", daemon=True)
        self._told: dict[str, Any] = {}
        self._logged: dict[str, float] = {}

    def say(self, message: str) -> None:
        """Show a message that stays."""
        self._display.say(message)

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
        """Begin a stage."""
        told = (name, total, done, delta, objective, best, later, scale)
        with self._lock:
            self._tally.stage(*told)
        self._display.stage(*told)

    def trial_started(self, number: int, worker: str = "") -> None:
        """A trial has begun."""
        with self._lock:
            self._tally.trial_started(number, worker)
        self._display.trial_started(number, worker)

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        """A phase has come further."""
        with self._lock:
            self._tally.step(phase, done, total, note, worker)
            now = time.monotonic()
            due = phase and now - self._logged.get(worker, 0.0) >= STEP_INTERVAL
            if due:
                self._logged[worker] = now
        if due:
            who, row = worker or "here", self._tally.rows.get(worker)
            trial = "" if row is None or row.number is None else f" trial {row.number}"
            words = phase_words(phase, done, total, note)
            logger.debug("[%s] %s%s: %s", self._tally.counter(), who, trial, words, extra=SHOWN)
        self._display.step(phase, done, total, note, worker)

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
        """A trial has ended."""
        with self._lock:
            self._tally.trial_finished(number, drop, cost_ratio, feasible, facts)
        self._display.trial_finished(number, drop, cost_ratio, feasible, state, reason, facts)

    def long_fit_ended(self) -> None:
        """A long fine-tuning has ended."""
        with self._lock:
            self._tally.long_fit_ended()
        self._display.long_fit_ended()

    def close(self) -> None:
        """The display is its owner's to close."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        # The database may be away for minutes; the thread ends by itself then.
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():
            return
        state = "finished" if kind is None else "failed"
        if kind is not None and not issubclass(kind, Exception):
            state = "interrupted"
        with suppress(Exception):  # what ended the study may be the database
            self._write(state)

    def _run(self) -> None:
        while True:
            try:
                self._write("running")
            except Exception as error:
                # Whatever it is, the next one may succeed, and the study goes on meanwhile.
                logger.debug("News could not be written: %s", type(error).__name__)
            if self._end.wait(self._every):
                return

    def _write(self, state: str) -> None:
        now = time.time()
        with self._lock:
            told = {"state": state, **self._tally.to_dict()}
        known = {key: value for key, value in self._told.items() if key not in ("at",)}
        told |= {"host": host_name(), "process": os.getpid()}
        if told == known and now - self._told["at"] < AT_LEAST:
            return
        told["at"] = round(now, 1)
        self._study._storage.set_study_system_attr(self._study._study_id, NEWS, told)
        self._told = told


_DISPLAY: type[Display] = Bulletin
