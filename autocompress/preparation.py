"""What a study needs before its first trial: the baseline, the layer table, the search space.

The process that conducts the study makes them, and leaves in database and artifact store all that a
worker needs to make the same from them, on any machine (`joining.py`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study
from safetensors.torch import load_file

from autocompress import __version__
from autocompress.artifacts import fetch_text, save_text, write_text
from autocompress.baseline import Baseline, check_better_than_guessing, train_baseline
from autocompress.channels import ChannelGroup
from autocompress.config import FinetuneConfig, StudyConfig, cache_folder
from autocompress.costs import is_timed
from autocompress.errors import AutocompressError, ConfigError, DamagedArtifact, StudyMismatch
from autocompress.evaluation import Evaluation, drop_bound, evaluate
from autocompress.gates import usual_gate
from autocompress.importance import build_ladders
from autocompress.latency import Deployment, LatencyMeter, describe
from autocompress.layers import LayerSpec, inspect_layers
from autocompress.layertimes import LayerTimes, with_times
from autocompress.loaders import describe_input
from autocompress.manifest import dtype_name
from autocompress.metrics import check_value
from autocompress.models import load_state, portable_state
from autocompress.objective import Bench, timed
from autocompress.observation import Observations, observe_layers
from autocompress.plan import group_to_dict
from autocompress.profiler import Latency, Profile, profile_model
from autocompress.progress import Display
from autocompress.recipes import recipe_of
from autocompress.samplers import reads_rejected_as_complete
from autocompress.scope import bound_table, bound_text, channel_groups, why_refused
from autocompress.sensitivity import LayerTable, build_table
from autocompress.space import SearchSpace
from autocompress.store import StudyFolder
from autocompress.task import Task, unfreeze
from autocompress.training import Recipe, fastest_precision
from autocompress.usage import usage_of
from autocompress.weights import save_weights, state_digest, write_weights

DATA, WEIGHTS = FINGERPRINTS = ("data fingerprint", "weights fingerprint")
"""What binds a study besides its settings, known once data and network are loaded."""
BASELINE = "baseline_weights"
"""User attribute of the exploration: the artifact of the baseline's weights."""
TABLE = "layer_table"
"""User attribute of the exploration: the artifact of the layer table, and a digest of its text."""
TABLE_FORMAT = 4
"""Grows with every change of what the layer table holds: an older one is made anew."""


@dataclass(frozen=True)
class Prepared:
    """All that trials need.

    Attributes:
        bench: The baseline, the data and what was measured of them.
        space: The search space.
        facts: What the report, the dashboard and the export of single trials need to know.
    """

    bench: Bench
    space: SearchSpace
    facts: Mapping[str, Any]


def prepare(
    config: StudyConfig,
    task: Task,
    display: Display,
    folder: StudyFolder,
    study: Study,
    store: ArtifactStore,
    seconds: dict[str, float],
) -> Prepared:
    """Make the baseline, the layer table and the search space, or read what is kept of them.

    Args:
        config: The checked study file.
        task: The user's network and data.
        display: Told about the progress.
        folder: The study's folder.
        study: The exploration.
        store: Where workers find what they need.
        seconds: Seconds by phase; this one's phases are added.

    Raises:
        ConfigError: If the settings don't fit the network or the data.
        StudyMismatch: If what is kept belongs to another network.
    """
    display.say(describe_input(task.train))
    with timed(seconds, "baseline"):
        baseline, example = _make_baseline(config, task, display, folder, study)
        baseline, meter = time_baseline(config, baseline, example, study, display)
    with timed(seconds, "table"):
        table, observations, left_alone = _analyse(
            config, task, baseline, example, meter, folder, study, display
        )
    bench = equip(config, task, baseline, example, meter, observations, store, study, display)
    if bench.int8:
        with timed(seconds, "int8 of the baseline"):
            _check_int8(bench, display)
    space = _space(config, table, baseline, left_alone)
    facts = _facts(config, bench, table, left_alone)
    describe_study(study, facts)
    _publish(study, store, baseline, table)
    return Prepared(bench, space, facts)


