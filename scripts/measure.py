"""Run the studies whose figures are in the README and print those figures.

    python scripts/measure.py quickstart
    python scripts/measure.py fashion-mnist [--images /usr/share/datasets/fashion-mnist]
    python scripts/measure.py cifar10 --images CIFAR10_FOLDER --weights resnet20-12fca82f.th

`--images` of cifar10 is an ImageFolder (`train/<class>/*`, `test/<class>/*`), of fashion-mnist a
folder with the four IDX files (without it torchvision downloads them). `--weights` is the published
ResNet-20 checkpoint; the baseline is fine-tuned on these images first (`baseline.epochs`), so that
compression does not get the credit for adapting it. Running the same command again goes on with an
interrupted study; seed 0 throughout.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from autocompress.api import task_from_config
from autocompress.conductor import run_study
from autocompress.config import flatten, parse_config
from autocompress.progress import make_display
from autocompress.store import load_study, open_storage

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {
    "quickstart": "quickstart",
    "fashion-mnist": "fashion-mnist-resnet",
    "cifar10": "cifar10-resnet20",
}


def main() -> None:
    """Run one study and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--images", help="folder of the images")
    parser.add_argument("--weights", help="checkpoint of the network")
    parser.add_argument("--out", default="runs", help="folder of the studies' folders")
    options = parser.parse_args()
    path = ROOT / "studies" / f"{STUDIES[options.study]}.toml"
    fields = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    fields["run.out"] = options.out
    if options.images and options.study == "cifar10":
        fields["data.source"] = f"folder:{Path(options.images).resolve()}"
    elif options.images:
        fields["data.root"] = str(Path(options.images).resolve())
    if options.weights:
        fields["model.weights"] = str(Path(options.weights).resolve())
    config = parse_config(fields)
    with make_display() as display:
        outcome = run_study(config, task_from_config(config), display, " ".join(["measure.py"]))
    print_figures(config.name, outcome.folder)


def print_figures(name: str, folder: Path) -> None:
    """Print the study's result and the best network so far after each trial."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before = result["baseline"]
    print(f"\n## {name}, delta {result['delta']:g}, seed {result['seed']}")
    print(f"seconds: {result['seconds']}")
    print(f"baseline: val {before['val_accuracy']:.2f} %, test {before.get('test_accuracy')} %")
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
        faster = best["baseline_latency"]["median_ms"] / best["profile"]["latency"]["median_ms"]
        print(
            f"winner: {best['stage']}/{best['trial']}, "
            f"{params:.2f}x params, {macs:.2f}x MACs, {faster:.2f}x faster (eager), "
            f"val drop {best['val_drop']:.2f}, "
            f"test {before['test_accuracy']:.2f} -> {best['test_accuracy']:.2f}, drop "
            f"{best['test_drop']:.2f} ({low:.2f} to {high:.2f})"
        )
    storage = open_storage(f"sqlite:///{folder.resolve() / 'study.db'}")
    for stage in result["trials"]:
        study = load_study(storage, name, stage)
        assert study is not None
        curve, least = [], float("inf")
        for trial in study.trials:
            if trial.values and trial.values[0] <= result["delta"]:
                least = min(least, trial.values[1])
            full = before["profile"][result["objective"]]
            curve.append(f"{full / least:.2f}" if least < float("inf") else "-")
        print(f"best {result['objective']} ratio after each {stage} trial: {' '.join(curve)}")


if __name__ == "__main__":
    main()
