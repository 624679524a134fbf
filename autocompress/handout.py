"""Hand out any trial of a study by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optuna.study import Study
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.card import Facts
from autocompress.config import DEFAULT_FORMATS, StudyConfig
from autocompress.errors import AutocompressError, ConfigError
from autocompress.evaluation import evaluate
from autocompress.export import ExportReport, adopt_dtypes, floating_type, made_up, save_model
from autocompress.formats import INT8_FILE
from autocompress.layermap import layer_rows
from autocompress.models import build_model, load_state
from autocompress.naming import config_of, modules_of, studies_of
from autocompress.objective import LATENCY, find_trial
from autocompress.plan import Plan
from autocompress.profiler import Example, Latency, Profile, profile_model
from autocompress.quantization import Quantizer
from autocompress.sources import task_from_config
from autocompress.store import StudyFolder, folder_of
from autocompress.surgery import build_plan
from autocompress.task import Task
from autocompress.trials import WEIGHTS
from autocompress.usage import usage_of
from autocompress.weights import fetch_weights

CHECKED_IMAGES = 64
"""Validation images on which exported files are compared with the network."""


@dataclass(frozen=True)
class Reading:
    """What was read from a study's data.

    Attributes:
        images: The network's inputs for some validation images, on which files are compared.
        usage: As from `usage.usage_of`.
    """

    images: Example
    usage: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A network of a study that is handed out.

    Attributes:
        plan: How it was compressed.
        state: Its weights.
        score: On the validation data.
        latency: As it was measured in the study; None where it wasn't.
        facts: What its model card tells.
    """

    plan: Plan
    state: Mapping[str, Tensor]
    score: float
    latency: Mapping[str, Any] | None
    facts: Facts


def export_trial(
    study: str | Path,
    trial: str,
    folder: str | Path,
    model: nn.Module | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    images: Tensor | Example | None = None,
) -> ExportReport:
    """Write the network of any trial, as `best/` holds the winner's.

    The same from the command line, for studies whose network is made by name: `python -m
    autocompress.study export`.

    Args:
        study: The study's folder, such as `runs/study`. Where its database has a password, the
            variable AUTOCOMPRESS_STORAGE gives the whole URL.
        trial: "best", or a trial as report and dashboard name it, such as "annealing/7".
        folder: The folder to write; `autocompress.load` reads it.
        model: A fresh instance of the baseline's network, which is not changed. Needed only for a
            network that came from Python.
        formats: Any of `formats.FORMATS`.
        images: Inputs to compare the exported files with the network on, batch first; made-up ones
            if None.

    Returns:
        What was written.

    Raises:
        ConfigError: If there is no such study or trial, it has no weights, its network can't be
            built or isn't `model` compressed, a format is unknown, or `folder` is something else
            than a saved network.

    Examples:
        >>> autocompress.export_trial(
        ...     "runs/study", "annealing/7", "small", model=Net()
        ... )  # doctest: +SKIP
    """
    if not Path(study).is_dir():
        raise ConfigError(f"There is no folder {study}; give a study's, such as runs/study.")
    config = config_of(str(study), {})
    studies = studies_of(config)
    reading = None
    if images is not None:
        real = (images,) if isinstance(images, Tensor) else images
        reading = Reading(real, _usage_told(studies["exploration"].user_attrs))
    return write_trial(
        folder_of(config),
        studies,
        trial,
        Path(folder),
        modules_of(str(study)),
        formats=formats,
        reading=reading,
        model=model,
    )


