"""Hand out any trial of a study by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from optuna.study import Study
from safetensors.torch import load_file

from autocompress.errors import ConfigError
from autocompress.export import ExportReport, save_model
from autocompress.models import build_model, load_state
from autocompress.objective import LATENCY, find_trial
from autocompress.plan import Plan
from autocompress.profiler import Latency, profile_model
from autocompress.store import StudyFolder, fetch_weights
from autocompress.surgery import build_plan
from autocompress.trials import WEIGHTS


def export_trial(
    folder: StudyFolder,
    studies: Mapping[str, Study],
    label: str,
    target: Path,
    study_folder: Path | None,
) -> ExportReport:
    """Write the network of a trial to a folder.

    Args:
        folder: The study's folder.
        studies: The Optuna studies by stage.
        label: "best", or a trial such as "annealing/7".
        target: The folder to write.
        study_folder: Where the study file's Python modules are looked for.

    Raises:
        ConfigError: If there is no such trial, it has no weights, or its network can only be built
            in Python.
    """
    attrs = studies["exploration"].user_attrs
    origin = attrs.get("origin")
    if origin is None:
        raise ConfigError(
            "The study's network came from Python and can't be built here; use "
            "autocompress.load(folder, model=YourNetwork()) on its best/ folder."
        )
    weights_file = folder.best / "model.safetensors"
    if label == "best":
        if not weights_file.exists():
            raise ConfigError(f"There is no {folder.best}: the study has no winner (yet).")
        plan = Plan.from_json((folder.best / "plan.json").read_text(encoding="utf-8"))
        state = load_file(weights_file)
        stored = json.loads((folder.best / "profile.json").read_text(encoding="utf-8"))
        accuracy, latency = stored["accuracy"], stored["latency"]
    else:
        try:
            trial = find_trial(studies, label)
        except (KeyError, ValueError, IndexError) as error:
            known = ", ".join(f"{stage}/0 to {len(s.trials) - 1}" for stage, s in studies.items())
            raise ConfigError(f"There is no trial {label!r}. Known: best, {known}.") from error
        if WEIGHTS not in trial.user_attrs:
            raise ConfigError(
                f"Trial {label} has no weights: {trial.user_attrs.get('reason', trial.state.name)}."
            )
        plan = Plan.from_json(trial.user_attrs["plan"])
        state = fetch_weights(trial.user_attrs[WEIGHTS], folder.artifact_store())
        accuracy = trial.user_attrs["metrics"]["accuracy"]
        latency = trial.user_attrs.get(LATENCY)
    base = build_model(origin["source"], origin["arguments"], None, study_folder)
    model = build_plan(base, plan)
    load_state(model, state)
    example = tuple(torch.randn(shape) for shape in attrs["input_shapes"])
    return save_model(
        target,
        model.eval(),
        plan,
        origin,
        example,
        replace(
            profile_model(model, example, latency=False),
            accuracy=accuracy,
            latency=None if latency is None else Latency(**latency),
        ),
        images=example,
        classes=tuple(attrs["classes"]),
        normalization=attrs["normalization"],
    )
