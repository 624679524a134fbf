"""The trial database: connecting to it, and writing to it in few transactions."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sqlite3
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    StudySystemAttributeModel,
    TrialHeartbeatModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)
from sqlalchemy.orm import Session

from autocompress.errors import ConfigError, DatabaseLost

logger = logging.getLogger("autocompress")

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds for which a database may be away."""
TOLD_AFTER = 1.0
"""Seconds after which it is told that a database is away."""
LONGEST_PAUSE = 5.0
"""Seconds between two attempts to reach it, at most."""
RACE = 30.0
"""Seconds in which a new database is opened anew, where several processes make its tables."""
RACES = ("already exists", "duplicate key", "UNIQUE constraint", "database is locked")
"""What that looks like."""
LASTING = ("authentication failed", "does not exist", "no pg_hba.conf entry", "permission denied")
"""What a server says that is there, and that won't let this process in later either."""
SECRETS = ("password", "sslpassword")
"""Options at the end of a URL that are not shown."""
MADE = "autocompress:made"
"""System attribute of a trial: a mark by which the call that made it finds it again."""
LIBPQ = {
    "application_name": "autocompress",
    # A machine that vanished doesn't say so: seconds until that is noticed, connecting, idle, and
    # (in ms) while an answer is awaited. Without these it takes minutes to hours.
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""Options of PostgreSQL's client library, where the URL doesn't give them."""


class _Connection(sqlite3.Connection):
    """One that does not wait for the disk at each of the hundreds of commits of a trial.

    With write-ahead logging a process that is killed loses nothing by that; a machine that loses
    its power may lose the last commits, and the database stays whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=NORMAL")

    def __del__(self) -> None:
        # One that was in use when its pool was closed comes back to nobody. A thread may not close
        # what is another's.
        with suppress(sqlite3.Error):
            self.close()


class PatientStorage(RDBStorage):
    """Optuna's storage, which waits while the database is away and then goes on.

    A call is repeated when the connection was lost, the server is being restarted, or an SQLite
    file is locked or its disk is full. Whether the lost call was carried out makes no difference to
    most; those that make a trial or end one look first. A study that is made without a name is not
    made again. A call of Optuna's that takes a waiting trial, and whose answer is lost, says that
    it has not got it: such a trial has no heartbeat, and is found by that (`take_waiting` knows).

    Args:
        url: The database's URL.
        patience: Seconds for which it waits.
        **more: As `RDBStorage` has it.

    Attributes:
        say: Told when it begins to wait and when the database is back.
    """

    def __init__(self, url: str, patience: float = PATIENCE, **more: Any) -> None:
        self.say: Callable[[str], None] = logger.warning
        self._patience = patience
        try:
            super().__init__(url, **more)
        finally:
            if "engine" in vars(self):
                # The pool would leave its connections open when nobody holds the storage any more.
                weakref.finalize(self, self.engine.dispose)

    def close(self) -> None:
        """Close the connections that are not in use; a later call opens new ones."""
        self.remove_session()
        self.engine.dispose()

    def patiently(self, call: Callable[[], T]) -> T:
        """The call's result, as soon as the database is there.

        Raises:
            DatabaseLost: If it was away for too long.
        """
        begun: float | None = None
        pause, told = 0.1, False
        while True:
            try:
                found = call()
            except (StorageInternalError, SQLAlchemyError) as error:
                cause = _transient(error)
                if cause is None:
                    raise
                self.remove_session()
                now = time.monotonic()
                if begun is None:
                    begun = now
                if now - begun > TOLD_AFTER and not told:
                    told = True
                    self.say(f"The database is away ({cause}); waiting for it.")
                if now - begun > self._patience:
                    raise DatabaseLost(
                        f"The database was away for {self._patience:g} s ({cause}). Nothing that "
                        "was finished is lost: run the same command again when it is back."
                    ) from None
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if begun is not None and told:
                self.say(f"The database is back after {time.monotonic() - begun:.0f} s.")
            return found

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """As Optuna's; if an answer was lost, there is one of that name: `load_if_exists` takes it.

        Raises:
            DuplicatedStudyError: If there is a study of that name.
        """

        def call() -> int:
            return RDBStorage.create_new_study(self, directions, study_name)

        return call() if study_name is None else self.patiently(call)

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        """As Optuna's, which repeats a lost call blindly and may make two trials of one."""
        trial = deepcopy(template_trial or create_trial(state=TrialState.RUNNING))
        mark = uuid4().hex
        trial.system_attrs = {**trial.system_attrs, MADE: mark}
        found: list[tuple[int, int]] = []
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            with _create_scoped_session(self.scoped_session) as session:
                # One after another: the trial's number is a count. A lost call that the server
                # still works on is waited for here, too.
                StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
                made = _marked(session, study_id, mark) if calls > 1 else None
                if made is None:
                    made = self._get_prepared_new_trial(study_id, trial, session)
                found.append((int(made.number), int(made.trial_id)))

        self.patiently(call)
        trial.number, trial._trial_id = found[-1]
        return trial

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """As Optuna's; that the trial has just this state and these values already is fine if a
        connection was lost on the way."""
        calls = 0

        def call() -> bool:
            nonlocal calls
            calls += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                if calls > 1 and _has(RDBStorage.get_trial(self, trial_id), state, values):
                    return True
                raise

        return self.patiently(call)


def _marked(session: Session, study_id: int, mark: str) -> TrialModel | None:
    return (
        session.query(TrialModel)
        .join(TrialSystemAttributeModel)
        .filter(TrialModel.study_id == study_id)
        .filter(TrialSystemAttributeModel.key == MADE)
        .filter(TrialSystemAttributeModel.value_json == json.dumps(mark))
        .one_or_none()
    )


def _has(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> bool:
    given = None if values is None else list(values)
    return trial.state == state and (given is None or trial.values == given)


def _repeated(name: str) -> Callable[..., Any]:
    """A method of Optuna's storage that waits for the database."""
    method = getattr(RDBStorage, name)

    @wraps(method)
    def patient(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(lambda: method(self, *args, **kwargs))

    return patient


for _name in (
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_all_studies",
    "set_trial_param",
    "_set_trial_param",
    "get_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_intermediate_value",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "get_all_trials",
    "_get_trials",
    "record_heartbeat",
):
    setattr(PatientStorage, _name, _repeated(_name))


def _transient(error: Exception) -> str | None:
    """What is wrong with the database for a while, in a line; None if it is something else."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):
        return "a connection was lost"
    if not isinstance(cause, DBAPIError):
        return None
    words = str(cause.orig).strip().splitlines() or [type(cause.orig).__name__]
    if isinstance(cause.orig, sqlite3.Error):
        brief = any(word in words[0] for word in ("locked", "busy", "full", "disk I/O"))
        return words[0] if brief else None
    lost = isinstance(cause, (OperationalError, InterfaceError)) or cause.connection_invalidated
    lasting = any(word in str(cause.orig) for word in LASTING)
    return words[0] if lost and not lasting else None


def open_storage(url: str, patience: float = PATIENCE, waits: bool = False) -> PatientStorage:
    """Connect to a study database.

    SQLite is switched to write-ahead logging, so that the dashboard reads while a study writes.

    Args:
        url: Its URL.
        patience: Seconds for which later calls wait if it is away.
        waits: Whether this call waits, too, for a database that was there before.

    Raises:
        ConfigError: If the URL is wrong or the database can't be reached; without its password.
    """
    begun, pause = time.monotonic(), 0.1
    while True:
        try:
            return _open(url, patience)
        except _Away as error:
            spent = time.monotonic() - begun
            if spent > (patience if waits else RACE if error.raced else 0.0):
                raise ConfigError(str(error)) from error.__cause__
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


class _Away(Exception):
    """A database that can't be opened now."""

    def __init__(self, text: str, raced: bool) -> None:
        super().__init__(text)
        self.raced = raced
        """Whether another process was about to make the same tables."""


def _open(url: str, patience: float) -> PatientStorage:
    parsed = _parsed(url)
    with _explained(url):
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            path = Path(str(parsed.database))
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=60)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        full = parsed.render_as_string(hide_password=False)
        return PatientStorage(full, patience, engine_kwargs=_engine_arguments(parsed))


def _engine_arguments(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60, "factory": _Connection}}
    # A process has few threads, and the server may have many processes.
    arguments: dict[str, Any] = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 20}
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        given = {key: value for key, value in LIBPQ.items() if key not in url.query}
        arguments["connect_args"] = given
    return arguments


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """What goes wrong in connecting, in words, without the password.

    Raises:
        ConfigError: If it would go wrong again.
        _Away: If not, perhaps.
    """
    shown = f"run.storage = {hide_password(url)!r}"
    try:
        yield
    except NoSuchModuleError as error:
        raise _no_url(url) from error
    except RuntimeError as error:
        # Optuna's words for tables of another version.
        if "pip install -U optuna" in str(error):
            raise ConfigError(f"{shown} {NEWER}") from error
        raise ConfigError(
            f"{shown} has the tables of an older Optuna. python -m autocompress.study upgrade "
            "brings it to the version here, which older ones can't read then."
        ) from error
    except (SQLAlchemyError, ImportError, sqlite3.Error, OSError) as error:
        cause = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise _Away(
            f"{shown} can't be opened: {cause}. Check that the database runs and its driver is "
            "installed (pip install 'autocompress[postgres]').",
            any(word in cause for word in RACES),
        ) from error


