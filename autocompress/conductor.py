"""The whole study in order: baseline, layer table, exploration, annealing, selection, report.

Everything that is worth keeping is written the moment it exists, so the same call goes on where an
interrupted one ended.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file
from torch import nn

from autocompress import __version__
from autocompress.annealing import AnnealingSampler, Parent
from autocompress.artifacts import portable_state, state_digest, write_text, write_weights
from autocompress.baseline import Baseline, check_better_than_guessing, train_baseline
from autocompress.channels import ChannelGroup
from autocompress.config import StudyConfig, bound_settings, cache_folder
from autocompress.dashboard import annotate
from autocompress.database import hide_password, open_storage
from autocompress.errors import AutocompressError, ConfigError, StudyMismatch
from autocompress.evaluation import Evaluation, drop_bound, evaluate
from autocompress.finals import rehearse
from autocompress.importance import build_ladders
from autocompress.latency import Deployment, LatencyMeter, describe
from autocompress.layers import LayerSpec, inspect_layers
from autocompress.layertimes import LayerTimes, with_times
from autocompress.models import load_state
from autocompress.objective import Bench, best_so_far, find_trial, run_trial
from autocompress.observation import observe_layers
from autocompress.outlook import EPOCHS, NEARLY, REHEARSAL, annealing_epochs, rehearsal_of
from autocompress.plan import Plan, group_to_dict
from autocompress.probe import settle
from autocompress.profiler import Latency, profile_model
from autocompress.progress import Display
from autocompress.report import write_report
from autocompress.samplers import make_sampler, reads_rejected_as_complete
from autocompress.scope import (
    bound_table,
    bound_text,
    channel_groups,
    check_names,
    why_refused,
)
from autocompress.selection import conclude, timed
from autocompress.sensitivity import LayerTable, build_table
from autocompress.space import SearchSpace
from autocompress.store import (
    StudyFolder,
    bury_interrupted,
    check_same,
    excuse,
    load_study,
    open_study,
    trials_spent,
)
from autocompress.surgery import build_plan
from autocompress.task import Task, check_outputs
from autocompress.training import Recipe, fastest_precision
from autocompress.trials import has_weights, violation, within_delta

COST_NAMES = {
    "params": "parameters",
    "size": "size (bytes)",
    "macs": "MACs",
    "latency": "latency (ms)",
    "params+macs": "parameters and MACs (mean share, %)",
}
DATA, WEIGHTS = FINGERPRINTS = ("data fingerprint", "weights fingerprint")
"""What binds a study besides its settings, known once data and network are loaded."""
TABLE_FORMAT = 4
"""Grows with every change of what the layer table holds: an older one is made anew."""
MAX_PARENTS = 4
"""How many of the exploration's trials annealing may start from."""
REHEARSED_FROM = 6
"""Trials of an annealing from which on it is worth a long fine-tuning to learn what these may lose.
With fewer, too few come after it."""
REHEARSED_AFTER = 4
"""It is done after one in so many of its trials."""
MAX_FAILURES = 5
"""A study in which this many trials in a row fail has a fault that no further trial will cure."""


@dataclass(frozen=True)
class Outcome:
    """What a study came to.

    Attributes:
        model: The compressed network, in evaluation mode; None if no trial met delta.
        plan: What was done to each layer; None likewise.
        summary: The content of `result.json`.
        folder: Where everything is.
    """

    model: nn.Module | None
    plan: Plan | None
    summary: Mapping[str, Any]
    folder: Path

    @property
    def met(self) -> bool:
        """Whether a network within delta was found."""
        return self.model is not None


def check_places(config: StudyConfig) -> None:
    """Refuse a folder, a database or a stored study that a run can't use, before data is loaded.

    Raises:
        ConfigError: If the folder can't be written, another process runs the study, the database
            can't be opened, or the runtime to measure the latency on is not here.
        StudyMismatch: If the stored study was made with other settings.
    """
    Deployment.from_config(config.latency)
    folder = StudyFolder(Path(config.run.out) / config.name)
    folder.create()
    url = config.run.storage
    if url is None and not folder.database.exists():
        return
    with folder.lock():
        stored = load_study(open_storage(folder.storage_url(url)), config.name, "exploration")
        if stored is not None and stored.get_trials(deepcopy=False):
            settings = stored.user_attrs["config"]
            known = {k: v for k, v in settings.items() if k not in FINGERPRINTS}
            check_same(config.name, known, bound_settings(config))


