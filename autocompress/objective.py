"""One trial, from top to bottom: plan, build, recalibrate, gate, fine-tune, evaluate, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from traceback import format_exception
from typing import Any

import torch
from optuna.artifacts._protocol import ArtifactStore
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor, nn

from autocompress.answers import Answers
from autocompress.artifacts import fetch_file, put_file, remove_artifact, save_text
from autocompress.baseline import Baseline
from autocompress.checkpoint import Checkpoint
from autocompress.costs import OBJECTIVES, cost_of, is_timed, share_of
from autocompress.database import write_proposal
from autocompress.distributed import share
from autocompress.errors import DISK_FULL, AutocompressError, DamagedArtifact, DatabaseLost
from autocompress.evaluation import (
    Evaluation,
    drop_bound,
    evaluate,
    metric_drop,
    recalibrate,
)
from autocompress.exhibits import trial_files, trial_name
from autocompress.facts import costs_of, facts_of
from autocompress.gates import RUNGS, Gate, Record
from autocompress.inheritance import Elder
from autocompress.latency import LatencyMeter
from autocompress.longfits import LongFit, long_fits
from autocompress.models import load_state
from autocompress.news import Phase
from autocompress.observation import Observations
from autocompress.outlook import EPOCHS, Outlook, outlook_of
from autocompress.plan import Plan
from autocompress.profiler import Profile, profile_model
from autocompress.progress import Display
from autocompress.quantization import Quantizer
from autocompress.samplers import trial_seed
from autocompress.slots import cut_off
from autocompress.space import SearchSpace
from autocompress.store import FINALS, STAGES
from autocompress.surgery import FactorCache, apply_plan, build_plan
from autocompress.task import Task
from autocompress.training import FitResult, Recipe, fit
from autocompress.trials import (
    CHECKPOINT,
    EARLY,
    NAME,
    PARENT,
    RATIO,
    SEED,
    TRACEBACK,
    WEIGHTS,
    has_weights,
    lost,
    set_constraint,
    within_delta,
)
from autocompress.watch import TrialTaken, Watch
from autocompress.weights import fetch_weights, save_weights

logger = logging.getLogger("autocompress")

RECALIBRATION_BATCHES = 50
WORK = ("audition", "recalibrate", "gate", "finetune", "evaluate")
"""Phases of a trial in which images go through its network; all else is overhead."""

UPLOAD_PAUSES = (5.0, 20.0, 60.0, 120.0)
"""Seconds after which an upload of weights that failed is tried again."""
MOST_OF_TRACEBACK = 8000
"""Characters of a failed trial's traceback that the database keeps: its end says the most."""
LATENCY = "latency"
"""User attribute of a trial: its latency, beside the baseline's, as `LatencyMeter.measure` says."""


