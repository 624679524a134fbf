"""The trial database: reached, waited for, and changed by one process at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from uuid import uuid4

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial
from postgres import Postgres

from autocompress.database import (
    PatientStorage,
    end_if,
    heartbeats,
    hide_password,
    open_storage,
    sole,
    take_waiting,
    upgrade,
)
from autocompress.errors import ConfigError, DatabaseLost
from autocompress.store import open_study

pytestmark = pytest.mark.usefixtures("closed_storages")


def opened(url: str, patience: float = 30.0) -> optuna.Study:
    return open_study(
        open_storage(url, patience), "one", "exploration", bound={}, cost_name="parameters"
    )


def waiting(study: optuna.Study) -> int:
    study.add_trial(create_trial(state=TrialState.WAITING))
    return study.trials[-1]._trial_id


def test_one_of_many_takes_a_waiting_trial(url: str) -> None:
    study = opened(url)
    ids = [waiting(study) for _ in range(10)]
    for trial_id in ids:
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(lambda n, i=trial_id: take_waiting(study, i, {"w": n}), range(4)))
        assert sum(won) == 1
        trial = study._storage.get_trial(trial_id)
        assert trial.state == TrialState.RUNNING and trial.user_attrs == {"w": won.index(True)}
        assert trial.datetime_start is not None


def test_a_trial_is_ended_once_and_only_from_the_state_that_is_meant(url: str) -> None:
    study = opened(url)
    trial_id = waiting(study)
    assert not end_if(study, trial_id, TrialState.RUNNING, TrialState.FAIL, {"reason": "a"})
    assert not study._storage.get_trial(trial_id).user_attrs
    assert take_waiting(study, trial_id, {})
    assert end_if(study, trial_id, TrialState.RUNNING, TrialState.FAIL, {"reason": "b"})
    assert not end_if(study, trial_id, TrialState.RUNNING, TrialState.FAIL, {"reason": "c"})
    trial = study._storage.get_trial(trial_id)
    assert trial.user_attrs == {"reason": "b"} and trial.datetime_complete is not None


def test_heartbeats_are_those_of_running_trials(url: str) -> None:
    study = opened(url)
    first, second, third = study.ask(), study.ask(), study.ask()
    for trial in (first, second):
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    study.tell(second, [1.0, 2.0])
    assert list(heartbeats(study)) == [first._trial_id]
    assert third._trial_id not in heartbeats(study)


def test_one_process_conducts_a_study(url: str) -> None:
    one, other = open_storage(url), open_storage(url)
    with sole(one, "mine"):
        with pytest.raises(ConfigError, match="'mine' is being run by another process"):
            with sole(other, "mine"):
                pass
        with sole(other, "another"):
            pass
    with sole(other, "mine"):
        pass


def test_who_conducts_a_study_may_die(url: str) -> None:
    code = (
        "import os, sys\nfrom autocompress.database import open_storage, sole\n"
        "with sole(open_storage(sys.argv[1]), 'mine'):\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, url], check=False).returncode == 9
    with sole(open_storage(url), "mine"):
        pass


def test_many_processes_open_a_new_database_at_once(url: str) -> None:
    code = (
        "import sys\nfrom autocompress.database import open_storage\n"
        "from autocompress.store import open_study\n"
        "open_study(open_storage(sys.argv[1]), 'one', 'exploration', bound={}, cost_name='x')\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    ends = [(run.wait(timeout=120), run.communicate()[1]) for run in runs]
    assert [code for code, _ in ends] == [0] * 4, ends


def test_a_restarted_server_is_waited_for(server: Postgres) -> None:
    study = opened(server.new_database(f"d{uuid4().hex}"))
    storage = study._storage._backend  # type: ignore[attr-defined]
    said: list[str] = []
    storage.say = said.append
    trials = [study.ask() for _ in range(4)]
    end = time.monotonic() + 6

    def write(trial: optuna.Trial) -> int:
        count = 0
        while time.monotonic() < end:
            trial.set_user_attr(f"a{count}", count)
            study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
            count += 1
            time.sleep(0.02)
        study.tell(trial, [1.0, float(count)])
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = pool.map(write, trials)
        time.sleep(0.5)
        server.stop("immediate")
        time.sleep(2)
        server.start()
        written = list(counts)
    for trial, count in zip(study.trials, written, strict=True):
        assert trial.state == TrialState.COMPLETE and trial.values == [1.0, float(count)]
        assert trial.user_attrs == {f"a{n}": n for n in range(count)}
    assert any("The database is away" in line for line in said)
    assert any("The database is back" in line for line in said)
    assert not any("s3cret" in line for line in said)


def test_a_server_that_stays_away_is_an_error_that_says_what_to_do(server: Postgres) -> None:
    study = opened(server.new_database(f"d{uuid4().hex}"), patience=0.5)
    server.stop()
    try:
        with pytest.raises(DatabaseLost, match="run the same command again") as error:
            study.set_user_attr("a", 1)
        assert "s3cret" not in str(error.value)
    finally:
        server.start()
    study.set_user_attr("a", 1)


def test_a_locked_file_is_waited_for(tmp_path: Path) -> None:
    study = opened(f"sqlite:///{tmp_path / 'study.db'}")
    lock = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    storage: PatientStorage = study._storage._backend  # type: ignore[attr-defined]

    def free() -> None:
        time.sleep(0.5)
        lock.execute("ROLLBACK")

    with storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=1")
    thread = Thread(target=free)
    thread.start()
    study.set_user_attr("a", 1)
    thread.join()
    lock.close()
    assert study.user_attrs["a"] == 1


def after_commit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The next call of a method of Optuna's storage is carried out, and its answer is lost."""
    real: Callable[..., object] = getattr(optuna.storages.RDBStorage, name)
    lost: list[bool] = []

    def losing(self: object, *args: object, **kwargs: object) -> object:
        found = real(self, *args, **kwargs)
        if not lost:
            lost.append(True)
            from sqlalchemy.exc import OperationalError

            raise StorageInternalError("lost") from OperationalError("", {}, Exception("lost"))
        return found

    monkeypatch.setattr(optuna.storages.RDBStorage, name, losing)


