"""How near the layer table's predicted impact comes to what the network's outputs make of a change.

    python scripts/bench_impact.py quickstart
    python scripts/bench_impact.py cifar10-resnet20 --images FOLDER --weights FILE

One layer is replaced, or one group loses channels, and nothing else; the outputs for four batches
of training images, batch norm on their own statistics, are compared with the baseline's. Printed is
how many times the mean squared change is what was predicted (`observation.output_change`), for
choices of each layer and group, and the smallest, median and largest of these: a prediction that is
wrong by the same factor everywhere ranks choices as well as the real change does. Then plans of
`--budgets`, by ranks, by channels and by both, and the points that each loses before it is
fine-tuned: the better the table, the less by both than by either.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from copy import deepcopy

import torch
from arena import Arena, parser_of, start, table
from bench_table import KINDS
from opponents import table_space
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.allocator import Knobs, decode
from autocompress.errors import AutocompressError
from autocompress.evaluation import evaluate, metric_drop, recalibrate
from autocompress.importance import ChannelChoice
from autocompress.plan import Plan
from autocompress.sensitivity import Choice
from autocompress.space import SearchSpace
from autocompress.surgery import FactorCache, apply_plan

BATCHES = 4
SHARES = (0.25, 0.5, 0.75)
"""Where on a ladder the choices lie that are tried."""


def main() -> None:
    """Print both tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    arena, _ = start(options := parser.parse_args())
    space, cache = table_space(arena, arena.config.search.channels)
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {}
    for kind, name, choice, real in changes(arena, space, cache):
        ratios.setdefault(kind, []).append(real / choice.impact)
        what = choice.transform if isinstance(choice, Choice) else f"{choice.keep} channels"
        numbers = (choice.error, choice.impact, real, real / choice.impact)
        rows.append([name, str(what), *(f"{number:.3g}" for number in numbers)])
    print(table(["layer or group", "choice", "error", "predicted", "real", "times"], rows))
    for kind, found in ratios.items():
        middle = statistics.median(found)
        print(f"\n{kind}: {min(found):.2f} to {max(found):.2f} times, median {middle:.2f}")
    lines = [[f"{budget:g}", *lost(arena, space, cache, budget)] for budget in options.budgets]
    print("\nPoints lost before fine-tuning:\n" + table(["budget", *KINDS], lines))


def changes(
    arena: Arena, space: SearchSpace, cache: FactorCache
) -> Iterator[tuple[str, str, Choice | ChannelChoice, float]]:
    """Choices, as `choices`, with the mean squared change of the outputs that each makes."""
    batches = list(arena.task.calibration_batches(BATCHES))

    def outputs(network: nn.Module) -> Tensor:
        network = deepcopy(network).eval()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        with torch.no_grad():
            found: list[Tensor] = [arena.task.forward(network, batch) for batch in batches]
        return torch.cat(found).float().flatten(1)

    exact = outputs(arena.baseline.model)
    for kind, name, choice, plan in choices(space):
        change = outputs(apply_plan(arena.baseline.model, plan, cache)) - exact
        yield kind, name, choice, float(change.square().sum(1).mean())


def lost(arena: Arena, space: SearchSpace, cache: FactorCache, budget: float) -> list[str]:
    """What plans of a budget lose once they are recalibrated, and how much smaller they are."""
    task, found = arena.task, []
    for weight in KINDS.values():
        here, picked = decode(space, Knobs(budget, channels=weight))
        small = apply_plan(arena.baseline.model, here.plan(picked), cache).to(task.device)
        recalibrate(small, task)
        drop = metric_drop(arena.baseline.val, evaluate(small, task, task.val))
        found.append(f"{drop:.2f} at {1 / arena.share(small):.2f}x")
    return found


def choices(
    space: SearchSpace,
) -> Iterator[tuple[str, str, Choice | ChannelChoice, Plan]]:
    """Some choices of each layer and group that are predicted to change something."""
    for name, options in space.options.items():
        known = [o.choice for o in options if o.choice is not None and o.choice.impact > 0]
        for choice in (known[int(share * len(known))] for share in SHARES if known):
            yield "ranks", name, choice, Plan({name: choice.transform})
    for name, ladder in space.width.ladders.items() if space.width is not None else ():
        rungs = [choice for choice in ladder.choices if choice.impact > 0]
        for rung in (rungs[int(share * len(rungs))] for share in SHARES if rungs):
            yield "channels", name, rung, Plan({}, {name: ladder.kept(rung.keep)})


if __name__ == "__main__":
    try:
        main()
    except AutocompressError as error:
        raise SystemExit(str(error)) from None
