"""The ground on which methods of compression are compared: one start, one treatment, one count.

Every method starts from the same trained network, sees the same images through the same `Task`, and
trains through the same `fit`. What it spends is counted at the training loader itself, so nobody's
epochs are hidden. Methods with a single dial (a rank fraction, a pruning ratio, a budget) are tuned
by `bisect_family` and finished by `finish`, as a study tunes and finishes its own trials.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from measure import places, speedup
from torch import nn

from autocompress.answers import Answers
from autocompress.artifacts import write_text
from autocompress.baseline import Baseline, train_baseline
from autocompress.batch import Batch
from autocompress.conductor import annealing_length, run_study
from autocompress.config import StudyConfig, bound_settings, flatten, load_config, parse_config
from autocompress.costs import spend
from autocompress.errors import ConfigError, TrainingDiverged
from autocompress.evaluation import (
    Evaluation,
    drop_bound,
    evaluate,
    metric_drop,
    paired_drop,
    recalibrate,
)
from autocompress.latency import Deployment, LatencyMeter
from autocompress.layers import LayerSpec, inspect_layers
from autocompress.profiler import Profile, profile_model
from autocompress.progress import Display, NullDisplay, make_display
from autocompress.recipes import recipe_of
from autocompress.sources import task_from_config
from autocompress.tally import NO_FACTS, Facts
from autocompress.task import Loader, Task
from autocompress.training import Recipe, fastest_precision, fit
from autocompress.weights import state_digest

FIRST_BUDGET = 0.25
"""Share of the baseline's cost at which a bisection begins, as a study's own seeds do."""
PLAUSIBLE = 2.5
"""A network that lost at most this many times delta may come within it by the long fine-tuning."""
LEAST_DIAL = 1 / 32
"""Where a family's cheapest network is."""
NARROW = 0.97
"""A bracket narrower than this is finished; what is left of the trials tries luck just below it."""


class CountedLoader:
    """A loader that counts the batches it gives, and else is the loader it wraps."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.given = 0

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.given / max(1, len(self.loader))

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.given += 1
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@dataclass
class Arena:
    """What all methods of one comparison share.

    Attributes:
        config: The study file with the command line's settings.
        task: Network and data; its training loader counts.
        baseline: The trained network, its validation scores and costs.
        example: The network's inputs for one image.
        layers: Its layers, in execution order.
        answers: What the network answered to training images by now.
    """

    config: StudyConfig
    task: Task
    baseline: Baseline
    example: tuple[Any, ...]
    layers: tuple[LayerSpec, ...]
    answers: Answers = field(default_factory=Answers)

    @property
    def counter(self) -> CountedLoader:
        """Counts the epochs of everything that trains."""
        assert isinstance(self.task.train, CountedLoader)
        return self.task.train

    @property
    def recipe(self) -> Recipe:
        """How every method's networks are fine-tuned."""
        return Recipe.from_config(self.config.finetune)

    @property
    def planned_epochs(self) -> float:
        """Epochs of a whole study, the winner's included, if no trial stops early."""
        search, recipe = self.config.search, self.recipe
        annealing = annealing_length(recipe, search.annealing_trials)
        # The winner is fine-tuned with two seeds.
        return search.trials * recipe.epochs + annealing + 2 * recipe.final_epochs

    def cost(self, profile: Profile) -> int:
        """What the study makes small; time that nobody measured is spent in MACs."""
        return spend(self.config.objective, profile.cost, self.baseline.profile.cost)

    @cached_property
    def meter(self) -> LatencyMeter:
        """Times networks beside the baseline on the study's runtime."""
        deployment = Deployment.from_config(self.config.latency)
        return LatencyMeter(self.baseline.model, self.example, deployment)

    def speedup(self, model: nn.Module) -> float:
        """How many times as fast a network is there; NaN where that can't be told."""
        try:
            return self.meter.speedup(self.meter.measure(model, seconds=2.0))
        except Exception:
            # Exporters and runtimes fail in more ways than can be named.
            return math.nan

    def share(self, model: nn.Module) -> float:
        """The network's cost as a share of the baseline's."""
        profile = profile_model(model, self.example, latency=False)
        return self.cost(profile) / self.cost(self.baseline.profile)


def open_arena(config: StudyConfig, display: Display) -> Arena:
    """Load the data and train the baseline, or load the one that was trained before."""
    return make_arena(config, task_from_config(config), display)