def equip(
    config: StudyConfig,
    task: Task,
    baseline: Baseline,
    example: tuple[torch.Tensor, ...],
    meter: LatencyMeter | None,
    observations: Observations,
    store: ArtifactStore,
    exploration: Study,
    display: Display,
) -> Bench:
    """The bench of a study, of which each process that runs its trials has one."""
    return Bench(
        task=task,
        baseline=baseline,
        example=example,
        cache=observations.factor_cache(baseline.model),
        observations=observations,
        finetune=Recipe.from_config(
            config.finetune, gate=usual_gate(task.scale, baseline.val.score, config.delta)
        ),
        delta=config.delta,
        confidence=config.confidence,
        objective=config.objective,
        seed=config.seed,
        store=store,
        identity=exploration.user_attrs["identity"],
        display=display,
        rejected_as_complete=reads_rejected_as_complete(config.search.sampler),
        meter=meter,
        int8=config.search.int8,
        annealed=config.search.stage != "exploration" and config.search.annealing_trials > 0,
        studies={"exploration": exploration},
    )


def search_space(config: StudyConfig, table: LayerTable, profile: Profile) -> SearchSpace:
    """The search space over a layer table that is bounded already."""
    full = replace(profile.cost, ms=table.network_ms)
    return SearchSpace.from_table(table, config.objective, full)


def _make_baseline(
    config: StudyConfig, task: Task, display: Display, folder: StudyFolder, study: Study
) -> tuple[Baseline, tuple[torch.Tensor, ...]]:
    """Train or load the baseline, score it on validation data and profile it."""
    imitates = task.distillation is not None or task.training is not None
    if config.finetune.distillation not in (0, FinetuneConfig().distillation) and not imitates:
        display.say(
            f"finetune.distillation = {config.finetune.distillation:g} has no effect: with a loss "
            "of your own nothing is distilled, unless you give a distillation function, too."
        )
    if unfreeze(task.model):
        display.say("All of the network's parameters were frozen; they are made trainable.")
    precision = study.user_attrs.get("precision")
    if precision is None:
        # A training loop of the user's own sees to its precision itself.
        task.amp_dtype = _first_steps(task) if task.training is None else None
        precision = str(task.amp_dtype or torch.float32).removeprefix("torch.")
        study.set_user_attr("precision", precision)
    task.amp_dtype = torch.bfloat16 if precision == "bfloat16" else None
    digest = _load_baseline(config, task, display, folder, study)
    task.model.eval()
    val = evaluate(task.model, task, task.val)
    check_value(val.metric, val.score, "the baseline on validation data")
    check_better_than_guessing(task, val)
    _check_enough_images(config, val)
    example = task.example()
    profile = profile_model(task.model, example, latency=False)
    profile = replace(profile, score=val.score)
    display.say(
        f"Baseline: {task.scale.value(val.score)} on validation data, "
        f"{profile.params / 1e6:.3f} M params, {profile.macs / 1e6:.1f} M MACs."
    )
    if task.val_seen:
        display.say(
            "The validation images were cut from the training data, which the network's weights "
            "have probably seen: the drop on them is larger than on new images. Give validation "
            "data, or set data.val_from = 'test'."
        )
    return Baseline(task.model, val, profile, digest), example


def time_baseline(
    config: StudyConfig,
    baseline: Baseline,
    example: tuple[torch.Tensor, ...],
    study: Study,
    display: Display,
) -> tuple[Baseline, LatencyMeter | None]:
    """Time the baseline on the runtime of the study file, or take what was measured before.

    Raises:
        ConfigError: If it doesn't run there, and latency is what the study makes small.
        StudyMismatch: If the study timed its trials elsewhere, likewise.
    """
    matters = is_timed(config.objective)
    deployment = Deployment.from_config(config.latency)
    stored = study.user_attrs.get("baseline", {}).get("latency")
    known = None if stored is None else Latency(**stored)
    if known is not None and not deployment.made(known):
        here = f"{describe(deployment)}, on {deployment.device}"
        there = f"{describe(known)}, on {known.device}"
        if matters:
            raise StudyMismatch(
                f"Study '{config.name}' timed its trials on {there}, and this is {here}: such "
                "latencies don't compare. Go on where it began, set latency.threads as they were, "
                "or use a new name."
            )
        display.say(f"The latencies of the trials so far are from {there}; this is {here}.")
        known = None
    try:
        meter = LatencyMeter(baseline.model, example, deployment, known)
    except ConfigError as error:
        if matters:
            raise
        display.say(f"No latency is measured. {error}")
        return baseline, None
    display.say(
        f"Latency of the baseline: {meter.reference.median_ms:.3f} ms (interquartile range "
        f"{meter.reference.iqr_ms:.3f}; {describe(meter.reference)})."
    )
    return replace(baseline, profile=replace(baseline.profile, latency=meter.reference)), meter


