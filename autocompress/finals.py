"""The end of the search: which trials are fine-tuned at length, and which network is handed out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.trial import FrozenTrial
from safetensors.torch import load_file
from torch import nn

from autocompress.checkpoint import Checkpoint
from autocompress.config import StudyConfig
from autocompress.errors import DamagedArtifact, TrainingDiverged
from autocompress.evaluation import Evaluation, evaluate
from autocompress.models import load_state
from autocompress.objective import Bench, load_trial_model
from autocompress.outlook import Outlook, rehearsals_of
from autocompress.plan import Plan
from autocompress.progress import Display
from autocompress.store import StudyFolder
from autocompress.training import fit
from autocompress.trials import has_weights, lost, stage_of, within_delta
from autocompress.weights import portable_state, save_weights, write_weights

LOST = 2.0
"""A network whose fine-tuning diverged has lost so many times what the gate allows."""
FINALS = 5
"""How many long fine-tunings there are at most, those with a second seed included."""


@dataclass(frozen=True)
class Finalist:
    """A network that may be handed out.

    Attributes:
        label: The trial that it came from.
        model: The network with its final weights.
        plan: What was done to it.
        val: Its scores on the validation data.
        drop: The drop on them that it is judged by, on the metric's scale.
        expected: The drop that new images should show: the mean of all that the plan came to. The
            better of two seeds is chosen on these very images, which flatters it.
        bound: Upper confidence bound of the expected drop.
        epochs: Length of the final fine-tuning that its weights had.
        seeds: The bounds that the final fine-tuning reached, by its seed.
    """

    label: str
    model: nn.Module
    plan: Plan
    val: Evaluation
    drop: float
    expected: float
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

    The winner was fine-tuned at length, where that is asked for, with two seeds, and the mean of
    their bounds is within delta: a plan that meets it by one seed's luck is none. Where a trial was
    within delta already, the weights that it had then are handed out if they are better, unless its
    long fine-tuning tells that it was lucky.

    Args:
        config: The study file.
        bench: The baseline, and the studies of all stages.
        folder: Keeps the fine-tuned weights.
        labelled: "<stage>/<number>" to each trial that has weights.
        display: Told about the progress.
    """
    tuned = _finals(config, bench, folder, labelled, display)
    if bench.finetune.final_epochs > 0:
        tuned.run()
    found: list[Finalist] = []
    for label in sorted(labelled, key=lambda label: labelled[label].values[1]):
        if len(found) == 2:
            break
        options, ends = tuned.networks(label), tuned.ends(label)
        mean = statistics.mean(one.bound for one in ends.values()) if ends else None
        if _stands(labelled[label], mean, config.delta):
            options = [*options, *_before(bench, label, display)]
        options = [option for option in options if option.bound <= config.delta]
        if options:
            best = min(options, key=lambda option: option.bound)
            found.append(_fair(best, ends))
    return found


def _fair(chosen: Finalist, ends: Mapping[int, Finalist]) -> Finalist:
    """The network that was chosen, and what to expect of it by all that its plan came to."""
    if not ends:
        return chosen
    expected = statistics.mean(one.drop for one in ends.values())
    bound = statistics.mean(one.bound for one in ends.values())
    if not chosen.epochs:
        expected, bound = _both(chosen.drop, expected), _both(chosen.bound, bound)
    seeds = {seed: one.bound for seed, one in ends.items()}
    return replace(chosen, expected=expected, bound=bound, seeds=seeds)


