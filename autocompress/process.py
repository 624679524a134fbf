"""A process that works for another one: its loop, what it is told, and what it tells."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from threading import Lock, Thread
from typing import Any, TextIO, TypeVar

from autocompress.progress import NullDisplay
from autocompress.tally import NO_FACTS, Facts
from autocompress.watch import Orders

STORAGE_VARIABLE = "AUTOCOMPRESS_STORAGE"
"""Environment variable that holds the database's URL, which no list of processes shows."""
SEARCHING = "searching"
"""User attribute of the exploration: whether trials are or will be waiting."""
EXIT_HUNG = 4
"""Exit code after a trial that hung was ended."""
PAUSE = 1.0
"""Seconds between two looks for a trial, where none is waiting."""

Found = TypeVar("Found")


def work(
    find: Callable[[], Found | None],
    carry_out: Callable[[Found], bool],
    orders: Orders,
    over: Callable[[], bool],
    patience: float,
) -> int:
    """Carry out what is found, one after the other, until there is nothing or orders end it.

    Args:
        find: The next trial; None where none is waiting.
        carry_out: Carries it out; tells whether it ended here.
        orders: What this process is told from outside.
        over: Whether no trial will be waiting any more.
        patience: Seconds without a trial, after which it ends.

    Returns:
        How many ended.
    """
    count, since = 0, time.monotonic()
    while not orders.drain:
        found = find()
        if found is None:
            if over() or time.monotonic() - since > patience:
                break
            time.sleep(PAUSE)
            continue
        try:
            count += carry_out(found)
        except KeyboardInterrupt:
            if orders.stop:  # as it was told
                break
            raise
        since = time.monotonic()
    return count


def follow(orders: Orders, lines: TextIO) -> None:
    """Take orders from the process that started this one: lines of "drain" or "stop".

    When that is gone, the lines end, which means stop.
    """

    def read() -> None:
        for line in lines:
            if line.strip() == "drain":
                orders.ask_to_drain()
            elif line.strip() == "stop":
                orders.ask_to_stop()
        orders.ask_to_stop()

    Thread(target=read, name="orders", daemon=True).start()


class EventHandler(logging.Handler):
    """Passes log records on, to the process that started this one and keeps the study's log.

    Args:
        display: Whose lines they become.
    """

    def __init__(self, display: EventDisplay) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on, with its traceback."""
        if not getattr(record, "shown", False):
            self._display.log(record.levelno, self.format(record))


class EventDisplay(NullDisplay):
    """Tells what happens as lines of JSON, to the process that started this one.

    Args:
        stream: Where the lines go.
        clock: Seconds that only go up.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._lock = Lock()
        self._last_step = -1.0
        self._last_phase = ""

    def say(self, message: str) -> None:
        """Show a message that stays."""
        self._send("say", message=message)

    def log(self, level: int, message: str) -> None:
        """Pass a log record on."""
        self._send("log", level=level, message=message)

    def trial_started(self, number: int, worker: str = "") -> None:
        """A trial has begun."""
        self._last_step = -1.0
        self._send("started", number=number)

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        """A phase has come further; at most one line a second, and one where another begins."""
        now = self._clock()
        if now - self._last_step >= 1.0 or phase != self._last_phase:
            self._last_step, self._last_phase = now, phase
            self._send("step", phase=phase, done=done, total=total, note=note)

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
        drops = "" if drop is None else f", drop {drop:.3g}"
        costs = "" if cost_ratio is None else f", cost {cost_ratio:.2f}x smaller"
        why = "" if reason is None else f": {reason}"
        self._send("finished", words=f"trial {number} {state.lower()}{drops}{costs}{why}")

    def _send(self, event: str, **values: Any) -> None:
        with self._lock:
            try:
                self._stream.write(json.dumps({"event": event, **values}) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more; the orders tell this process to end.
                pass
