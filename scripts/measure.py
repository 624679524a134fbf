"""Run the studies whose figures are in the README and print those figures.

    python scripts/measure.py quickstart
    python scripts/measure.py fashion-mnist [--images /usr/share/datasets/fashion-mnist]
    python scripts/measure.py cifar10 --images CIFAR10_FOLDER --weights resnet20-12fca82f.th
    python scripts/measure.py tables

`--images` of cifar10 is an ImageFolder (`train/<class>/*`, `test/<class>/*`), of fashion-mnist a
folder with the four IDX files (without it torchvision downloads them). `--weights` is the published
ResNet-20 checkpoint; the baseline is fine-tuned on these images first (`baseline.epochs`), so that
compression does not get the credit for adapting it. Running the same command again goes on with an
interrupted study; seed 0 throughout. `tables` times the layer tables of ResNet-20 and ResNet-18 on
noise of 32x32 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autocompress.conductor import run_study
from autocompress.config import ALL_TRANSFORMS, StudyConfig, load_config
from autocompress.costs import cost_of
from autocompress.database import open_storage
from autocompress.latency import describe
from autocompress.layers import inspect_layers
from autocompress.models import build_model
from autocompress.observation import observe_layers
from autocompress.profiler import Latency, Profile
from autocompress.progress import make_display
from autocompress.sensitivity import build_table
from autocompress.sources import task_from_config
from autocompress.store import load_study
from autocompress.task import Task
from autocompress.trials import within_delta

STUDIES = {
    "fashion-mnist-small": "fashion-mnist-small",
    "quickstart": "quickstart",
    "fashion-mnist": "fashion-mnist-resnet",
    "cifar10": "cifar10-resnet20",
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*STUDIES, "tables"])
    parser.add_argument("--images", help="folder of the images")
    parser.add_argument("--weights", help="checkpoint of the network")
    parser.add_argument("--out", default="runs", help="folder of the studies' folders")
    options = parser.parse_args()
    if options.what == "tables":
        time_tables()
    else:
        run(options)


def study_of(what: str, images: str | None, weights: str | None, out: str) -> StudyConfig:
    """A ready study by its short name, with the places that the command line gave."""
    return load_config(STUDIES[what], {"run.out": out, **places(images, weights)})


def places(images: str | None, weights: str | None) -> dict[str, str]:
    """The settings that say where images and weights are.

    Images are a folder with train/ and test/, or with IDX files, or a file for `array:`.
    """
    settings: dict[str, str] = {}
    if images:
        place = Path(images).resolve()
        if place.suffix == ".npz":
            settings["data.source"] = f"array:{place}"
        elif (place / "train").is_dir():
            settings["data.source"] = f"folder:{place}"
        else:
            settings["data.root"] = str(place)
    if weights:
        settings["model.weights"] = str(Path(weights).resolve())
    return settings


def run(options: argparse.Namespace) -> None:
    """Run a ready study, or go on with it, and print its figures."""
    config = study_of(options.what, options.images, options.weights, options.out)
    with make_display() as display:
        outcome = run_study(config, task_from_config(config), display, "scripts/measure.py")
    print_figures(config.name, outcome.folder)


def time_tables() -> None:
    """Print how long the layer tables of two networks take to build."""
    for source in ("zoo:resnet20", "zoo:resnet18"):
        torch.manual_seed(0)
        model = build_model(source, {"num_classes": 10}, None)
        batch = (torch.randn(128, 3, 32, 32), torch.arange(128) % 10)
        task = Task(model, [batch] * 8, [batch], [batch])
        start = time.perf_counter()
        layers, _ = inspect_layers(model, task.example())
        seen = observe_layers(model, task, layers)
        table = build_table(
            model,
            layers,
            seen.factor_cache(model),
            seen,
            ALL_TRANSFORMS,
        )
        rows = sum(map(len, table.choices.values()))
        seconds = time.perf_counter() - start
        print(f"{source}: {rows} choices for {len(layers)} layers in {seconds:.1f} s")


def speedup(baseline: Mapping[str, Any], best: Mapping[str, Any]) -> float:
    """How many times as fast the winner is on the study's runtime; NaN where not known.

    Args:
        baseline: The baseline's profile.
        best: The winner's.
    """
    before, after = baseline["latency"], best["latency"]
    if before is None or after is None:
        return math.nan
    return float(before["median_ms"] / after["median_ms"])


def print_figures(name: str, folder: Path) -> None:
    """Print the study's result and the best network so far after each trial."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before = result["baseline"]
    print(f"\n## {name}, delta {result['delta']:g}, seed {result['seed']}")
    print(f"seconds: {result['seconds']}")
    print(f"baseline: val {before['val_score']:.2f} %, test {before.get('test_score')} %")
    for stage, best in result["stage_best"].items():
        metrics = best["metrics"]
        params, macs = (before["profile"][key] / metrics[key] for key in ("params", "macs"))
        print(
            f"{stage}: trial {best['trial']}, {params:.2f}x params, {macs:.2f}x MACs, "
            f"val drop {metrics['drop']:.2f}"
        )
    if result["best"] is not None:
        best = result["best"]
        low, high = best["test_drop_interval"]
        params, macs = (before["profile"][key] / best["profile"][key] for key in ("params", "macs"))
        latency = before["profile"]["latency"]
        where = "no latency" if latency is None else describe(Latency(**latency))
        faster = speedup(before["profile"], best["profile"])
        print(
            f"winner: {best['stage']}/{best['trial']}, "
            f"{params:.2f}x params, {macs:.2f}x MACs, {faster:.2f}x as fast ({where}), "
            f"val drop {best['val_drop']:.2f}, "
            f"test {before['test_score']:.2f} -> {best['test_score']:.2f}, drop "
            f"{best['test_drop']:.2f} ({low:.2f} to {high:.2f})"
        )
    baseline = Profile.from_dict(before["profile"])
    full = cost_of(result["objective"], baseline, baseline.latency_ms, baseline)
    storage = open_storage(f"sqlite:///{folder.resolve() / 'study.db'}")
    for stage in result["trials"]:
        study = load_study(storage, name, stage)
        assert study is not None
        curve, least = [], float("inf")
        for trial in study.trials:
            if trial.values and within_delta(trial):
                least = min(least, trial.values[1])
            curve.append(f"{full / least:.2f}" if least < float("inf") else "-")
        print(f"best {result['objective']} ratio after each {stage} trial: {' '.join(curve)}")


if __name__ == "__main__":
    main()
