"""Time what a proposal costs, in milliseconds: ask, suggest all parameters, tell.

    python scripts/bench_sampler.py [--layers 60] [--trials 100 1000] [--asks 5] [--storage URL]

For the samplers knobs, annealing, random and tpe, on in-memory storage, on SQLite and in the
database of `--storage` (an empty one, for its studies stay), with that many finished trials in the
study and two parameters for each layer. The random sampler's time is the storage's own. Means over
`--asks` proposals, of the wall clock and of this process's CPU time; the finished trials are made
up, half of them near the best.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.allocator import Knobs, allocate
from autocompress.annealing import AnnealingSampler, Parent
from autocompress.database import open_storage, write_proposal
from autocompress.layers import Cost, LayerSpec
from autocompress.outlook import Outlook
from autocompress.samplers import KNOBS, make_sampler
from autocompress.sensitivity import Choice, LayerTable
from autocompress.space import SearchSpace
from autocompress.transforms import SVD, SpatialSVD

DELTA = 1.0


def main() -> None:
    """Print one line for each storage, number of trials and sampler."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--asks", type=int, default=5)
    parser.add_argument("--storage", help="URL of an empty PostgreSQL database")
    parser.add_argument("--samplers", nargs="+", default=["random", "knobs", "annealing", "tpe"])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = make_space(options.layers)
    print(f"{2 * options.layers} parameters, mean of {options.asks}, ms")
    print(
        "| storage | trials | sampler | ask + suggest | its CPU | tell |\n|---|---|---|---|---|---|"
    )
    for count in options.trials:
        trials = make_trials(space, count)
        for place in ("memory", "sqlite", *([options.storage] if options.storage else [])):
            with tempfile.TemporaryDirectory() as folder:
                study = make_study(place, Path(folder), trials)
                for name in options.samplers:
                    study.sampler = sampler(name, space, count)
                    times = measure(study, space, options.asks)
                    cells = " | ".join(f"{milliseconds:.0f}" for milliseconds in times)
                    print(f"| {place.partition(':')[0]} | {count} | {name} | {cells} |", flush=True)


def make_space(layers: int) -> SearchSpace:
    """Equal 3x3 convolutions with made-up errors, two methods and 16 ranks each."""
    rng = np.random.default_rng(0)
    specs, choices = [], {}
    for index in range(layers):
        layer = LayerSpec(
            name=f"stage.{index}.conv",
            kind="conv2d",
            in_channels=64,
            out_channels=64,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
            groups=1,
            padding_mode="zeros",
            bias=False,
            in_size=(16, 16),
            out_size=(16, 16),
        )
        factor = float(np.exp(rng.normal()))
        rows = []
        for step in range(1, 17):
            for kind in (SVD, SpatialSVD):
                transform = kind(rank=3 * step)
                cost = transform.cost(layer)
                error = factor * (1 - step / 16) ** 2
                rows.append(Choice(transform, step / 16, cost.params, cost.macs, error, error**2))
        specs.append(layer)
        choices[layer.name] = tuple(rows)
    full = sum((layer.cost for layer in specs), Cost(0, 0))
    return SearchSpace.from_table(LayerTable(tuple(specs), choices, {}), "params", full)


def make_trials(space: SearchSpace, count: int) -> list[FrozenTrial]:
    """Finished trials, as an exploration leaves them; every tenth met delta."""
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        reach = 0.1 if number % 2 else 0.7
        methods = {method: float(rng.uniform(-reach, reach)) for method in space.methods}
        stages = tuple(rng.uniform(-reach, reach, 4))
        knobs = Knobs(0.2 + 0.2 * rng.random(), stages=stages, methods=methods)
        plan = space.plan(picked := allocate(space, knobs))
        drop = DELTA * (0.9 if number % 10 == 0 else 2.0)
        found.append(
            create_trial(
                state=TrialState.COMPLETE,
                values=[drop, float(space.cost(picked))],
                params=space.params(picked),
                distributions=space.distributions(),
                user_attrs={
                    "plan": plan.to_json(),
                    "plan_digest": plan.digest,
                    "weights": "none",
                    "parent": "exploration/0",
                },
                system_attrs={KNOBS: knobs.to_params(space) | {"kind": "sample"}},
                constraints={"0": drop - DELTA},
            )
        )
    return found


def make_study(place: str, folder: Path, trials: Sequence[FrozenTrial]) -> Study:
    """A study with these trials."""
    url = f"sqlite:///{folder / 'study.db'}" if place == "sqlite" else place
    storage = None if place == "memory" else open_storage(url)
    study = optuna.create_study(storage=storage, directions=["minimize", "minimize"])
    study.add_trials(trials)
    return study


def sampler(name: str, space: SearchSpace, count: int) -> BaseSampler:
    """A sampler of the study file, or the annealing's."""
    if name != "annealing":
        return make_sampler(name, space, 0, count, 16)
    plan = space.plan(picked := allocate(space, Knobs(0.4)))
    parent = Parent("exploration/0", plan.to_json(), 0.5 * DELTA, float(space.cost(picked)))
    outlook = Outlook(DELTA, {})
    return AnnealingSampler(space, 0, outlook=outlook, parents=[parent], trials=count + 100)


def measure(study: Study, space: SearchSpace, asks: int) -> tuple[float, float, float]:
    """Mean milliseconds of ask and suggest, their CPU time, and tell; one proposal goes before."""
    ask = cpu = tell = 0.0
    for index in range(asks + 1):
        start, busy = time.perf_counter(), time.process_time()
        trial = study.ask()
        write_proposal(trial)
        space.suggest(trial)
        middle, used = time.perf_counter(), time.process_time() - busy
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [5.0])
        study.tell(trial, state=TrialState.PRUNED)
        if index:
            ask += middle - start
            cpu += used
            tell += time.perf_counter() - middle
    return 1000 * ask / asks, 1000 * cpu / asks, 1000 * tell / asks


if __name__ == "__main__":
    main()
