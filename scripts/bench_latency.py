"""Does the allocator's time come true? Plans that aim at MACs and plans that aim at milliseconds.

    python scripts/bench_latency.py --networks zoo:resnet18@32 torchvision:mobilenet_v2@224

For each network, kind of plan (ranks alone, channels alone, or the shares of both that the layer
table predicts to break least), aim and budget one plan is allocated through the layer table, built,
and timed beside the network on the runtime. "damage" is the sum of the predicted changes of the
network's outputs, by which the allocator compares plans; the row "ms, same damage" is the fastest
plan by the table that breaks no more than the plan for MACs above it. With `--plans N`, so many
plans of random budgets tell how well the table's sums predict the measured time.

Weights and images are random: nothing is trained, no accuracy is known, and the damage says little
of a trained network's. Times hold for trained ones too, for they depend on shapes alone.

"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from arena import table
from scipy.stats import pearsonr, spearmanr
from torch import nn

from autocompress.allocator import ALONE, Knobs, allocate, decode
from autocompress.config import LatencyConfig, cache_folder
from autocompress.grouping import find_groups, removable
from autocompress.importance import build_ladders
from autocompress.latency import Deployment, LatencyMeter, describe
from autocompress.layers import inspect_layers
from autocompress.layertimes import LayerTimes, with_times
from autocompress.models import build_model
from autocompress.observation import observe_layers
from autocompress.profiler import Profile, profile_model
from autocompress.sensitivity import LayerTable, build_table
from autocompress.space import Option, SearchSpace
from autocompress.surgery import build_plan
from autocompress.task import Task

AIMS = ("macs", "latency")
BUDGETS = (0.5, 0.25)
IMAGES = 32
"""Random images that the layers are observed on; as few as their gradients need."""


@dataclass(frozen=True)
class Subject:
    """A network to make plans for.

    Attributes:
        name: Its source and image size.
        model: The network.
        profile: Its costs.
        meter: Times networks beside it.
        table: Its layer table, with times.
        spaces: Aim to the search space whose costs are of that unit.
    """

    name: str
    model: nn.Module
    profile: Profile
    meter: LatencyMeter
    table: LayerTable
    spaces: dict[str, SearchSpace]


@dataclass(frozen=True)
class Candidate:
    """A plan's network, and what its maker predicts.

    Attributes:
        model: The network.
        speedup: How many times as fast it should be.
        damage: What it breaks, as the allocator sums it up.
    """

    model: nn.Module
    speedup: float
    damage: float


def plan_of(subject: Subject, aim: str, budget: float, channels: float) -> Candidate:
    """The allocator's plan within a budget, at an error weight of channels (`Knobs.channels`)."""
    here, picked = decode(subject.spaces[aim], Knobs(budget, channels=channels))
    return _candidate(subject, here, picked)


