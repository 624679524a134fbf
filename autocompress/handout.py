"""Hand out any trial of a study by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from optuna.study import Study
from safetensors.torch import load_file

from autocompress.config import StudyConfig
from autocompress.errors import AutocompressError, ConfigError
from autocompress.evaluation import evaluate
from autocompress.export import INT8_FILE, ExportReport, save_model
from autocompress.models import build_model, load_state
from autocompress.objective import LATENCY, find_trial
from autocompress.plan import Plan
from autocompress.profiler import Latency, profile_model
from autocompress.quantization import Quantizer
from autocompress.store import StudyFolder
from autocompress.surgery import build_plan
from autocompress.task import Task
from autocompress.trials import WEIGHTS
from autocompress.weights import fetch_weights


def export_trial(
    folder: StudyFolder,
    studies: Mapping[str, Study],
    label: str,
    target: Path,
    study_folder: Path | None,
    quantizer: Quantizer | None = None,
    say: Callable[[str], None] = print,
) -> ExportReport:
    """Write the network of a trial to a folder.

    Args:
        folder: The study's folder.
        studies: The Optuna studies by stage.
        label: "best", or a trial such as "annealing/7".
        target: The folder to write.
        study_folder: Where the study file's Python modules are looked for.
        quantizer: Adds an int8 file, whatever it loses; None for none. It is rounded only: a study
            with `int8 = true` fine-tunes its winner where it must.
        say: Told about the int8 file.

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
        score, latency = stored["score"], stored["latency"]
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
        state = fetch_weights(
            trial.user_attrs[WEIGHTS], folder.artifact_store(studies["exploration"])
        )
        score = trial.user_attrs["metrics"]["score"]
        latency = trial.user_attrs.get(LATENCY)
    base = build_model(origin["source"], origin["arguments"], None, study_folder)
    model = build_plan(base, plan)
    load_state(model, state)
    example = tuple(torch.randn(shape) for shape in attrs["input_shapes"])
    with TemporaryDirectory() as place:
        int8 = None
        if quantizer is not None:
            int8 = _quantized(quantizer, model.eval(), Path(place) / INT8_FILE, say)
        return save_model(
            target,
            model.eval(),
            plan,
            origin,
            example,
            replace(
                profile_model(model, example, latency=False),
                score=score,
                latency=None if latency is None else Latency(**latency),
            ),
            images=example,
            classes=tuple(attrs["classes"]),
            normalization=attrs["normalization"],
            int8=int8,
        )


def quantizer_of(config: StudyConfig, folder: StudyFolder, task: Task) -> Quantizer:
    """What makes int8 files of a study's networks and measures them against its baseline.

    Args:
        config: The study file.
        folder: The study's folder; it holds the baseline's weights.
        task: Network and data of the study.

    Raises:
        ConfigError: If the baseline's weights are not there.
    """
    if not folder.baseline.exists():
        raise ConfigError(
            f"There is no {folder.baseline}, which drops refer to; run the study first."
        )
    load_state(task.model, load_file(folder.baseline))
    task.model.to(task.device).eval()
    before = evaluate(task.model, task, task.val)
    return Quantizer(task, before, task.example(), config.delta, config.confidence)


def _quantized(
    quantizer: Quantizer, model: torch.nn.Module, path: Path, say: Callable[[str], None]
) -> Path | None:
    """The int8 file of a network; None where it can't be made, which costs no other file."""
    try:
        found, _ = quantizer.best(model, path, say)
    except AutocompressError as error:
        say(f"{INT8_FILE} was not written: {error}")
        return None
    if found.bound > quantizer.delta:
        say(
            f"{INT8_FILE} is not within the study's delta of {quantizer.delta:g}. A study with "
            "int8 = true fine-tunes its winner with the rounding in place."
        )
    return path
