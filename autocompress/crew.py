"""Those who carry out a stage's trials: the process that conducts the study, or its workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from autocompress.launchers import Workers
from autocompress.objective import Bench
from autocompress.process import PAUSE
from autocompress.slots import take
from autocompress.stages import Stage
from autocompress.worker import perform

TURNS = 5
"""Turns of looking after workers for each look into the database, which takes longer."""


class Crew(Protocol):
    """Those who carry out the trials."""

    @property
    def alive(self) -> int:
        """How many of them work in other processes."""
        ...

    def tend(self, stages: Sequence[Stage]) -> None:
        """Give them time to work, a moment or a trial long; on the first of the stages first."""
        ...

    def drain(self) -> None:
        """Let them end after their trials."""
        ...


class Solo:
    """Carries out the trials in this process.

    Args:
        bench: All that they need.
    """

    alive = 0

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def tend(self, stages: Sequence[Stage]) -> None:
        """Carry out one trial, if one waits."""
        for stage in stages:
            trial = take(stage.study)
            if trial is not None:
                perform(self._bench, stage, trial)
                return
        time.sleep(PAUSE)  # workers elsewhere have them all

    def drain(self) -> None:
        """Its trial is over whenever it is asked."""


class Team:
    """Workers in processes of their own.

    Args:
        workers: They.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    @property
    def alive(self) -> int:
        """How many work."""
        return self._workers.alive

    def tend(self, stages: Sequence[Stage]) -> None:
        """See to them until a trial has ended, for about a second at most."""
        before = self._workers.finished
        for _ in range(TURNS):
            self._workers.tend()
            if self._workers.finished > before:
                return

    def drain(self) -> None:
        """Let them end after their trials."""
        self._workers.drain()

    def close(self) -> None:
        """End them."""
        self._workers.stop()