KINDS: dict[str, Callable[[Subject, str, float], Candidate]] = {
    "ranks": partial(plan_of, channels=ALONE),
    "channels": partial(plan_of, channels=-ALONE),
    "both": partial(plan_of, channels=0.0),
}
"""Kinds of plan: a function of the network, what to aim at, and the budget as a share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=["zoo:resnet18@32"])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--transforms", nargs="+", default=["svd", "spatial_svd", "tucker2"])
    parser.add_argument("--plans", type=int, default=0, help="random plans to predict")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each plan")
    options = parser.parse_args()
    settings: dict[str, Any] = {"runtime": options.runtime, "batch_size": options.batch_size}
    deployment = Deployment.from_config(LatencyConfig(**settings))
    for name in options.networks:
        subject = make_subject(name, deployment, options.transforms)
        print(compare_aims(subject, options.seconds), flush=True)
        if options.plans:
            print(check_predictions(subject, options.plans, options.seconds), flush=True)


def make_subject(name: str, deployment: Deployment, transforms: Sequence[str]) -> Subject:
    """Build a network such as "zoo:resnet18@32", observe random images and time its layers."""
    torch.manual_seed(0)
    source, _, size = name.rpartition("@")
    model = build_model(source, {}, None).eval()
    batch = (torch.randn(IMAGES, 3, int(size), int(size)), torch.zeros(IMAGES, dtype=torch.long))
    task = Task(model, [batch], [batch], [batch])
    example = task.example()
    profile = profile_model(model, example, latency=False)
    meter = LatencyMeter(model, example, deployment)
    layers, _ = inspect_layers(model, example)
    start = time.perf_counter()
    seen = observe_layers(model, task, layers, images=IMAGES, patches=256)
    rows = build_table(model, layers, seen.factor_cache(model), seen, transforms)
    groups, _ = find_groups(model, example)
    groups = removable(groups, layers, {}, {})
    rows = replace(rows, ladders=build_ladders(model, task, groups, seen, "outputs"))
    errors = time.perf_counter() - start
    times = LayerTimes(deployment, cache_folder() / "layer-times")
    known, start = len(times), time.perf_counter()
    rows = with_times(rows, times, meter.runner)
    count = sum(map(len, rows.choices.values()))
    print(
        f"\n## {name}: {profile.macs / 1e6:.0f} M MACs, {meter.reference.median_ms:.2f} ms "
        f"({describe(meter.reference)}; {meter.reference.device})\n\n"
        f"Layer table: {count} choices, errors {errors:.0f} s, times {len(times) - known} new "
        f"shapes in {time.perf_counter() - start:.0f} s.\n",
        flush=True,
    )
    full = replace(profile.cost, ms=rows.network_ms)
    spaces = {aim: SearchSpace.from_table(rows, aim, full) for aim in AIMS}
    return Subject(name, model, profile, meter, rows, spaces)


def compare_aims(subject: Subject, seconds: float) -> str:
    """Time one plan for each kind, budget and aim; a Markdown table."""
    header = ["kind", "aim", "budget", "params", "MACs", "speed-up", "of MACs", "by the table"]
    lines = []
    for kind, make in KINDS.items():
        for budget in BUDGETS:
            by_macs = make(subject, "macs", budget)
            candidates = {
                "MACs": by_macs,
                "ms": make(subject, "latency", budget),
                "ms, same damage": _as_gentle(subject, make, by_macs.damage),
            }
            for aim, found in candidates.items():
                figures = _figures(subject, found, seconds)
                lines.append([kind, aim, f"{budget:g}", *figures, f"{found.damage:.3g}"])
    return table([*header, "damage"], lines)


def check_predictions(subject: Subject, count: int, seconds: float) -> str:
    """How well the table's sums and the MACs predict the time of plans of random budgets."""
    rng = np.random.default_rng(0)
    predicted, measured, macs = [], [], []
    for _ in range(count):
        space = subject.spaces[str(rng.choice(AIMS))]
        tilts = {name: float(rng.normal()) for name in space.options}
        picked = allocate(space, Knobs(rng.uniform(0.2, 0.9), layers=tilts))
        found = _candidate(subject, space, picked)
        latency = subject.meter.measure(found.model, seconds)
        predicted.append(1 / found.speedup)
        measured.append(latency.median_ms / subject.meter.reference.median_ms)
        macs.append(_macs(subject, found.model) / subject.profile.macs)
    lines = []
    for name, values in (("sum of the table", predicted), ("MACs", macs)):
        away = np.abs(np.array(values) / np.array(measured) - 1)
        correlations = (f(values, measured).statistic for f in (pearsonr, spearmanr))
        lines.append([name, *(f"{c:.3f}" for c in correlations), f"{100 * np.mean(away):.1f} %"])
    header = [f"predicted by ({count} plans)", "Pearson", "Spearman", "mean error of the time"]
    return table(header, lines)


def _candidate(subject: Subject, here: SearchSpace, picked: dict[str, Option]) -> Candidate:
    """The network of one option for each layer, at the space's channels."""
    network = subject.table.network_ms
    assert network is not None
    layers = {layer.name: layer for layer in subject.table.layers}
    remaining = layers if here.width is None else here.width.remaining(here.kept)
    saved = 0.0
    for name in layers:
        option = picked.get(name)
        cost = subject.table.cost(remaining[name])
        if option is not None and option.choice is not None:
            cost = option.choice.cost
        assert cost.ms is not None
        saved += subject.table.layer_ms[name] - cost.ms
    model = build_plan(subject.model, here.plan(picked)).eval()
    return Candidate(model, network / (network - saved), here.damage(picked))


def _as_gentle(
    subject: Subject, make: Callable[[Subject, str, float], Candidate], damage: float
) -> Candidate:
    """The plan for milliseconds that breaks as much as allowed, by bisection of the budget."""
    low, high = 0.02, 1.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        if make(subject, "latency", middle).damage > damage:
            low = middle
        else:
            high = middle
    return make(subject, "latency", high)


def _figures(subject: Subject, found: Candidate, seconds: float) -> list[str]:
    profile = profile_model(found.model, subject.meter.example, latency=False)
    macs = subject.profile.macs / profile.macs
    speedup = subject.meter.speedup(subject.meter.measure(found.model, seconds))
    ratios = (subject.profile.params / profile.params, macs, speedup)
    return [
        *(f"{r:.2f}x" for r in ratios),
        f"{100 * speedup / macs:.0f} %",
        f"{found.speedup:.2f}x",
    ]


def _macs(subject: Subject, model: nn.Module) -> int:
    return profile_model(model, subject.meter.example, latency=False).macs


if __name__ == "__main__":
    main()
