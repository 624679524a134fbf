"""What a study is on disk and in its database: the folder, the Optuna studies, their trials."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from filelock import FileLock, Timeout
from optuna.artifacts._protocol import ArtifactStore
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL

from autocompress.artifacts import open_artifacts, write_text
from autocompress.config import StudyConfig, differences
from autocompress.errors import ConfigError, StudyMismatch
from autocompress.scale import ACCURACY
from autocompress.trials import EXCUSED, counted

PLACE = "artifacts"
"""User attribute of the exploration: where its artifacts are."""
SETTINGS = "settings"
"""User attribute of the exploration: the settings that it was last run with, as JSON."""
STAGES = ("exploration", "annealing")
"""The stages of the search, each an Optuna study."""
FINALS = "finals"
"""The Optuna study of the long fine-tunings, whose trials are ordered, not proposed."""


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
        self.lost = path / "lost_images"
        self.best = path / "best"
        self.second = path / "second"
        self.int8 = path / "int8"
        self.baseline = path / "baseline.safetensors"
        self.identity = path / "study.id"
        self.code = path / "study.code"

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

    def claim(self, study: Study, storage: str | None) -> str:
        """Tie the folder and a study in a database to each other, by an identity that both keep.

        Args:
            study: The exploration.
            storage: The database as the settings have it, without its password.

        Returns:
            The identity; what the folder holds under another one belongs to another study.

        Raises:
            StudyMismatch: If the study is kept in another folder, or the folder keeps a study of
                another database.
        """
        kept = study.user_attrs.get("identity")
        if kept is None:
            self._check_database(storage)
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

    def _check_database(self, storage: str | None) -> None:
        """Let no study of one database take the folder of a study of another one."""
        if not (self.identity.exists() and self.baseline.exists() and self.config.exists()):
            return
        other = json.loads(self.config.read_text(encoding="utf-8"))["run"]["storage"]
        if other != storage:
            raise StudyMismatch(
                f"{self.path} holds a study of the database {other or self.database}, and "
                f"{storage or self.database} has none of its trials. Put run.storage back, use a "
                "new name or another run.out, or remove the folder."
            )

    def remember(self, modules: Path | None) -> None:
        """Note where the modules are that the study file names, for those who name this folder."""
        if modules is not None:
            write_text(self.code, str(modules.resolve()))

    @property
    def modules(self) -> Path | None:
        """The folder of those modules; None where it isn't known or is gone."""
        if not self.code.exists():
            return None
        kept = Path(self.code.read_text(encoding="utf-8").strip())
        return kept if kept.is_dir() else None

    def storage_url(self, url: str | None) -> str:
        """The database's URL: the one given, or SQLite in the folder."""
        path = str(self.database.resolve())
        return url or URL.create("sqlite", database=path).render_as_string()

    def artifact_store(self, exploration: Study) -> ArtifactStore:
        """The study's artifact store: a bucket, or the folder here, which may have been moved.

        Raises:
            ConfigError: If it can't be reached.
        """
        place = str(exploration.user_attrs.get(PLACE, self.artifacts))
        return open_artifacts(str(nearest(place, self.artifacts) or place), writes=False)


def nearest(place: str | None, here: Path | None) -> str | Path | None:
    """Where a study's artifacts are seen from here: nothing is written.

    Args:
        place: Where the study keeps them, as its database says.
        here: The folder of artifacts in the study's own folder, which may have been moved; it is
            empty where `run.artifacts` names another one.

    Returns:
        The bucket or folder; None where there is none.
    """
    if place is not None and "://" in place:
        return place
    folders = (here, None if place is None else Path(place))
    present = [folder for folder in folders if folder is not None and folder.is_dir()]
    return next((f for f in present if any(f.iterdir())), present[0] if present else None)


def folder_of(config: StudyConfig) -> StudyFolder:
    """The folder of the study with these settings, whether it is there yet or not."""
    return StudyFolder(Path(config.run.out).expanduser() / config.name)


def study_name(name: str, stage: str) -> str:
    """The Optuna study of one stage."""
    return f"{name}-{stage}"


def open_study(
    storage: RDBStorage,
    name: str,
    stage: str,
    *,
    bound: Mapping[str, Any],
    cost_name: str,
    drop_name: str = ACCURACY.drop_name,
) -> Study:
    """Create the Optuna study of a stage, or go on with it; its sampler is set later.

    Args:
        storage: The database.
        name: The study's name, without the stage.
        stage: "exploration", "annealing" or "finals".
        bound: The settings that the study stands for, flat.
        cost_name: Name of the second objective, with its unit.
        drop_name: Name of the first.

    Raises:
        StudyMismatch: If the stored study was made with other settings; says which.
    """
    _forget_untried(storage, name, stage, bound)
    study = optuna.create_study(
        study_name=study_name(name, stage),
        storage=storage,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    stored = study.user_attrs.get("config")
    if stored is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([drop_name, cost_name])
        study.set_user_attr("config", dict(bound))
    else:
        check_same(name, stored, bound)
    return study


def _forget_untried(storage: RDBStorage, name: str, stage: str, bound: Mapping[str, Any]) -> None:
    """Remove a study without trials that was made with other settings.

    It binds nobody, and what was made for it (the baseline, the layer table) fits those settings.
    """
    left = load_study(storage, name, stage)
    if left is None or left.get_trials(deepcopy=False):
        return
    # Where it has no settings, another process is just making it.
    stored = left.user_attrs.get("config")
    if stored is not None and _changes(stored, bound):
        optuna.delete_study(study_name=left.study_name, storage=storage)


def _changes(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return differences(stored, json.loads(json.dumps(given)))


def check_same(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a study that stands for other settings.

    Raises:
        StudyMismatch: Naming each setting that differs.
    """
    changed = _changes(stored, given)
    if changed:
        raise StudyMismatch(
            f"Study '{name}' was made with other settings ({'; '.join(changed)}). "
            "Use a new name for a new study, or put the setting back."
        )


def load_study(storage: BaseStorage, name: str, stage: str) -> Study | None:
    """The Optuna study of a stage for reading; None if there is none."""
    try:
        return optuna.load_study(study_name=study_name(name, stage), storage=storage)
    except KeyError:
        return None


def load_stages(storage: BaseStorage, name: str) -> dict[str, Study]:
    """The Optuna studies of both stages by stage, as far as there are any."""
    found = {stage: load_study(storage, name, stage) for stage in STAGES}
    return {stage: one for stage, one in found.items() if one is not None}


def load_all(storage: BaseStorage, name: str) -> dict[str, Study]:
    """The Optuna studies by stage, that of the long fine-tunings last, as far as there are any."""
    finals = load_study(storage, name, FINALS)
    return load_stages(storage, name) | ({} if finals is None else {FINALS: finals})


def settings_in(storage: BaseStorage, name: str) -> dict[str, Any] | None:
    """The settings that a study of a database was last run with; None if there is none."""
    study = load_study(storage, name, "exploration")
    kept = None if study is None else study.user_attrs.get(SETTINGS)
    return None if kept is None else dict(json.loads(kept))


def trials_spent(study: Study) -> list[FrozenTrial]:
    """The trials that count towards the budget: all that ended by themselves."""
    return [trial for trial in counted(study) if trial.state.is_finished()]


def excuse(study: Study, numbers: Sequence[int]) -> None:
    """Take failed trials out of the budget: what made them fail lies outside of the study."""
    study.set_user_attr(EXCUSED, sorted({*study.user_attrs.get(EXCUSED, ()), *numbers}))
