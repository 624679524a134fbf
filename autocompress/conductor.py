"""The whole study: baseline, layer table, exploration, annealing, the final choice, the report.

Everything that is worth keeping is written the moment it exists, so the same call goes on where an
interrupted one ended.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file
from torch import nn

from autocompress import baseline as baselines
from autocompress.baseline import Baseline
from autocompress.config import StudyConfig, bound_settings
from autocompress.dashboard import annotate
from autocompress.errors import AutocompressError, ConfigError
from autocompress.evaluation import Evaluation, evaluate, paired_drop
from autocompress.export import save_model
from autocompress.layers import LayerSpec, inspect_layers
from autocompress.objective import Bench, find_trial, load_trial_model, run_trial
from autocompress.plan import Plan
from autocompress.profiler import Profile, compare_latency, profile_model
from autocompress.progress import Display
from autocompress.report import write_report
from autocompress.samplers import (
    NEARLY,
    AnnealingSampler,
    Parent,
    make_sampler,
    reads_rejected_as_complete,
)
from autocompress.sensitivity import LayerTable, build_table, collect_patches
from autocompress.space import SearchSpace
from autocompress.store import (
    StudyFolder,
    bury_interrupted,
    check_same,
    load_study,
    open_storage,
    open_study,
    portable_state,
    state_digest,
    study_name,
    trials_spent,
    write_text,
    write_weights,
)
from autocompress.surgery import FactorCache, build_plan
from autocompress.task import Task, check_outputs
from autocompress.training import fastest_precision, fit

COST_NAMES = {
    "params": "parameters",
    "size": "size (bytes)",
    "macs": "MACs",
    "latency": "latency (ms)",
}
MAX_PARENTS = 4
"""How many of the exploration's trials annealing may start from."""
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
    folder = StudyFolder(Path(config.run.out) / config.name)
    folder.create()
    with folder.lock(), _log_to(folder.log):
        write_text(folder.config, config.model_dump_json(indent=1))
        return _run(config, task, display, folder, command)


def _run(
    config: StudyConfig, task: Task, display: Display, folder: StudyFolder, command: str
) -> Outcome:
    seconds: dict[str, float] = {}
    storage = open_storage(folder.storage_url(config.run.storage))
    bound = {**bound_settings(config), "data fingerprint": task.fingerprint}
    earlier = load_study(storage, config.name, "exploration")
    if earlier is not None and "config" in earlier.user_attrs:
        check_same(config.name, earlier.user_attrs["config"], bound)

    task.model.to(task.device)
    check_outputs(task)
    with _timed(seconds, "baseline"):
        baseline, example = _prepare(config, task, display, earlier)
    with _timed(seconds, "table"):
        bench, table, left_alone = _analyse(config, task, baseline, example, folder, display)
    space = SearchSpace.from_table(table, config.objective, _total(config, baseline))
    if not space.options:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:5])
        raise ConfigError(
            "No layer of this network can be transformed by search.transforms within "
            f"search.include and search.exclude. {reasons}"
        )

    sampler = make_sampler(
        config.search.sampler,
        space,
        config.seed,
        0 if earlier is None else len(earlier.get_trials(deepcopy=False)),
        config.search.trials,
    )
    exploration = open_study(
        storage,
        config.name,
        "exploration",
        sampler=sampler,
        bound=bound,
        cost_name=COST_NAMES[config.objective],
    )
    shapes = [list(value.shape) for value in example]
    _describe(exploration, config, baseline, table, left_alone, task, shapes)
    bench.studies["exploration"] = exploration
    _bury(exploration, "exploration", display)
    if config.search.stage != "annealing":
        _run_stage(bench, "exploration", space, config.search.trials, display)
    annealing = load_study(storage, config.name, "annealing")
    if annealing is not None:
        bench.studies["annealing"] = annealing
    if config.search.stage != "exploration" and config.search.annealing_trials > 0:
        annealing = _anneal(bench, config, space, bound, storage, display)
    seconds["exploration"] = _spent(exploration)
    seconds["annealing"] = _spent(annealing) if annealing is not None else 0.0
    summary = _finish(config, bench, folder, display, seconds, command)
    for study in bench.studies.values():
        annotate(study)
    write_report(summary, exploration, annealing, folder.report)
    display.say(f"Report: {folder.report}")
    return _outcome(summary, bench, folder)


