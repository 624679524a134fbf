"""Compare autocompress with other methods: same network, data and total fine-tuning.

    python scripts/bench_peers.py quickstart --seeds 0 1 2
    python scripts/bench_peers.py cifar10-resnet20 --images CIFAR10_FOLDER --weights resnet20.th

autocompress runs a whole study (`autocompress-ranks`, `-channels` and `-both` do so with what they
name to choose from, whatever the study file says). Every other method is a family of networks with
one dial: it gets as many short fine-tunings as the study's exploration, as long as those, on
networks bisected for the least cost within delta; then the cheapest plausible one is fine-tuned as
long as the study's winner, and the next milder ones in its place while delta is missed, as long as
the study's own number of epochs lasts (so what the study spends on annealing is theirs for more
long fine-tunings). Delta is judged on validation data, and test data is read once for each method.
A finished method is kept in --out, and the same command goes on with the others. Seeds are those of
search and training; baseline and split are the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arena import (
    Arena,
    Make,
    bisect_family,
    describe,
    finish,
    parser_of,
    run_all,
    run_whole_study,
    settings_of,
    spread,
    start,
    study_figures,
    table,
)
from opponents import alds, pruning, tucker_vbmf, uniform

from autocompress.artifacts import write_text
from autocompress.errors import AutocompressError

VBMF_AS_FOUND = "tucker2-vbmf-1"
FAMILIES: dict[str, tuple[str, Callable[[Arena], Make]]] = {
    "torch-pruning": ("Torch-Pruning, global, group norm", pruning),
    "tucker2-uniform": ("Tucker-2, uniform ranks", lambda a: uniform(a, "tucker2", weighted=False)),
    "tucker2-vbmf": ("Tucker-2, VBMF ranks, scaled", tucker_vbmf),
    VBMF_AS_FOUND: ("Tucker-2, VBMF ranks as found", lambda a: tucker_vbmf(a, factor=1.0)),
    "alds": ("ALDS-style splits, min-max error", alds),
}
OURS: dict[str, dict[str, Any]] = {
    "autocompress": {},
    "autocompress-ranks": {"search.channels": False},
    "autocompress-channels": {"search.channels": True, "search.transforms": ()},
    "autocompress-both": {"search.channels": True},
}
"""Whole studies: as the study file says, by ranks alone, by channels alone, and by both."""
FIGURES = ("params_ratio", "macs_ratio", "val_drop", "test_drop", "latency_ratio")


def main() -> None:
    """Run the methods that the command line names and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *FAMILIES], default=None)
    options = parser.parse_args()
    methods = options.methods or ["autocompress", *FAMILIES]
    arena, out = start(options)

    def work(method: str, seed: int) -> dict[str, Any]:
        if method in OURS:
            return run_ours(arena, out, method, seed)
        return run_peer(arena, method, seed, epochs_of_ours(out, seed) or arena.planned_epochs)

    results = run_all(methods, options.seeds, out, lambda _: settings_of(arena), work, result_line)
    write_text(out / "peers.json", json.dumps(results, indent=1))
    print("\n" + peers_table(results, options.seeds))


def epochs_of_ours(out: Path, seed: int) -> float:
    """The most epochs that one of the whole studies took with this seed; 0 if there is none yet."""
    epochs = [0.0]
    for path in (out / f"{name}-{seed}.json" for name in OURS):
        if path.exists():
            epochs.append(json.loads(path.read_text(encoding="utf-8"))["epochs"])
    return max(epochs)


def run_ours(arena: Arena, out: Path, method: str, seed: int) -> dict[str, Any]:
    """A whole study: its winner's figures are its own, measured the same way."""
    name = method.replace("autocompress", "study")
    found = run_whole_study(arena, f"{name}-{seed}", out, seed, OURS[method])
    figures = study_figures(found["summary"])
    return {
        "epochs": found["epochs"],
        "trials": found["trials"],
        "met": bool(figures),
        **figures,
    }


def run_peer(arena: Arena, method: str, seed: int, epochs: float) -> dict[str, Any]:
    """Tune another method's dial and finish the winner; `epochs` bounds all of its training."""
    config = arena.config
    fixed = method == VBMF_AS_FOUND
    before = arena.counter.epochs
    attempts = bisect_family(
        {method: FAMILIES[method][1](arena)},
        arena,
        trials=1 if fixed else config.search.trials,
        epochs=arena.recipe.epochs,
        learning_rate=arena.recipe.learning_rate,
        seed=seed,
    )
    left = epochs - (arena.counter.epochs - before)
    winner = finish(attempts, arena, epochs=left, seed=seed, anyway=fixed)
    result = {
        "epochs": arena.counter.epochs - before,
        "epochs_allowed": epochs,
        "trials": [attempt.to_dict() for attempt in attempts],
        "met": winner is not None and winner.lost <= config.delta,
    }
    if winner is not None:
        result |= describe(winner.model, arena, winner.drop)
    return result


def result_line(result: dict[str, Any]) -> str:
    """One line for a finished method."""
    keys = (*FIGURES, "epochs", "seconds")
    return str({key: round(result[key], 3) for key in keys if key in result})


def peers_table(results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """The comparison as Markdown: means over the seeds, with standard deviations."""
    header = ["method", "params", "MACs", "val drop", "test drop", "speed-up"]
    header += ["epochs", "s", "met"]
    rows = []
    for method, runs in results.items():
        name = FAMILIES[method][0] if method in FAMILIES else method
        figures = [spread([run.get(key) for run in runs]) for key in FIGURES]
        figures = [
            f"{figures[0]}x",
            f"{figures[1]}x",
            *figures[2:4],
            *(f"{f}x" for f in figures[4:]),
        ]
        effort = [spread([run[key] for run in runs], 1) for key in ("epochs", "seconds")]
        rows.append([name, *figures, *effort, f"{sum(r['met'] for r in runs)} of {len(runs)}"])
    return table(header, rows) + f"\n\nSeeds {', '.join(map(str, seeds))}."


if __name__ == "__main__":
    try:
        main()
    except AutocompressError as error:
        raise SystemExit(str(error)) from None