def make_arena(config: StudyConfig, task: Task, display: Display) -> Arena:
    """Train the task's network as the study file says and look at it once for all methods."""
    task.model.to(task.device)
    task.amp_dtype = fastest_precision(task)
    recipe = recipe_of(config, given=config.model.weights is not None)
    train_baseline(task, recipe, config.seed, display)
    task.model.eval()
    # What only looks at training images must not count as training.
    task = replace(task, train=CountedLoader(task.train), calibration=task.calibrating)
    example = task.example()
    val = evaluate(task.model, task, task.val)
    profile = replace(profile_model(task.model, example, latency=False), score=val.score)
    baseline = Baseline(task.model, val, profile, state_digest(task.model.state_dict()))
    layers, _ = inspect_layers(
        task.model, example, include=config.search.include, exclude=config.search.exclude
    )
    return Arena(config, task, baseline, example, layers)


@dataclass
class Attempt:
    """One network of a family and what it came to.

    Attributes:
        model: The network with its fine-tuned weights.
        family: Which family it is of.
        budget: Share of the baseline's cost that was asked for.
        share: Share that it costs.
        drop: Accuracy drop on validation data, in points.
        lost: Its upper confidence bound, by which it is within delta or not, as in a study.
        epochs: Epochs that the method had spent by then.
    """

    model: nn.Module
    family: str
    budget: float
    share: float
    drop: float
    lost: float
    epochs: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, for JSON."""
        return {k: v for k, v in vars(self).items() if k != "model"}


Make = Callable[[float], nn.Module]
"""A family: `make(dial)` gives a network, the cheaper the smaller `dial`, which is in (0, 1]."""


def spend_budget(make: Make, share: Callable[[nn.Module], float], budget: float) -> nn.Module:
    """The dearest network of a family whose share of the cost is at most `budget`.

    Where even the cheapest costs more, that one. The dial is bisected; nothing is trained.
    """
    low, high = LEAST_DIAL, 1.0
    found = None
    for _ in range(12):
        middle = (low + high) / 2
        model = make(middle)
        if share(model) <= budget:
            low, found = middle, model
        else:
            high = middle
    return make(LEAST_DIAL) if found is None else found


def next_budget(tried: Sequence[tuple[float, bool]], floor: float) -> float:
    """The next budget of a bisection for the least one within delta.

    Args:
        tried: Share of the cost and whether it stayed within delta, so far.
        floor: The family's least share.
    """
    if not tried:
        return max(FIRST_BUDGET, floor)
    least = min((share for share, within in tried if within), default=1.0)
    missed = [share for share, within in tried if not within and share < least]
    most = max(missed, default=floor)
    if most > NARROW * least:
        # Training is noisy: another network just below may do what this neighbour did not.
        most = 0.85 * least
    return math.sqrt(least * most)


def bisect_family(
    families: Mapping[str, Make],
    arena: Arena,
    *,
    trials: int,
    epochs: float,
    learning_rate: float,
    seed: int,
) -> list[Attempt]:
    """Spend a number of short fine-tunings on families of networks, turn by turn.

    Each attempt is built within a budget, recalibrated, fine-tuned and scored on validation data;
    the budgets of each family are bisected for the least one within delta.

    Args:
        families: Name to family; they share the trials evenly.
        arena: Network, data and baseline.
        trials: Number of attempts in all.
        epochs: Length of each, in passes over the training data.
        learning_rate: Peak of its schedule.
        seed: Fixes the training.
    """
    attempts: list[Attempt] = []
    start = arena.counter.epochs
    floors = {name: arena.share(make(LEAST_DIAL)) for name, make in families.items()}
    for number in range(trials):
        name = list(families)[number % len(families)]
        tried = [(a.share, a.lost <= arena.config.delta) for a in attempts if a.family == name]
        budget = next_budget(tried, floors[name])
        model = spend_budget(families[name], arena.share, budget).to(arena.task.device)
        recalibrate(model, arena.task)
        drop, lost = tune(model, arena, epochs, learning_rate, seed + 1000 * number)
        spent = arena.counter.epochs - start
        attempts.append(Attempt(model, name, budget, arena.share(model), drop, lost, spent))
        print(f"{name} {number}: {1 / attempts[-1].share:.2f}x, drop {drop:.2f}", flush=True)
    return attempts


def tune(
    model: nn.Module, arena: Arena, epochs: float, learning_rate: float, seed: int
) -> tuple[float, float]:
    """Fine-tune a network in place as a study does.

    Returns:
        Its accuracy drop on validation data and the upper confidence bound of that, in points.

    Training that diverges counts as a loss of everything.
    """
    try:
        fit(
            model,
            arena.task,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            teacher=arena.baseline.model,
            answers=arena.answers,
            distillation=arena.config.finetune.distillation,
        )
    except TrainingDiverged:
        return 100.0, 100.0
    base, after = arena.baseline.val, evaluate(model, arena.task, arena.task.val)
    return metric_drop(base, after), drop_bound(base, after, arena.config.confidence)


def losses(arena: Arena, model: nn.Module, seed: int) -> tuple[float, float]:
    """Accuracy drop after recalibration and after fine-tuning, in points of validation data."""
    task, recipe = arena.task, arena.recipe
    recalibrate(model.to(task.device), task)
    before = metric_drop(arena.baseline.val, evaluate(model, task, task.val))
    return before, tune(model, arena, recipe.epochs, recipe.learning_rate, seed)[0]


def finish(
    attempts: Sequence[Attempt], arena: Arena, *, epochs: float, seed: int, anyway: bool = False
) -> Attempt | None:
    """Fine-tune the cheapest plausible network at length; the milder ones where it misses delta.

    An attempt that was within delta already keeps its weights where the long fine-tuning, or what
    is left to spend on it, does not help.

    Args:
        attempts: From `bisect_family`.
        arena: Network, data and baseline.
        epochs: What may be spent; each network takes `finetune.final_epochs` of it.
        seed: Fixes the training.
        anyway: Whether the first network is taken, within delta or not.

    Returns:
        The cheapest network within delta; None if there is none.
    """
    recipe, delta = arena.recipe, arena.config.delta
    start = arena.counter.epochs
    plausible = [a for a in attempts if anyway or a.lost <= PLAUSIBLE * delta]
    # A network that costs the same as another and lost more has no chance beside it.
    order = sorted(plausible, key=lambda a: (round(a.share, 3), a.lost))
    distinct = {round(a.share, 3): a for a in reversed(order)}
    for attempt in sorted(distinct.values(), key=lambda a: a.share):
        long = 0 < recipe.final_epochs <= epochs - (arena.counter.epochs - start) + 1e-6
        if long:
            model = deepcopy(attempt.model)
            drop, lost = tune(model, arena, recipe.final_epochs, recipe.final_learning_rate, seed)
            if lost <= max(delta, attempt.lost):
                attempt = replace(attempt, model=model, drop=drop, lost=lost)
        if anyway or attempt.lost <= delta:
            return attempt
    return None


def describe(model: nn.Module, arena: Arena, val_drop: float) -> dict[str, Any]:
    """The figures of a method's final network. Reads the test data: once for each method."""
    profile = profile_model(model, arena.example, latency=False)
    task = arena.task
    reference: Evaluation = evaluate(arena.baseline.model, task, task.test)
    drop, low, high = paired_drop(reference, evaluate(model, task, task.test))
    full = arena.baseline.profile
    return {
        "params_ratio": full.params / profile.params,
        "macs_ratio": full.macs / profile.macs,
        "latency_ratio": arena.speedup(model),
        "val_drop": val_drop,
        "test_drop": drop,
        "test_drop_interval": [low, high],
    }