NEWER = "has the tables of a newer Optuna than the one here: pip install --upgrade optuna."


def _no_url(url: str) -> ConfigError:
    return ConfigError(
        f"run.storage = {hide_password(url)!r} is no database URL; give one such as "
        "sqlite:///study.db or postgresql://user@host/database."
    )


def _parsed(url: str) -> URL:
    """The parts of a URL; PostgreSQL is reached by psycopg 3.

    Raises:
        ConfigError: If it is none.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not the cause: SQLAlchemy's text may hold the password.
        raise _no_url(url) from None
    if "@" in (parsed.host or ""):
        raise ConfigError(
            f"run.storage = {hide_password(url)!r}: the host can't be told from the password. "
            "Write %40 for each @ in user and password."
        )
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def write_proposal(trial: Trial) -> None:
    """Write the parameters that the trial's sampler proposes, all in one transaction.

    `suggest` finds them written then, and else would commit each by itself: 0.2 s for 120 of them
    on SQLite, and 120 times the way to a PostgreSQL server. What it can't do, other storages and
    parameters that are queued or not proposed, is left to `suggest`.
    """
    storage = trial.study._storage
    backend = getattr(storage, "_backend", storage)
    kept = trial._cached_frozen_trial
    if not isinstance(backend, RDBStorage) or "fixed_params" in kept.system_attrs:
        return
    params, space = trial.relative_params, trial.relative_search_space or {}
    fresh = {
        name: value
        for name, value in params.items()
        if name not in kept.distributions and not space[name].single()
    }

    def write() -> None:
        with _create_scoped_session(backend.scoped_session) as session:
            rows = session.query(TrialParamModel.param_name)
            known = {name for (name,) in rows.filter(TrialParamModel.trial_id == trial._trial_id)}
            session.add_all(
                TrialParamModel(
                    trial_id=trial._trial_id,
                    param_name=name,
                    param_value=space[name].to_internal_repr(value),
                    distribution_json=distribution_to_json(space[name]),
                )
                for name, value in fresh.items()
                if name not in known
            )

    try:
        _patiently(backend, write)
    except IntegrityError:
        # A lost call was carried out only now.
        _patiently(backend, write)
    for name, value in fresh.items():
        kept.distributions[name], kept.params[name] = space[name], value


def _patiently(storage: RDBStorage, call: Callable[[], T]) -> T:
    return storage.patiently(call) if isinstance(storage, PatientStorage) else call()


def hide_password(url: str) -> str:
    """`url` with its password masked, to the last @; one among its options is left out."""
    try:
        parsed = make_url(url).difference_update_query(SECRETS)
    except (ArgumentError, ValueError):
        return "***" if "@" in url else url
    if parsed.password is not None and "@" in (parsed.host or ""):
        parsed = parsed.set(host=str(parsed.host).rpartition("@")[2])
    return parsed.render_as_string(hide_password=True)


def take_waiting(study: Study, trial_id: int, attrs: Mapping[str, Any]) -> bool:
    """Make a waiting trial a running one, unless another process has done so.

    One statement tests and sets, for SQLite has no `FOR UPDATE`, and Optuna's own way hands one
    trial to two workers there.

    Args:
        study: Its study.
        trial_id: The trial.
        attrs: User attributes that are written along.

    Returns:
        Whether this process has it.
    """
    return _set_state(study, trial_id, TrialState.WAITING, TrialState.RUNNING, attrs)


def end_if(
    study: Study, trial_id: int, before: TrialState, after: TrialState, attrs: Mapping[str, Any]
) -> bool:
    """End a trial if it is in a certain state still; of several processes one does.

    Args:
        study: Its study.
        trial_id: The trial.
        before: The state that it must be in.
        after: The state that it gets.
        attrs: User attributes that are written along.

    Returns:
        Whether this process has ended it.
    """
    return _set_state(study, trial_id, before, after, attrs)


@contextmanager
def sole(storage: PatientStorage, name: str) -> Iterator[Callable[[], None]]:
    """A block in which this process conducts a study, and no other one, on any machine.

    PostgreSQL frees the lock when the process or its connection dies. On SQLite, whose file one
    machine has, the lock is a file beside it.

    Yields:
        A function to call from time to time: it takes the lock again if the connection was lost.

    Raises:
        ConfigError: If another process conducts it, or has taken it since.
    """
    engine = storage.engine
    if engine.name == "postgresql":
        lock = _Advisory(engine, name)
        try:
            storage.patiently(lock.hold)
            yield lambda: storage.patiently(lock.hold)
        finally:
            lock.free()
    elif engine.name == "sqlite" and engine.url.database not in (None, "", ":memory:"):
        with _locked(Path(f"{engine.url.database}.{name}.lock"), name):
            yield lambda: None
    else:
        yield lambda: None


def _taken(name: str) -> ConfigError:
    return ConfigError(
        f"Study '{name}' is being run by another process; wait for it or stop it. To add workers "
        f"to it: python -m autocompress.study worker --study {name} --storage URL."
    )


class _Advisory:
    """A lock of PostgreSQL, which a connection of its own holds."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name
        digest = hashlib.sha256(f"autocompress/{name}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._connection: Connection | None = None

    def hold(self) -> None:
        """Hold the lock, on a new connection if there is none or it was lost."""
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
                return
            except SQLAlchemyError:
                self.free()
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        query = text("SELECT pg_try_advisory_lock(:key)")
        if not connection.execute(query, {"key": self._key}).scalar():
            connection.close()
            raise _taken(self._name)
        self._connection = connection

    def free(self) -> None:
        """Free the lock, and end the connection."""
        if self._connection is not None:
            with suppress(SQLAlchemyError):
                # At once: the server may be slow to see that a connection has ended.
                query = text("SELECT pg_advisory_unlock(:key)")
                self._connection.execute(query, {"key": self._key})
            with suppress(SQLAlchemyError):
                # Not back into the pool, where it would hold the lock.
                self._connection.invalidate()
            with suppress(SQLAlchemyError):
                self._connection.close()
            self._connection = None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise _taken(name) from error
    with lock:
        yield


def heartbeats(study: Study) -> dict[int, datetime]:
    """The latest heartbeat of each running trial that has one, by the trial's id."""
    backend = _backend(study)

    def read() -> dict[int, datetime]:
        with _create_scoped_session(backend.scoped_session) as session:
            rows = (
                session.query(TrialHeartbeatModel.trial_id, TrialHeartbeatModel.heartbeat)
                .join(TrialModel, TrialModel.trial_id == TrialHeartbeatModel.trial_id)
                .filter(TrialModel.study_id == study._study_id)
                .filter(TrialModel.state == TrialState.RUNNING)
            )
            return {trial_id: beat for trial_id, beat in rows}

    return _patiently(backend, read)


def write_study_attrs(study: Study, attrs: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Write system attributes of a study, all of them in one transaction or none.

    A reader never sees half of them; Optuna commits each by itself.

    Args:
        study: The study.
        attrs: What to write.
        known: The study's system attributes as they were when it was decided what to write.

    Returns:
        Whether they were written; False where somebody else has changed one of them since.
    """
    backend = getattr(study._storage, "_backend", study._storage)
    if not isinstance(backend, RDBStorage):
        for key, value in attrs.items():
            backend.set_study_system_attr(study._study_id, key, value)
        return True

    def write() -> bool:
        with _create_scoped_session(backend.scoped_session) as session:
            return _write_unchanged(session, study._study_id, attrs, known)

    try:
        return _patiently(backend, write)
    except IntegrityError:
        # Another process wrote one of them for the first time in the same moment.
        return False


def _write_unchanged(
    session: Session, study_id: int, attrs: Mapping[str, Any], known: Mapping[str, Any]
) -> bool:
    if session.get_bind().dialect.name == "sqlite":
        # It locks no rows. A write, even of nothing new, keeps all others out until the end.
        owner = session.query(StudyModel).filter(StudyModel.study_id == study_id)
        owner.update({"study_name": StudyModel.study_name}, synchronize_session=False)
    rows = session.query(StudySystemAttributeModel).filter(
        StudySystemAttributeModel.study_id == study_id,
        StudySystemAttributeModel.key.in_(list(attrs)),
    )
    kept = {str(row.key): row for row in rows.with_for_update()}
    values = {key: json.loads(str(row.value_json)) for key, row in kept.items()}
    if any(values.get(key) != known.get(key) for key in attrs):
        return False
    for key, value in attrs.items():
        text = json.dumps(value)
        if key in kept:
            kept[key].value_json = text
        else:
            new = StudySystemAttributeModel(study_id=study_id, key=key, value_json=text)
            session.add(new)
    return True


def _set_state(
    study: Study, trial_id: int, before: TrialState, after: TrialState, attrs: Mapping[str, Any]
) -> bool:
    backend = _backend(study)
    # The columns, which hold UTC; the attributes of these names convert it.
    columns = TrialModel.__table__.c
    when = "datetime_complete" if after.is_finished() else "datetime_start"
    now = datetime.now(UTC).replace(tzinfo=None)
    calls = 0

    def change() -> bool:
        nonlocal calls
        calls += 1
        try:
            with _create_scoped_session(backend.scoped_session) as session:
                for key, value in attrs.items():
                    backend._set_trial_attr_without_commit(
                        session, TrialUserAttributeModel, trial_id, key, value
                    )
                changed = (
                    session.query(TrialModel)
                    .filter(TrialModel.trial_id == trial_id, TrialModel.state == before)
                    .update({columns.state: after, columns[when]: now}, synchronize_session=False)
                )
                if not changed:
                    # Nothing of this is written then.
                    raise UpdateFinishedTrialError
        except UpdateFinishedTrialError:
            # A call whose answer was lost may have done it.
            return calls > 1 and _was_set(backend, trial_id, after, when, now)
        return True

    return _patiently(backend, change)


def _was_set(
    storage: RDBStorage, trial_id: int, state: TrialState, when: str, now: datetime
) -> bool:
    """Whether it was just this change; its time is no other process's."""
    with _create_scoped_session(storage.scoped_session) as session:
        column = TrialModel.__table__.c[when]
        found = session.query(TrialModel).filter(TrialModel.trial_id == trial_id, column == now)
        return found.filter(TrialModel.state == state).count() == 1


def _backend(study: Study) -> RDBStorage:
    found = getattr(study._storage, "_backend", study._storage)
    assert isinstance(found, RDBStorage)
    return found


def upgrade(url: str) -> str:
    """Bring the tables that an older Optuna made to the form of the one installed here.

    Returns:
        What was done, in a line.

    Raises:
        ConfigError: If the database can't be reached, or a newer Optuna made it.
    """
    parsed, shown = _parsed(url), hide_password(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
        raise ConfigError(f"run.storage = {shown!r}: there is no such file.")
    try:
        with _explained(url):
            full = parsed.render_as_string(hide_password=False)
            arguments = _engine_arguments(parsed)
            storage = PatientStorage(full, engine_kwargs=arguments, skip_compatibility_check=True)
    except _Away as error:
        raise ConfigError(str(error)) from error.__cause__
    try:
        before, head = storage.get_current_version(), storage.get_head_version()
        if before == head:
            return f"{shown} has Optuna's schema {head} already; nothing to do."
        if before not in storage.get_all_versions():
            raise ConfigError(f"run.storage = {shown!r} {NEWER}")
        with _quiet_upgrade():
            storage.upgrade()
        return f"{shown}: Optuna's schema {before} became {head}."
    finally:
        storage.close()


@contextmanager
def _quiet_upgrade() -> Iterator[None]:
    """Alembic sets up logging where nobody has, and disables all loggers that there are."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            # Reading the old forms of distributions, which is what an upgrade is for.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.getLogger().removeHandler(handler)