def rehearse(
    config: StudyConfig, bench: Bench, folder: StudyFolder, display: Display, again: bool = False
) -> dict[str, Any] | None:
    """Fine-tune at length what would be the first finalist now.

    That tells what the long fine-tuning wins back, and so what the other trials may lose. The
    weights are kept, so that nothing is done twice if the trial is a finalist in the end, too.

    Args:
        config: The study file.
        bench: The baseline, and the studies of all stages.
        folder: Keeps the fine-tuned weights.
        display: Told about the progress.
        again: With the second seed, if it was rehearsed with the first one.

    Returns:
        The rehearsal: "trial", its label; "before" and "after", its drop, and "bound", that of the
        drop after, both twice the gate where the fine-tuning diverged; "weights", the artifact of
        the weights if they are better than the trial's, from which its children may begin. None
        where no trial promises to come within delta, or that one was rehearsed so before.
    """
    labelled = candidates(bench)
    label = _finals(config, bench, folder, labelled, display).first()
    done = sum(one["trial"] == label for one in rehearsals_of(bench.studies))
    if label is None or done != int(again):
        return None
    finalist = _final_fit(config, bench, folder, label, config.seed + done, display)
    before = labelled[label].values[0]
    diverged = LOST * bench.finetune.gate
    found = {"trial": label, "before": before, "after": diverged, "bound": diverged}
    found["weights"] = None
    if finalist is not None:
        found |= {"after": finalist.drop, "bound": finalist.bound}
        if finalist.drop < before:
            study = bench.studies["annealing"]
            found["weights"] = save_weights(finalist.model, study, bench.store)
    return found


def standing(bench: Bench) -> tuple[float, float] | None:
    """The cheapest network that is surely within delta now: its cost, in the objective's unit, and
    what it leaves of delta, in points; None where none is.

    Of a trial that was rehearsed the better of its bounds counts, before and after.
    """
    delta = bench.delta
    found: list[tuple[float, float]] = []
    for label, trial in candidates(bench).items():
        end = bench.outlook.ends.get(label)
        bounds = [lost(trial, delta)] if _stands(trial, end, delta) else []
        bounds += [end] if end is not None and end <= delta else []
        if bounds:
            found.append((trial.values[1], min(bounds)))
    if not found:
        return None
    cost, bound = min(found)
    return cost, delta - bound


def _stands(trial: FrozenTrial, end: float | None, delta: float) -> bool:
    """Whether a trial is within delta as it is.

    Of many trials near delta some are within by luck; where one's long fine-tuning came to a bound
    (None: it had none), the mean of both must be within.
    """
    bound = lost(trial, delta)
    return within_delta(trial) and (end is None or _both(bound, end) <= delta)


def _both(own: float, end: float) -> float:
    """What a trial's own weights and its long fine-tuning tell together, of a drop or a bound."""
    return (own + end) / 2


def candidates(bench: Bench) -> dict[str, FrozenTrial]:
    """ "<stage>/<number>" to each trial of all stages that has weights."""
    return {
        f"{stage}/{trial.number}": trial
        for stage, study in bench.studies.items()
        for trial in study.get_trials(deepcopy=False)
        if has_weights(trial)
    }


