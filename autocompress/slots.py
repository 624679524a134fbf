"""The budget of a stage as data: its trials wait in the database until a worker takes them.

Optuna counts trials when they begin, so several workers that ask until a number is reached run too
many, and more at each resumption. Here the conductor, of which there is one, writes waiting trials,
and a worker takes one by a single statement that two can't both win. What is waiting, running and
ended together is the budget at every moment. A trial whose worker died is ended, and a new one with
the same plan waits in its place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autocompress.database import end_if, take_waiting
from autocompress.trials import (
    CHECKPOINT,
    EARLY,
    INTERRUPTED,
    LENGTH,
    NAME,
    PARENT,
    RATE,
    SEED,
    counted,
)

AHEAD = 64
"""How many trials wait at most: workers go on with so many should the conductor be gone, and each
reading of a study reads them all."""
MAX_DEATHS = 2
"""A trial is begun anew so often after its worker died; then it has failed."""
RETRY = "retry"
"""User attribute of a trial that is another's second try: {"of": its number, "deaths": how many
workers died of it}."""
WORKER = "worker"
"""User attribute of a trial: who carries it out, as `worker_name` gives it."""
STOPPED, DIED, WITHDRAWN = "stopped", "died", "withdrawn"
"""Why a trial was cut off: its worker was told to end, or it died, or nobody wants it any more."""

_COPIED_SYSTEM = ("autocompress:knobs",)
_COPIED_USER = (PARENT, SEED, CHECKPOINT, EARLY, LENGTH, RATE, NAME)


def host_name() -> str:
    """Names this machine."""
    return socket.gethostname()


def worker_name(process: int | None = None) -> str:
    """Names a process of this machine, or this one, among all that work for a study:
    "<host>/<process>"."""
    return f"{host_name()}/{process or os.getpid()}"


def is_gone(trial: FrozenTrial) -> bool:
    """Whether a running trial's worker can be seen to be gone.

    That of another machine can't; and a number may be another process's by now. Their heartbeats
    tell then.
    """
    host, _, process = str(trial.user_attrs.get(WORKER, "")).rpartition("/")
    if not process:  # it was never taken by a worker that says who it is
        return True
    if host != host_name():
        return False
    if int(process) == os.getpid():  # it had this process's number before
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def top_up(study: Study, total: int) -> int:
    """Let as many trials wait as are missing to a total, or take back what is too many.

    Trials that were cut off come again with their plans. Only for the process that conducts the
    study.

    Returns:
        How many trials were added; negative: taken back.
    """
    trials = study.get_trials(deepcopy=False)
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    missing = total - len(counted(study))
    if missing < 0:
        surplus = waiting[missing:]
        return -sum(_end(study, trial, TrialState.WAITING, STOPPED) for trial in surplus)
    missing = min(missing, AHEAD - len(waiting))
    again = _bring_back(study, _unrepeated(trials)[: max(0, missing)])
    for _ in range(missing - again):
        study.add_trial(create_trial(state=TrialState.WAITING))
    return max(0, missing)


def bring_back(study: Study) -> int:
    """Let trials that were cut off wait again. Only for the process that conducts the study.

    Returns:
        How many.
    """
    return _bring_back(study, _unrepeated(study.get_trials(deepcopy=False)))


def _bring_back(study: Study, dead: Sequence[FrozenTrial]) -> int:
    for trial in dead:
        study.add_trial(_repeated(trial))
    return len(dead)


def take(study: Study) -> Trial | None:
    """Take a waiting trial, those that come again first; None if none is waiting.

    The trial is running then, and the sampler has proposed its parameters.
    """
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    for trial in sorted(waiting, key=lambda t: (RETRY not in t.user_attrs, t.number)):
        if take_waiting(study, trial._trial_id, {WORKER: worker_name()}):
            # As in Study.ask: what this thread remembers of the trials is from the last one.
            study._thread_local.cached_all_trials = None
            return Trial(study, trial._trial_id)
    return None


def cut_off(study: Study, trial: FrozenTrial, died: str | None = None) -> bool:
    """End a running trial that its worker can't, so that another comes in its place.

    Args:
        study: Its study.
        trial: The trial.
        died: How its worker died; None if it was told to end. A trial of which too many workers
            died has failed, and counts.

    Returns:
        Whether it was still running.
    """
    deaths = _deaths(trial) + (died is not None)
    if died is not None and deaths > MAX_DEATHS:
        reason = f"its worker died {deaths} times, the last time: {died}"
        return _end(study, trial, TrialState.RUNNING, None, reason)
    kind = STOPPED if died is None else DIED
    return _end(study, trial, TrialState.RUNNING, kind, died or "interrupted")


def withdraw(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """End waiting trials that nobody wants any more: they don't count, and don't come again.

    Returns:
        Those that were still waiting.
    """
    return [t for t in trials if _end(study, t, TrialState.WAITING, WITHDRAWN)]


def cut_off_gone(study: Study) -> int:
    """End the running trials whose workers can be seen to be gone; returns how many."""
    gone = [trial for trial in running(study) if is_gone(trial)]
    return sum(cut_off(study, trial, "its process is gone") for trial in gone)


def running(study: Study) -> list[FrozenTrial]:
    """The trials that are running, or whose worker died unnoticed."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _end(
    study: Study, trial: FrozenTrial, state: TrialState, kind: str | None, reason: str = "withdrawn"
) -> bool:
    attrs = {"reason": reason} | ({} if kind is None else {INTERRUPTED: kind})
    return end_if(study, trial._trial_id, state, TrialState.FAIL, attrs)


def _unrepeated(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that were cut off, and of which is known what they were; not those that have come
    again."""
    repeated = {trial.user_attrs[RETRY]["of"] for trial in trials if RETRY in trial.user_attrs}
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAIL
        and trial.user_attrs.get(INTERRUPTED, WITHDRAWN) != WITHDRAWN
        and ("plan" in trial.user_attrs or PARENT in trial.user_attrs)
        and trial.number not in repeated
    ]


def _repeated(dead: FrozenTrial) -> FrozenTrial:
    """A waiting trial with the plan of one that was cut off, and without its constraint.

    Optuna's own callback copies the constraint, which can't be written again then.
    """
    retry = {"of": dead.number, "deaths": _deaths(dead) + (dead.user_attrs[INTERRUPTED] == DIED)}
    system = {key: dead.system_attrs[key] for key in _COPIED_SYSTEM if key in dead.system_attrs}
    user = {key: dead.user_attrs[key] for key in _COPIED_USER if key in dead.user_attrs}
    return create_trial(
        state=TrialState.WAITING,
        system_attrs={**system, "fixed_params": dict(dead.params)},
        user_attrs={**user, RETRY: retry},
    )


def _deaths(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(RETRY, {}).get("deaths", 0))
