"""Those who carry out a stage's trials: the process that conducts the study, or its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread
from typing import Protocol

import torch

from autocompress.launchers import Workers
from autocompress.objective import Bench
from autocompress.process import PAUSE
from autocompress.progress import Beside, Display
from autocompress.slots import take
from autocompress.stages import Stage
from autocompress.worker import perform

TURNS = 5
"""Turns of looking after workers for each look into the database, which takes longer."""

Work = Callable[[Display], object]


class Crew(Protocol):
    """Those who carry out the trials."""

    @property
    def alive(self) -> int:
        """How many of them work."""
        ...

    def tend(self, stage: Stage) -> None:
        """Give them time to work on a stage, a moment or a trial long."""
        ...

    def beside(self, work: Work) -> bool:
        """Do something besides the trials, which is told a display; once, if it is asked again
        meanwhile.

        Returns:
            Whether it is done and has used the whole display.
        """
        ...

    def wait(self) -> None:
        """Wait for what is done beside."""
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

    def tend(self, stage: Stage) -> None:
        """Carry out one trial, if one waits."""
        trial = take(stage.study)
        if trial is None:  # workers elsewhere have them all
            time.sleep(PAUSE)
            return
        perform(self._bench, stage, trial)

    def beside(self, work: Work) -> bool:
        """Do it between two trials."""
        work(self._bench.display)
        return True

    def wait(self) -> None:
        """It is done whenever it is asked."""

    def drain(self) -> None:
        """Its trial is over whenever it is asked."""


class Team:
    """Workers in processes of their own.

    Args:
        workers: They.
        display: Shows what they do.
    """

    def __init__(self, workers: Workers, display: Display) -> None:
        self._workers, self._display = workers, display
        self._other: Thread | None = None
        self._error: BaseException | None = None

    @property
    def alive(self) -> int:
        """How many work."""
        return self._workers.alive

    def tend(self, stage: Stage) -> None:
        """See to them until a trial has ended, for about a second at most."""
        before = self._workers.finished
        for _ in range(TURNS):
            self._workers.tend()
            if self._error is not None:
                raise self._error
            if self._workers.finished > before:
                return

    def beside(self, work: Work) -> bool:
        """Do it on another thread, while they go on; not again if it is being or was done."""
        if self._other is None:
            self._other = Thread(target=self._do, args=(work,), name="beside", daemon=True)
            self._other.start()
        return False

    def wait(self) -> None:
        """Wait for what is done beside, and see to the workers meanwhile."""
        while self._other is not None and self._other.is_alive():
            self._workers.tend()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Let them end after their trials."""
        self._workers.drain()

    def close(self) -> None:
        """End them, and wait for what is done beside."""
        self._workers.stop()
        if self._other is not None:
            self._other.join()

    def _do(self, work: Work) -> None:
        # Several threads that wait for each other beside busy processes are slower than one.
        torch.set_num_threads(1)
        with Beside(self._display, "rehearsal") as display:
            try:
                work(display)
            except BaseException as error:
                self._error = error
