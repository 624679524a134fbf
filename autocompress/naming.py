"""Which study a command line means: its settings, its folder, its stages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study

from autocompress.config import StudyConfig, flatten, load_config, parse_config, ready_folder
from autocompress.database import hide_password, open_storage
from autocompress.errors import ConfigError
from autocompress.process import STORAGE_VARIABLE
from autocompress.store import StudyFolder, folder_of, load_stages, settings_in


def config_of(study: str | None, overrides: Mapping[str, Any]) -> StudyConfig:
    """The checked settings of a study file, of a ready study or of a study's folder.

    Args:
        study: What the command line names; None: the quickstart.
        overrides: Settings in place of those, by dotted key; None leaves one as it is.

    Raises:
        ConfigError: If there is no such file or folder, or a setting is wrong.
    """
    if study is None or not Path(study).is_dir():
        return load_config(study, overrides)
    stored = StudyFolder(Path(study)).config
    if not stored.exists():
        raise ConfigError(f"{study} is no study's folder: there is no study.json in it.")
    given = {key: value for key, value in overrides.items() if value is not None}
    config = _stored(stored, given)
    if "run.out" not in given:
        out = str(_out_of(Path(study), config.name))
        config = config.model_copy(update={"run": config.run.model_copy(update={"out": out})})
    if ":***@" not in str(config.run.storage):
        return config
    whole = os.environ.get(STORAGE_VARIABLE)
    if whole is None or hide_password(whole) != config.run.storage:
        raise ConfigError(
            f"The study in {study} is in the database {config.run.storage}, whose password is not "
            f"kept in files; give --storage with the whole URL, or the variable {STORAGE_VARIABLE}."
        )
    run = config.run.model_copy(update={"storage": whole})
    return config.model_copy(update={"run": run})


def _out_of(folder: Path, name: str) -> Path:
    """The folder in which a study's folder is.

    Raises:
        ConfigError: If its folder isn't called as it is: another study's may be, there.
    """
    for place in (folder.absolute(), folder.resolve()):
        if place.name == name:
            return place.parent
    raise ConfigError(
        f"{folder} holds the study '{name}', and a study's folder must be called as it is. Call it "
        f"{name} again; several of one name need folders of their own around them, as run.out."
    )


def begun_config(study: str | None, storage: str | None, out: str | None) -> StudyConfig:
    """The settings that a study was last run with, which the command line may have changed.

    They are in the study's folder, or where that is not here in the database.

    Args:
        study: What the command line names, or the study's name in the database.
        storage: The database's URL; None: the environment's, or the study file's.
        out: The folder in which studies' folders are; None: the study file's.

    Raises:
        ConfigError: As `config_of`, if the database doesn't know the study either.
    """
    url = storage or os.environ.get(STORAGE_VARIABLE)
    try:
        config = config_of(study, {"run.storage": storage, "run.out": out})
    except ConfigError:
        if study is None or url is None or Path(study).exists():
            raise
        kept = settings_in(open_storage(url), study)
        if kept is None:
            raise
        return parse_config(
            flatten(kept) | {"run.storage": url} | ({"run.out": out} if out else {})
        )
    places = {"run.storage": config.run.storage, "run.out": config.run.out}
    stored = folder_of(config).config
    return _stored(stored, places) if stored.exists() else config


def _stored(path: Path, changes: Mapping[str, Any]) -> StudyConfig:
    """The settings that a study was last run with, and changes of them."""
    return parse_config({**flatten(json.loads(path.read_text(encoding="utf-8"))), **changes})


def modules_of(study: str | None) -> Path | None:
    """Where modules of the user are looked for: beside the study file, a ready one's too; for a
    study's folder beside the file that it was run from."""
    if study is None:
        return None
    if Path(study).is_dir():
        return StudyFolder(Path(study)).modules or ready_folder()
    return Path(study).absolute().parent if Path(study).is_file() else ready_folder()


def studies_of(config: StudyConfig) -> dict[str, Study]:
    """The stages of a study that has begun, for reading.

    Raises:
        ConfigError: If it has not begun, or the database can't be opened.
    """
    folder = folder_of(config)
    if config.run.storage is None and not folder.database.exists():
        raise ConfigError(
            f"Study '{config.name}' has not begun: there is no {folder.database}. Run it first, or "
            "give --out or --storage."
        )
    present = load_stages(open_storage(folder.storage_url(config.run.storage)), config.name)
    if not present:
        raise ConfigError(f"Study '{config.name}' has not begun; run it first.")
    return present
