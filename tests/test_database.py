"""The trial database: reached, waited for, and changed by one process at a time."""

from __future__ import annotations

import gc
import logging
import sqlite3
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from uuid import uuid4

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages._rdb.models import TrialParamModel
from optuna.trial import TrialState, create_trial
from postgres import Postgres
from sqlalchemy import event, insert
from sqlalchemy.pool import QueuePool

from autocompress import database
from autocompress.database import (
    PatientStorage,
    end_if,
    heartbeats,
    hide_password,
    open_storage,
    sole,
    take_waiting,
    upgrade,
    write_proposal,
    write_study_attrs,
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


@pytest.fixture
def _far_from_utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_far_from_utc")
def test_times_are_kept_as_optuna_keeps_them(url: str) -> None:
    study, before = opened(url), datetime.now()
    trial_id = waiting(study)
    take_waiting(study, trial_id, {})
    end_if(study, trial_id, TrialState.RUNNING, TrialState.FAIL, {})
    trial = study._storage.get_trial(trial_id)
    assert trial.datetime_start is not None and trial.datetime_complete is not None
    assert before <= trial.datetime_start <= trial.datetime_complete <= datetime.now()


def backend(study: optuna.Study) -> PatientStorage:
    found = study._storage._backend  # type: ignore[attr-defined]
    assert isinstance(found, PatientStorage)
    return found


def lose(study: optuna.Study, carried_out: bool = True) -> None:
    """The connection of the next transaction is lost, once it was carried out or before."""
    dialect: Any = backend(study).engine.dialect
    real = dialect.do_commit

    def commit(connection: object) -> None:
        dialect.do_commit = real
        if carried_out:
            real(connection)
        raise dialect.loaded_dbapi.OperationalError("disk I/O error")

    dialect.do_commit = commit


both = pytest.mark.parametrize("carried_out", [True, False])


def test_a_trial_that_was_taken_though_the_answer_was_lost(url: str) -> None:
    study = opened(url)
    trial_id = waiting(study)
    lose(study)
    assert take_waiting(study, trial_id, {"w": 1})
    assert not take_waiting(study, trial_id, {"w": 1})
    lose(study)
    assert end_if(study, trial_id, TrialState.RUNNING, TrialState.FAIL, {})


def test_a_trial_that_another_takes_while_the_connection_is_lost(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other = opened(url), opened(url)
    trial_id = waiting(study)
    monkeypatch.setattr(time, "sleep", lambda _: take_waiting(other, trial_id, {}))
    lose(study, False)
    assert not take_waiting(study, trial_id, {})
    assert study._storage.get_trial(trial_id).state == TrialState.RUNNING


@both
def test_a_trial_is_made_once_whatever_is_lost(url: str, carried_out: bool) -> None:
    study = opened(url)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"n": 0}))
    lose(study, carried_out)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"n": 1}))
    lose(study, carried_out)
    trials = opened(url).trials
    assert [(trial.number, trial.user_attrs) for trial in trials] == [(0, {"n": 0}), (1, {"n": 1})]
    lose(study, carried_out)
    asked = study._storage.create_new_trial(study._study_id)
    assert [trial._trial_id for trial in opened(url).trials[2:]] == [asked]
    kept = study._storage.get_trial(asked)
    assert (kept.number, kept.state) == (2, TrialState.RUNNING)
    assert kept.datetime_start is not None


@both
def test_a_study_is_made_once_whatever_is_lost(url: str, carried_out: bool) -> None:
    study = opened(url)
    lose(study, carried_out)
    other = optuna.create_study(
        study_name="other", storage=study._storage, directions=["minimize"] * 2, load_if_exists=True
    )
    assert sorted(optuna.get_all_study_names(study._storage)) == ["one-exploration", "other"]
    assert other.directions == study.directions


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
    # The server may take a moment to see that the connection has ended.
    last = time.monotonic() + 20
    while True:
        try:
            with sole(open_storage(url), "mine"):
                return
        except ConfigError:
            assert time.monotonic() < last
            time.sleep(0.1)


def test_many_processes_open_a_new_database_at_once(url: str) -> None:
    code = (
        "import sys\nfrom autocompress.database import open_storage\n"
        "from autocompress.store import open_study\n"
        "open_study(open_storage(sys.argv[1]), 'one', 'exploration', bound={}, cost_name='x')\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    ends = [(run.wait(timeout=120), run.communicate()[1]) for run in runs]
    assert [code for code, _ in ends] == [0] * 8, ends


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
            study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"of": trial.number}))
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
    made = [trial.user_attrs["of"] for trial in study.trials[4:]]
    assert [made.count(number) for number in range(4)] == written
    for trial, count in zip(study.trials[:4], written, strict=True):
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


