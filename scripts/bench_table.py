"""How well what the layer table says of a plan ranks plans by the accuracy that they come to.

    python scripts/bench_table.py quickstart
    python scripts/bench_table.py fashion-mnist-small [--images FOLDER]
    python scripts/bench_table.py cifar10-resnet20 --images FOLDER --weights FILE \
        --budgets 0.7 0.5 0.35
    python scripts/bench_table.py fashion-mnist-small --kinds channels both --budgets 0.6 0.45 0.35

Plans of three budgets, with error weights drawn anew for each layer, method and channel group, are
built, recalibrated, scored, and fine-tuned for a short while (`--epochs`). Printed is Spearman's
rank correlation of the accuracy drop with the prediction of each rule, over the plans of one budget
(mean of the three) and over all: `weights`, the squared relative error of the kernels;
`activations`, that of the layers' outputs on real inputs; `impact`, the predicted change of the
network's outputs (`observation.output_change`); `damage`, the mean of both, the search's;
`evaluations`, the drop of the network with one layer replaced alone, on 256 training images with
batch norm on their own statistics, one evaluation a choice (AIMET's way). The seed draws the plans.
`--kinds` also takes plans by channels alone and by both, of which only the activations, the impact
and their mean predict anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from arena import Arena, losses, parser_of, start, table
from opponents import table_space
from scipy.stats import spearmanr
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.allocator import ALONE, Knobs, allocate, decode
from autocompress.artifacts import write_text
from autocompress.batch import first_samples
from autocompress.errors import AutocompressError
from autocompress.importance import ChannelChoice
from autocompress.plan import Plan
from autocompress.sensitivity import Choice
from autocompress.space import Option, SearchSpace
from autocompress.surgery import FactorCache, apply_plan, dense_weight

RULES = ("weights", "activations", "impact", "damage", "evaluations")
OF_CHANNELS = ("activations", "impact", "damage")
KINDS = {"ranks": ALONE, "channels": -ALONE, "both": 0.0}
"""Kinds of plan: the error weight of channels (`Knobs.channels`)."""


class Predictor:
    """Predicts what a plan loses, by each rule: the sum over its layers."""

    def __init__(self, arena: Arena, cache: FactorCache, rules: Sequence[str]) -> None:
        model, task = arena.baseline.model, arena.task
        self._model, self._task, self._cache, self._rules = model, task, cache, rules
        self._batch = first_samples(next(task.calibration_batches(1)), 256)
        self._right = self._score(model)
        self._known: dict[tuple[str, object], dict[str, float]] = {}

    def __call__(self, here: SearchSpace, picked: Mapping[str, Option]) -> dict[str, float]:
        parts = [
            self._of(name, option.choice)
            for name, option in picked.items()
            if option.choice is not None
        ]
        if here.width is not None:
            for name, keep in here.kept.items():
                rungs = here.width.ladders[name].choices
                parts.append(_predictions(next(c for c in rungs if c.keep == keep)))
        return {rule: sum(part[rule] for part in parts) for rule in self._rules}

    def _of(self, name: str, choice: Choice) -> dict[str, float]:
        key = (name, choice.transform)
        if "weights" not in self._rules:
            return _predictions(choice)
        if key not in self._known:
            alone = apply_plan(self._model, Plan({name: choice.transform}), self._cache)
            layer = self._model.get_submodule(name)
            weight = layer.get_parameter("weight").detach().cpu()
            other = dense_weight(alone.get_submodule(name), layer)
            self._known[key] = {
                "weights": float((other - weight).norm() / weight.norm()) ** 2,
                **_predictions(choice),
                "evaluations": self._right - self._score(alone),
            }
        return self._known[key]

    def _score(self, model: nn.Module) -> float:
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 0.0  # its own statistics, and the running ones stay
        with torch.no_grad():
            output = self._task.forward(model, self._batch)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.eval().momentum = momentum
        metric = self._task.measure
        return metric.value(metric.observe(output, self._batch)) / 100


def _predictions(choice: Choice | ChannelChoice) -> dict[str, float]:
    """What the layer table itself says of a choice."""
    return {"activations": choice.error**2, "impact": choice.impact, "damage": choice.damage}


def main() -> None:
    """Measure what the command line names."""
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=["ranks"])
    parser.add_argument("--plans", type=int, default=30, help="plans for each seed")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.2, 0.12])
    options = parser.parse_args()
    arena, out = start(options)
    wide = options.kinds != ["ranks"]
    rules = OF_CHANNELS if wide else RULES
    space, cache = table_space(arena, channels=wide)
    predictor = Predictor(arena, cache, rules)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        rng = np.random.default_rng(seed)
        for index in range(options.plans):
            budget = options.budgets[index % len(options.budgets)]
            kind = options.kinds[index // len(options.budgets) % len(options.kinds)]
            here, picked = random_plan(space, budget, KINDS[kind], rng)
            began = time.perf_counter()
            model = apply_plan(arena.baseline.model, here.plan(picked), cache)
            before, after = losses(arena, model, 1000 * seed + index)
            row = {"budget": budget, "recalibrated": before, "fine-tuned": after}
            rows.append({**row, "kind": kind, "predicted": predictor(here, picked)})
            write_text(out / "table.json", json.dumps(rows))
            print(f"{index} {kind} {row} {time.perf_counter() - began:.0f} s", flush=True)
    print("\n" + report(rows, rules))


def random_plan(
    space: SearchSpace, budget: float, channels: float, rng: np.random.Generator
) -> tuple[SearchSpace, dict[str, Option]]:
    """The knapsack's plan under errors that are weighted at random.

    Of ranks alone it is under relative errors of the layers, which favours no rule's order.
    """
    if space.width is not None:
        tilts = {name: float(rng.normal(0, 1.2)) for name in space.options}
        tilts |= {f"{name}.channels": float(rng.normal(0, 1.5)) for name in space.width.options}
        here, picked = decode(space, Knobs(budget, layers=tilts, channels=channels))
        return here, picked
    methods = {method: float(rng.normal(0, 0.5)) for method in space.methods}
    tilted = {}
    for name, own in space.options.items():
        weight = np.exp(rng.normal(0, 1.0))
        tilted[name] = tuple(
            replace(o, error=weight * o.choice.error if o.choice is not None else 0.0) for o in own
        )
    picked = allocate(SearchSpace(tilted, space.fixed_cost), Knobs(budget, methods=methods))
    return space, {name: space.options[name][tilted[name].index(o)] for name, o in picked.items()}


def report(rows: list[dict[str, object]], rules: Sequence[str]) -> str:
    """The table of correlations, as Markdown."""
    lines = []
    for rule in rules:
        cells = []
        for stage in ("recalibrated", "fine-tuned"):
            groups = {
                row["budget"]: [r for r in rows if r["budget"] == row["budget"]] for row in rows
            }
            within = [_correlation(group, rule, stage) for group in groups.values()]
            cells += [float(np.mean(within)), _correlation(rows, rule, stage)]
        lines.append([rule, *(f"{cell:.2f}" for cell in cells)])
    header = ["rule", "recalibrated, one budget", "all", "fine-tuned, one budget", "all"]
    return table(header, lines)


def _correlation(rows: list[dict[str, object]], rule: str, stage: str) -> float:
    predicted = [row["predicted"][rule] for row in rows]  # type: ignore[index]
    return float(spearmanr(predicted, [row[stage] for row in rows]).statistic)


if __name__ == "__main__":
    try:
        main()
    except AutocompressError as error:
        raise SystemExit(str(error)) from None
