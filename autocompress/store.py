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
        return url or f"sqlite:///{self.database.resolve()}"

    def artifact_store(self, exploration: Study) -> ArtifactStore:
        """The study's artifact store: a bucket, or the folder here, which may have been moved.

        Raises:
            ConfigError: If it can't be reached.
        """
        place = str(exploration.user_attrs.get(PLACE, self.artifacts))
        elsewhere = "://" in place or not self.artifacts.exists()
        return open_artifacts(place if elsewhere else str(self.artifacts), writes=False)


def folder_of(config: StudyConfig) -> StudyFolder:
    """The folder of the study with these settings, whether it is there yet or not."""
    return StudyFolder(Path(config.run.out) / config.name)


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
            study.set_metric_names([drop_name, cost_name])
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
