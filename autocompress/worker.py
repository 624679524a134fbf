"""A worker: takes the trials that wait in a study's database, one after the other."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.config import StudyConfig
from autocompress.database import end_if
from autocompress.distributed import share
from autocompress.heartbeat import Heartbeat
from autocompress.objective import Bench, announce, train_along
from autocompress.process import EXIT_HUNG, SEARCHING, work
from autocompress.slots import take, worker_name
from autocompress.space import SearchSpace
from autocompress.stages import (
    PARENTS,
    Stage,
    annealing_stage,
    exploration_stage,
    finals_stage,
)
from autocompress.store import FINALS, load_study

WAIT, END = "wait", "end"
"""What rank 0 of a group tells the others besides the fine-tunings."""

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
    bench.doing = None

    def end(reason: str) -> None:
        assert hung is not None
        hung(stage, trial, reason)

    with (
        Heartbeat(stage.study, trial._trial_id, doing=lambda: bench.doing) as beat,
        # How long a trial of the search may take says nothing of a long fine-tuning.
        bench.watch.over(
            lambda: beat.taken, None if hung is None else end, limited=not stage.ordered
        ),
    ):
        return stage.carry_out(bench, trial)


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


def follow_first(bench: Bench) -> int:
    """Be a process of a group that trains along with rank 0, which has the trials.

    Signals are for rank 0, which tells the others at the next step.

    Returns:
        0: how many trials ended here.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while (job := share(None)) != END:
        if job != WAIT:
            train_along(bench, job)
    return 0


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
        self._exploration = exploration_stage(bench, config, space, number)
        self._annealing: Stage | None = None
        self._finals: Stage | None = None

    def run(self) -> int:
        """Work; returns how many trials ended here."""
        orders = self._bench.watch.orders
        try:
            return work(self._find, self._carry_out, orders, self._over, self._patience)
        finally:
            share(END)

    def _over(self) -> bool:
        return not self._exploration.study.user_attrs.get(SEARCHING, False)

    def _carry_out(self, found: tuple[Stage, Trial]) -> bool:
        ended = perform(self._bench, *found, end_process)
        if ended is not None:
            announce(self._bench, ended)
        return ended is not None

    def _find(self) -> tuple[Stage, Trial] | None:
        found = self._take()
        if found is None:
            # So that the other processes of a group don't take this one for dead.
            share(WAIT)
        return found

    def _take(self) -> tuple[Stage, Trial] | None:
        """A waiting trial, those of later stages first."""
        self._look_for_others()
        for stage in (self._finals, self._annealing, self._exploration):
            trial = None if stage is None else take(stage.study)
            if stage is not None and trial is not None:
                return stage, trial
        return None

    def _look_for_others(self) -> None:
        """Look for the stages that have begun since."""
        if self._annealing is None:
            study = self._study("annealing")
            if study is not None and PARENTS in study.user_attrs:
                parents = study.user_attrs[PARENTS]
                self._annealing = annealing_stage(
                    self._bench, self._config, self._space, study, parents
                )
        if self._finals is None:
            study = self._study(FINALS)
            if study is not None:
                self._finals = finals_stage(self._bench, study)

    def _study(self, stage: str) -> Study | None:
        return load_study(self._exploration.study._storage, self._config.name, stage)
