"""What can end a trial from outside: orders, limits, and a conductor who gave it to others.

A worker's trial asks at each step whether it should go on. What hangs can't ask; a thread looks on
and ends the process.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from types import FrameType

from autocompress.config import RunConfig
from autocompress.errors import TrialTimeout

Clock = Callable[[], float]

LOOK = 1.0
"""Seconds between two looks at a trial that may hang."""


class TrialTaken(BaseException):
    """The trial was ended by others; its worker drops it. No error of the trial's own."""


class Orders:
    """What this process was told from outside: to end after its trials, or now.

    Ctrl-C once asks it to finish what is running, twice to end now, and a third time it ends
    wherever it is. SIGTERM, as SLURM and Kubernetes send it, asks it to end now. Now is the next
    step of a trial, which is kept with all that it has learned by then.
    """

    def __init__(self) -> None:
        self._drain, self._stop = Event(), Event()
        self._patient = False

    @property
    def drain(self) -> bool:
        """Whether no further trial should begin."""
        return self._drain.is_set()

    @property
    def stop(self) -> bool:
        """Whether the running trial should end at its next step."""
        return self._stop.is_set()

    def ask_to_drain(self) -> None:
        """Let what is running end by itself, and begin nothing."""
        self._drain.set()

    def ask_to_stop(self) -> None:
        """End at the next step."""
        self._drain.set()
        self._stop.set()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """A block in which trials run, that asks for its orders; else they end the process."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Take the signals of this process as orders.

        Args:
            say: Told, within the signal's handler, what was understood.
        """

        def interrupt(signum: int, frame: FrameType | None) -> None:
            if not self._patient or self.stop:
                self.ask_to_stop()
                raise KeyboardInterrupt
            if signum == signal.SIGTERM or self.drain:
                self.ask_to_stop()
                say("Stopping now; the running trials go on from here next time.")
            else:
                self.ask_to_drain()
                say("Finishing the running trials; Ctrl-C again stops now.")

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Watch:
    """Looks after the trial that a process carries out.

    Attributes:
        orders: What this process was told.
        limit: Seconds that a trial may take; None for any.
        stall: Seconds without a step, after which it hangs; None for any.
        clock: Seconds that only go up.
    """

    orders: Orders = field(default_factory=Orders)
    limit: float | None = None
    stall: float | None = None
    clock: Clock = time.monotonic
    _began: float | None = None
    _moved: float = 0.0
    _limited: bool = True
    _taken: Callable[[], bool] = lambda: False

    def set_limits(self, run: RunConfig) -> None:
        """Take the limits of a study file, which are in minutes."""
        self.limit = None if run.trial_limit is None else 60 * run.trial_limit
        self.stall = 60 * run.stall_limit

    def step(self) -> None:
        """The trial has come a step further.

        Raises:
            KeyboardInterrupt: If it should end now.
            TrialTaken: If it was given to others.
            TrialTimeout: If it takes too long.
        """
        self._moved = self.clock()
        if self.orders.stop:
            raise KeyboardInterrupt
        if self._began is None:
            return
        if self._taken():
            raise TrialTaken
        limit = self._limit()
        if limit is not None and self._moved - self._began > limit:
            raise TrialTimeout(_too_long(limit))

    @contextmanager
    def over(
        self,
        taken: Callable[[], bool] = lambda: False,
        hung: Callable[[str], None] | None = None,
        limited: bool = True,
    ) -> Iterator[None]:
        """The block carries out a trial.

        Args:
            taken: Tells whether others have ended it.
            hung: Called on another thread with the reason, if the trial makes no step for too
                long; it should record that and end the process. None: nobody looks.
            limited: Whether the limit of a trial's length counts.
        """
        self._limited = limited
        self._began = self._moved = self.clock()
        self._taken = taken
        end = Event()
        if hung is not None and (self.stall is not None or self.limit is not None):
            Thread(target=self._look, args=(end, hung), name="watch", daemon=True).start()
        try:
            yield
        finally:
            end.set()
            self._began = None
            self._taken = lambda: False

    def _look(self, end: Event, hung: Callable[[str], None]) -> None:
        while not end.wait(LOOK):
            reason = self._hangs()
            if reason is not None and not end.is_set():
                hung(reason)
                return

    def _hangs(self) -> str | None:
        now, began = self.clock(), self._began
        if began is None:
            return None
        if self.stall is not None and now - self._moved > self.stall:
            return (
                f"it hung: no step in {self.stall / 60:g} minutes (run.stall_limit). A data loader "
                "that waits for ever does that."
            )
        # A step that is merely long gets to say so itself first.
        limit = self._limit()
        if limit is not None and now - began > limit + max(60.0, limit / 10):
            return _too_long(limit)
        return None

    def _limit(self) -> float | None:
        return self.limit if self._limited else None


def _too_long(limit: float) -> str:
    return f"it took more than {limit / 60:g} minutes (run.trial_limit)."
