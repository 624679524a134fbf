"""How well what the layer table says of a plan ranks plans by the accuracy that they come to.

    python scripts/bench_table.py quickstart
    python scripts/bench_table.py fashion-mnist [--images FOLDER]
    python scripts/bench_table.py cifar10 --images FOLDER --weights FILE

Plans of three budgets, with error weights drawn anew for each layer and method, are built,
recalibrated, scored, and fine-tuned for a short while. Printed is Spearman's rank correlation of
the accuracy drop with the prediction of each rule, over the plans of one budget (mean of the three)
and over all: `weights`, the squared relative error of the kernels; `activations`, that of the
layers' outputs on real inputs; `impact`, what the table goes by (`sensitivity.output_change`);
`evaluations`, the drop of the network with one layer replaced alone, on 256 training images with
batch norm on their own statistics, one evaluation a choice (AIMET's way). Seed 0. Going on with an
interrupted run starts it anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import study_of
from scipy.stats import spearmanr
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.api import task_from_config
from autocompress.baseline import train_baseline
from autocompress.evaluation import Evaluation, accuracy_drop, evaluate, recalibrate
from autocompress.layers import inspect_layers
from autocompress.plan import Plan
from autocompress.progress import make_display
from autocompress.sensitivity import Choice, build_table, observe_layers
from autocompress.space import Knobs, Option, SearchSpace, allocate
from autocompress.surgery import FactorCache, apply_plan, dense_weight
from autocompress.task import Task, batches, first_samples
from autocompress.training import fit

BUDGETS = {"quickstart": (0.4, 0.2, 0.1), "fashion-mnist": (0.4, 0.2, 0.12)}
RULES = ("weights", "activations", "impact", "evaluations")


class Predictor:
    """Predicts what a plan loses, by each rule: the sum over its layers."""

    def __init__(self, model: nn.Module, task: Task, cache: FactorCache) -> None:
        self._model, self._task, self._cache = model, task, cache
        loader = task.calibration or task.train
        self._batch = first_samples(next(iter(batches(loader, task.device, 1))), 256)
        self._right = self._score(model)
        self._known: dict[tuple[str, object], dict[str, float]] = {}

    def __call__(self, picked: Mapping[str, Option]) -> dict[str, float]:
        parts = [
            self._of(name, option.choice)
            for name, option in picked.items()
            if option.choice is not None
        ]
        return {rule: sum(part[rule] for part in parts) for rule in RULES}

    def _of(self, name: str, choice: Choice) -> dict[str, float]:
        key = (name, choice.transform)
        if key not in self._known:
            alone = apply_plan(self._model, Plan({name: choice.transform}), self._cache)
            layer = self._model.get_submodule(name)
            weight = layer.get_parameter("weight").detach()
            other = dense_weight(alone.get_submodule(name), layer)
            self._known[key] = {
                "weights": float((other - weight).norm() / weight.norm()) ** 2,
                "activations": choice.error**2,
                "impact": choice.impact,
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
        return float(self._task.metric(output, self._batch).mean())


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["quickstart", "fashion-mnist", "cifar10"])
    parser.add_argument("--images", help="folder of the images")
    parser.add_argument("--weights", help="checkpoint of the network")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--epochs", type=float, help="length of the fine-tuning")
    parser.add_argument("--out", default="runs", help="folder of the figures")
    options = parser.parse_args()
    config = study_of(options.what, options.images, options.weights, options.out)
    task = task_from_config(config)
    with make_display() as display:
        train_baseline(task, config.baseline, config.baseline.epochs or 0.0, config.seed, display)
    model = task.model.eval()
    base = evaluate(model, task, task.val)
    layers, _ = inspect_layers(model, task.example())
    seen = observe_layers(model, task, layers)
    cache = seen.factor_cache(model)
    table = build_table(model, layers, cache, seen, config.search.transforms)
    total = sum(parameter.numel() for parameter in model.parameters())
    space = SearchSpace.from_table(table, "params", total)
    predictor = Predictor(model, task, cache)
    epochs = config.finetune.epochs if options.epochs is None else options.epochs
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    path = Path(options.out) / f"table-{options.what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(options.plans):
        budgets = BUDGETS.get(options.what, (0.7, 0.5, 0.35))
        budget = budgets[index % len(budgets)]
        picked = random_plan(space, budget, rng)
        start = time.perf_counter()
        before, after = losses(
            task, base, apply_plan(model, space.plan(picked), cache), epochs, index
        )
        row = {"budget": budget, "recalibrated": before, "fine-tuned": after}
        rows.append({**row, "predicted": predictor(picked)})
        path.write_text(json.dumps(rows))
        print(f"{index} {row} {time.perf_counter() - start:.0f} s", flush=True)
    report(rows)


def random_plan(space: SearchSpace, budget: float, rng: np.random.Generator) -> dict[str, Option]:
    """The knapsack's plan under relative errors that are weighted at random."""
    methods = {method: float(rng.normal(0, 0.5)) for method in space.methods}
    tilted = {}
    for name, own in space.options.items():
        weight = np.exp(rng.normal(0, 1.0))
        tilted[name] = tuple(
            replace(o, error=weight * o.choice.error if o.choice is not None else 0.0) for o in own
        )
    picked = allocate(SearchSpace(tilted, space.fixed_cost), Knobs(budget, methods=methods))
    return {name: space.options[name][tilted[name].index(o)] for name, o in picked.items()}


def losses(
    task: Task, base: Evaluation, model: nn.Module, epochs: float, seed: int
) -> tuple[float, float]:
    """Accuracy drop after recalibration and after fine-tuning, in points of validation data."""
    model.to(task.device)
    recalibrate(model, task)
    before = accuracy_drop(base, evaluate(model, task, task.val))
    fit(
        model,
        task,
        epochs=epochs,
        learning_rate=0.015,
        seed=seed,
        teacher=task.model,
        distillation=0.5,
    )
    return before, accuracy_drop(base, evaluate(model, task, task.val))


def report(rows: list[dict[str, object]]) -> None:
    """Print the table of correlations."""
    print("\n| rule | recalibrated, one budget | all | fine-tuned, one budget | all |")
    print("|---|---|---|---|---|")
    for rule in RULES:
        cells = []
        for stage in ("recalibrated", "fine-tuned"):
            groups = {
                row["budget"]: [r for r in rows if r["budget"] == row["budget"]] for row in rows
            }
            within = [_correlation(group, rule, stage) for group in groups.values()]
            cells += [float(np.mean(within)), _correlation(rows, rule, stage)]
        print(f"| {rule} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


def _correlation(rows: list[dict[str, object]], rule: str, stage: str) -> float:
    predicted = [row["predicted"][rule] for row in rows]  # type: ignore[index]
    return float(spearmanr(predicted, [row[stage] for row in rows]).statistic)


if __name__ == "__main__":
    main()