@dataclass
class Bench:
    """All that a trial needs, made once per process.

    Attributes:
        task: The user's data and functions.
        baseline: The network to compress.
        example: Its inputs for one image.
        cache: Factorizations of the baseline's layers.
        observations: Real inputs of the layers, and derivatives at their outputs.
        finetune: Length, learning rate, distillation and gate.
        delta: The tolerance, on the metric's scale.
        confidence: How sure it must be that the drop is within it.
        objective: Key of `costs.OBJECTIVES`.
        seed: The study's seed.
        store: Optuna's artifact store.
        identity: Ties what is kept in the study's folder to the study.
        display: Told about the progress.
        rejected_as_complete: Whether trials of the exploration that the gate stops are told as
            complete.
        studies: The Optuna studies of the search by stage; a child finds its parent there.
        finals: The Optuna study of the long fine-tunings, as soon as there is one.
        meter: Times networks on the runtime that the study names; None where the baseline doesn't
            run there, which only a study of latency can't do without.
        annealed: Whether an annealing follows the exploration.
        int8: Whether networks are judged by their int8 files.
        watch: Asked at each step whether the trial should go on.
        checkpoint_every: Seconds between two checkpoints of a trial.
        doing: What it does at the moment.
        auditions: Seconds that children have been compared for since the trial began.
        answers: What the baseline answered to training images by now.
    """

    task: Task
    baseline: Baseline
    example: tuple[Tensor, ...]
    cache: FactorCache
    observations: Observations
    finetune: Recipe
    delta: float
    confidence: float
    objective: str
    seed: int
    store: ArtifactStore
    identity: str
    display: Display
    rejected_as_complete: bool = False
    studies: dict[str, Study] = field(default_factory=dict)
    finals: Study | None = None
    meter: LatencyMeter | None = None
    annealed: bool = False
    int8: bool = False
    watch: Watch = field(default_factory=Watch)
    checkpoint_every: float = 180.0
    doing: Phase | None = None
    auditions: float = 0.0
    answers: Answers = field(default_factory=Answers)

    def show(self, phase: str, done: float = 0.0, total: float = 0.0, note: str = "") -> None:
        """Tell the display, and those who look from elsewhere, what is done at the moment."""
        self.doing = (phase, done, total, note)
        self.display.step(phase, done, total, note)

    @property
    def quantizer(self) -> Quantizer:
        """Makes int8 files, and measures them against the baseline."""
        return Quantizer(self.task, self.baseline.val, self.example, self.delta, self.confidence)

    def judge(self, model: nn.Module, val: Evaluation) -> tuple[float, float]:
        """The drop that a network is judged by, and its upper bound.

        Args:
            model: The network.
            val: Its own scores on the validation data; those of its int8 file count instead where
                the study asks for that.
        """
        if self.int8:
            val = self.quantizer.score(model)
        drop = metric_drop(self.baseline.val, val)
        return drop, drop_bound(self.baseline.val, val, self.confidence)

    @property
    def outlook(self) -> Outlook:
        """What is expected of trials, by all that the study has seen by now."""
        return outlook_of(self.studies, self.finetune, self.delta, self.annealed, self.long_fits)

    @property
    def all_studies(self) -> dict[str, Study]:
        """The Optuna studies by stage, that of the long fine-tunings last."""
        return self.studies | ({} if self.finals is None else {FINALS: self.finals})

    @property
    def long_fits(self) -> list[LongFit]:
        """The long fine-tunings that have ended by now."""
        if self.finals is None:
            return []
        return long_fits(self.finals, self.studies, self.delta, self.finetune.gate)

    def epochs(self, stage: str) -> float:
        """Passes over the training data in each trial of a stage."""
        return float(self.studies[stage].user_attrs.get(EPOCHS, self.finetune.epochs))


class Stopwatch:
    """Seconds by phase; each `lap` gives the time since the last one to a phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 4)
        self._last = now

    def give(self, phase: str, other: str, seconds: float) -> None:
        """Give some of a phase's time to another."""
        if seconds:
            self.seconds[phase] = round(self.seconds[phase] - seconds, 4)
            self.seconds[other] = round(self.seconds.get(other, 0.0) + seconds, 4)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long the block takes, in seconds."""
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 2)


def run_trial(bench: Bench, stage: str, space: SearchSpace, trial: Trial) -> FrozenTrial | None:
    """Carry out a trial of a stage's study, and tell the study how it went, as `see_through`."""
    bench.display.trial_started(trial.number)
    return see_through(bench, trial, stage, lambda: _carry_out(bench, stage, space, trial))