def _prepare(
    config: StudyConfig, task: Task, display: Display, earlier: Study | None
) -> tuple[Baseline, tuple[torch.Tensor, ...]]:
    """Train or load the baseline, score it on validation data and profile it."""
    precision = None if earlier is None else earlier.user_attrs.get("precision")
    if precision is None:
        task.amp_dtype = fastest_precision(task)
    else:
        task.amp_dtype = torch.bfloat16 if precision == "bfloat16" else None
    epochs = config.baseline.epochs
    if epochs is None:
        epochs = 0.0 if config.model.weights is not None or task.origin is None else 10.0
    baselines.train_baseline(task, config.baseline, epochs, config.seed, display)
    task.model.eval()
    val = evaluate(task.model, task, task.val)
    example = task.example()
    profile = replace(profile_model(task.model, example), accuracy=val.accuracy)
    display.say(
        f"Baseline: {val.accuracy:.2f} % on validation data, {profile.params / 1e6:.3f} M params, "
        f"{profile.macs / 1e6:.1f} M MACs."
    )
    digest = state_digest(task.model.state_dict())
    return Baseline(task.model, val, profile, digest), example


def _analyse(
    config: StudyConfig,
    task: Task,
    baseline: Baseline,
    example: tuple[torch.Tensor, ...],
    folder: StudyFolder,
    display: Display,
) -> tuple[Bench, LayerTable, dict[str, str]]:
    """Look at the layers and make the layer table, or read it from the study's folder."""
    layers, left_alone = inspect_layers(
        baseline.model, example, include=config.search.include, exclude=config.search.exclude
    )
    patches = collect_patches(baseline.model, task, layers, seed=config.seed)
    cache = FactorCache(baseline.model, patches)
    key = f"{baseline.digest}/{config.seed}/{config.search.transforms}"
    table = _stored_table(folder, key, layers)
    if table is None:
        start = time.perf_counter()
        table = build_table(baseline.model, layers, cache, patches, config.search.transforms)
        write_text(folder.table, json.dumps({"key": key, "table": table.to_json()}))
        rows = sum(len(choices) for choices in table.choices.values())
        display.say(
            f"Layer table: {rows} choices for {len(table.choices)} layers in "
            f"{time.perf_counter() - start:.1f} s."
        )
    for name in table.refused:
        if name not in table.choices:
            reasons = dict.fromkeys(table.refused[name].values())
            left_alone[name] = "; ".join(reasons) or "no rank saves both params and MACs"
    bench = Bench(
        task=task,
        baseline=baseline,
        example=example,
        cache=cache,
        patches=patches,
        errors={
            (name, choice.transform): choice.error
            for name, choices in table.choices.items()
            for choice in choices
        },
        finetune=config.finetune,
        delta=config.delta,
        objective=config.objective,
        seed=config.seed,
        store=folder.artifact_store(),
        display=display,
        rejected_as_complete=reads_rejected_as_complete(config.search.sampler),
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


def _run_stage(bench: Bench, stage: str, space: SearchSpace, total: int, display: Display) -> None:
    """Run trials until exactly `total` of them have ended by themselves."""
    study = bench.studies[stage]
    display.stage(
        stage, total, len(trials_spent(study)), delta=bench.delta, objective=bench.objective
    )
    failures = 0
    while len(trials_spent(study)) < total:
        ended = run_trial(bench, stage, space)
        failures = failures + 1 if ended.state == TrialState.FAIL else 0
        if failures >= MAX_FAILURES:
            raise AutocompressError(
                f"{failures} trials of the {stage} failed one after the other, the last with: "
                f"{ended.user_attrs.get('reason')}. Mend the cause and run the same command again."
            )


def _anneal(
    bench: Bench,
    config: StudyConfig,
    space: SearchSpace,
    bound: Mapping[str, Any],
    storage: optuna.storages.RDBStorage,
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
    narrowed = space.narrow(plans, band=0.5)
    sampler = AnnealingSampler(
        narrowed,
        config.seed,
        delta=config.delta,
        parents=[
            Parent(f"exploration/{trial.number}", plan, trial.values[0], trial.values[1])
            for trial, plan in zip(parents, plans, strict=True)
        ],
        trials=config.search.annealing_trials,
    )
    annealing = open_study(
        storage,
        config.name,
        "annealing",
        sampler=sampler,
        bound=bound,
        cost_name=COST_NAMES[config.objective],
    )
    annealing.set_user_attr("parents", [f"exploration/{trial.number}" for trial in parents])
    for key, value in exploration.user_attrs.items():
        if key not in annealing.user_attrs:
            annealing.set_user_attr(key, value)
    bench.studies["annealing"] = annealing
    _bury(annealing, "annealing", display)
    _run_stage(bench, "annealing", narrowed, config.search.annealing_trials, display)
    return annealing


def _parents(study: Study, bench: Bench) -> list[FrozenTrial]:
    """Where annealing starts: the cheapest Pareto trials within delta, and cheaper ones that
    missed it narrowly; where nothing came near, the one that lost least."""
    usable = [t for t in study.get_trials(deepcopy=False) if _usable(t)]
    front = [t for t in usable if not any(_dominates(other, t) for other in usable)]
    front.sort(key=lambda t: t.values[1])
    within = [t for t in front if t.values[0] <= bench.delta]
    nearly = [t for t in front if bench.delta < t.values[0] <= NEARLY * bench.delta]
    chosen = within[:MAX_PARENTS] + nearly[-MAX_PARENTS // 2 :]
    return chosen or sorted(usable, key=lambda t: t.values[0])[:1]


def _usable(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and "weights" in trial.user_attrs


def _dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
    better = all(a <= b for a, b in zip(one.values, other.values, strict=True))
    return better and one.values != other.values


def _finish(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    display: Display,
    seconds: dict[str, float],
    command: str,
) -> dict[str, Any]:
    """Choose on validation data, fine-tune the winner at length, read test data, export."""
    labelled = {
        f"{stage}/{trial.number}": trial
        for stage, study in bench.studies.items()
        for trial in study.get_trials(deepcopy=False)
        if _usable(trial)
    }
    previous = _previous_result(folder, labelled)
    if previous is not None:
        display.say("Nothing to do: the study is finished.")
        return previous
    base_profile = bench.baseline.profile
    summary: dict[str, Any] = {
        "study": config.name,
        "delta": config.delta,
        "objective": config.objective,
        "met": False,
        "stage_best": {},
        "baseline": {
            "profile": base_profile.to_dict(),
            "val_accuracy": bench.baseline.val.accuracy,
        },
        "best": None,
        "second": None,
        "nearest": None,
        "trials": {stage: len(trials_spent(study)) for stage, study in bench.studies.items()},
        "candidates": sorted(labelled),
        "final_epochs": config.finetune.final_epochs,
        "seconds": seconds,
        "versions": versions(),
        "device": str(bench.task.device),
        "precision": str(bench.task.amp_dtype or torch.float32).removeprefix("torch."),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    within = sorted(
        (t for t in labelled.items() if t[1].values[0] <= config.delta),
        key=lambda item: item[1].values[1],
    )
    for stage in bench.studies:
        own = [item for item in within if item[0].startswith(stage)]
        if own:
            label, trial = own[0]
            summary["stage_best"][stage] = {
                "trial": int(label.split("/")[1]),
                "metrics": trial.user_attrs["metrics"],
            }
    with _timed(seconds, "final"):
        winners = _finalists(config, bench, folder, labelled, within, display)
    if winners:
        summary["met"] = True
        best = _describe_finalist(bench, winners[0], config)
        with _timed(seconds, "test"):
            best |= _test(bench, winners[0], display)
        summary["baseline"]["test_accuracy"] = best.pop("baseline_test_accuracy")
        summary["best"] = best
        if len(winners) > 1:
            summary["second"] = _describe_finalist(bench, winners[1], config)
        with _timed(seconds, "export"):
            for target, found, place in (
                ("best", summary["best"], folder.best),
                ("second", summary["second"], folder.second),
            ):
                if found is not None:
                    finalist = winners[0 if target == "best" else 1]
                    _export(bench, finalist, found, place, display)
    elif labelled:
        label, trial = min(labelled.items(), key=lambda item: item[1].values[0])
        stage, number = label.split("/")
        summary["nearest"] = {
            "stage": stage,
            "trial": int(number),
            "val_accuracy": trial.user_attrs["metrics"]["accuracy"],
            "val_drop": trial.values[0],
            "metrics": trial.user_attrs["metrics"],
            "plan": json.loads(trial.user_attrs["plan"]),
        }
        display.say(
            f"No trial kept the drop within {config.delta:g} points; the nearest is {label} with "
            f"{trial.values[0]:.2f}."
        )
    write_text(folder.result, json.dumps(summary, indent=1))
    return summary


@dataclass(frozen=True)
class Finalist:
    """A network that may be handed out.

    Attributes:
        label: The trial that it came from.
        model: The network with its final weights.
        plan: What was done to it.
        val: Its scores on the validation data.
        epochs: Length of the final fine-tuning that its weights had.
    """

    label: str
    model: nn.Module
    plan: Plan
    val: Evaluation
    epochs: float


def _finalists(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    labelled: Mapping[str, FrozenTrial],
    within: Sequence[tuple[str, FrozenTrial]],
    display: Display,
) -> list[Finalist]:
    """The best network within delta, fine-tuned at length, and the second best.

    A long fine-tuning wins back more than a trial's short one. So the cheapest trial that missed
    delta by no more than delta itself is tried first; if it still misses, the cheapest trial
    within delta is the winner, whose weights from before are kept where they are better.
    """
    epochs = config.finetune.final_epochs
    limit = within[0][1].values[1] if within else math.inf
    daring = sorted(
        (
            item
            for item in labelled.items()
            if config.delta < item[1].values[0] <= 2 * config.delta
            and item[1].values[1] < 0.97 * limit
        ),
        key=lambda item: item[1].values[0],
    )[:1]
    found: list[Finalist] = []
    for label, _ in [*(daring if epochs > 0 else []), *within[:2]]:
        if len(found) == 2:
            break
        long = epochs if not found else 0.0
        finalist = _final_fit(config, bench, folder, label, long, display)
        drop = bench.baseline.val.accuracy - finalist.val.accuracy
        if drop <= config.delta:
            found.append(finalist)
    return found


def _final_fit(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    label: str,
    epochs: float,
    display: Display,
) -> Finalist:
    """Fine-tune a trial's network at length; keep the weights that are better on validation."""
    task = bench.task
    model, plan = load_trial_model(bench, label)
    before = evaluate(model, task, task.val)
    if epochs <= 0:
        return Finalist(label, model, plan, before, 0.0)
    path = folder.finals / f"{label.replace('/', '-')}-{epochs:g}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        display.stage("final", 1)

        def on_step(done: float, total: float, loss: float) -> None:
            display.step("fine-tune", done, total, f"loss {loss:.3f}")

        fit(
            model,
            task,
            epochs=epochs,
            learning_rate=config.finetune.learning_rate,
            seed=config.seed,
            teacher=bench.baseline.model,
            distillation=config.finetune.distillation,
            on_step=on_step,
        )
        write_weights(path, portable_state(model))
    after = evaluate(model, task, task.val)
    display.say(
        f"Fine-tuned {label} for {epochs:g} epochs: {before.accuracy:.2f} % -> "
        f"{after.accuracy:.2f} % on validation data."
    )
    if after.accuracy < before.accuracy:
        model, _ = load_trial_model(bench, label)
        return Finalist(label, model, plan, before, 0.0)
    return Finalist(label, model, plan, after, epochs)


def _describe_finalist(bench: Bench, finalist: Finalist, config: StudyConfig) -> dict[str, Any]:
    stage, number = finalist.label.split("/")
    profile = profile_model(finalist.model, bench.example, latency=False)
    before, after = compare_latency(bench.baseline.model, finalist.model, bench.example)
    profile = replace(profile, latency=after, accuracy=finalist.val.accuracy)
    drop = bench.baseline.val.accuracy - finalist.val.accuracy
    return {
        "stage": stage,
        "trial": int(number),
        "plan": json.loads(finalist.plan.to_json()),
        "profile": profile.to_dict(),
        "baseline_latency": asdict(before),
        "val_accuracy": finalist.val.accuracy,
        "val_drop": drop,
        "tolerance_unused": config.delta - drop,
        "final_epochs": finalist.epochs,
    }


def _test(bench: Bench, finalist: Finalist, display: Display) -> dict[str, Any]:
    """Read the test data, once, for the baseline and the winner together."""
    task = bench.task
    before = evaluate(bench.baseline.model, task, task.test)
    after = evaluate(finalist.model, task, task.test)
    drop, low, high = paired_drop(before, after)
    display.say(
        f"Test data: {before.accuracy:.2f} % -> {after.accuracy:.2f} %, drop {drop:.2f} points "
        f"(95 % interval {low:.2f} to {high:.2f}, {len(before.scores)} images)."
    )
    return {
        "baseline_test_accuracy": before.accuracy,
        "test_accuracy": after.accuracy,
        "test_drop": drop,
        "test_drop_interval": [low, high],
        "test_images": len(before.scores),
    }


def _export(
    bench: Bench, finalist: Finalist, found: dict[str, Any], place: Path, display: Display
) -> None:
    task = bench.task
    export = save_model(
        place,
        finalist.model,
        finalist.plan,
        task.origin,
        bench.example,
        Profile.from_dict(found["profile"]),
        images=task.images(64),
        classes=task.classes,
        normalization=task.normalization,
    )
    for name, reason in export.skipped.items():
        display.say(f"{place.name}/{name} was not written: {reason}")
    found["files"] = dict(export.files)
    found["export_differences"] = dict(export.checks)


def _previous_result(
    folder: StudyFolder, labelled: Mapping[str, FrozenTrial]
) -> dict[str, Any] | None:
    """The result of an earlier run over the same trials, so that test data isn't read again."""
    if not folder.result.exists():
        return None
    stored: dict[str, Any] = json.loads(folder.result.read_text(encoding="utf-8"))
    same = stored["candidates"] == sorted(labelled)
    complete = not stored["met"] or (folder.best / "plan.json").exists()
    return stored if same and complete else None


def _outcome(summary: Mapping[str, Any], bench: Bench, folder: StudyFolder) -> Outcome:
    if not summary["met"]:
        return Outcome(None, None, summary, folder.path)
    plan = Plan.from_json((folder.best / "plan.json").read_text(encoding="utf-8"))
    model = build_plan(bench.baseline.model, plan)
    model.load_state_dict(load_file(folder.best / "model.safetensors"))
    return Outcome(model.cpu().eval(), plan, summary, folder.path)


def _describe(
    study: Study,
    config: StudyConfig,
    baseline: Baseline,
    table: LayerTable,
    left_alone: Mapping[str, str],
    task: Task,
    input_shapes: list[list[int]],
) -> None:
    """Put on the study what the report and the dashboard need to know, once."""
    facts = {
        "baseline": {"accuracy": baseline.val.accuracy, **baseline.profile.to_dict()},
        "layers": [asdict(layer) for layer in table.layers],
        "left_alone": dict(left_alone),
        "delta": config.delta,
        "objective": config.objective,
        "precision": str(task.amp_dtype or torch.float32).removeprefix("torch."),
        "origin": dict(task.origin) if task.origin is not None else None,
        "input_shapes": input_shapes,
        "classes": list(task.classes),
        "normalization": dict(task.normalization) if task.normalization is not None else None,
    }
    for key, value in facts.items():
        if key not in study.user_attrs:
            study.set_user_attr(key, value)


def _bury(study: Study, stage: str, display: Display) -> None:
    dead = bury_interrupted(study)
    spent = len(trials_spent(study))
    if dead:
        display.say(f"{study_name('', stage)[1:]}: {dead} interrupted trial(s) will be run again.")
    if spent:
        display.say(f"Going on with the {stage} after {spent} trials.")


def _total(config: StudyConfig, baseline: Baseline) -> int:
    profile = baseline.profile
    return profile.params if config.objective in ("params", "size") else profile.macs


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


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 2)


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("autocompress", "torch", "torchvision", "optuna", "tensorly", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
