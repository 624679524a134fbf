"""The trial database: connecting to it, and writing to it in few transactions."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import Trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from autocompress.errors import ConfigError


class _Connection(sqlite3.Connection):
    """One that does not wait for the disk at each of the hundreds of commits of a trial.

    With write-ahead logging a process that is killed loses nothing by that; a machine that loses
    its power may lose the last commits, and the database stays whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=NORMAL")


def open_storage(url: str) -> RDBStorage:
    """Connect to a study database.

    SQLite is switched to write-ahead logging, so that the dashboard reads while a study writes.

    Raises:
        ConfigError: If the URL is wrong or the database can't be reached; without its password.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        arguments: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.get_backend_name() == "sqlite":
            arguments = {"connect_args": {"timeout": 60, "factory": _Connection}}
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
                with sqlite3.connect(parsed.database, timeout=60) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
                connection.close()
        return RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs=arguments)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"run.storage = {hide_password(url)!r} is no database URL; give one such as "
            "sqlite:///study.db or postgresql://user@host/database."
        ) from error
    except RuntimeError as error:
        # Optuna's words: the database has the tables of another version.
        raise ConfigError(
            f"run.storage = {hide_password(url)!r}: {str(error).strip().splitlines()[0]}"
        ) from error
    except (SQLAlchemyError, ImportError, sqlite3.Error, OSError) as error:
        cause = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise ConfigError(
            f"run.storage = {hide_password(url)!r} can't be opened: {cause}. Check that the "
            "database runs and its driver is installed (pip install 'autocompress[postgres]')."
        ) from error


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
    rows = []
    for name, value in params.items():
        distribution = space[name]
        if name in kept.distributions or distribution.single():
            continue
        rows.append(
            TrialParamModel(
                trial_id=trial._trial_id,
                param_name=name,
                param_value=distribution.to_internal_repr(value),
                distribution_json=distribution_to_json(distribution),
            )
        )
        kept.distributions[name], kept.params[name] = distribution, value
    with _create_scoped_session(backend.scoped_session) as session:
        session.add_all(rows)


def hide_password(url: str) -> str:
    """`url` with its password masked."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "***" if "@" in url else url