def run_study(config: StudyConfig, task: Task, display: Display, command: str = "") -> Outcome:
    """Compress the task's network as the study file says, or go on with it.

    Args:
        config: The checked study file.
        task: The user's network and data.
        display: Told about the progress.
        command: How this was called, for the report.

    Raises:
        ConfigError: If the settings don't fit the data, or another process runs the study.
        StudyMismatch: If the stored study was made with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task.model.to(task.device)
    check_names(task.model, config.search)
    check_outputs(task)
    folder = StudyFolder(Path(config.run.out) / config.name)
    folder.create()
    with folder.lock(), _log_to(folder.log):
        url = config.run.storage
        storage = open_storage(folder.storage_url(url))
        if url is not None:
            # From here on the settings are written to files.
            run = config.run.model_copy(update={"storage": hide_password(url)})
            config = config.model_copy(update={"run": run})
            command = command.replace(url, hide_password(url))
        return _run(config, task, display, folder, storage, command)


def _run(
    config: StudyConfig,
    task: Task,
    display: Display,
    folder: StudyFolder,
    storage: optuna.storages.RDBStorage,
    command: str,
) -> Outcome:
    seconds: dict[str, float] = {}
    bound = {
        **bound_settings(config),
        DATA: task.fingerprint,
        WEIGHTS: state_digest(task.model.state_dict()),
    }
    exploration = open_study(
        storage, config.name, "exploration", bound=bound, cost_name=COST_NAMES[config.objective]
    )
    identity = folder.claim(exploration)
    if config.search.stage == "annealing" and not trials_spent(exploration):
        raise ConfigError(
            "search.stage = 'annealing' goes on from an exploration, and this study has none yet; "
            "run search.stage = 'exploration' or 'both' first."
        )
    write_text(folder.config, config.model_dump_json(indent=1))
    with timed(seconds, "baseline"):
        baseline, example = _prepare(config, task, display, folder, exploration)
        baseline, meter = _time_baseline(config, baseline, example, exploration, display)
    with timed(seconds, "table"):
        bench, table, left_alone = _analyse(
            config, task, baseline, example, meter, folder, identity, display
        )
    if bench.int8:
        with timed(seconds, "int8 of the baseline"):
            _check_int8(bench, display)
    full = replace(baseline.profile.cost, ms=table.network_ms)
    space = SearchSpace.from_table(table, config.objective, full)
    if space.empty:
        # One layer for each reason: a network may have hundreds.
        examples = {why: name for name, why in reversed(left_alone.items())}
        reasons = "; ".join(f"{name}: {why}" for why, name in reversed(examples.items()))
        if table.choices and config.objective == "latency":
            reasons = "No choice takes less time than its layer; objective = 'macs' doesn't ask"
        raise ConfigError(
            "No layer of this network can be transformed by search.transforms, and no channels "
            "can be removed, within search.include, search.exclude and search.bounds. "
            f"{reasons}."
        )

    facts = _facts(config, bench, table, left_alone)
    _describe(exploration, facts)
    bench.studies["exploration"] = exploration
    with timed(seconds, "probe"):
        bench.finetune = settle(bench, space, config.finetune, exploration)
    exploration.sampler = make_sampler(
        config.search.sampler,
        space,
        config.seed,
        len(exploration.get_trials(deepcopy=False)),
        config.search.trials,
        partial(bench.outlook.shortfall, "exploration"),
    )
    _bury(exploration, "exploration", display)
    if config.search.stage != "annealing":
        later = 0.0
        if config.search.stage == "both":
            length = annealing_length(bench.finetune, config.search.annealing_trials)
            later = length / max(bench.finetune.epochs, 0.1)
        _run_stage(bench, "exploration", space, config, display, later)
    annealing = load_study(storage, config.name, "annealing")
    if annealing is not None:
        bench.studies["annealing"] = annealing
    if bench.annealed:
        annealing = _anneal(bench, config, space, bound, facts, storage, folder, display)
    seconds["exploration"] = _spent(exploration)
    seconds["annealing"] = _spent(annealing) if annealing is not None else 0.0
    rehearsal = rehearsal_of(bench.studies)
    if rehearsal is not None:
        seconds["rehearsal"] = rehearsal["seconds"]
    summary = conclude(config, bench, folder, display, seconds, command)
    for study in bench.studies.values():
        annotate(study)
    write_report(summary, exploration, annealing, folder.report)
    display.say(f"Report: {folder.report}")
    return _outcome(summary, bench, folder)


def _prepare(
    config: StudyConfig, task: Task, display: Display, folder: StudyFolder, study: Study
) -> tuple[Baseline, tuple[torch.Tensor, ...]]:
    """Train or load the baseline, score it on validation data and profile it."""
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        task.model.requires_grad_(True)
        display.say("All of the network's parameters were frozen; they are made trainable.")
    precision = study.user_attrs.get("precision")
    if precision is None:
        task.amp_dtype = _first_steps(task)
        precision = str(task.amp_dtype or torch.float32).removeprefix("torch.")
        study.set_user_attr("precision", precision)
    task.amp_dtype = torch.bfloat16 if precision == "bfloat16" else None
    digest = _make_baseline(config, task, display, folder, study)
    task.model.eval()
    val = evaluate(task.model, task, task.val)
    check_better_than_guessing(task, val)
    _check_enough_images(config, val)
    example = task.example()
    profile = profile_model(task.model, example, latency=False)
    profile = replace(profile, accuracy=val.accuracy)
    display.say(
        f"Baseline: {val.accuracy:.2f} % on validation data, {profile.params / 1e6:.3f} M params, "
        f"{profile.macs / 1e6:.1f} M MACs."
    )
    if task.val_seen:
        display.say(
            "The validation images were cut from the training data, which the network's weights "
            "have probably seen: the drop on them is larger than on new images. Give validation "
            "data, or set data.val_from = 'test'."
        )
    return Baseline(task.model, val, profile, digest), example


def _time_baseline(
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
    matters = config.objective == "latency"
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
            f"{len(val.scores)} validation images are too few for delta = {config.delta:g} at "
            f"confidence = {config.confidence:g}: even a network that errs on no further image may "
            f"be {least:.2f} points worse. Give more validation images, a larger delta, or a "
            "smaller confidence (0.5 trusts the measured drop)."
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
    display.say(f"The baseline in int8 loses {drop:.2f} points, at most {bound:.2f}.")


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


def _make_baseline(
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
        epochs = config.baseline.epochs
        if epochs is None:
            epochs = 0.0 if config.model.weights is not None or task.origin is None else 10.0
        train_baseline(task, config.baseline, epochs, config.seed, display)
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
    identity: str,
    display: Display,
) -> tuple[Bench, LayerTable, dict[str, str]]:
    """Look at the layers and make the layer table, or read it from the study's folder."""
    layers, left_alone = inspect_layers(
        baseline.model, example, include=config.search.include, exclude=config.search.exclude
    )
    key = f"{__version__}/{TABLE_FORMAT}/{identity}/{baseline.digest}"
    table = _stored_table(folder, key, layers)
    groups: tuple[ChannelGroup, ...] = ()
    unfit: dict[str, str] = {}
    if table is None:
        groups, readers, unfit = channel_groups(
            baseline.model, example, layers, left_alone, config.search
        )
    else:
        readers = table.others
    observations = observe_layers(baseline.model, task, (*layers, *readers), seed=config.seed)
    cache = observations.factor_cache(baseline.model)
    if table is None:
        start = time.perf_counter()
        table = build_table(baseline.model, layers, cache, observations, config.search.transforms)
        table = replace(table, others=readers, refused_groups=unfit)
        if groups:
            importance = config.search.importance
            ladders = build_ladders(baseline.model, task, groups, observations, importance)
            table = replace(table, ladders=ladders)
        if config.objective == "latency" and meter is not None:
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
    bench = Bench(
        task=task,
        baseline=baseline,
        example=example,
        cache=cache,
        observations=observations,
        finetune=Recipe.from_config(config.finetune),
        delta=config.delta,
        confidence=config.confidence,
        objective=config.objective,
        seed=config.seed,
        store=folder.artifact_store(),
        identity=identity,
        display=display,
        rejected_as_complete=reads_rejected_as_complete(config.search.sampler),
        meter=meter,
        int8=config.search.int8,
        annealed=config.search.stage != "exploration" and config.search.annealing_trials > 0,
    )
    return bench, table, left_alone


