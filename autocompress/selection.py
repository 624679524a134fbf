"""The end of a study: choose on validation data, read test data, hand out."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from torch import nn

from autocompress.artifacts import write_text
from autocompress.card import Facts, write_card
from autocompress.compatible import compatible_profile
from autocompress.config import StudyConfig
from autocompress.evaluation import evaluate, metric_drop, paired_drop
from autocompress.export import save_model
from autocompress.finals import Finalist, candidates, choose_finalists
from autocompress.int8 import Int8, make_int8, measure_int8, score_int8
from autocompress.latency import describe
from autocompress.layermap import layer_rows
from autocompress.objective import Bench, pace, timed
from autocompress.profiler import Latency, Profile, profile_model
from autocompress.progress import Display
from autocompress.review import Predictions, class_changes, write_lost_images
from autocompress.store import StudyFolder, trials_spent
from autocompress.task import classifies
from autocompress.trials import lost, violation, within_delta
from autocompress.usage import usage_of
from autocompress.view import View, search_facts

TIMING_SECONDS = 2.0
"""Time for the latency of each network that is handed out."""


def conclude(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    display: Display,
    seconds: dict[str, float],
    command: str,
) -> dict[str, Any]:
    """Choose on validation data, read test data, export.

    Where an earlier run concluded over the same trials, its result stands and nothing is done.

    Args:
        config: The study file.
        bench: The baseline, and the studies of all stages.
        folder: Where the result, `best/` and `second/` are written.
        display: Told about the progress.
        seconds: Seconds by phase; this one's phases are added.
        command: How the study was called.

    Returns:
        The content of `result.json`.
    """
    labelled, scale = candidates(bench), bench.task.scale
    previous = finished_result(config, bench, folder)
    if previous is not None:
        added = _count_again(config, bench, previous, seconds)
        if added > 0:
            write_text(folder.result, json.dumps(previous, indent=1))
            display.say(f"{added} more trials left no network to choose: the result stands.")
        else:
            display.say("Nothing to do: the study is finished.")
        _tell_of_formats(config, previous, folder, display)
        return previous
    within = sorted(
        (item for item in labelled.items() if within_delta(item[1])),
        key=lambda item: item[1].values[1],
    )
    summary = _facts(config, bench, labelled, seconds, command)
    summary["stage_best"] = _stage_best(bench, within)
    with timed(seconds, "selection"):
        winners = choose_finalists(bench, labelled, display)
    if winners:
        summary["met"] = True
        summary["best"] = best = _describe_finalist(bench, winners[0], config, display)
        best["layers"] = _layers(bench, best, labelled[winners[0].label])
        int8 = None
        if config.int8:
            with timed(seconds, "int8"):
                int8 = make_int8(bench, folder, winners, display)
        with timed(seconds, "test"):
            summary["test_reads"] = _count_test_read(bench)
            best |= _test(bench, winners[0], int8, folder, display)
        summary["baseline"]["test_score"] = best.pop("baseline_test_score")
        with timed(seconds, "export"):
            _export(config, bench, winners[0], best, folder.best, int8, display)
            for second in winners[1:]:
                summary["second"] = own = _describe_finalist(bench, second, config, display)
                own["layers"] = _layers(bench, own, labelled[second.label])
                _export(config, bench, second, summary["second"], folder.second, int8, display)
            if int8 is not None:
                home = folder.best if int8.label == winners[0].label else folder.second
                summary["int8"] = int8.record | measure_int8(bench, int8, home, display)
            _cards(summary, folder, display)
    elif labelled:
        summary["nearest"] = nearest = _nearest(labelled, config.delta)
        trial = labelled[f"{nearest['stage']}/{nearest['trial']}"]
        nearest["layers"] = _layers(bench, nearest, trial)
        display.say(
            f"No trial kept the drop within {scale.difference(config.delta)}; the nearest is "
            f"{nearest['stage']}/{nearest['trial']} with {scale.number(nearest['val_drop'])}, at "
            f"most {scale.number(nearest['val_drop_bound'])} at confidence {config.confidence:g}."
        )
    summary |= search_facts(View.read(summary, bench.studies))
    write_text(folder.result, json.dumps(summary, indent=1))
    return summary


def finished_result(
    config: StudyConfig, bench: Bench, folder: StudyFolder
) -> dict[str, Any] | None:
    """The result that an earlier run concluded with, if it was chosen from the same trials in the
    same way, and is complete."""
    if not folder.result.exists():
        return None
    result: dict[str, Any] = json.loads(folder.result.read_text(encoding="utf-8"))
    stands = (
        result["identity"] == bench.identity
        and result["candidates"] == sorted(candidates(bench))
        and result["final_epochs"] == bench.finetune.final_epochs
        and result.get("final_learning_rate") == bench.finetune.final_learning_rate
        and (not result["met"] or (folder.best / "plan.json").exists())
        and (not result["met"] or not config.int8 or result.get("int8") is not None)
    )
    return result if stands else None


def _counts(bench: Bench) -> dict[str, int]:
    """Stage to its trials that ended."""
    return {stage: len(trials_spent(study)) for stage, study in bench.studies.items()}


def _count_again(
    config: StudyConfig, bench: Bench, result: dict[str, Any], seconds: Mapping[str, float]
) -> int:
    """Note in a result the trials that ended since and changed nothing; returns how many."""
    now = _counts(bench)
    added = sum(now.values()) - sum(map(int, result["trials"].values()))
    if added > 0:
        spent = {key: seconds[key] for key in ("exploration", "annealing", "finals")}
        result["trials"] = now
        result["config"]["search"] = config.model_dump(mode="json")["search"]
        result["seconds"] = result["seconds"] | spent
        result["pace"] = pace(bench.studies)
        result["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        result |= search_facts(View.read(result, bench.studies))
    return added


def _tell_of_formats(
    config: StudyConfig, result: Mapping[str, Any], folder: StudyFolder, display: Display
) -> None:
    """Say how to write the formats that were added since the networks were handed out."""
    before = result["config"]["run"].get("formats", ())
    added = [name for name in config.run.formats if name not in before]
    if result["met"] and added:
        display.say(
            f"run.formats has {', '.join(added)} by now, which {folder.best} was written without: "
            f"python -m autocompress.study export {folder.path} --format {','.join(added)}"
        )


def _facts(
    config: StudyConfig,
    bench: Bench,
    labelled: Mapping[str, FrozenTrial],
    seconds: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    """What is known before anything is chosen."""
    return {
        "study": config.name,
        "identity": bench.identity,
        "delta": config.delta,
        "confidence": config.confidence,
        "objective": config.objective,
        "metric": bench.task.scale.to_dict(),
        "met": False,
        "baseline": {
            "profile": bench.baseline.profile.to_dict(),
            "val_score": bench.baseline.val.score,
            "compatible": _compatible(bench, bench.baseline.model),
        },
        "val_seen": bench.task.val_seen,
        "test_reads": 0,
        "best": None,
        "second": None,
        "int8": None,
        "nearest": None,
        "trials": _counts(bench),
        "long_fits": [asdict(fit) for fit in bench.long_fits],
        "candidates": sorted(labelled),
        "final_epochs": bench.finetune.final_epochs,
        "final_learning_rate": bench.finetune.final_learning_rate,
        "seconds": seconds,
        "pace": pace(bench.studies),
        "versions": versions(),
        "device": str(bench.task.device),
        "precision": str(bench.task.amp_dtype or torch.float32).removeprefix("torch."),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _stage_best(bench: Bench, within: Sequence[tuple[str, FrozenTrial]]) -> dict[str, Any]:
    """The cheapest trial within delta of each stage that has one."""
    found: dict[str, Any] = {}
    for stage in bench.studies:
        own = [trial for label, trial in within if label.startswith(f"{stage}/")]
        if own:
            found[stage] = {"trial": own[0].number, "metrics": own[0].user_attrs["metrics"]}
    return found


def _nearest(labelled: Mapping[str, FrozenTrial], delta: float) -> dict[str, Any]:
    """The trial that lost least, where all lost too much."""
    label, trial = min(labelled.items(), key=lambda item: violation(item[1]))
    return {
        "stage": label.partition("/")[0],
        "trial": trial.number,
        "val_score": trial.user_attrs["metrics"]["score"],
        "val_drop": trial.values[0],
        "val_drop_bound": lost(trial, delta),
        "metrics": trial.user_attrs["metrics"],
        "plan": json.loads(trial.user_attrs["plan"]),
    }


def _layers(bench: Bench, found: Mapping[str, Any], trial: FrozenTrial) -> list[dict[str, Any]]:
    """What was done to each layer of a network that came from `trial`."""
    facts = bench.studies["exploration"].user_attrs
    errors = trial.user_attrs.get("layer_errors") or {}
    return layer_rows(facts, bench.baseline.profile.to_dict(), found, errors)


def _describe_finalist(
    bench: Bench, finalist: Finalist, config: StudyConfig, display: Display
) -> dict[str, Any]:
    stage, number = finalist.label.split("/")
    profile = profile_model(finalist.model, bench.example, latency=False)
    latency = _latency(bench, finalist, profile, display)
    profile = replace(profile, latency=latency, score=finalist.val.score)
    drop = metric_drop(bench.baseline.val, finalist.val)
    return {
        "stage": stage,
        "trial": int(number),
        "plan": json.loads(finalist.plan.to_json()),
        "profile": profile.to_dict(),
        "compatible": _compatible(bench, finalist.model),
        "val_score": finalist.val.score,
        "val_drop": drop,
        "val_drop_expected": drop + finalist.expected - finalist.drop,
        "val_drop_bound": finalist.bound,
        "tolerance_unused": config.delta - finalist.bound,
        "final_bounds": {str(seed): bound for seed, bound in finalist.seeds.items()},
        "final_epochs": finalist.epochs,
    }


def _compatible(bench: Bench, model: nn.Module) -> dict[str, float]:
    """A network's figures by the published profiler's formulas."""
    return asdict(compatible_profile(model, bench.example))


def _latency(
    bench: Bench, finalist: Finalist, profile: Profile, display: Display
) -> Latency | None:
    """The network's latency on the study's runtime; None where that fails."""
    meter = bench.meter
    if meter is None:
        return None
    try:
        latency = meter.measure(finalist.model, TIMING_SECONDS)
    except Exception as error:
        # As with the exports: no way in which this fails may cost the result.
        display.say(f"The latency was not measured: {type(error).__name__}: {error}")
        return None
    display.say(
        f"{finalist.label}: {bench.baseline.profile.macs / profile.macs:.2f}x fewer MACs, "
        f"{meter.speedup(latency):.2f}x as fast: {meter.reference.median_ms:.3f} ms -> "
        f"{latency.median_ms:.3f} ms ({describe(latency)})."
    )
    return latency


def _count_test_read(bench: Bench) -> int:
    """Note on the study that test data is about to be read; returns how often it was by then."""
    study = bench.studies["exploration"]
    reads = int(study.user_attrs.get("test_reads", 0)) + 1
    study.set_user_attr("test_reads", reads)
    return reads


def _test(
    bench: Bench, finalist: Finalist, int8: Int8 | None, folder: StudyFolder, display: Display
) -> dict[str, Any]:
    """Read the test data, once, for the baseline, the winner and the int8 file together."""
    task = bench.task
    was = Predictions()
    now = Predictions(was)
    looks = classifies(task)
    before = evaluate(bench.baseline.model, task, task.test, watch=was if looks else None)
    after = evaluate(finalist.model, task, task.test, watch=now if looks else None)
    if int8 is not None:
        int8.record.update(score_int8(bench, int8, before, display))
    drop, low, high = paired_drop(before, after)
    scale = task.scale
    display.say(
        f"Test data: {scale.value(before.score)} -> {scale.value(after.score)}, drop "
        f"{scale.difference(drop)} (95 % interval {scale.number(low)} to {scale.number(high)}, "
        f"{before.size} images)."
    )
    return {
        "baseline_test_score": before.score,
        "test_score": after.score,
        "test_drop": drop,
        "test_drop_interval": [low, high],
        "test_images": before.size,
        "classes": class_changes(was, now, task.classes),
        "lost_images": write_lost_images(now, folder.lost, task.classes, task.normalization),
    }


def _export(
    config: StudyConfig,
    bench: Bench,
    finalist: Finalist,
    found: dict[str, Any],
    place: Path,
    int8: Int8 | None,
    display: Display,
) -> None:
    task = bench.task
    export = save_model(
        place,
        finalist.model,
        finalist.plan,
        task.origin,
        bench.example,
        Profile.from_dict(found["profile"]),
        formats=config.run.formats,
        images=task.images(64),
        **usage_of(task),
        int8=int8.path if int8 is not None and int8.label == finalist.label else None,
    )
    for name, reason in export.skipped.items():
        display.say(f"{place.name}/{name} was not written: {reason}")
    found["files"] = dict(export.files)
    found["export_differences"] = dict(export.checks)


def _cards(summary: Mapping[str, Any], folder: StudyFolder, display: Display) -> None:
    """The model cards of what was handed out, with all that the study measured."""
    for place, name in ((folder.best, "best"), (folder.second, "second")):
        if summary[name] is not None:
            reason = write_card(place, Facts(summary, summary[name]))
            if reason is not None:
                display.say(f"{name}/README.md was not written: {reason}")


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "autocompress",
        "torch",
        "torchvision",
        "optuna",
        "tensorly",
        "numpy",
        "onnxruntime",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