def see_through(
    bench: Bench,
    trial: Trial,
    stage: str,
    work: Callable[[], tuple[tuple[float, float], str | None]],
) -> FrozenTrial | None:
    """Carry out a trial, and tell its study how it went.

    Every end is recorded: complete; stopped at the gate (PRUNED, with the constraint's value; or
    complete in an exploration whose sampler learns only from those); failed with its reason. A
    trial that is interrupted from outside is marked so, does not count, and the interruption goes
    on.

    Args:
        bench: All that it needs.
        trial: The trial.
        stage: Its stage, for the log.
        work: Carries it out; gives its values and, if it was stopped at the gate, the reason.

    Returns:
        The ended trial; None where others have ended it, who took this process for dead.

    Raises:
        AutocompressError: If the disk is full. The trial doesn't count then.
    """
    study = trial.study
    values: tuple[float, float] | None = None
    reason: str | None = None
    state = TrialState.COMPLETE
    try:
        try:
            values, reason = work()
            learns = stage == "exploration" and bench.rejected_as_complete
            if reason is not None and not learns:
                state = TrialState.PRUNED
        except (UpdateFinishedTrialError, DatabaseLost):
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            state, reason = TrialState.FAIL, _failed(stage, trial, error)
        except Exception as error:
            # The user's own functions may raise anything.
            state, reason = TrialState.FAIL, _failed(stage, trial, error)
        if reason is not None:
            trial.set_user_attr("reason", reason)
        return study.tell(
            trial,
            values if state == TrialState.COMPLETE else None,
            state=state,
            skip_if_finished=True,
        )
    except (TrialTaken, UpdateFinishedTrialError):
        logger.warning("%s %d was taken from this worker.", stage, trial.number)
        return None
    except (KeyboardInterrupt, SystemExit, OSError) as error:
        # It may have cut a read of the database off, whose session then blocks writing; what can't
        # be marked now is marked when the study goes on.
        study._storage.remove_session()
        with suppress(StorageInternalError, DatabaseLost):
            cut_off(study, study._storage.get_trial(trial._trial_id))
        if isinstance(error, OSError):
            raise AutocompressError(
                f"There is no room left on the disk ({error}). Free some, and run the same command "
                "again: nothing that was finished is lost."
            ) from error
        raise


def _failed(stage: str, trial: Trial, error: Exception) -> str:
    """Why a trial failed; the study's log has the whole story."""
    logger.warning("%s %d failed", stage, trial.number, exc_info=error)
    text = "".join(format_exception(error))[-MOST_OF_TRACEBACK:]
    trial.study._storage.set_trial_system_attr(trial._trial_id, TRACEBACK, text)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {error}"


def announce(bench: Bench, trial: FrozenTrial) -> None:
    """Tell the display how an ended trial went."""
    metrics = trial.user_attrs.get("metrics", {})
    cost = metrics.get(OBJECTIVES[bench.objective].metric)
    bench.display.trial_finished(
        trial.number,
        metrics.get("drop"),
        None if cost is None else _ratio(bench, cost),
        within_delta(trial),
        trial.state.name,
        trial.user_attrs.get("reason"),
        facts_of(trial, costs_of(bench.baseline.profile.to_dict())),
    )