def _check_enough_images(config: StudyConfig, val: Evaluation) -> None:
    """Refuse a tolerance that so few validation images can never show to be kept.

    Raises:
        ConfigError: If not even a network that changes no answer would be within delta.
    """
    least = drop_bound(val, val, config.confidence)
    if least > config.delta:
        raise ConfigError(
            f"{val.size} validation images are too few for delta = {config.delta:g} at "
            f"confidence = {config.confidence:g}: even a network that errs on no further image may "
            f"be {val.metric.scale.difference(least)} worse. Give more validation images, a larger "
            "delta, or a smaller confidence (0.5 trusts the measured drop)."
        )


def _check_int8(bench: Bench, display: Display) -> None:
    """Say what int8 alone costs the baseline, whose trials are to be judged in int8.

    Raises:
        ConfigError: If it can't be quantized.
    """
    try:
        drop, bound = bench.judge(bench.baseline.model, bench.baseline.val)
    except AutocompressError as error:
        raise ConfigError(
            f"search.int8 = true judges every trial by its int8 file, and the baseline has none: "
            f"{error} Leave search.int8 out."
        ) from error
    scale = bench.task.scale
    display.say(
        f"The baseline in int8 loses {scale.difference(drop)}, at most {scale.number(bound)}."
    )


def _first_steps(task: Task) -> torch.dtype | None:
    """The precision to train in; the steps that tell it also show that training works at all.

    Raises:
        ConfigError: If it doesn't.
    """
    try:
        return fastest_precision(task)
    except Exception as error:
        raise ConfigError(
            f"The first training step failed with {type(error).__name__}: {error}. Check the "
            "forward pass, the loss and the labels."
        ) from error


def _load_baseline(
    config: StudyConfig, task: Task, display: Display, folder: StudyFolder, study: Study
) -> str:
    """Give the task's network the baseline's weights; the digest of these is bound to the study.

    Raises:
        StudyMismatch: If they are lost, and can't be made again.
    """
    kept = study.user_attrs.get("baseline_digest")
    if kept is not None and folder.baseline.exists():
        load_state(task.model, load_file(folder.baseline))
    else:
        given = config.model.weights is not None or task.origin is None
        train_baseline(task, recipe_of(config, given), config.seed, display)
    digest = state_digest(task.model.state_dict())
    if kept is None:
        write_weights(folder.baseline, portable_state(task.model))
        study.set_user_attr("baseline_digest", digest)
    elif digest != kept:
        raise StudyMismatch(
            f"The baseline of study '{config.name}' has other weights now than its trials were "
            f"measured against. Put {folder.baseline} back, or use a new name."
        )
    return digest


def _analyse(
    config: StudyConfig,
    task: Task,
    baseline: Baseline,
    example: tuple[torch.Tensor, ...],
    meter: LatencyMeter | None,
    folder: StudyFolder,
    study: Study,
    display: Display,
) -> tuple[LayerTable, Observations, dict[str, str]]:
    """Look at the layers and make the layer table, or read it from the study's folder."""
    layers, left_alone = inspect_layers(
        baseline.model, example, include=config.search.include, exclude=config.search.exclude
    )
    key = f"{__version__}/{TABLE_FORMAT}/{study.user_attrs['identity']}/{baseline.digest}"
    table = _stored_table(folder, key, layers)
    groups: tuple[ChannelGroup, ...] = ()
    unfit: dict[str, str] = {}
    if table is None:
        display.stage("layer table", 0)
        groups, readers, unfit = channel_groups(
            baseline.model, example, layers, left_alone, config.search
        )
    else:
        readers = table.others
    observations = observe_layers(baseline.model, task, (*layers, *readers), seed=config.seed)
    if table is None:
        cache = observations.factor_cache(baseline.model)
        start = time.perf_counter()
        table = build_table(baseline.model, layers, cache, observations, config.search.transforms)
        table = replace(table, others=readers, refused_groups=unfit)
        if groups:
            importance = config.search.importance
            ladders = build_ladders(baseline.model, task, groups, observations, importance)
            table = replace(table, ladders=ladders)
        if is_timed(config.objective) and meter is not None:
            display.say(f"Timing the layers on {meter.deployment.name} ...")
            kept = LayerTimes(meter.deployment, cache_folder() / "layer-times")
            table = with_times(table, kept, meter.runner)
        write_text(folder.table, json.dumps({"key": key, "table": table.to_json()}))
        rows = sum(len(choices) for choices in table.choices.values())
        display.say(
            f"Layer table: {rows} choices for {len(table.choices)} layers"
            + (f", keep-counts for {len(table.ladders)} channel groups" if table.ladders else "")
            + f" in {time.perf_counter() - start:.1f} s."
        )
    for name in table.refused:
        if name not in table.choices:
            left_alone[name] = why_refused(table.refused[name].values())
    table, emptied = bound_table(table, config.search.bounds or ())
    left_alone |= emptied
    return table, observations, left_alone