class TrialLog(NullDisplay):
    """Writes a line for each trial of a study: the best ratio so far and the epochs so far.

    Args:
        path: The file; a study that goes on adds to it.
        counter: Counts the epochs.
    """

    def __init__(self, path: Path, counter: CountedLoader) -> None:
        self._path = path
        self._counter = counter
        self._start = counter.epochs
        lines = self.lines()
        self._before = float(lines[-1]["epochs"]) if lines else 0.0

    @property
    def epochs(self) -> float:
        """Epochs of the whole study, the earlier runs' included."""
        return self._before + self._counter.epochs - self._start

    def lines(self) -> list[dict[str, Any]]:
        """What was written so far."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
        facts: Facts = NO_FACTS,
    ) -> None:
        """Write the trial's line."""
        line = {
            "ratio": cost_ratio,
            "drop": drop,
            "within": feasible,
            "state": state,
            "epochs": self.epochs,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_whole_study(
    arena: Arena, name: str, out: Path, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Run autocompress itself on the arena's network; the same call goes on with it.

    Args:
        arena: Network, data and baseline.
        name: Name of the study's folder.
        out: Where that folder is made.
        seed: Of proposals and training; network and data are the arena's.
        settings: What differs from the study file, by dotted key.

    Returns:
        `summary`: the content of `result.json`; `trials`: a line for each trial; `epochs` spent.
    """
    fields = {"name": name, "seed": seed, "run.out": str(out), "baseline.epochs": 0.0}
    fields |= {"run.workers": 0}  # what other processes learn from is not counted
    config = override(arena.config, {**fields, **settings})
    (out / name).mkdir(parents=True, exist_ok=True)
    log = TrialLog(out / name / "trials.jsonl", arena.counter)
    with log:
        outcome = run_study(config, arena.task, log, "scripts")
    return {"summary": dict(outcome.summary), "trials": log.lines(), "epochs": log.epochs}


def study_figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `describe`, of a study's winner; empty if it has none."""
    best = summary["best"]
    if best is None:
        return {}
    before, after = summary["baseline"]["profile"], best["profile"]
    return {
        "params_ratio": before["params"] / after["params"],
        "macs_ratio": before["macs"] / after["macs"],
        "latency_ratio": speedup(before, after),
        **{key: best[key] for key in ("val_drop", "test_drop", "test_drop_interval")},
    }


def override(config: StudyConfig, settings: Mapping[str, Any]) -> StudyConfig:
    """`config` with settings replaced, by dotted key, and checked again."""
    return parse_config({**flatten(config.model_dump()), **settings})


def remember(
    path: Path, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of `work`, or the one that an earlier run wrote to `path`.

    Raises:
        ConfigError: If that was made with other settings.
    """
    given = json.loads(json.dumps(settings))
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # A setting that is new since then, and not used, changes nothing.
        changed = [
            k for k in {**kept["settings"], **given} if kept["settings"].get(k) != given.get(k)
        ]
        if changed:
            raise ConfigError(
                f"{path} was made with other settings ({', '.join(changed)}); give another --out, "
                "or delete it."
            )
        return kept
    start = time.perf_counter()
    result = {**work(), "seconds": round(time.perf_counter() - start, 1), "settings": given}
    write_text(path, json.dumps(result, indent=1))
    return result


def run_all(
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    settings: Callable[[str], Mapping[str, Any]],
    work: Callable[[str, int], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> dict[str, list[dict[str, Any]]]:
    """Run every method with every seed, save what earlier runs have finished.

    Args:
        methods: Their names.
        seeds: Of search and training.
        out: Where finished results are kept.
        settings: What a method's kept result stands for.
        work: `work(method, seed)` gives a result.
        line: What is printed of a result.

    Returns:
        Method to its results, in the order of the seeds.
    """
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            print(f"## {method}, seed {seed}", flush=True)
            path = out / f"{method}-{seed}.json"
            results[method].append(remember(path, settings(method), partial(work, method, seed)))
            print(line(results[method][-1]), flush=True)
    return results


def settings_of(arena: Arena) -> dict[str, Any]:
    """What a kept result stands for: the study's settings, data and weights."""
    # Budgets are free in a study, which may be continued with others; in a comparison they are not.
    search, recipe = arena.config.search, arena.recipe
    budgets = {
        "search.trials": search.trials,
        "search.annealing_trials": search.annealing_trials,
        "finetune.final_epochs": recipe.final_epochs,
        "finetune.final_learning_rate": recipe.final_learning_rate,
    }
    return {**bound_settings(arena.config), **budgets, "baseline": arena.baseline.digest}


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and, of two or more, standard deviation; how many are missing, if any."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" +/- {statistics.stdev(known):.{digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parser_of(text: str) -> argparse.ArgumentParser:
    """The options that both comparisons have."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("study", help="study file or name of a ready study")
    parser.add_argument("--images", help="folder of the images: IDX files, or train/ and test/")
    parser.add_argument("--weights", help="checkpoint of the network")
    parser.add_argument("--out", default="runs/bench", help="folder of everything that is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of search and training")
    parser.add_argument("--trials", type=int, help="search.trials")
    parser.add_argument("--epochs", type=float, help="finetune.epochs: of each short fine-tuning")
    parser.add_argument("--final-epochs", type=float, help="finetune.final_epochs")
    parser.add_argument("--annealing-trials", type=int, help="search.annealing_trials")
    parser.add_argument("--delta", type=float, help="tolerated accuracy drop, in points")
    parser.add_argument("--objective", help="the cost to make small, e.g. params+macs")
    return parser


def read_config(options: argparse.Namespace) -> StudyConfig:
    """The study that the command line names, with its options."""
    settings: dict[str, Any] = {
        "search.trials": options.trials,
        "search.annealing_trials": options.annealing_trials,
        "finetune.epochs": options.epochs,
        "finetune.final_epochs": options.final_epochs,
        "delta": options.delta,
        "objective": options.objective,
        **places(options.images, options.weights),
    }
    config = load_config(options.study, settings)
    if config.finetune.epochs is None or config.finetune.learning_rate is None:
        raise ConfigError(
            f"{options.study} leaves finetune.epochs or finetune.learning_rate to a probe, which "
            "the other methods have not got; give numbers."
        )
    return config


def start(options: argparse.Namespace) -> tuple[Arena, Path]:
    """The arena that the command line names, and the folder for its results."""
    config = read_config(options)
    with make_display() as display:
        arena = open_arena(config, display)
    profile = arena.baseline.profile
    print(
        f"{config.name}: {arena.baseline.val.score:.2f} % on validation data, "
        f"{profile.params / 1e6:.3f} M params, {profile.macs / 1e6:.1f} M MACs"
    )
    return arena, Path(options.out) / config.name