def _stored_table(folder: StudyFolder, key: str, layers: Sequence[LayerSpec]) -> LayerTable | None:
    if not folder.table.exists():
        return None
    stored = json.loads(folder.table.read_text(encoding="utf-8"))
    if stored["key"] != key:
        return None
    table = LayerTable.from_json(stored["table"])
    return table if table.layers == tuple(layers) else None


def _run_stage(
    bench: Bench,
    stage: str,
    space: SearchSpace,
    config: StudyConfig,
    display: Display,
    later: float = 0.0,
    between: Callable[[int], bool] = lambda spent: False,
) -> None:
    """Run trials until exactly as many as planned have ended by themselves.

    Before each, `between` is told how many have, and says whether it used the display meanwhile.
    """
    study = bench.studies[stage]
    planned = {
        "exploration": config.search.trials,
        "annealing": config.search.annealing_trials,
    }
    total = planned[stage]
    # The winner's fine-tuning, with two seeds, counts as the trials that would take as long.
    later += 2 * bench.finetune.final_epochs / max(bench.epochs(stage), 0.1)

    def announce() -> None:
        display.stage(
            stage,
            total,
            len(trials_spent(study)),
            delta=bench.delta,
            objective=bench.objective,
            best=best_so_far(bench),
            later=later,
        )

    announce()
    failed: list[FrozenTrial] = []
    while (spent := len(trials_spent(study))) < total:
        if between(spent):
            announce()
        ended = run_trial(bench, stage, space)
        failed = [*failed, ended] if ended.state == TrialState.FAIL else []
        hopeless = len(failed) == total and stage == "exploration"
        if hopeless or len(failed) >= MAX_FAILURES:
            excuse(study, [trial.number for trial in failed])
            raise AutocompressError(
                f"{len(failed)} trials of the {stage} failed one after the other, the last with: "
                f"{ended.user_attrs.get('reason')}. They don't count: mend the cause and run the "
                "same command again."
            )