def _stored_table(folder: StudyFolder, key: str, layers: Sequence[LayerSpec]) -> LayerTable | None:
    if not folder.table.exists():
        return None
    stored = json.loads(folder.table.read_text(encoding="utf-8"))
    if stored["key"] != key:
        return None
    table = LayerTable.from_json(stored["table"])
    return table if table.layers == tuple(layers) else None


def _facts(
    config: StudyConfig,
    bench: Bench,
    table: LayerTable,
    left_alone: Mapping[str, str],
) -> dict[str, Any]:
    """What the report, the dashboard and the export of single trials need to know."""
    task, baseline = bench.task, bench.baseline
    return {
        "baseline": {"score": baseline.val.score, **baseline.profile.to_dict()},
        "layers": [asdict(layer) for layer in table.layers],
        "left_alone": dict(left_alone),
        "groups": {name: group_to_dict(ladder.group) for name, ladder in table.ladders.items()},
        "left_groups": dict(table.refused_groups),
        "bounds": {
            layer.name: bound_text(layer.name, config.search.bounds or ()) for layer in table.layers
        },
        "delta": config.delta,
        "metric": task.scale.to_dict(),
        "objective": config.objective,
        "origin": dict(task.origin) if task.origin is not None else None,
        "input_shapes": [list(value.shape) for value in bench.example],
        "input_dtypes": [dtype_name(value) for value in bench.example],
        **usage_of(task),
    }


def describe_study(study: Study, facts: Mapping[str, Any]) -> None:
    """Put facts on the study, once."""
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)


def _space(
    config: StudyConfig,
    table: LayerTable,
    baseline: Baseline,
    left_alone: Mapping[str, str],
) -> SearchSpace:
    """The search space.

    Raises:
        ConfigError: If there is nothing in it.
    """
    space = search_space(config, table, baseline.profile)
    if not space.empty:
        return space
    # One layer for each reason: a network may have hundreds.
    examples = {why: name for name, why in reversed([*left_alone.items()])}
    reasons = "; ".join(f"{name}: {why}" for why, name in reversed([*examples.items()]))
    if table.choices and config.objective == "latency":
        reasons = "No choice takes less time than its layer; objective = 'macs' doesn't ask"
    raise ConfigError(
        "No layer of this network can be transformed by search.transforms, and no channels "
        "can be removed, within search.include, search.exclude and search.bounds. "
        f"{reasons}."
    )


def _publish(study: Study, store: ArtifactStore, baseline: Baseline, table: LayerTable) -> None:
    """Put the baseline's weights and the layer table where workers find them, once."""
    if BASELINE not in study.user_attrs:
        study.set_user_attr(BASELINE, save_weights(baseline.model, study, store))
    text = json.dumps(table.to_json())
    kept = study.user_attrs.get(TABLE)
    if kept is not None and kept["digest"] == table_digest(text):
        with suppress(DamagedArtifact):
            if fetch_text(kept["artifact"], store) == text:
                return
    artifact = save_text(text, "table.json", study, store)
    study.set_user_attr(TABLE, {"artifact": artifact, "digest": table_digest(text)})


def table_digest(text: str) -> str:
    """12 hex digits that identify a layer table, as JSON."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