def test_an_end_whose_answer_was_lost_is_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(f"sqlite:///{tmp_path / 'study.db'}")
    trial, other = study.ask(), study.ask()
    after_commit(monkeypatch, "set_trial_state_values")
    study.tell(trial, [1.0, 2.0])
    assert study.trials[0].values == [1.0, 2.0]
    # Another end than the one that is there is an error still.
    after_commit(monkeypatch, "set_trial_state_values")
    study.tell(other, state=TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        study._storage.set_trial_state_values(other._trial_id, TrialState.COMPLETE, [1.0, 2.0])


def test_other_errors_are_raised_at_once(tmp_path: Path) -> None:
    study = opened(f"sqlite:///{tmp_path / 'study.db'}")
    with study._storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql("DROP TABLE study_user_attributes")
    with pytest.raises(StorageInternalError):
        study.set_user_attr("a", 1)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "is no database URL"),
        ("nosuchdb://u:secret@host/x", "is no database URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", "can't be opened"),
        ("sqlite:////proc/nowhere/study.db", "can't be opened"),
    ],
)
def test_a_database_that_can_not_be_opened(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_passwords_are_hidden() -> None:
    assert hide_password("postgresql://u:secret@h/d") == "postgresql://u:***@h/d"
    assert hide_password("://u:secret@h") == "***"


def test_an_older_schema_is_upgraded_on_request(url: str) -> None:
    storage = open_storage(url)
    older = storage.get_all_versions()[1]
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{older}'")
        connection.exec_driver_sql("UPDATE version_info SET schema_version = 11")
    with pytest.raises(ConfigError, match="autocompress.study upgrade"):
        open_storage(url)
    said = upgrade(url)
    assert older in said and storage.get_head_version() in said and "s3cret" not in said
    open_storage(url)
    assert "nothing to do" in upgrade(url)