def _anneal(
    bench: Bench,
    config: StudyConfig,
    space: SearchSpace,
    bound: Mapping[str, Any],
    facts: Mapping[str, Any],
    storage: optuna.storages.RDBStorage,
    folder: StudyFolder,
    display: Display,
) -> Study | None:
    """The second study: narrower, seeded from the exploration's best, with their weights."""
    exploration = bench.studies["exploration"]
    parents = _parents(exploration, bench)
    stored = load_study(storage, config.name, "annealing")
    if stored is not None and "parents" in stored.user_attrs:
        # The space stays what it was when the study began.
        parents = [find_trial(bench.studies, label) for label in stored.user_attrs["parents"]]
    if not parents:
        display.say("No trial of the exploration can be annealed: none was fine-tuned.")
        return None
    plans = [Plan.from_json(parent.user_attrs["plan"]) for parent in parents]
    # With channels to remove, each child has a space of its own: it depends on those that remain.
    narrowed = space if space.width is not None else space.narrow(plans, band=0.5)
    annealing = open_study(
        storage, config.name, "annealing", bound=bound, cost_name=COST_NAMES[config.objective]
    )
    if EPOCHS not in annealing.user_attrs:
        # As final_epochs may change later, and the trials of one study must be alike.
        annealing.set_user_attr(EPOCHS, annealing_epochs(bench.finetune))
    sampler = annealing.sampler = AnnealingSampler(
        narrowed,
        config.seed,
        outlook=bench.outlook,
        parents=[Parent.of("exploration", trial, config.delta) for trial in parents],
        trials=config.search.annealing_trials,
    )
    annealing.set_user_attr("parents", [f"exploration/{trial.number}" for trial in parents])
    _describe(annealing, facts)
    bench.studies["annealing"] = annealing
    _bury(annealing, "annealing", display)
    longer = bench.finetune.final_epochs > annealing.user_attrs[EPOCHS]
    total = config.search.annealing_trials

    def rehearse_early(spent: int) -> bool:
        due = longer and total >= REHEARSED_FROM and spent >= total // REHEARSED_AFTER
        done = False
        if due and rehearsal_of(bench.studies) is None:
            start = time.perf_counter()
            found = rehearse(config, bench, folder, display)
            if found is not None:
                seconds = round(time.perf_counter() - start, 2)
                annealing.set_user_attr(REHEARSAL, {**found, "seconds": seconds})
                done = True
        sampler.outlook = bench.outlook
        return done

    _run_stage(bench, "annealing", narrowed, config, display, between=rehearse_early)
    return annealing


