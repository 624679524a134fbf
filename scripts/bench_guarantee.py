"""How often the selected network keeps delta on test data, over many small studies.

    python scripts/bench_guarantee.py [--images /usr/share/datasets/fashion-mnist] [--studies 20]
    python scripts/bench_guarantee.py --train 4000 --validation 6000 --delta 1 --trials 16 8

Each study has other training and validation images (of Fashion-MNIST, shrunk to 14 x 14 pixels),
another seed, and so another baseline; all are tested on the same 10,000 test images. For each
`confidence` it prints in how many studies the winner's test drop was within delta, the mean drop,
and the mean compression: what the margin costs. A study that was finished before is not run again;
with more --extra-trials than then it goes on. Ranks, channels and both on a larger network, each in
an --out of its own (with search.channels=false, with search.transforms=[], and with neither):

    python scripts/bench_guarantee.py --train 4000 --validation 6000 --delta 1 --trials 16 8 \\
        --confidences 0.95 --extra-trials 4 --first 1 --studies 1 --out runs/both \\
        --set model.source=zoo:resnet18 objective=params+macs+latency latency.batch_size=32 \\
        latency.threads=1 run.workers=0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from autocompress.conductor import run_study
from autocompress.config import DataConfig, parse_config, parse_pairs
from autocompress.data import load_data
from autocompress.loaders import unaugmented
from autocompress.progress import NullDisplay
from autocompress.sources import task_from_config


def main() -> None:
    """Run the studies and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of Fashion-MNIST")
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--train", type=int, default=2667, help="images to train on")
    parser.add_argument("--validation", type=int, default=1333, help="images to choose on")
    parser.add_argument("--trials", type=int, nargs=2, default=[8, 4], help="of both stages")
    parser.add_argument("--extra-trials", type=int, default=8, help="search.extra_trials")
    parser.add_argument("--delta", type=float, default=2.0)
    parser.add_argument("--confidences", type=float, nargs="+", default=[0.975, 0.5])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of the studies"
    )
    parser.add_argument("--out", default="runs", help="folder of the studies' folders")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    rows: dict[float, list[dict[str, Any]]] = {c: [] for c in options.confidences}
    images = fashion(options.images)
    for seed in range(options.first, options.first + options.studies):
        source = images_of(images, out, seed, options.train + options.validation)
        for confidence in options.confidences:
            found = run(source, out, seed, confidence, options)
            rows[confidence].append(found)
            best = found["best"] or {}
            print(
                f"seed {seed}, confidence {confidence:g}: test drop "
                f"{best.get('test_drop', float('nan')):.2f}, validation drop "
                f"{best.get('val_drop', float('nan')):.2f}, {ratio(found):.2f}x parameters, "
                f"{ratio(found, 'macs'):.2f}x MACs, {speedup(found):.2f}x as fast",
                flush=True,
            )
    header = ["confidence", "studies", "kept delta on test data", "test drop, mean (sd; largest)"]
    header += ["more than on validation", "more than expected", "unused", "after exploration"]
    header += ["params", "MACs"]
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for confidence, results in rows.items():
        met = [one for one in results if one["met"]]
        drops = np.array([one["best"]["test_drop"] for one in met])
        # A study that found nothing hands out nothing, and so breaks no promise.
        kept = int((drops <= options.delta).sum()) + len(results) - len(met)
        more, surprise = (
            np.mean([one["best"]["test_drop"] - one["best"][key] for one in met])
            for key in ("val_drop", "val_drop_expected")
        )
        unused = np.mean([one["best"]["tolerance_unused"] for one in met])
        ratios: list[Callable[[dict[str, Any]], float]]
        ratios = [explored, ratio, partial(ratio, cost="macs")]
        means = (np.exp(np.mean([np.log(of(one)) for one in results])) for of in ratios)
        print(
            f"| {confidence:g} | {len(results)} | {kept} | "
            f"{drops.mean():.2f} ({drops.std():.2f}; {drops.max():.2f}) | {more:.2f} | "
            f"{surprise:.2f} | {unused:.2f} | {' | '.join(f'{mean:.2f}x' for mean in means)} |"
        )


