"""Compare the search with simpler ones: same network, data, trials and fine-tuning of each trial.

    python scripts/bench_search.py quickstart --seeds 0 1 2
    python scripts/bench_search.py cifar10-resnet20 --images CIFAR10_FOLDER --weights resnet20.th \
        --trials 30 --flat-trials 300 --seeds 0 1 2

The methods: `uniform` gives every layer one transform at one share of its rank, bisected, the
transforms by turns; `allocator` bisects the budget of the study's own knapsack; `random`, `tpe` and
`gp` are Optuna's samplers over the raw parameters of every layer; `tpe-long` is `tpe` with
`--flat-trials`; `exploration` is the study's first stage alone; `both` is the whole study, half of
the same epochs for each stage, so that it has fewer, longer trials. Their networks are compared
as the trials left them, on validation data. Then each method's winner gets the long fine-tuning
(`--final-epochs 0`: none, which also makes the annealing's trials as short as the others), and test
data is read once. A finished run is kept in --out, and the same command goes on with the others, in
the middle of a study, too. Seeds are those of search and training; baseline and split are the same
for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arena import (
    Arena,
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
from opponents import allocator, uniform

from autocompress.artifacts import write_text
from autocompress.conductor import annealing_length
from autocompress.config import StudyConfig
from autocompress.errors import AutocompressError
from autocompress.training import Recipe

METHODS = {
    "uniform": "uniform ranks, best transform",
    "allocator": "allocator alone",
    "random": "random search",
    "tpe": "flat TPE",
    "gp": "flat GP",
    "tpe-long": "flat TPE, long",
    "exploration": "exploration only",
    "both": "exploration and annealing",
}
BY_DEFAULT = ("uniform", "allocator", "random", "tpe", "exploration", "both")
FLAT = {"random": "random", "tpe": "tpe", "gp": "gp", "tpe-long": "tpe"}
POINTS = (0.25, 0.5, 1.0)
"""Shares of the common epochs at which the table shows the best network so far."""


def main() -> None:
    """Run the methods that the command line names and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None)
    parser.add_argument("--flat-trials", type=int, help="also run flat TPE for this many trials")
    options = parser.parse_args()
    methods = options.methods or [*BY_DEFAULT, *(["tpe-long"] if options.flat_trials else [])]
    if "tpe-long" in methods and not options.flat_trials:
        parser.error("--methods tpe-long needs --flat-trials")
    arena, out = start(options)

    def work(method: str, seed: int) -> dict[str, Any]:
        if method in ("uniform", "allocator"):
            return run_family(arena, method, seed)
        own = stages(arena.config, method, options.flat_trials)
        return run_search(arena, f"{method}-{seed}", out, seed, own)

    def settings(method: str) -> dict[str, Any]:
        flat = {"flat trials": options.flat_trials} if method == "tpe-long" else {}
        return settings_of(arena) | flat

    def shown(result: dict[str, Any]) -> str:
        best = best_after(result["trials"])
        return f"best within delta: {best and round(best, 2)}"

    results = run_all(methods, options.seeds, out, settings, work, shown)
    write_text(out / "search.json", json.dumps(results, indent=1))
    print("\n" + search_table(results, arena.config, options.seeds))


def stages(config: StudyConfig, method: str, flat_trials: int | None) -> dict[str, Any]:
    """Settings of a study for one method, with the same epochs for all but "tpe-long"."""
    trials = config.search.trials
    if method in FLAT:
        count = flat_trials if method == "tpe-long" else trials
        return {
            "search.sampler": FLAT[method],
            "search.trials": count,
            "search.annealing_trials": 0,
        }
    if method == "exploration":
        return {"search.annealing_trials": 0}
    first = max(1, trials // 2)
    recipe = Recipe.from_config(config.finetune)
    left = (trials - first) * recipe.epochs
    slack = 0.5 * recipe.epochs
    second = max(n for n in range(trials + 1) if annealing_length(recipe, n) <= left + slack)
    own = {"search.trials": first, "search.annealing_trials": max(1, second)}
    return own | {"search.extra_trials": 0}


def run_family(arena: Arena, method: str, seed: int) -> dict[str, Any]:
    """Bisect the budget of networks with one dial, as many trials as the others have."""
    finetune, search = arena.recipe, arena.config.search
    before = arena.counter.epochs
    if method == "allocator":
        families = {method: allocator(arena, search.channels)}
    else:
        families = {name: uniform(arena, name) for name in search.transforms}
    attempts = bisect_family(
        families,
        arena,
        trials=search.trials,
        epochs=finetune.epochs,
        learning_rate=finetune.learning_rate,
        seed=seed,
    )
    spent = arena.counter.epochs - before
    # As in a study: the winner's fine-tuning, and at most two in vain.
    winner = finish(attempts, arena, epochs=3 * finetune.final_epochs, seed=seed)
    result: dict[str, Any] = {
        "trials": [
            {
                "ratio": 1 / attempt.share,
                "drop": attempt.drop,
                "within": attempt.lost <= arena.config.delta,
                "epochs": attempt.epochs,
                "family": attempt.family,
            }
            for attempt in attempts
        ],
        "search_epochs": spent,
        "epochs": arena.counter.epochs - before,
    }
    return result | (describe(winner.model, arena, winner.drop) if winner is not None else {})


def run_search(
    arena: Arena, name: str, out: Path, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """A study with these settings; its figures are those of its winner."""
    found = run_whole_study(arena, f"study-{name}", out, seed, settings)
    trials = found["trials"]
    return {
        "trials": trials,
        "search_epochs": trials[-1]["epochs"] if trials else 0.0,
        "epochs": found["epochs"],
        **study_figures(found["summary"]),
    }


def best_after(trials: list[dict[str, Any]], epochs: float = float("inf")) -> float | None:
    """The best ratio within delta among the trials that ended within so many epochs."""
    return max((t["ratio"] for t in trials if t["within"] and t["epochs"] <= epochs), default=None)


def search_table(
    results: dict[str, list[dict[str, Any]]], config: StudyConfig, seeds: list[int]
) -> str:
    """The comparison as Markdown: means over the seeds, with standard deviations."""
    recipe = Recipe.from_config(config.finetune)
    common = config.search.trials * recipe.epochs
    header = [
        "search",
        "trials",
        "epochs",
        *(f"{config.objective} after {point * common:g} epochs" for point in POINTS),
        "after all",
        "finished: params",
        "MACs",
        "val drop",
        "test drop",
    ]
    rows = []
    for method, runs in results.items():
        # The steps before a study's first trial must not push the last one over the line.
        slack = 0.5 * recipe.epochs
        limits = [*(point * common + slack for point in POINTS), float("inf")]
        curve = [
            spread([best_after(run["trials"], epochs=limit) for run in runs]) for limit in limits
        ]
        keys = ("params_ratio", "macs_ratio", "val_drop", "test_drop")
        final = [spread([run.get(key) for run in runs]) for key in keys]
        effort = [spread([len(run["trials"]) for run in runs], 0)]
        effort.append(spread([run["search_epochs"] for run in runs], 1))
        rows.append([METHODS[method], *effort, *curve, *final])
    return table(header, rows) + f"\n\nSeeds {', '.join(map(str, seeds))}; ratios within delta."


if __name__ == "__main__":
    try:
        main()
    except AutocompressError as error:
        raise SystemExit(str(error)) from None