def write_trial(
    folder: StudyFolder,
    studies: Mapping[str, Study],
    label: str,
    target: Path,
    study_folder: Path | None,
    quantizer: Quantizer | None = None,
    say: Callable[[str], None] = print,
    formats: Sequence[str] = DEFAULT_FORMATS,
    reading: Reading | None = None,
    model: nn.Module | None = None,
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
        formats: Any of `formats.FORMATS`.
        reading: What the study's data tell, see `read_task`; if None, the files are compared on
            made-up inputs.
        model: The baseline's network, whatever its weights, which is not changed; None: built by
            its name.

    Raises:
        ConfigError: If there is no such trial, it has no weights, or its network can't be built.
    """
    attrs = studies["exploration"].user_attrs
    if "origin" not in attrs:
        raise ConfigError("This study has no trial yet, and so no network to write; run it first.")
    origin = attrs["origin"]
    if origin is None and model is None:
        raise ConfigError(
            "The study's network came from Python and can't be built here. In Python, "
            f"autocompress.export_trial({str(folder.path)!r}, {label!r}, {str(target)!r}, "
            "model=YourNetwork()) writes it."
        )
    chosen = _best(folder) if label == "best" else _trial(folder, studies, label)
    network = _network(origin, chosen, label, study_folder, model)
    dtypes = attrs.get("input_dtypes", ())
    example = made_up(attrs["input_shapes"], dtypes, floating_type(network))
    latency = None if chosen.latency is None else Latency(**chosen.latency)
    profile = profile_model(network, example, latency=False)
    usage = _usage_told(attrs) if reading is None else reading.usage
    with TemporaryDirectory() as place:
        int8 = None
        if quantizer is not None:
            int8 = _quantized(quantizer, network, Path(place) / INT8_FILE, say)
        return save_model(
            target,
            network,
            chosen.plan,
            origin,
            example,
            replace(profile, score=chosen.score, latency=latency),
            formats=formats,
            images=None if reading is None else reading.images,
            int8=int8,
            facts=chosen.facts,
            **usage,
        )


def _network(
    origin: Mapping[str, Any] | None,
    chosen: Chosen,
    label: str,
    study_folder: Path | None,
    model: nn.Module | None,
) -> nn.Module:
    """The network that is handed out, with its weights, in evaluation mode.

    Raises:
        ConfigError: If it can't be built.
    """
    base = model
    if base is None:
        assert origin is not None, "one of the two tells what the network is"
        base = build_model(origin["source"], origin["arguments"], None, study_folder)
    network = build_plan(base, chosen.plan).cpu()
    adopt_dtypes(network, chosen.state)
    try:
        load_state(network, chosen.state)
    except RuntimeError as error:
        given = "" if model is None else f" {type(model).__name__} that was given"
        raise ConfigError(
            f"The weights of {label} don't fit the network{given}: {' '.join(str(error).split())}"
        ) from error
    return network.eval()


def _usage_told(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """How the study's images become inputs, and what its network does, by what it tells itself."""
    # Studies of earlier versions tell only the first two.
    return {name: attrs.get(name) for name in ("classes", "normalization", "image", "task")}


def read_task(
    config: StudyConfig,
    studies: Mapping[str, Study],
    study_folder: Path | None,
    say: Callable[[str], None],
) -> Reading | None:
    """What a study's data and task tell of its networks; None if the data can't be read here.

    Args:
        config: The study file.
        studies: The Optuna studies by stage.
        study_folder: Where the study file's Python modules are looked for.
        say: Told why, where they can't.
    """
    normalization = studies["exploration"].user_attrs.get("normalization") or {}
    # The network's own weights don't matter here, and pretrained ones might have to be downloaded;
    # the normalization that comes with them is known.
    untrained = config.model.model_copy(update={"weights": None})
    data = config.data.model_copy(update=dict(normalization))
    run = config.run.model_copy(update={"device": "cpu"})
    own = config.model_copy(update={"model": untrained, "data": data, "run": run})
    try:
        task = task_from_config(own, study_folder)
        return Reading(task.images(CHECKED_IMAGES), usage_of(task))
    except Exception as error:
        # Functions of the user's are called, on a machine that may not be the study's.
        say(
            f"The files are compared on made-up inputs, for the study's data can't be read: {error}"
        )
        return None


def _best(folder: StudyFolder) -> Chosen:
    """The study's winner.

    Raises:
        ConfigError: If it has none.
    """
    weights = folder.best / "model.safetensors"
    if not weights.exists():
        raise ConfigError(f"There is no {folder.best}: the study has no winner (yet).")
    stored = json.loads((folder.best / "profile.json").read_text(encoding="utf-8"))
    facts = Facts()
    if folder.result.exists():
        result = json.loads(folder.result.read_text(encoding="utf-8"))
        facts = Facts(result, result.get("best"))
    return Chosen(
        plan=Plan.from_json((folder.best / "plan.json").read_text(encoding="utf-8")),
        state=load_file(weights),
        score=stored["score"],
        latency=stored["latency"],
        facts=facts,
    )


def _trial(folder: StudyFolder, studies: Mapping[str, Study], label: str) -> Chosen:
    """A trial's network.

    Raises:
        ConfigError: If there is no such trial, or it has no weights.
    """
    try:
        trial = find_trial(studies, label)
    except (KeyError, ValueError, IndexError) as error:
        known = ", ".join(f"{stage}/0 to {len(s.trials) - 1}" for stage, s in studies.items())
        raise ConfigError(f"There is no trial {label!r}. Known: best, {known}.") from error
    attrs = trial.user_attrs
    if WEIGHTS not in attrs:
        raise ConfigError(f"Trial {label} has no weights: {attrs.get('reason', trial.state.name)}.")
    study = studies["exploration"].user_attrs
    stage, _, number = label.partition("/")
    found: dict[str, Any] = {
        "stage": stage,
        "trial": int(number),
        "plan": json.loads(attrs["plan"]),
        "val_score": attrs["metrics"]["score"],
        "val_drop": trial.values[0],
    }
    found["layers"] = layer_rows(study, study["baseline"], found, attrs.get("layer_errors") or {})
    told: dict[str, Any] = {
        "study": studies["exploration"].study_name.removesuffix("-exploration"),
        "metric": study.get("metric"),
        "delta": study["delta"],
        "baseline": {
            "val_score": study["baseline"]["score"],
            "profile": Profile.from_dict(study["baseline"]).to_dict(),
        },
        "config": {"data": {"source": (study.get("config") or {}).get("data.source")}},
    }
    return Chosen(
        plan=Plan.from_json(attrs["plan"]),
        state=fetch_weights(attrs[WEIGHTS], folder.artifact_store(studies["exploration"])),
        score=attrs["metrics"]["score"],
        latency=attrs.get(LATENCY),
        facts=Facts(told, found),
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
    quantizer: Quantizer, model: nn.Module, path: Path, say: Callable[[str], None]
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