class Finals:
    """Fine-tunes at length the cheapest trials that promise to come within delta by that.

    What the first ones won back tells what the next may have lost: after a success a cheaper trial
    is tried, after a failure one that lost less. When there is no cheaper one, the success is
    repeated with a second seed; if that spoils it, the search goes on.

    Args:
        labelled: "<stage>/<number>" to each trial that has weights.
        outlook: What is expected of trials.
        seed: The first seed; the second is the next number.
        tune: `tune(label, seed)` gives a trial's network after a long fine-tuning; None where that
            diverged.
    """

    def __init__(
        self,
        labelled: Mapping[str, FrozenTrial],
        outlook: Outlook,
        seed: int,
        tune: Callable[[str, int], Finalist | None],
    ) -> None:
        self._labelled, self._outlook, self._tune = labelled, outlook, tune
        self._seeds = (seed, seed + 1)
        self._tuned: dict[str, list[Finalist | None]] = {}

    def first(self) -> str | None:
        """The trial that is fine-tuned first; None where none promises to come within delta."""
        return self._next(None, sure=False)

    def run(self) -> None:
        """Spend at most `FINALS` long fine-tunings."""
        for spent in range(FINALS):
            best = min(filter(self._met, self._tuned), key=self._cost, default=None)
            label = self._next(best, sure=best is None and spent >= FINALS - 2)
            if label is None:
                if best is None or len(self._tuned[best]) == 2:
                    return
                label = best
            done = self._tuned.setdefault(label, [])
            finalist = self._tune(label, self._seeds[len(done)])
            done.append(finalist)
            if finalist is not None:
                before = self._labelled[label].values[0]
                self._outlook = self._outlook.having_seen(stage_of(label), before, finalist.drop)

    def networks(self, label: str) -> list[Finalist]:
        """The networks of a trial that met delta, with both seeds or with the one that it had."""
        return [one for one in self._tuned[label] if one] if self._met(label) else []

    def ends(self, label: str) -> dict[int, Finalist]:
        """Seed to the network that the trial came to with it, where that did not diverge."""
        done = zip(self._seeds, self._tuned.get(label, []), strict=False)
        return {seed: one for seed, one in done if one is not None}

    def _met(self, label: str) -> bool:
        done = self._tuned.get(label, [])
        bounds = [float("inf") if one is None else one.bound for one in done]
        return bool(bounds) and statistics.mean(bounds) <= self._outlook.delta

    def _cost(self, label: str) -> float:
        return float(self._labelled[label].values[1])

    def _next(self, best: str | None, sure: bool) -> str | None:
        """The cheapest trial that promises to come within delta and be clearly cheaper than `best`.

        Where `sure`, only those that were within it before.
        """
        least = float("inf") if best is None else 0.97 * self._cost(best)
        promising = [
            label
            for label, trial in self._labelled.items()
            if label not in self._tuned
            and self._cost(label) < least
            and (within_delta(trial) if sure else self._promises(label))
        ]
        return min(promising, key=self._cost, default=None)

    def _promises(self, label: str) -> bool:
        return self._outlook.shortfall(stage_of(label), self._labelled[label]) <= 0


def _finals(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    labelled: Mapping[str, FrozenTrial],
    display: Display,
) -> Finals:
    def tune(label: str, seed: int) -> Finalist | None:
        return _final_fit(config, bench, folder, label, seed, display)

    return Finals(labelled, bench.outlook, config.seed, tune)


def _before(bench: Bench, label: str, display: Display) -> list[Finalist]:
    """A trial's network as the trial left it; none if its weights can't be read any more."""
    try:
        model, plan = load_trial_model(bench, label)
    except DamagedArtifact as error:
        display.say(f"{label} is passed over: {error}")
        return []
    val = evaluate(model, bench.task, bench.task.val)
    drop, bound = bench.judge(model, val)
    return [Finalist(label, model, plan, val, drop, drop, bound)]


def _final_fit(
    config: StudyConfig,
    bench: Bench,
    folder: StudyFolder,
    label: str,
    seed: int,
    display: Display,
) -> Finalist | None:
    """A trial's network after a long fine-tuning; None if that diverged, or can't begin."""
    task, recipe = bench.task, bench.finetune
    try:
        model, plan = load_trial_model(bench, label)
    except DamagedArtifact as error:
        display.say(f"{label} is passed over: {error}")
        return None
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
        load_state(model, load_file(path))
    else:
        display.stage("final", 1)
        state = path.with_suffix(".checkpoint")

        def on_step(done: float, total: float, loss: float) -> None:
            display.step("fine-tune", done, total, f"loss {loss:.3f}")
            bench.watch.step()

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
                checkpoint=Checkpoint.in_file(state, bench.checkpoint_every),
            )
        except TrainingDiverged as error:
            state.unlink(missing_ok=True)
            display.say(f"The final fine-tuning of {label} failed: {error}")
            return None
        write_weights(path, portable_state(model))
        state.unlink(missing_ok=True)
    val = evaluate(model, task, task.val)
    drop, bound = bench.judge(model, val)
    display.say(
        f"Fine-tuned {label} for {recipe.final_epochs:g} epochs, seed {seed}: "
        f"{task.scale.value(val.score)} on validation data, a drop of at most "
        f"{task.scale.number(bound)} at confidence {config.confidence:g}"
        f"{' (in int8)' if bench.int8 else ''}."
    )
    return Finalist(label, model, plan, val, drop, drop, bound, recipe.final_epochs, {seed: bound})