def _carry_out(
    bench: Bench, stage: str, space: SearchSpace, trial: Trial
) -> tuple[tuple[float, float], str | None]:
    """The trial's values (drop, cost) and the reason if it was stopped at the gate."""
    watch = Stopwatch()
    task, finetune = bench.task, bench.finetune
    # One that comes again has the seed that it had.
    own = trial_seed(bench.seed, trial.number + 1_000_000 * STAGES.index(stage))
    seed = int(trial.user_attrs.get(SEED, own))
    bench.auditions = 0.0
    write_proposal(trial)
    plan = space.suggest(trial)
    trial.set_user_attr("plan", plan.to_json())
    trial.set_user_attr("plan_digest", plan.digest)
    trial.set_user_attr(SEED, seed)
    trial.set_user_attr("stage", stage)
    trial.set_user_attr("layer_errors", space.errors(plan))
    watch.lap("suggest")
    watch.give("suggest", "audition", bench.auditions)

    bench.show("build")
    model = _build(bench, plan, trial).to(task.device)
    watch.lap("build")
    profile = profile_model(model, bench.example, latency=False)
    watch.lap("profile")
    latency = _latency(bench, model, trial)
    watch.lap("latency")
    full = bench.baseline.profile
    cost = cost_of(bench.objective, profile, latency, full)

    checkpoint = checkpoint_of(bench, trial)
    gate = _gate(bench, stage, trial)
    closed = False
    if not gate.drops:
        bench.show("recalibrate")
        recalibrate(model, task, RECALIBRATION_BATCHES)
        watch.lap("recalibrate")
        closed = gate.closes(model, 0)
        trial.set_user_attr(EARLY, gate.drops)
        watch.lap("gate")

    def on_step(done: float, total: float, loss: float) -> None:
        looked = f", drop {task.scale.number(gate.drops[-1])} so far" if gate.drops else ""
        bench.show("fine-tune", done, total, f"loss {loss:.3f}{looked}")
        bench.watch.step()

    def hopeless(rung: int) -> bool:
        found = gate.closes(model, rung)
        trial.set_user_attr(EARLY, gate.drops)
        return found

    bench.watch.step()
    if not closed:
        job: dict[str, Any] = {
            "epochs": bench.epochs(stage),
            "learning_rate": finetune.learning_rate,
            "distillation": finetune.distillation,
            "seed": seed,
        }
        # The other processes of a group, which know nothing of trials, train along.
        share({"plan": plan.to_json(), "fit": job, "rungs": RUNGS})
        result = fit(
            model,
            task,
            teacher=bench.baseline.model,
            answers=bench.answers,
            on_step=on_step,
            rungs=RUNGS,
            hopeless=hopeless,
            checkpoint=checkpoint,
            **job,
        )
        watch.lap("finetune")
    if gate.reason is not None:
        # Mostly larger than a violation at the end, so that a sampler ranks it behind.
        drop = gate.drops[-1]
        set_constraint(trial, gate.lost - bench.delta)
        # Of the gate's images, but as near to that of all as is known.
        score = bench.baseline.val.score + task.scale.drop(0.0, drop)
        _record(bench, trial, watch, score, drop, gate.lost, profile, latency)
        _name(bench, stage, trial, drop, cost, " when it was stopped")
        remove_artifact(trial.user_attrs.get(CHECKPOINT), bench.store)
        return (drop, cost), gate.reason
    after, drop, bound = keep_fitted(bench, trial, model, result, watch)
    _exhibit(bench, stage, trial, plan, replace(profile, score=after.score))
    remove_artifact(trial.user_attrs.get(CHECKPOINT), bench.store)
    watch.lap("store")
    _record(bench, trial, watch, after.score, drop, bound, profile, latency)
    _name(bench, stage, trial, drop, cost)
    return (drop, cost), None


def keep_fitted(
    bench: Bench, trial: Trial, model: nn.Module, result: FitResult, watch: Stopwatch
) -> tuple[Evaluation, float, float]:
    """Score a trial's fine-tuned network, and keep its weights.

    Returns:
        Its scores on the validation data, the drop that it is judged by, and its upper bound.
    """
    trial.set_user_attr("images_per_second", round(result.images_per_second, 1))
    bench.show("evaluate")
    after = evaluate(model, bench.task, bench.task.val)
    drop, bound = bench.judge(model, after)
    watch.lap("evaluate")
    set_constraint(trial, bound - bench.delta)
    trial.set_user_attr(WEIGHTS, _keep_weights(model, trial, bench.store))
    return after, drop, bound


def train_along(bench: Bench, job: Mapping[str, Any]) -> None:
    """Do the part of a trial's fine-tuning that is this process's, as rank 0 told it to."""
    model = build_plan(bench.baseline.model, Plan.from_json(job["plan"])).to(bench.task.device)
    # Rank 0 has the weights, the rungs and the checkpoint, and records how it ends.
    with suppress(AutocompressError, KeyboardInterrupt):
        fit(model, bench.task, teacher=bench.baseline.model, rungs=job["rungs"], **job["fit"])


