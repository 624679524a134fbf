"""A worker: takes the trials that wait in a study's database, one after the other."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.config import StudyConfig
from autocompress.database import end_if
from autocompress.heartbeat import Heartbeat
from autocompress.objective import Bench, announce, run_trial
from autocompress.slots import take, worker_name
from autocompress.space import SearchSpace
from autocompress.stages import PARENTS, Stage, annealing_stage, exploration_stage
from autocompress.store import load_study
from autocompress.watch import Orders

SEARCHING = "searching"
"""User attribute of the exploration: whether trials are or will be waiting."""
STORAGE_VARIABLE = "AUTOCOMPRESS_STORAGE"
"""Environment variable that holds the database's URL, which no list of processes shows."""
EXIT_HUNG = 4
"""A worker's exit code after it has ended a trial that hung."""
PAUSE = 1.0
"""Seconds between two looks for a trial, where none is waiting."""

Found = TypeVar("Found")
Hung = Callable[[Stage, Trial, str], None]


def perform(
    bench: Bench, stage: Stage, trial: Trial, hung: Hung | None = None
) -> FrozenTrial | None:
    """Carry out a trial that was taken, with signs of life, and within the limits.

    Args:
        bench: All that it needs.
        stage: Its stage.
        trial: The trial.
        hung: Called on another thread if it hangs; None: nobody looks.

    Returns:
        The ended trial; None if others have ended it.
    """
    stage.refresh(bench)

    def end(reason: str) -> None:
        assert hung is not None
        hung(stage, trial, reason)

    with (
        Heartbeat(stage.study, trial._trial_id) as beat,
        bench.watch.over(lambda: beat.taken, None if hung is None else end),
    ):
        return run_trial(bench, stage.name, stage.space, trial)


def end_process(stage: Stage, trial: Trial, reason: str) -> None:
    """Record that a trial hung, and end this process, for its thread can't be ended."""
    end_if(
        stage.study,
        trial._trial_id,
        TrialState.RUNNING,
        TrialState.FAIL,
        {"reason": f"TrialTimeout: {reason}"},
    )
    os._exit(EXIT_HUNG)


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
        count += carry_out(found)
        since = time.monotonic()
    return count


class Worker:
    """Runs trials of a study until none is left, or it is told to end.

    Args:
        bench: All that trials need; it knows the exploration.
        config: The study file.
        space: The whole search space.
        patience: Seconds without a trial, after which it ends.
    """

    def __init__(
        self, bench: Bench, config: StudyConfig, space: SearchSpace, patience: float = 3600.0
    ) -> None:
        self._bench, self._config, self._space = bench, config, space
        self._patience = patience
        number = zlib.crc32(worker_name().encode())
        self._stages = [exploration_stage(bench, config, space, number)]

    def run(self) -> int:
        """Work; returns how many trials ended here."""
        orders = self._bench.watch.orders
        return work(self._take, self._carry_out, orders, self._over, self._patience)

    def _over(self) -> bool:
        return not self._exploration.user_attrs.get(SEARCHING, False)

    def _carry_out(self, found: tuple[Stage, Trial]) -> bool:
        ended = perform(self._bench, *found, end_process)
        if ended is not None:
            announce(self._bench, ended)
        return ended is not None

    def _take(self) -> tuple[Stage, Trial] | None:
        """A waiting trial, those of the later stage first."""
        self._look_for_annealing()
        for stage in reversed(self._stages):
            trial = take(stage.study)
            if trial is not None:
                return stage, trial
        return None

    def _look_for_annealing(self) -> None:
        if len(self._stages) > 1:
            return
        study = load_study(self._exploration._storage, self._config.name, "annealing")
        if study is not None and PARENTS in study.user_attrs:
            self._stages.append(
                annealing_stage(
                    self._bench, self._config, self._space, study, study.user_attrs[PARENTS]
                )
            )

    @property
    def _exploration(self) -> Study:
        return self._bench.studies["exploration"]


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


class EventDisplay:
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

    def say(self, message: str) -> None:
        """Show a message that stays."""
        self._send("say", message=message)

    def stage(
        self,
        name: str,
        total: int,
        done: int = 0,
        delta: float | None = None,
        objective: str = "params",
        best: tuple[float, float] | None = None,
        later: float = 0.0,
    ) -> None:
        """The conductor knows the stages better."""

    def trial_started(self, number: int, worker: str = "") -> None:
        """A trial has begun."""
        self._last_step = -1.0
        self._send("started", number=number)

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        """A phase has come further; at most one line a second."""
        now = self._clock()
        if now - self._last_step >= 1.0:
            self._last_step = now
            self._send("step", phase=phase, done=done, total=total, note=note)

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> None:
        """A trial has ended."""
        self._send("finished", number=number)

    def close(self) -> None:
        """Nothing is on a screen."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def _send(self, event: str, **values: Any) -> None:
        with self._lock:
            try:
                self._stream.write(json.dumps({"event": event, **values}) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more; the orders tell this process to end.
                pass