def test_an_end_whose_answer_was_lost_is_an_end(url: str) -> None:
    study = opened(url)
    trial, other = study.ask(), study.ask()
    storage = study._storage
    lose(study)
    assert storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0, 2.0])
    assert study.trials[0].values == [1.0, 2.0]
    # Another end than the one that is there is an error still.
    storage.set_trial_state_values(other._trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        study._storage.set_trial_state_values(other._trial_id, TrialState.COMPLETE, [1.0, 2.0])


class Proposing(optuna.samplers.RandomSampler):
    """Proposes one parameter."""

    space: ClassVar[dict[str, BaseDistribution]] = {"a": FloatDistribution(0.0, 1.0)}

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(self, *_: object) -> dict[str, float]:
        return {"a": 0.25}


@both
def test_a_proposal_is_written_once_whatever_is_lost(url: str, carried_out: bool) -> None:
    study = opened(url)
    study.sampler = Proposing()
    trial = study.ask()
    lose(study, carried_out)
    write_proposal(trial)
    assert opened(url).trials[0].params == {"a": 0.25} == trial.params


def test_a_proposal_that_a_lost_call_writes_only_now(url: str) -> None:
    study = opened(url)
    study.sampler = Proposing()
    trial = study.ask()
    row = {
        "trial_id": trial._trial_id,
        "param_name": "a",
        "param_value": 0.25,
        "distribution_json": distribution_to_json(Proposing.space["a"]),
    }

    def late(*_: object) -> None:
        with backend(study).engine.begin() as connection:
            connection.execute(insert(TrialParamModel), [row])

    event.listen(backend(study).scoped_session.session_factory, "before_flush", late, once=True)
    write_proposal(trial)
    assert opened(url).trials[0].params == {"a": 0.25}


@pytest.mark.parametrize("by", ["closing", "letting go"])
def test_a_storage_leaves_no_connection_open(tmp_path: Path, by: str) -> None:
    storage: PatientStorage | None = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    assert storage is not None and not storage.get_all_studies()
    pool = storage.engine.pool
    assert isinstance(pool, QueuePool) and pool.checkedin() > 0
    if by == "closing":
        storage.close()
        assert pool.checkedin() == 0
        assert not storage.get_all_studies(), "it can be used again"
    storage = None
    gc.collect()
    assert pool.checkedin() == 0


def test_a_connection_in_use_is_closed_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []

    def close(connection: sqlite3.Connection) -> None:
        closed.append(id(connection))
        sqlite3.Connection.close(connection)

    monkeypatch.setattr(database._Connection, "close", close, raising=False)
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    connection = storage.engine.connect()
    raw = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)
    known = id(raw)
    storage.close()
    connection.close()
    assert known not in closed
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del raw, connection
        gc.collect()
    assert known in closed


def test_a_server_that_lets_nobody_in_is_not_away(server: Postgres) -> None:
    name = f"d{uuid4().hex}"
    study = opened(server.new_database(name))
    backend(study).close()
    other = open_storage(server.new_database(f"d{uuid4().hex}"))
    with other.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} RENAME TO {name}2")
    with pytest.raises(StorageInternalError) as error:
        study.set_user_attr("a", 1)
    assert "does not exist" in str(error.value.__cause__)


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
        ("postgresql://u:secret@host:port/x", "is no database URL"),
        ("postgresql://user:secret@127.0.0.1:1/x", "can't be opened"),
        ("postgresql://user@127.0.0.1:1/x?password=secret", "can't be opened"),
        ("sqlite:////proc/nowhere/study.db", "can't be opened|there is no such file"),
    ],
)
@pytest.mark.parametrize("call", [open_storage, upgrade])
def test_a_database_that_can_not_be_opened(
    call: Callable[[str], object], url: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        call(url)
    shown: traceback.TracebackException | None
    shown = traceback.TracebackException.from_exception(error.value)
    while shown is not None:
        assert "secret" not in "".join(shown.format_exception_only())
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


def test_passwords_are_hidden() -> None:
    assert hide_password("postgresql://u:secret@h/d") == "postgresql://u:***@h/d"
    assert hide_password("://u:secret@h") == "***"
    assert hide_password("postgresql://u:se@cret@h/d") == "postgresql://u:***@h/d"
    assert hide_password("postgresql://u@h/d?password=secret&host=i") == "postgresql://u@h/d?host=i"


def test_what_a_url_says_of_the_connection_goes_before_our_own(server: Postgres) -> None:
    url = server.new_database(f"d{uuid4().hex}")
    query = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    for asked, name in (("", "autocompress"), ("?application_name=mine", "mine")):
        storage = open_storage(url + asked)
        with storage.engine.connect() as connection:
            assert connection.exec_driver_sql(query).scalar() == name


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


def test_an_upgrade_leaves_logging_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = open_storage(url)
    with storage.engine.begin() as connection:
        older = storage.get_all_versions()[1]
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{older}'")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    upgrade(url)
    assert logging.getLogger().handlers == []
    assert not logging.getLogger("autocompress").disabled


def test_a_newer_schema_is_refused(url: str) -> None:
    storage = open_storage(url)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    for call in (open_storage, upgrade):
        with pytest.raises(ConfigError, match="newer Optuna than the one here: pip install"):
            call(url)


def test_attributes_of_a_study_are_written_together_or_not_at_all(url: str) -> None:
    study = opened(url)
    storage, number = study._storage, study._study_id

    def known() -> dict[str, Any]:
        return dict(storage.get_study_system_attrs(number))

    assert write_study_attrs(study, {"a": 1, "b": [2]}, known())
    before = known()
    assert (before["a"], before["b"]) == (1, [2])
    storage.set_study_system_attr(number, "b", "changed")
    assert not write_study_attrs(study, {"a": 3, "b": [3], "c": 3}, before)
    assert known() == before | {"b": "changed"}
    assert write_study_attrs(study, {"a": 3, "c": 3}, before)


def test_of_many_that_write_a_studys_attributes_at_once_one_wins(url: str) -> None:
    study = opened(url)
    known = study._storage.get_study_system_attrs(study._study_id)
    for names in (["a", "b"], ["c"]):

        def write(number: int, names: list[str] = names) -> bool:
            return write_study_attrs(study, dict.fromkeys(names, number), known)

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(write, range(4)))
        assert sum(won) == 1
        found = study._storage.get_study_system_attrs(study._study_id)
        assert {found[name] for name in names} == {won.index(True)}