def annealing_length(finetune: Recipe, trials: int) -> float:
    """Passes over the training data in a whole annealing, with its rehearsal of the finals."""
    each = annealing_epochs(finetune)
    rehearsed = trials >= REHEARSED_FROM and finetune.final_epochs > each
    return trials * each + (finetune.final_epochs if rehearsed else 0.0)


def _parents(study: Study, bench: Bench) -> list[FrozenTrial]:
    """Where annealing starts: the cheapest Pareto trials that promise to end within delta, cheaper
    ones that miss it narrowly, and, should the promise not be kept, the cheapest within delta
    already; where nothing comes near, the one that lost least."""
    usable = [t for t in study.get_trials(deepcopy=False) if has_weights(t)]
    front = [t for t in usable if not any(_dominates(other, t) for other in usable)]
    front.sort(key=lambda t: t.values[1])
    outlook = bench.outlook
    missed = {t.number: outlook.shortfall("exploration", t) for t in front}
    promising = [t for t in front if missed[t.number] <= 0]
    nearly = [t for t in front if 0 < missed[t.number] <= (NEARLY - 1) * bench.delta]
    within = [t for t in front if within_delta(t)]
    chosen = promising[:MAX_PARENTS] + nearly[-MAX_PARENTS // 2 :] + within[:1]
    known = {t.number: t for t in chosen}
    return list(known.values()) or sorted(usable, key=violation)[:1]


def _dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
    better = all(a <= b for a, b in zip(one.values, other.values, strict=True))
    return better and one.values != other.values


def _outcome(summary: Mapping[str, Any], bench: Bench, folder: StudyFolder) -> Outcome:
    if not summary["met"]:
        return Outcome(None, None, summary, folder.path)
    plan = Plan.from_json((folder.best / "plan.json").read_text(encoding="utf-8"))
    model = build_plan(bench.baseline.model, plan)
    load_state(model, load_file(folder.best / "model.safetensors"))
    return Outcome(model.cpu().eval(), plan, summary, folder.path)


def _facts(
    config: StudyConfig,
    bench: Bench,
    table: LayerTable,
    left_alone: Mapping[str, str],
) -> dict[str, Any]:
    """What the report, the dashboard and the export of single trials need to know."""
    task, baseline = bench.task, bench.baseline
    return {
        "baseline": {"accuracy": baseline.val.accuracy, **baseline.profile.to_dict()},
        "layers": [asdict(layer) for layer in table.layers],
        "left_alone": dict(left_alone),
        "groups": {name: group_to_dict(ladder.group) for name, ladder in table.ladders.items()},
        "left_groups": dict(table.refused_groups),
        "bounds": {
            layer.name: bound_text(layer.name, config.search.bounds or ()) for layer in table.layers
        },
        "delta": config.delta,
        "objective": config.objective,
        "origin": dict(task.origin) if task.origin is not None else None,
        "input_shapes": [list(value.shape) for value in bench.example],
        "classes": list(task.classes),
        "normalization": dict(task.normalization) if task.normalization is not None else None,
    }


def _describe(study: Study, facts: Mapping[str, Any]) -> None:
    """Put facts on the study, once."""
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)


def _bury(study: Study, stage: str, display: Display) -> None:
    dead = bury_interrupted(study)
    spent = len(trials_spent(study))
    if dead:
        display.say(f"{stage}: {dead} interrupted trial(s) will be run again.")
    if spent:
        display.say(f"Going on with the {stage} after {spent} trials.")


def _spent(study: Study) -> float:
    """Seconds that the study's trials took in all."""
    durations = [t.duration for t in trials_spent(study)]
    return round(sum(d.total_seconds() for d in durations if d is not None), 2)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Append what the package says to the study's log."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("autocompress")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
