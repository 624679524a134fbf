"""A trial of the finals: the network of a trial of the search, fine-tuned as long as the winner."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.artifacts import remove_artifact
from autocompress.distributed import share
from autocompress.objective import (
    Bench,
    Stopwatch,
    checkpoint_of,
    find_trial,
    keep_fitted,
    load_trial_model,
    see_through,
)
from autocompress.store import FINALS
from autocompress.training import fit
from autocompress.trials import CHECKPOINT, LENGTH, PARENT, RATE, SEED


def run_long_trial(bench: Bench, trial: Trial) -> FrozenTrial | None:
    """Carry out a long fine-tuning that was ordered, and tell its study how it went, as
    `see_through`."""
    try:
        return see_through(bench, trial, FINALS, lambda: (_carry_out(bench, trial), None))
    finally:
        bench.display.step("", 0, 0)


def _carry_out(bench: Bench, trial: Trial) -> tuple[float, float]:
    """The values (drop, cost); the cost is that of the trial whose network it is."""
    watch = Stopwatch()
    label = trial.user_attrs[PARENT]
    model, plan = load_trial_model(bench, label)
    checkpoint = checkpoint_of(bench, trial)
    watch.lap("build")

    def on_step(done: float, total: float, loss: float) -> None:
        bench.show(f"fine-tune {label} at length", done, total, f"loss {loss:.3f}")
        bench.watch.step()

    bench.watch.step()
    job: dict[str, Any] = {
        "epochs": trial.user_attrs[LENGTH],
        "learning_rate": trial.user_attrs[RATE],
        "distillation": bench.finetune.distillation,
        "seed": trial.user_attrs[SEED],
    }
    # The other processes of a group, which know nothing of trials, train along.
    share({"plan": plan.to_json(), "fit": job, "rungs": ()})
    result = fit(
        model,
        bench.task,
        teacher=bench.baseline.model,
        answers=bench.answers,
        on_step=on_step,
        checkpoint=checkpoint,
        **job,
    )
    watch.lap("finetune")
    after, drop, bound = keep_fitted(bench, trial, model, result, watch)
    remove_artifact(trial.user_attrs.get(CHECKPOINT), bench.store)
    watch.lap("store")
    trial.set_user_attr("metrics", {"score": after.score, "drop": drop, "drop_bound": bound})
    trial.set_user_attr("seconds", watch.seconds)
    return drop, find_trial(bench.studies, label).values[1]


def announce_long(bench: Bench, trial: FrozenTrial) -> None:
    """Count an ended one, and say how it went."""
    bench.display.long_fit_ended()
    label, attrs = trial.user_attrs[PARENT], trial.user_attrs
    if trial.state != TrialState.COMPLETE:
        bench.display.say(f"The long fine-tuning of {label} failed: {attrs.get('reason')}")
        return
    scale, metrics = bench.task.scale, attrs["metrics"]
    bench.display.say(
        f"Fine-tuned {label} for {attrs[LENGTH]:g} epochs, seed {attrs[SEED]}: "
        f"{scale.value(metrics['score'])} on validation data, a drop of at most "
        f"{scale.number(metrics['drop_bound'])} at confidence {bench.confidence:g}"
        f"{' (in int8)' if bench.int8 else ''}."
    )
