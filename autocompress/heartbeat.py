"""Signs of life of the workers, in the database: written by each, watched by the conductor.

Optuna's heartbeats belong to `Study.optimize`; their thread ends for ever at the first lost
connection, and they are judged by the database's clock, which may jump. Here the thread goes on
whatever happens, and what counts is whether a heartbeat has changed within a time that the watching
process measures itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from threading import Event, Thread
from types import TracebackType
from typing import Self

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial

from autocompress.database import heartbeats
from autocompress.news import DOING, Phase
from autocompress.slots import cut_off, running

logger = logging.getLogger("autocompress")

BEAT = 10.0
"""Seconds between two heartbeats."""
GRACE = 120.0
"""A trial whose heartbeat has not changed for so many seconds has lost its worker."""

Clock = Callable[[], float]


class Heartbeat:
    """Writes heartbeats of a running trial, until it leaves the context.

    Args:
        study: Its study.
        trial_id: The trial.
        every: Seconds between two.
        doing: Says what the worker does at the moment, which is written with them.
    """

    def __init__(
        self,
        study: Study,
        trial_id: int,
        every: float = BEAT,
        doing: Callable[[], Phase | None] = lambda: None,
    ) -> None:
        self._study, self._trial_id, self._every = study, trial_id, every
        self._doing = doing
        self._told: Phase | None = None
        self._end = Event()
        self._taken = Event()
        self._thread = Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def taken(self) -> bool:
        """Whether the trial was ended by others, who took this worker for dead."""
        return self._taken.is_set()

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

    def _run(self) -> None:
        storage = self._study._storage
        while True:
            try:
                storage.record_heartbeat(self._trial_id)  # type: ignore[attr-defined]
                if storage.get_trial(self._trial_id).state.is_finished() and not self._end.is_set():
                    self._taken.set()
                    return
                self._tell()
            except Exception as error:
                # Whatever it is, the next one may succeed, and the trial goes on meanwhile.
                logger.warning("A heartbeat was missed: %s", type(error).__name__)
            if self._end.wait(self._every):
                return

    def _tell(self) -> None:
        """Write what the worker does, if that is new and the trial still runs."""
        doing = self._doing()
        if doing is None or doing == self._told or self._end.is_set():
            return
        with suppress(UpdateFinishedTrialError):  # it ended a moment ago
            self._study._storage.set_trial_system_attr(self._trial_id, DOING, list(doing))
        self._told = doing


class StaleWatch:
    """Finds running trials whose worker shows no sign of life any more.

    Args:
        grace: For how many seconds there was none.
        clock: Seconds that only go up, of this process.
    """

    def __init__(self, grace: float = GRACE, clock: Clock = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[datetime | None, float]] = {}

    def stale(self, study: Study) -> list[FrozenTrial]:
        """The running trials whose heartbeat was the same for all of the grace."""
        now = self._clock()
        beats = heartbeats(study)
        found = []
        for trial in running(study):
            beat = beats.get(trial._trial_id)
            known = self._seen.get(trial._trial_id)
            if known is None or known[0] != beat:
                self._seen[trial._trial_id] = beat, now
            elif now - known[1] > self._grace:
                found.append(trial)
        return found

    def cut_off_stale(self, study: Study) -> None:
        """End them, so that they come again."""
        for trial in self.stale(study):
            cut_off(study, trial, "it gave no sign of life any more")
