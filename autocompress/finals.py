"""The end of the search: which trials are fine-tuned at length, and which network is handed out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from optuna.trial import FrozenTrial
from safetensors.torch import load_file
from torch import nn

from autocompress.config import StudyConfig
from autocompress.errors import TrainingDiverged
from autocompress.evaluation import Evaluation, drop_bound, evaluate
from autocompress.objective import Bench, load_trial_model
from autocompress.plan import Plan
from autocompress.progress import Display
from autocompress.store import StudyFolder, portable_state, write_weights
from autocompress.training import fit
from autocompress.trials import lost, within_delta

FINALS = 3
"""How many trials are fine-tuned at length, at most; the winner once more, with a second seed."""
KEPT = 2 / 3
"""Share of what a trial lost that it loses still after a long fine-tuning, before that is known. On
a CIFAR ResNet-20 it was 0.7."""


@dataclass(frozen=True)
class Finalist:
    """A network that may be handed out.

    Attributes:
        label: The trial that it came from.
        model: The network with its final weights.
        plan: What was done to it.
        val: Its scores on the validation data.
        bound: Upper confidence bound of its drop on them, in points.
        epochs: Length of the final fine-tuning that its weights had.
        seeds: The bounds that the final fine-tuning reached, by its seed.
    """

    label: str
    model: nn.Module
    plan: Plan
    val: Evaluation
    bound: float
    epochs: float = 0.0
    seeds: Mapping[int, float] = field(default_factory=dict)


def choose_finalists(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    labelled: Mapping[str, FrozenTrial],
    display: Display,
) -> list[Finalist]:
    """The cheapest network within delta, and the second cheapest.

    The winner was fine-tuned at length with two seeds, and within delta with both: a plan that
    meets delta by one seed's luck is none. Where a trial was within delta already, the weights that
    it had then are handed out if they are better.

    Args:
        config: The study file.
        bench: The baseline, and the studies of all stages.
        folder: Keeps the fine-tuned weights.
        labelled: "<stage>/<number>" to each trial that has weights.
        display: Told about the progress.
    """
    tuned = _tune_cheapest(config, bench, folder, labelled, display)
    found: list[Finalist] = []
    for label in sorted(labelled, key=lambda label: labelled[label].values[1]):
        if len(found) == 2:
            break
        options = [tuned[label]] if label in tuned else []
        if options and not found:
            again = _final_fit(config, bench, folder, label, config.seed + 1, display)
            options = _confirmed(options[0], again, config)
        if within_delta(labelled[label]):
            options.append(_before(bench, label))
        options = [option for option in options if option.bound <= config.delta]
        if options:
            best = min(options, key=lambda option: option.bound)
            found.append(replace(best, seeds=options[0].seeds))
    return found


def _tune_cheapest(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    labelled: Mapping[str, FrozenTrial],
    display: Display,
) -> dict[str, Finalist]:
    """Fine-tune at length the cheapest trials that promise to come within delta by that.

    What the first ones kept of what they had lost tells what the next may have lost: after a
    success a cheaper trial is tried, after a failure one that lost less; in the end, if all failed,
    the cheapest that was within delta before.

    Returns:
        Label to the network, of those that came within delta.
    """
    if bench.finetune.final_epochs <= 0:
        return {}
    kept, tried, tuned = [KEPT], set[str](), dict[str, Finalist]()
    least = float("inf")
    for turn in range(FINALS + 1):
        most = config.delta / min(1.0, max(0.3, statistics.mean(kept)))
        if turn == FINALS:
            if tuned:
                break
            most = config.delta
        promising = [
            label
            for label, trial in labelled.items()
            if label not in tried and trial.values[1] < least and lost(trial, config.delta) <= most
        ]
        if not promising:
            break
        label = min(promising, key=lambda label: labelled[label].values[1])
        tried.add(label)
        finalist = _final_fit(config, bench, folder, label, config.seed, display)
        if finalist is None:
            continue
        before = lost(labelled[label], config.delta)
        if before > 0:
            kept.append(finalist.bound / before)
        if finalist.bound <= config.delta:
            tuned[label] = finalist
            least = 0.97 * labelled[label].values[1]
    return tuned


def _confirmed(first: Finalist, again: Finalist | None, config: StudyConfig) -> list[Finalist]:
    """Both networks if both are within delta, each with the bounds of both; else none."""
    if again is None or again.bound > config.delta:
        return []
    seeds = {config.seed: first.bound, config.seed + 1: again.bound}
    return [replace(one, seeds=seeds) for one in (first, again)]


def _before(bench: Bench, label: str) -> Finalist:
    """A trial's network as the trial left it."""
    model, plan = load_trial_model(bench, label)
    val = evaluate(model, bench.task, bench.task.val)
    return Finalist(label, model, plan, val, drop_bound(bench.baseline.val, val, bench.confidence))


def _final_fit(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    label: str,
    seed: int,
    display: Display,
) -> Finalist | None:
    """A trial's network after a long fine-tuning; None if that diverged."""
    task, recipe = bench.task, bench.finetune
    model, plan = load_trial_model(bench, label)
    name = "-".join(
        (
            bench.identity,
            label.replace("/", "-"),
            f"{recipe.final_epochs:g}",
            f"{recipe.final_learning_rate:g}",
            f"{seed}.safetensors",
        )
    )
    path = folder.finals / name
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        display.stage("final", 1)

        def on_step(done: float, total: float, loss: float) -> None:
            display.step("fine-tune", done, total, f"loss {loss:.3f}")

        try:
            fit(
                model,
                task,
                epochs=recipe.final_epochs,
                learning_rate=recipe.final_learning_rate,
                seed=seed,
                teacher=bench.baseline.model,
                distillation=recipe.distillation,
                on_step=on_step,
            )
        except TrainingDiverged as error:
            display.say(f"The final fine-tuning of {label} failed: {error}")
            return None
        write_weights(path, portable_state(model))
    val = evaluate(model, task, task.val)
    bound = drop_bound(bench.baseline.val, val, bench.confidence)
    display.say(
        f"Fine-tuned {label} for {recipe.final_epochs:g} epochs, seed {seed}: {val.accuracy:.2f} % "
        f"on validation data, a drop of at most {bound:.2f} at confidence {config.confidence:g}."
    )
    return Finalist(label, model, plan, val, bound, recipe.final_epochs, {seed: bound})
