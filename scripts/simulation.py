"""Studies of simulated trials, which only wait: for measuring workers, and for killing them.

The database, the budget, the heartbeats, the processes and their orders are the real ones; what a
trial would do is a pause. `conduct` runs such a study, and this file, run by itself, is its worker:

    AUTOCOMPRESS_STORAGE=URL python scripts/simulation.py STUDY SECONDS [GRACE]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.database import PatientStorage, open_storage, write_proposal
from autocompress.heartbeat import Heartbeat, StaleWatch
from autocompress.process import STORAGE_VARIABLE, EventDisplay, follow, work
from autocompress.progress import Display, NullDisplay
from autocompress.slots import WORKER, cut_off, cut_off_gone, running, take, top_up
from autocompress.store import load_study, open_study, trials_spent
from autocompress.trials import INTERRUPTED
from autocompress.watch import Watch
from autocompress.workers import Launch, Pool

STAGE = "exploration"
LAYERS = 30
"""Parameters of a trial: two for each."""
STEP = 0.05
"""Seconds between two steps of a trial."""


class Killer:
    """Kills workers of a pool at random instants.

    Args:
        kills: How many in all.
        every: Mean seconds between two.
    """

    def __init__(self, kills: int, every: float) -> None:
        self.left, self._every = kills, every
        self._next = time.monotonic() + 3.0
        self._chance = random.Random(0)

    def __call__(self, pool: Pool, study: Study) -> None:
        if self.left and time.monotonic() > self._next:
            self._next = time.monotonic() + self._chance.expovariate(1 / self._every)
            busy = {str(t.user_attrs[WORKER]) for t in running(study) if WORKER in t.user_attrs}
            if busy:
                name = self._chance.choice(sorted(busy))
                try:
                    os.kill(int(name.rpartition("/")[2]), signal.SIGKILL)
                except ProcessLookupError:
                    return
                self.left -= 1


@dataclass(frozen=True)
class Tally:
    """What a study came to.

    Attributes:
        complete: Trials that were carried out to their end.
        failed: Trials that count as failed.
        cut_off: Trials that were cut off, and came again.
        left: Trials that still wait or run.
        seconds: Wall-clock time.
    """

    complete: int
    failed: int
    cut_off: int
    left: int
    seconds: float = 0.0


class Lots(RandomSampler):
    """Proposes a transform and a rank fraction for each layer by lot, all at once."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters of a plan."""
        space: dict[str, BaseDistribution] = {}
        for layer in range(LAYERS):
            kinds = CategoricalDistribution(["keep", "svd", "tucker2"])
            space[f"layer{layer}.transform"] = kinds
            space[f"layer{layer}.rank_fraction"] = FloatDistribution(0.0, 1.0)
        return space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value for each."""
        return {
            name: self.sample_independent(study, trial, name, one)
            for name, one in search_space.items()
        }


def open_simulated(url: str, name: str) -> Study:
    """The study of that name, which is made if it is not there."""
    study = open_study(open_storage(url), name, STAGE, bound={}, cost_name="parameters")
    study.sampler = Lots()
    return study


def carry_out(study: Study, trial: Trial, seconds: float, watch: Watch) -> bool:
    """A trial as `objective.run_trial` records it, with a pause instead of the fine-tuning."""
    try:
        write_proposal(trial)
        for layer in range(LAYERS):
            trial.suggest_categorical(f"layer{layer}.transform", ["keep", "svd", "tucker2"])
            trial.suggest_float(f"layer{layer}.rank_fraction", 0.0, 1.0)
        trial.set_user_attr("plan", str(trial.params))
        with Heartbeat(study, trial._trial_id, every=1.0) as beat, watch.over(lambda: beat.taken):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(STEP, seconds))
                watch.step()
        drop = random.uniform(0.0, 2.0)
        study.tell(trial, [drop, float(trial.number)], skip_if_finished=True)
    except KeyboardInterrupt:
        cut_off(study, study._storage.get_trial(trial._trial_id))
        return False
    return True


def be_worker(name: str, seconds: float) -> None:
    """Carry out trials until this process is told to end."""
    lines, sys.stdout = sys.stdout, sys.stderr
    display, watch = EventDisplay(lines), Watch()
    follow(watch.orders, sys.stdin)
    study = load_study(open_storage(os.environ[STORAGE_VARIABLE], waits=True), name, STAGE)
    assert study is not None
    study.sampler = Lots()

    def one(trial: Trial) -> bool:
        display.trial_started(trial.number)
        ended = carry_out(study, trial, seconds, watch)
        display.trial_finished(trial.number, None, None, False, "COMPLETE", None)
        return ended

    work(lambda: take(study), one, watch.orders, lambda: False, 1e9)


def conduct(
    url: str,
    name: str,
    total: int,
    workers: int,
    seconds: float,
    disturb: Callable[[Pool, Study], None] = lambda pool, study: None,
    grace: float = 10.0,
    display: Display | None = None,
    steadfast: bool = False,
) -> Tally:
    """Run a study of simulated trials to its end.

    Args:
        url: The database's URL.
        name: The study's name.
        total: Its trials.
        workers: How many processes.
        seconds: How long a trial takes.
        disturb: Called at every turn.
        grace: Seconds without a sign of life, after which a trial has lost its worker.
        display: Told what happens.
        steadfast: Whether dead workers are started again however often, and at once.
    """
    study = open_simulated(url, name)
    argv = [sys.executable, str(Path(__file__).resolve()), name, str(seconds)]
    launch = Launch(argv, {STORAGE_VARIABLE: url, "OMP_NUM_THREADS": "1"})
    limits: dict[str, Any] = {"max_deaths": 10**9, "longest_pause": 0.0} if steadfast else {}
    pool = Pool([launch] * workers, lambda: [study], display or NullDisplay(), **limits)
    cut_off_gone(study)
    stale, start = StaleWatch(grace), time.perf_counter()
    try:
        while True:
            top_up(study, total)
            if len(trials_spent(study)) >= total:
                break
            disturb(pool, study)
            pool.tend()
            stale.cut_off_stale(study)
        seconds = time.perf_counter() - start
    finally:
        pool.stop()
    found = tally(study, seconds)
    storage = study._storage._backend  # type: ignore[attr-defined]
    assert isinstance(storage, PatientStorage)
    storage.close()
    return found


def tally(study: Study, seconds: float = 0.0) -> Tally:
    """What is in the database."""
    spent = trials_spent(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return Tally(
        complete=sum(trial.state == TrialState.COMPLETE for trial in spent),
        failed=sum(trial.state == TrialState.FAIL for trial in spent),
        cut_off=sum(was_lost(trial) for trial in study.get_trials(deepcopy=False)),
        left=sum(not state.is_finished() for state in states),
        seconds=seconds,
    )


def was_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was cut off, and not just taken back."""
    attrs: Mapping[str, object] = trial.user_attrs
    return INTERRUPTED in attrs and attrs.get("reason") != "withdrawn"


if __name__ == "__main__":
    be_worker(sys.argv[1], float(sys.argv[2]))