def _latency(bench: Bench, model: nn.Module, trial: Trial) -> float | None:
    """Milliseconds on the study's runtime; None where it does not run there.

    Raises:
        AutocompressError: If it does not run there, and latency is what the study makes small.
    """
    matters = is_timed(bench.objective)
    if bench.meter is None:
        return None
    # Where it is not what the study makes small, a glance at it is enough.
    seconds, min_runs = (0.2, 20) if matters else (0.05, 5)
    try:
        latency = bench.meter.measure(model, seconds, min_runs)
    except Exception as error:
        # Exporters and runtimes fail in more ways than can be named.
        if matters:
            runtime = bench.meter.deployment.runtime
            raise AutocompressError(
                f"latency.runtime = '{runtime}' can't run it: {type(error).__name__}: {error}"
            ) from error
        logger.warning("The latency was not measured.", exc_info=error)
        return None
    trial.set_user_attr(LATENCY, asdict(latency))
    return latency.median_ms


def _keep_weights(model: nn.Module, trial: Trial, store: ArtifactStore) -> str:
    """Upload a trial's weights, which cost too much to be lost with a bucket that is away."""
    for pause in UPLOAD_PAUSES:
        try:
            return save_weights(model, trial, store)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            logger.warning("The weights could not be kept; again in %g s: %s", pause, error)
            time.sleep(pause)
    return save_weights(model, trial, store)


def _exhibit(bench: Bench, stage: str, trial: Trial, plan: Plan, profile: Profile) -> None:
    """Upload what people look at in the dashboard; a trial is not lost for the lack of it."""
    facts = bench.studies[stage].user_attrs
    errors = trial.user_attrs.get("layer_errors") or {}
    described = profile.to_dict() | {LATENCY: trial.user_attrs.get(LATENCY)}
    files = trial_files(plan.to_json(), described, facts, errors, bench.objective)
    try:
        for name, text in files.items():
            save_text(text, name, trial, bench.store)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        logger.warning("The files for the dashboard could not be kept: %s", error)


def _name(bench: Bench, stage: str, trial: Trial, drop: float, cost: float, when: str = "") -> None:
    ratio, label = _ratio(bench, cost), f"{stage}/{trial.number}"
    name = trial_name(label, bench.objective, ratio, drop, bench.task.scale)
    trial.set_user_attr(NAME, name + when)
    trial.set_user_attr(RATIO, round(ratio, 4))


def checkpoint_of(bench: Bench, trial: Trial) -> Checkpoint:
    """Keeps the trial's fine-tuning in the artifact store, where its next worker finds it."""

    def keep(path: Path) -> None:
        old = trial.user_attrs.get(CHECKPOINT)
        trial.set_user_attr(CHECKPOINT, put_file(path, bench.store))
        remove_artifact(old, bench.store)

    def fetch(path: Path) -> bool:
        kept = trial.user_attrs.get(CHECKPOINT)
        if kept is not None:
            fetch_file(kept, path, bench.store)
        return kept is not None

    return Checkpoint(keep, fetch, bench.checkpoint_every)


def _gate(bench: Bench, stage: str, trial: Trial) -> Gate:
    """The gate of a trial, which knows how the stage's trials before it went.

    One that goes on from another's checkpoint knows what that had lost, too.
    """
    records = [
        Record(other.user_attrs[EARLY], lost(other, bench.delta))
        for other in bench.studies[stage].get_trials(deepcopy=False)
        if has_weights(other) and EARLY in other.user_attrs
    ]
    return Gate(
        bench.task,
        bench.baseline.val,
        records,
        most=bench.finetune.gate,
        useful=bench.outlook.useful(stage),
        drops=trial.user_attrs.get(EARLY, ()) if CHECKPOINT in trial.user_attrs else (),
    )


def _build(bench: Bench, plan: Plan, trial: Trial) -> nn.Module:
    """The network of `plan`, from the parent's weights if the sampler named a parent."""
    label = trial.study._storage.get_trial_user_attrs(trial._trial_id).get(PARENT)
    trial.set_user_attr(PARENT, label)
    if label is None:
        return apply_plan(bench.baseline.model, plan, bench.cache)
    try:
        return load_elder(bench, label).child(plan)
    except DamagedArtifact as error:
        logger.warning("%s can't be a parent: %s", label, error)
        trial.set_user_attr(PARENT, None)
        return apply_plan(bench.baseline.model, plan, bench.cache)


