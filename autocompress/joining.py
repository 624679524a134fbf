"""Join a study from its database alone: what a worker needs, on this machine or another one.

The study file, the baseline's weights and the layer table come from the database and the artifact
store; only the data must be here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study

from autocompress.artifacts import fetch_text, open_artifacts
from autocompress.baseline import Baseline
from autocompress.config import StudyConfig, flatten, own_code, parse_config
from autocompress.database import open_storage
from autocompress.errors import ConfigError, DamagedArtifact, StudyMismatch
from autocompress.evaluation import evaluate
from autocompress.models import PRETRAINED, load_state
from autocompress.observation import observe_layers
from autocompress.preparation import (
    BASELINE,
    DATA,
    TABLE,
    Prepared,
    equip,
    search_space,
    table_digest,
    time_baseline,
)
from autocompress.probe import settle
from autocompress.profiler import Profile
from autocompress.progress import Display, NullDisplay
from autocompress.sensitivity import LayerTable
from autocompress.sources import task_from_config
from autocompress.store import PLACE, SETTINGS, load_study
from autocompress.task import Task, unfreeze
from autocompress.weights import fetch_weights


@dataclass(frozen=True)
class Place:
    """A machine on which a study's trials are to run, and what is different there.

    Attributes:
        url: The database's URL.
        study: The study's name.
        workers: How many processes, "auto", or 0 for this one.
        device: "cpu", "cuda", "cuda:1" or "auto".
        data_root: The data's folder; None: as in the study.
        data_source: The data; None likewise.
        artifacts: Where the artifacts are; None likewise.
        code: The folder of the user's own modules, which may run here then.
        patience: Seconds without a trial, after which a worker ends.
        launcher: What starts the workers; None: as in the study.
        options: Its options.
    """

    url: str
    study: str
    workers: int | str | None = "auto"
    device: str = "auto"
    data_root: str | None = None
    data_source: str | None = None
    artifacts: str | None = None
    code: Path | None = None
    patience: float = 3600.0
    launcher: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that are others there, by dotted key."""
        changes = {
            "data.root": self.data_root,
            "data.source": self.data_source,
            "run.artifacts": self.artifacts,
            "run.device": self.device,
            "run.workers": self.workers,
            "run.launcher": self.launcher,
            "run.launcher_options": dict(self.options) or None,
        }
        return {key: value for key, value in changes.items() if value is not None}

    def command(self, device: str) -> list[str]:
        """The command of one worker process, without the database's URL."""
        argv = [sys.executable, "-m", "autocompress.study", "worker", "--child"]
        options = {
            "--study": self.study,
            "--device": device,
            "--data-root": self.data_root,
            "--data-source": self.data_source,
            "--artifacts": self.artifacts,
            "--code": self.code,
            "--patience": self.patience / 60,
        }
        for option, value in options.items():
            if value is not None:
                argv += [option, str(value)]
        return argv


def read_settings(place: Place, waits: bool = False) -> tuple[StudyConfig, Study]:
    """The study file and the exploration of a study, from its database.

    Raises:
        ConfigError: If there is no such study, or it has not begun to search; or if it names code
            and `code` doesn't say that this may run.
    """
    study = load_study(open_storage(place.url, waits=waits), place.study, "exploration")
    settings = None if study is None else study.user_attrs.get(SETTINGS)
    if study is None or settings is None or TABLE not in study.user_attrs:
        raise ConfigError(
            f"Study '{place.study}' of this database has not begun to search yet. Start it first: "
            "python -m autocompress.study my.toml --storage URL."
        )
    # Where the artifacts are, the study says itself: the settings' folder is relative to another.
    known = flatten(json.loads(settings)) | {"run.storage": None, "run.artifacts": None}
    facts = study.user_attrs
    if known.get("model.weights") == PRETRAINED and known.get("data.mean") is None:
        # What the library's weights asked for, which are not loaded here.
        known |= {f"data.{key}": list(facts["normalization"][key]) for key in ("mean", "std")}
    threads = (facts["baseline"].get("latency") or {}).get("threads")
    config = parse_config(
        known | {"model.weights": None, "latency.threads": threads} | place.overrides
    )
    _check_code(config, place.code)
    return config, study


def _check_code(config: StudyConfig, code: Path | None) -> None:
    """Let no database choose which code runs here.

    Raises:
        ConfigError: If the study names functions and no folder of code was given.
    """
    own = own_code(config)
    if own and code is None:
        raise ConfigError(
            f"Study '{config.name}' runs code of its own ({', '.join(own)}). If you trust it, name "
            "the folder in which that code is on this machine: --code FOLDER."
        )


def join(config: StudyConfig, study: Study, display: Display, code: Path | None = None) -> Prepared:
    """Make what the study's trials need.

    Args:
        config: As `read_settings` gave it.
        study: Likewise.
        display: Told about the progress.
        code: The folder of the user's own modules.

    Raises:
        ConfigError: If network or data can't be had here.
        StudyMismatch: If the data here is another.
        DamagedArtifact: If weights or table can't be read from the artifact store.
    """
    facts = study.user_attrs
    store = open_artifacts(config.run.artifacts or facts[PLACE])
    task = task_from_config(config, code)
    if task.fingerprint != facts["config"][DATA]:
        raise StudyMismatch(
            f"The data here is not that of study '{config.name}' (fingerprint {task.fingerprint}, "
            f"expected {facts['config'][DATA]}). Give the same data: --data-root FOLDER."
        )
    task.amp_dtype = torch.bfloat16 if facts["precision"] == "bfloat16" else None
    unfreeze(task.model)
    baseline, example = _baseline(task, study, store)
    # What it says of the latency was said when the study began.
    baseline, meter = time_baseline(config, baseline, example, study, NullDisplay())
    table = _table(facts[TABLE], store)
    observations = observe_layers(
        baseline.model, task, (*table.layers, *table.others), seed=config.seed
    )
    bench = equip(config, task, baseline, example, meter, observations, store, study, display)
    space = search_space(config, table, baseline.profile)
    bench.finetune = settle(bench, space, config.finetune, study)
    return Prepared(bench, space, {})


def _table(kept: Mapping[str, Any], store: ArtifactStore) -> LayerTable:
    text = fetch_text(kept["artifact"], store)
    if table_digest(text) != kept["digest"]:
        raise DamagedArtifact(
            f"The layer table in artifact {kept['artifact']} is damaged. Run the study's own "
            "command again, which makes it anew."
        )
    return LayerTable.from_json(json.loads(text))


def _baseline(
    task: Task, study: Study, store: ArtifactStore
) -> tuple[Baseline, tuple[torch.Tensor, ...]]:
    """The baseline with the weights and the costs that the study has, scored here."""
    facts = study.user_attrs
    load_state(task.model, fetch_weights(facts[BASELINE], store))
    task.model.to(task.device).eval()
    val = evaluate(task.model, task, task.val)
    profile = Profile.from_dict(facts["baseline"])
    return Baseline(task.model, val, profile, facts["baseline_digest"]), task.example()
