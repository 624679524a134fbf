"""What each part of fine-tuning is worth: one plan, trained with and without it.

    python scripts/bench_finetune.py quickstart --lengths 2 5 --seeds 0 1 2 3 4 5
    python scripts/bench_finetune.py fashion-mnist-small --images FOLDER --lengths 0.15 1.5 \
        --seeds 0 1 2
    python scripts/bench_finetune.py cifar10-resnet20 --images FOLDER --weights FILE --budget 0.4 \
        --lengths 0.6 --seeds 0 1 2

The plan is the allocator's for `--budget`. Each variant differs from `fit` as it is in one thing:
`as it is`; `no distillation`; `more distillation` (0.9 of the loss instead of the study's share);
`features` (the input of the last layer is imitated, too); `average` (an exponential moving average
of the weights, decay 0.99, with batch-norm statistics of its own); `running statistics` (batch norm
keeps those of the last steps); `whole images` (its statistics are of images that are not
augmented); `rate / 3` and `rate x 3`. Others change the time above all, and are run where
`--variants` names them: `compiled` (`torch.compile`), `no graph` (without CUDA graphs), `no kept
answers` (the baseline is asked in every step, about new views of the images) and `all in bfloat16`
(layers whose kernels are slow there, too). Printed are points lost on validation data, the mean
over the seeds with the standard deviation, and the seconds of the fastest run (where answers are
kept, one that found them if there were enough before it: a seed may be named twice).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from arena import Arena, parser_of, spread, start, table
from opponents import allocator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autocompress.artifacts import write_text
from autocompress.batch import Batch
from autocompress.evaluation import evaluate, metric_drop, recalibrate
from autocompress.loaders import unaugmented
from autocompress.task import Task, logit_distillation
from autocompress.training import LAST_BATCHES, fit

DECAY = 0.99
FEATURE_WEIGHT = 1.0

Tuned = tuple[nn.Module, Task]
"""The network to be judged, and the task that judges it."""
Variant = Callable[[nn.Module, Arena, float, int], Tuned]
"""`variant(model, arena, epochs, seed)` trains the network."""


def train(
    model: nn.Module,
    arena: Arena,
    epochs: float,
    seed: int,
    *,
    task: Task | None = None,
    distillation: float | None = None,
    rate: float = 1.0,
    keep: bool = True,
) -> Tuned:
    """`fit` as a study calls it, with one thing changed."""
    own, forward = arena.config.finetune.distillation, arena.task.forward
    fit(
        model,
        task or arena.task,
        epochs=epochs,
        learning_rate=rate * arena.recipe.learning_rate,
        seed=seed,
        teacher=arena.baseline.model,
        # Kept answers are those of the task's own forward pass.
        answers=arena.answers if keep and (task or arena.task).forward is forward else None,
        distillation=own if distillation is None else distillation,
    )
    return model, arena.task


def with_features(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Imitate the baseline's input of the last layer beside its logits."""
    task = arena.task

    def forward(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        last = network.get_submodule(arena.layers[-1].name)
        hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        output = task.forward(network, batch)
        hook.remove()
        return output, seen[0]

    def imitate(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        mine, its = student[1].float().flatten(1), teacher[1].float().flatten(1)
        apart = F.mse_loss(mine, its) / its.square().mean()
        return logit_distillation(student[0], teacher[0]) + FEATURE_WEIGHT * apart

    def loss(output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return task.loss(output[0], batch)

    both = replace(task, forward=forward, loss=loss, distillation=imitate)
    return train(model, arena, epochs, seed, task=both)


def with_average(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Judge the moving average of the weights."""
    averages: list[AveragedModel] = []

    def optimizer(network: nn.Module, rate: float) -> Optimizer:
        made = arena.task.optimizer(network, rate)
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
        averages.append(average)
        made.register_step_post_hook(lambda *_: average.update_parameters(network))
        return made

    train(model, arena, epochs, seed, task=replace(arena.task, optimizer=optimizer))
    found: nn.Module = averages[0].module
    recalibrate(found.eval(), arena.task, LAST_BATCHES)
    return found, arena.task


def with_running_statistics(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Leave batch norm as the last steps left it."""
    with patch("autocompress.training.recalibrate"):
        return train(model, arena, epochs, seed)


def with_whole_images(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Take the last batch-norm statistics of images that are not augmented."""
    quiet = replace(arena.task, calibration=unaugmented(arena.counter.loader))
    return train(model, arena, epochs, seed, task=quiet)


def compiled(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Compile the forward and backward pass of the student."""
    fast: Any = torch.compile(model)
    task = arena.task

    def forward(network: nn.Module, batch: Batch) -> Any:
        learns = network is model and torch.is_grad_enabled()
        return task.forward(fast if learns else network, batch)

    return train(model, arena, epochs, seed, task=replace(task, forward=forward))


def without_graph(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Launch the kernels of each step one by one, as on a CPU anyway."""
    with patch("autocompress.training._can_be_captured", return_value=False):
        return train(model, arena, epochs, seed)


def all_in_bfloat16(model: nn.Module, arena: Arena, epochs: float, seed: int) -> Tuned:
    """Leave mixed precision to autocast, on a CPU."""
    with patch("autocompress.kernels._slow_in_bfloat16", return_value=[]):
        return train(model, arena, epochs, seed)


def _changed(**change: Any) -> Variant:
    return lambda model, arena, epochs, seed: train(model, arena, epochs, seed, **change)


VARIANTS: dict[str, Variant] = {
    "as it is": train,
    "no distillation": _changed(distillation=0.0),
    "more distillation": _changed(distillation=0.9),
    "features": with_features,
    "average": with_average,
    "running statistics": with_running_statistics,
    "whole images": with_whole_images,
    "rate / 3": _changed(rate=1 / 3),
    "rate x 3": _changed(rate=3.0),
    "compiled": compiled,
    "no graph": without_graph,
    "no kept answers": _changed(keep=False),
    "all in bfloat16": all_in_bfloat16,
}
BY_DEFAULT = list(VARIANTS)[:-4]


def main() -> None:
    """Train the plan in every way and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--budget", type=float, default=0.15, help="share of the baseline's cost")
    parser.add_argument("--lengths", type=float, nargs="+", required=True, help="epochs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=BY_DEFAULT)
    options = parser.parse_args()
    arena, out = start(options)
    plan = allocator(arena)(options.budget)
    recalibrate(plan.to(arena.task.device), arena.task)
    rows: list[dict[str, Any]] = []
    for epochs in options.lengths:
        for name in options.variants:
            for seed in options.seeds:
                began = time.perf_counter()
                model, task = VARIANTS[name](deepcopy(plan), arena, epochs, seed)
                seconds = time.perf_counter() - began
                drop = metric_drop(arena.baseline.val, evaluate(model, task, task.val))
                rows.append({"variant": name, "epochs": epochs, "drop": drop, "seconds": seconds})
                write_text(out / "finetune.json", json.dumps(rows))
            print(name, epochs, [row["drop"] for row in rows[-len(options.seeds) :]], flush=True)
    print(f"\n{1 / arena.share(plan):.2f}x; points lost after so many epochs (seconds of a run)\n")
    print(finetune_table(rows))


def finetune_table(rows: list[dict[str, Any]]) -> str:
    """Points lost by variant and length, as Markdown."""
    lengths = list(dict.fromkeys(row["epochs"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for length in lengths:
            own = [row for row in rows if row["variant"] == name and row["epochs"] == length]
            seconds = min(row["seconds"] for row in own)
            cells.append(f"{spread([row['drop'] for row in own])} ({seconds:.1f})")
        lines.append([name, *cells])
    return table(["fine-tuning", *(f"{length:g} epochs" for length in lengths)], lines)


if __name__ == "__main__":
    main()
