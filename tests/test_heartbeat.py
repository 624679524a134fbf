"""Signs of life, and who shows none."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from autocompress.database import end_if, heartbeats, open_storage
from autocompress.heartbeat import Heartbeat, StaleWatch
from autocompress.store import open_study


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    return open_study(storage, "one", "exploration", bound={}, cost_name="parameters")


def beat(study: optuna.Study, trial: optuna.Trial) -> None:
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


def until(condition: object, seconds: float = 10.0) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_a_running_trial_gets_heartbeats(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = study.ask()
    real = study._storage.record_heartbeat  # type: ignore[attr-defined]
    calls: list[int] = []

    def counting(trial_id: int) -> None:
        calls.append(1)
        real(trial_id)

    monkeypatch.setattr(study._storage, "record_heartbeat", counting)
    with Heartbeat(study, trial._trial_id, every=0.01) as heartbeat:
        assert until(lambda: len(calls) > 3)
        assert trial._trial_id in heartbeats(study) and not heartbeat.taken


def test_a_missed_heartbeat_does_not_end_them(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = study.ask()
    real = study._storage.record_heartbeat  # type: ignore[attr-defined]
    calls: list[int] = []

    def failing(trial_id: int) -> None:
        calls.append(trial_id)
        if len(calls) < 3:
            raise StorageInternalError("gone")
        real(trial_id)

    monkeypatch.setattr(study._storage, "record_heartbeat", failing)
    with Heartbeat(study, trial._trial_id, every=0.01):
        assert until(lambda: trial._trial_id in heartbeats(study))


def test_a_worker_learns_that_its_trial_was_given_to_others(study: optuna.Study) -> None:
    trial = study.ask()
    with Heartbeat(study, trial._trial_id, every=0.01) as heartbeat:
        end_if(study, trial._trial_id, TrialState.RUNNING, TrialState.FAIL, {})
        assert until(lambda: heartbeat.taken)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_who_shows_no_sign_of_life_is_found(study: optuna.Study) -> None:
    clock = Clock()
    watch = StaleWatch(grace=60.0, clock=clock)
    silent, alive, ended = study.ask(), study.ask(), study.ask()
    for trial in (alive, ended):
        beat(study, trial)
    assert watch.stale(study) == []
    study.tell(ended, [1.0, 2.0])
    clock.now += 59
    assert watch.stale(study) == []
    _move_heartbeat(study, alive, "2001-01-01 00:00:00")
    clock.now += 2
    assert [trial.number for trial in watch.stale(study)] == [silent.number]
    clock.now += 61
    assert len(watch.stale(study)) == 2


@pytest.mark.parametrize("moment", ["1999-01-01 00:00:00", "2999-01-01 00:00:00"])
def test_the_databases_clock_may_jump(study: optuna.Study, moment: str) -> None:
    """Only that a heartbeat changes counts, and the time that the watching process measures."""
    clock = Clock()
    watch = StaleWatch(grace=60.0, clock=clock)
    trial = study.ask()
    beat(study, trial)
    watch.stale(study)
    clock.now += 50
    _move_heartbeat(study, trial, moment)
    assert watch.stale(study) == []
    clock.now += 50
    assert watch.stale(study) == []
    clock.now += 11
    assert len(watch.stale(study)) == 1


def _move_heartbeat(study: optuna.Study, trial: optuna.Trial, moment: str) -> None:
    engine = study._storage._backend.engine  # type: ignore[attr-defined]
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE trial_heartbeats SET heartbeat = '{moment}.000000' "
            f"WHERE trial_id = {trial._trial_id}"
        )