def best_so_far(bench: Bench) -> tuple[float, float] | None:
    """Compression ratio and drop of the cheapest trial within delta, of all stages."""
    trials = [t for study in bench.studies.values() for t in study.get_trials(deepcopy=False)]
    within = [t for t in trials if has_weights(t) and within_delta(t)]
    best = min(within, key=lambda t: t.values[1], default=None)
    return None if best is None else (_ratio(bench, best.values[1]), best.values[0])


def pace(studies: Mapping[str, Study]) -> dict[str, float | None]:
    """How well the time of the trials that were carried out was spent; None without such trials.

    Returns:
        "overhead", the share of their time in which neither training nor evaluation ran (0 to 1),
        and "images_per_second", the median speed of fine-tuning.
    """
    trials = [t for study in studies.values() for t in study.get_trials(deepcopy=False)]
    done = [t.user_attrs for t in trials if has_weights(t)]
    spent = sum(sum(attrs["seconds"].values()) for attrs in done)
    worked = sum(attrs["seconds"].get(phase, 0.0) for attrs in done for phase in WORK)
    speeds = [s for attrs in done if (s := attrs["images_per_second"]) > 0]
    return {
        "overhead": round(1 - worked / spent, 4) if spent else None,
        "images_per_second": median(speeds) if speeds else None,
    }


def find_trial(studies: Mapping[str, Study], label: str) -> FrozenTrial:
    """The trial of a label such as "exploration/12"."""
    stage, number = label.split("/")
    return studies[stage].get_trials(deepcopy=False)[int(number)]


def load_trial_model(
    bench: Bench, label: str, weights: str | None = None
) -> tuple[nn.Module, Plan]:
    """The fine-tuned network of a trial, on the task's device, and its plan.

    Args:
        bench: Knows the study.
        label: "<stage>/<number>".
        weights: The artifact of the weights; None for those that the trial left.

    Raises:
        DamagedArtifact: If the weights can't be read any more.
    """
    trial = find_trial(bench.studies, label)
    plan = Plan.from_json(trial.user_attrs["plan"])
    model = build_plan(bench.baseline.model, plan)
    load_state(model, fetch_weights(weights or trial.user_attrs[WEIGHTS], bench.store))
    return model.to(bench.task.device).eval(), plan


def load_elder(bench: Bench, label: str) -> Elder:
    """A trial as a parent: with the weights of its long fine-tuning, if it had one that helped.

    Raises:
        DamagedArtifact: If its weights can't be read any more.
    """
    own = [fit for fit in bench.long_fits if fit.trial == label and fit.after < fit.before]
    best = min(own, key=lambda fit: fit.after, default=None)
    model, plan = load_trial_model(bench, label, None if best is None else best.weights)
    return Elder(model, plan, bench.baseline.model, bench.observations)


def _ratio(bench: Bench, cost: float) -> float:
    full = bench.baseline.profile
    most = cost_of(bench.objective, full, full.latency_ms, full)
    return most / cost if cost else float("inf")


def _record(
    bench: Bench,
    trial: Trial,
    watch: Stopwatch,
    score: float,
    drop: float,
    bound: float,
    profile: Profile,
    latency_ms: float | None,
) -> None:
    share = share_of(bench.objective, profile, latency_ms, bench.baseline.profile)
    trial.set_user_attr(
        "metrics",
        {
            "score": score,
            "drop": drop,
            "drop_bound": bound,
            "params": profile.params,
            "macs": profile.macs,
            "size_bytes": profile.size_bytes,
            "memory_bytes": profile.memory_bytes,
            "latency_ms": latency_ms,
            "share": share,
        },
    )
    watch.lap("other")
    trial.set_user_attr("seconds", watch.seconds)