def fashion(root: str | None) -> tuple[np.ndarray, ...]:
    """Training and test images as bytes, 14 x 14 pixels, each with its labels."""
    config = DataConfig(source="torchvision:FashionMNIST", root=root, val_fraction=0.01)
    data = load_data(config, 0, torch.device("cpu"), Path())
    assert data.normalization is not None
    mean, std = data.normalization["mean"][0], data.normalization["std"][0]
    parts: list[np.ndarray] = []
    for loader in (unaugmented(data.train), data.test):
        assert loader is not None
        images, labels = (torch.cat(column) for column in zip(*loader, strict=True))
        small = F.avg_pool2d(255 * (images * std + mean), 2)
        parts += [small.round().clamp(0, 255).byte().numpy(), labels.numpy()]
    return tuple(parts)


def images_of(images: Sequence[np.ndarray], out: Path, seed: int, count: int) -> Path:
    """An `.npz` of `count` images of the seed to train and choose on, and all test images."""
    path = out / f"guarantee-{count}-{seed}.npz"
    if not path.exists():
        x, y, x_test, y_test = images
        rows = np.random.default_rng(seed).permutation(len(x))[:count]
        out.mkdir(parents=True, exist_ok=True)
        np.savez(path, x_train=x[rows], y_train=y[rows], x_test=x_test, y_test=y_test)
    return path


def run(
    source: Path, out: Path, seed: int, confidence: float, options: argparse.Namespace
) -> dict[str, Any]:
    """The `result.json` of one study."""
    sizes = (options.train, options.validation)
    exploration, annealing = options.trials
    config = parse_config(
        {
            "name": f"guarantee-{sizes[0]}-{sizes[1]}-{confidence:g}-{seed}",
            "seed": seed,
            "delta": options.delta,
            "confidence": confidence,
            "model.source": "zoo:resnet_small",
            "model.arguments": {"num_classes": 10, "in_channels": 1, "width": 16},
            "data.source": f"array:{source}",
            "data.augment": "none",
            "data.val_fraction": sizes[1] / sum(sizes),
            "data.batch_size": 64,
            "baseline.epochs": 6,
            "baseline.learning_rate": 0.1,
            "search.transforms": ("svd", "spatial_svd", "tucker2"),
            "search.trials": exploration,
            "search.annealing_trials": annealing,
            "search.extra_trials": options.extra_trials,
            "finetune.epochs": 1,
            "finetune.final_epochs": 4,
            "finetune.learning_rate": 0.03,
            "run.out": str(out),
            **parse_pairs(options.set, "--set", "search.channels=false"),
        }
    )
    outcome = run_study(
        config, task_from_config(config), NullDisplay(), "scripts/bench_guarantee.py"
    )
    return dict(outcome.summary)


def ratio(found: dict[str, Any], cost: str = "params") -> float:
    """How many times less the study's network costs; 1 where it found none."""
    if not found["met"]:
        return 1.0
    return float(found["baseline"]["profile"][cost] / found["best"]["profile"][cost])


def speedup(found: dict[str, Any]) -> float:
    """How many times as fast the study's network is; NaN where it found or timed none."""
    before = found["baseline"]["profile"]["latency"]
    after = (found["best"] or {}).get("profile", {}).get("latency")
    return float(before["median_ms"] / after["median_ms"]) if before and after else float("nan")


def explored(found: dict[str, Any]) -> float:
    """How many times fewer parameters the exploration's best has; 1 where it found none."""
    best = found["stage_best"].get("exploration")
    if best is None:
        return 1.0
    return float(found["baseline"]["profile"]["params"] / best["metrics"]["params"])


if __name__ == "__main__":
    main()
