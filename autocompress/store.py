"""What outlives the process: the study's folder, its database and its artifacts."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from safetensors.torch import load_file, save_file
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from torch import Tensor, nn

from autocompress.config import differences
from autocompress.errors import ConfigError, StudyMismatch
from autocompress.trials import EXCUSED, INTERRUPTED, counted

STAGES = ("exploration", "annealing")


class StudyFolder:
    """The folder of one study and the names of what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.artifacts = path / "artifacts"
        self.database = path / "study.db"
        self.table = path / "table.json"
        self.log = path / "study.log"
        self.config = path / "study.json"
        self.result = path / "result.json"
        self.report = path / "report.html"
        self.best = path / "best"
        self.second = path / "second"
        self.finals = path / "finals"
        self.baseline = path / "baseline.safetensors"
        self.identity = path / "study.id"

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: If the place can't be written.
        """
        try:
            self.artifacts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.out: can't make the folder {self.path}: {error.strerror}."
            ) from error

    def lock(self) -> AbstractContextManager[Any]:
        """Held by the one process that runs the study; the system frees it when that dies.

        Raises:
            ConfigError: If another process holds it.
        """
        lock = FileLock(self.path / "study.lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"The study in {self.path} is being run by another process; wait for it or stop it."
            ) from error
        except OSError as error:
            raise ConfigError(f"run.out: can't write in {self.path}: {error.strerror}.") from error

    def claim(self, study: Study) -> str:
        """Tie the folder and a study in a database to each other, by an identity that both keep.

        Returns:
            The identity; what the folder holds under another one belongs to another study.

        Raises:
            StudyMismatch: If the study is kept in another folder.
        """
        kept = study.user_attrs.get("identity")
        if kept is None:
            kept = uuid4().hex[:12]
            write_text(self.identity, kept)
            study.set_user_attr("folder", str(self.path.resolve()))
            study.set_user_attr("identity", kept)
        elif not self.identity.exists() or self.identity.read_text(encoding="utf-8") != kept:
            raise StudyMismatch(
                f"Study '{study.study_name}' of this database is not the one of {self.path}: its "
                f"weights are in {study.user_attrs['folder']}. Give that folder's place as "
                "run.out, or use a new name."
            )
        return str(kept)

    def storage_url(self, url: str | None) -> str:
        """The database's URL: the one given, or SQLite in the folder."""
        return url or f"sqlite:///{self.database.resolve()}"

    def artifact_store(self) -> FileSystemArtifactStore:
        """Optuna's artifact store in the folder."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        return FileSystemArtifactStore(self.artifacts)


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


def study_name(name: str, stage: str) -> str:
    """The Optuna study of one stage."""
    return f"{name}-{stage}"


def open_study(
    storage: RDBStorage, name: str, stage: str, *, bound: Mapping[str, Any], cost_name: str
) -> Study:
    """Create the Optuna study of a stage, or go on with it; its sampler is set later.

    Args:
        storage: The database.
        name: The study's name, without the stage.
        stage: "exploration" or "annealing".
        bound: The settings that the study stands for, flat.
        cost_name: Name of the second objective, with its unit.

    Raises:
        StudyMismatch: If the stored study was made with other settings; says which.
    """
    study = optuna.create_study(
        study_name=study_name(name, stage),
        storage=storage,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    stored = study.user_attrs.get("config")
    # A study without trials binds nobody.
    if stored is None or not study.get_trials(deepcopy=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["accuracy drop (points)", cost_name])
        study.set_user_attr("config", dict(bound))
    else:
        check_same(name, stored, bound)
    return study


def check_same(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a study that stands for other settings.

    Raises:
        StudyMismatch: Naming each setting that differs.
    """
    changed = differences(stored, json.loads(json.dumps(given)))
    if changed:
        raise StudyMismatch(
            f"Study '{name}' was made with other settings ({'; '.join(changed)}). "
            "Use a new name for a new study, or put the setting back."
        )


def load_study(storage: RDBStorage, name: str, stage: str) -> Study | None:
    """The Optuna study of a stage for reading; None if there is none."""
    try:
        return optuna.load_study(study_name=study_name(name, stage), storage=storage)
    except KeyError:
        return None


def trials_spent(study: Study) -> list[FrozenTrial]:
    """The trials that count towards the budget: all that ended by themselves."""
    return [trial for trial in counted(study) if trial.state.is_finished()]


def excuse(study: Study, numbers: Sequence[int]) -> None:
    """Take failed trials out of the budget: what made them fail lies outside of the study."""
    study.set_user_attr(EXCUSED, sorted({*study.user_attrs.get(EXCUSED, ()), *numbers}))


def bury_interrupted(study: Study) -> int:
    """End the trials that a killed process left running; they don't count towards the budget.

    Only for the process that holds the folder's lock: for it, every running trial is a dead one.

    Returns:
        How many there were.
    """
    dead = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in dead:
        mark_interrupted(study, trial._trial_id, trial.number)
    return len(dead)


def mark_interrupted(study: Study, trial_id: int, number: int) -> None:
    """End a trial that was cut off from outside."""
    study._storage.set_trial_user_attr(trial_id, INTERRUPTED, True)
    study._storage.set_trial_user_attr(trial_id, "reason", "interrupted")
    study.tell(number, state=TrialState.FAIL)


def save_weights(model: nn.Module, owner: Trial | Study, store: FileSystemArtifactStore) -> str:
    """Upload a network's weights as safetensors; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(portable_state(model), path)
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner)


def save_text(text: str, name: str, trial: Trial, store: FileSystemArtifactStore) -> str:
    """Upload a text as a file of that name; returns the artifact's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        return upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)


def fetch_weights(artifact_id: str, store: FileSystemArtifactStore) -> dict[str, Tensor]:
    """Download weights that `save_weights` uploaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        download_artifact(artifact_store=store, artifact_id=artifact_id, file_path=str(path))
        return load_file(path)


def portable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, every tensor contiguous and in memory of its own."""
    return {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }


def state_digest(state: Mapping[str, Tensor]) -> str:
    """12 hex digits that identify weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, beside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(state), beside)
    os.replace(beside, path)
