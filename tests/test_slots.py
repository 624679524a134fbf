"""The budget as data: trials that wait, are taken once, and come again."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.database import open_storage
from autocompress.slots import (
    AHEAD,
    MAX_DEATHS,
    RETRY,
    WORKER,
    cut_off,
    is_gone,
    running,
    take,
    top_up,
    worker_name,
)
from autocompress.store import open_study, trials_spent
from autocompress.trials import CHECKPOINT, INTERRUPTED, PARENT, set_constraint

SPACE = {"x": FloatDistribution(0.0, 1.0)}


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return opened(tmp_path)


def opened(folder: Path) -> optuna.Study:
    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    return open_study(storage, "one", "exploration", bound={}, cost_name="parameters")


def planned(study: optuna.Study) -> optuna.Trial:
    """A trial that was taken and has its plan."""
    trial = take(study)
    assert trial is not None
    trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr("plan", "a plan")
    return trial


def frozen(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    return study.trials[trial.number]


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_what_waits_runs_and_ended_is_the_budget(study: optuna.Study) -> None:
    assert top_up(study, 4) == 4 and top_up(study, 4) == 0
    first, second = take(study), take(study)
    assert first is not None and second is not None
    study.tell(first, [1.0, 2.0])
    study.tell(second, state=TrialState.FAIL)
    assert top_up(study, 4) == 0
    assert states(study) == ["COMPLETE", "FAIL", "WAITING", "WAITING"]
    for _ in range(2):
        trial = take(study)
        assert trial is not None
        study.tell(trial, [1.0, 2.0])
    assert take(study) is None and top_up(study, 4) == 0
    assert len(trials_spent(study)) == 4


def test_a_smaller_budget_takes_back_what_waits(study: optuna.Study) -> None:
    top_up(study, 5)
    take(study)
    assert top_up(study, 2) == -3
    assert states(study) == ["RUNNING", "WAITING", "FAIL", "FAIL", "FAIL"]
    assert top_up(study, 3) == 1 and len(trials_spent(study)) == 0


def test_not_all_of_a_large_budget_waits_at_once(study: optuna.Study) -> None:
    assert top_up(study, AHEAD + 10) == AHEAD
    take(study)
    assert top_up(study, AHEAD + 10) == 1


def test_a_trial_that_was_cut_off_comes_again_with_its_plan(study: optuna.Study) -> None:
    top_up(study, 2)
    trial = planned(study)
    trial.set_user_attr(PARENT, "exploration/7")
    trial.set_user_attr(CHECKPOINT, "artifact")
    study._storage.set_trial_system_attr(trial._trial_id, "autocompress:knobs", {"seed": 3})
    set_constraint(trial, 5.0)
    assert cut_off(study, frozen(study, trial)) and not cut_off(study, frozen(study, trial))
    assert frozen(study, trial).user_attrs["reason"] == "interrupted"
    assert top_up(study, 2) == 1 and top_up(study, 2) == 0
    again = take(study)
    assert again is not None and again.number == 2, "it goes before those that have no plan"
    assert again.suggest_float("x", 0.0, 1.0) == trial.params["x"]
    assert again.user_attrs[RETRY] == {"of": 0, "deaths": 0}
    assert again.user_attrs[PARENT] == "exploration/7"
    assert again.user_attrs[CHECKPOINT] == "artifact"
    assert frozen(study, again).system_attrs["autocompress:knobs"] == {"seed": 3}
    # Optuna's own retry keeps the dead trial's constraint.
    assert not frozen(study, again).constraints
    study.tell(again, [1.0, 2.0])
    assert len(trials_spent(study)) == 1


def test_a_trial_without_a_plan_comes_again_as_any_other(study: optuna.Study) -> None:
    top_up(study, 1)
    trial = take(study)
    assert trial is not None
    cut_off(study, frozen(study, trial))
    top_up(study, 1)
    again = take(study)
    assert again is not None and RETRY not in again.user_attrs


def test_a_trial_of_which_workers_die_fails_in_the_end(study: optuna.Study) -> None:
    top_up(study, 1)
    for death in range(MAX_DEATHS + 1):
        trial = take(study) if death else planned(study)
        assert trial is not None
        trial.set_user_attr("plan", "a plan")
        assert not trials_spent(study)
        assert cut_off(study, frozen(study, trial), died="SIGSEGV")
        top_up(study, 1)
    (failed,) = trials_spent(study)
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["reason"] == "its worker died 3 times, the last time: SIGSEGV"
    assert take(study) is None


def test_being_told_to_end_is_no_death(study: optuna.Study) -> None:
    top_up(study, 1)
    for _ in range(2 * MAX_DEATHS):
        trial = take(study)
        assert trial is not None
        trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("plan", "a plan")
        cut_off(study, frozen(study, trial))
        top_up(study, 1)
    assert not trials_spent(study) and take(study) is not None


def test_what_ended_by_itself_can_not_be_cut_off(study: optuna.Study) -> None:
    top_up(study, 1)
    trial = planned(study)
    before = frozen(study, trial)
    study.tell(trial, [1.0, 2.0])
    assert not cut_off(study, before)
    (ended,) = trials_spent(study)
    assert ended.state == TrialState.COMPLETE and INTERRUPTED not in ended.user_attrs


def test_a_worker_says_who_it_is(study: optuna.Study) -> None:
    top_up(study, 1)
    take(study)
    (trial,) = running(study)
    assert trial.user_attrs[WORKER] == worker_name()
    assert worker_name().endswith(f"/{os.getpid()}")


def test_a_worker_of_this_machine_can_be_seen_to_be_gone() -> None:
    def of(name: str | None) -> FrozenTrial:
        return create_trial(
            state=TrialState.RUNNING, user_attrs={} if name is None else {WORKER: name}
        )

    host = worker_name().partition("/")[0]
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert is_gone(of(f"{host}/{child.pid}"))
    assert is_gone(of(None)), "of a version that had no workers"
    assert is_gone(of(worker_name())), "a process before this one had its number"
    assert not is_gone(of(f"{host}/{os.getppid()}"))
    assert not is_gone(of("another-machine/1"))


TAKER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_slots import opened
from autocompress.slots import take
study = opened(Path(sys.argv[2]))
while (trial := take(study)) is not None:
    print(trial.number, flush=True)
    study.tell(trial, [1.0, float(trial.number)])
"""


def test_no_trial_is_taken_twice(study: optuna.Study, tmp_path: Path) -> None:
    """Optuna's own way hands a waiting trial on SQLite to two processes."""
    top_up(study, AHEAD)
    argv = [sys.executable, "-c", TAKER, str(Path(__file__).parent), str(tmp_path)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(argv, capture_output=True, text=True, check=True), range(4)
            )
        )
    taken = [int(line) for run in runs for line in run.stdout.split()]
    assert sorted(taken) == list(range(AHEAD))
    assert states(study) == ["COMPLETE"] * AHEAD
