"""The whole study in order: baseline, layer table, exploration, annealing, selection, report.

Everything that is worth keeping is written the moment it exists, so the same call goes on where an
interrupted one ended.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study
from optuna.trial import FrozenTrial
from safetensors.torch import load_file
from torch import nn

from autocompress.annealing import at_the_end
from autocompress.artifacts import open_artifacts, remove_artifact, write_text
from autocompress.config import StudyConfig, bound_settings, flatten
from autocompress.costs import OBJECTIVES
from autocompress.crew import Crew, Solo, Team
from autocompress.database import hide_password, open_storage, sole
from autocompress.errors import ConfigError, StudyMismatch
from autocompress.exhibits import publish
from autocompress.finals import Finals, standing
from autocompress.formats import choose_formats
from autocompress.joining import Place
from autocompress.latency import Deployment
from autocompress.logs import study_log
from autocompress.longfits import order, withdraw_others
from autocompress.models import load_state, portable_state
from autocompress.news import Bulletin
from autocompress.notes import OUTCOME, outcome_facts
from autocompress.objective import Bench, timed
from autocompress.outlook import EPOCHS, NEARLY, annealing_epochs
from autocompress.pinboard import annotate
from autocompress.plan import Plan
from autocompress.preparation import (
    BASELINE,
    DATA,
    FINGERPRINTS,
    WEIGHTS,
    describe_study,
    prepare,
)
from autocompress.probe import settle
from autocompress.process import SEARCHING
from autocompress.progress import Display
from autocompress.report import write_report
from autocompress.runner import Runner
from autocompress.scope import check_names
from autocompress.selection import conclude, finished_result
from autocompress.serving import start_workers
from autocompress.slots import cut_off_gone
from autocompress.space import SearchSpace
from autocompress.stages import (
    PARENTS,
    Stage,
    annealing_stage,
    exploration_stage,
    finals_stage,
)
from autocompress.store import (
    FINALS,
    PLACE,
    SETTINGS,
    StudyFolder,
    check_same,
    folder_of,
    load_study,
    open_study,
    trials_spent,
)
from autocompress.surgery import build_plan
from autocompress.task import Task, check_outputs
from autocompress.training import Recipe
from autocompress.trials import CHECKPOINT, EXTRA, counted, has_weights, violation, within_delta
from autocompress.watch import Watch
from autocompress.weights import state_digest

logger = logging.getLogger("autocompress")

MAX_PARENTS = 4
"""How many of the exploration's trials annealing may start from."""
REHEARSED_FROM = 6
"""Trials of an annealing from which on it is worth a long fine-tuning to learn what these may lose.
With fewer, too few come after it."""
REHEARSED_AFTER = 4
"""It is done after one in so many of its trials."""
AT_A_TIME = 2
"""By so many trials an annealing goes on beyond the planned ones, or by one for each worker, if
these are more; then the finals are rehearsed."""
LEFT = 0.1
"""It does so while the network that would be handed out leaves more than this of delta, or there
is none,"""
PAID = 0.97
"""or while the last of these trials made it this much cheaper."""
PAID_FOR = "cost_before_extra_trials"
"""User attribute of the annealing: what the winner cost before the last of them; None for none."""


@dataclass(frozen=True)
class Outcome:
    """What a study came to.

    Attributes:
        model: The compressed network, in evaluation mode; None if no trial met delta.
        plan: What was done to each layer; None likewise.
        summary: The content of `result.json`.
        folder: Where everything is.
    """

    model: nn.Module | None
    plan: Plan | None
    summary: Mapping[str, Any]
    folder: Path

    @property
    def met(self) -> bool:
        """Whether a network within delta was found."""
        return self.model is not None


def check_places(config: StudyConfig) -> None:
    """Refuse a folder, a database or a stored study that a run can't use, before data is loaded.

    Raises:
        ConfigError: If the folder can't be written, another process runs the study, the database
            can't be opened, or the runtime to measure the latency on, or to write a format, is not
            here.
        StudyMismatch: If the stored study was made with other settings.
    """
    Deployment.from_config(config.latency)
    choose_formats(config.run.formats)
    folder = folder_of(config)
    folder.create()
    url = config.run.storage
    if url is None and not folder.database.exists():
        return
    with folder.lock():
        stored = load_study(open_storage(folder.storage_url(url)), config.name, "exploration")
        if stored is not None and stored.get_trials(deepcopy=False):
            settings = stored.user_attrs["config"]
            known = {k: v for k, v in settings.items() if k not in FINGERPRINTS}
            check_same(config.name, known, bound_settings(config))


def run_study(
    config: StudyConfig,
    task: Task,
    display: Display,
    command: str = "",
    watch: Watch | None = None,
    modules: Path | None = None,
) -> Outcome:
    """Compress the task's network as the study file says, or go on with it.

    Args:
        config: The checked study file.
        task: The user's network and data.
        display: Told about the progress.
        command: How this was called, for the report.
        watch: What this process is told from outside.
        modules: The folder of the user's own modules, for workers.

    Raises:
        ConfigError: If the settings don't fit the data, or another process runs the study.
        StudyMismatch: If the stored study was made with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task.model.to(task.device)
    check_names(task.model, config.search)
    check_outputs(task)
    # Told here, and not when the baseline has been trained: a network must take tensors alone.
    task.example()
    _check_training(config, task)
    _check_workers(config, task)
    folder = folder_of(config)
    folder.create()
    url = folder.storage_url(config.run.storage)
    with (
        folder.lock(),
        log_of(config, folder, command),
        closing(open_storage(url)) as storage,
    ):
        storage.say = display.say
        with sole(storage, config.name) as hold:
            if config.run.storage is not None:
                # From here on the settings are written to files.
                run = config.run.model_copy(update={"storage": hide_password(url)})
                config = config.model_copy(update={"run": run})
            place = config.run.artifacts or str(folder.artifacts)
            place = place if "://" in place else str(Path(place).expanduser().resolve())
            watch = watch or Watch()
            watch.set_limits(config.run)
            setting = _Setting(
                config, task, display, folder, storage, url, place, watch, modules, hold
            )
            return _run(setting, command)


@dataclass(frozen=True)
class _Setting:
    """Where a study runs.

    Attributes:
        config: The study file, without the database's password.
        task: The user's network and data.
        display: Told about the progress.
        folder: The study's folder.
        storage: The database.
        url: Its URL.
        place: Where the artifacts are.
        watch: What this process was told from outside.
        modules: The folder of the user's own modules.
        hold: Sees to it that this process is the one that conducts the study.
    """

    config: StudyConfig
    task: Task
    display: Display
    folder: StudyFolder
    storage: optuna.storages.RDBStorage
    url: str
    place: str
    watch: Watch
    modules: Path | None
    hold: Callable[[], None]


def _check_training(config: StudyConfig, task: Task) -> None:
    """Refuse to look for settings of a training loop that isn't ours.

    Raises:
        ConfigError: If length or learning rate are left open.
    """
    if task.training is None:
        return
    for key in ("epochs", "learning_rate"):
        if getattr(config.finetune, key) is None:
            raise ConfigError(
                f"finetune.{key} = 'auto' is found by a probe with our training loop, and the "
                f"task has its own; give finetune.{key}."
            )


def _check_workers(config: StudyConfig, task: Task) -> None:
    """Refuse workers where only this process has the network or the data.

    Raises:
        ConfigError: If so.
    """
    if task.origin is None and config.run.workers:
        raise ConfigError(
            f"run.workers = {config.run.workers}: the network and the loaders are in this process "
            "alone, and other processes can't be given them. Name functions that make them in a "
            "study file (model.source and data.source), or leave run.workers out."
        )


def _run(setting: _Setting, command: str) -> Outcome:
    """Open the study and carry it out, with news of it in the database."""
    config, task, folder = setting.config, setting.task, setting.folder
    bound = {
        **bound_settings(config),
        DATA: task.fingerprint,
        WEIGHTS: state_digest(portable_state(task.model)),
    }
    exploration = _open(setting, "exploration", bound)
    folder.claim(exploration, config.run.storage)
    folder.remember(setting.modules)
    if config.search.stage == "annealing" and not trials_spent(exploration):
        raise ConfigError(
            "search.stage = 'annealing' goes on from an exploration, and this study has none yet; "
            "run search.stage = 'exploration' or 'both' first."
        )
    settings = config.model_dump_json(indent=1)
    write_text(folder.config, settings)
    exploration.set_user_attr(SETTINGS, settings)
    with Bulletin(setting.display, exploration) as display:
        return _conduct(replace(setting, display=display), exploration, bound, command)


def _conduct(
    setting: _Setting, exploration: Study, bound: Mapping[str, Any], command: str
) -> Outcome:
    """Everything in order, from the baseline to the report."""
    config, task, display = setting.config, setting.task, setting.display
    folder, watch = setting.folder, setting.watch
    seconds: dict[str, float] = {}
    store = _store(exploration, setting.place)
    prepared = prepare(config, task, display, folder, exploration, store, seconds)
    bench, space = prepared.bench, prepared.space
    bench.watch = watch
    with timed(seconds, "probe"):
        bench.finetune = settle(bench, space, config.finetune, exploration)
    # What was fine-tuned at length counts, even where nothing more is.
    if bench.finetune.final_epochs or load_study(setting.storage, config.name, FINALS):
        finals_stage(bench, _open(setting, FINALS, bound))
    stored = load_study(setting.storage, config.name, "annealing")
    if stored is not None:
        bench.studies["annealing"] = stored
    _bury(bench, display)
    _withdraw(bench, display)
    annealing = None
    with _crew(setting, bench) as crew:
        runner = Runner(bench, crew, setting.hold)
        if config.search.stage != "annealing":
            later = 0.0
            if config.search.stage == "both":
                length = annealing_length(bench.finetune, config.search.annealing_trials)
                later = length / max(bench.finetune.epochs, 0.1)
            runner.run(exploration_stage(bench, config, space), later)
        if bench.annealed:
            annealing = _anneal(setting, space, bound, prepared.facts, runner)
        if finished_result(config, bench, folder) is None:
            runner.fit_long(again=True)
        exploration.set_user_attr(SEARCHING, False)
    annealing = annealing or bench.studies.get("annealing")
    seconds["exploration"] = _spent(exploration)
    seconds["annealing"] = _spent(annealing) if annealing is not None else 0.0
    seconds["finals"] = round(sum(fit.seconds for fit in bench.long_fits), 2)
    summary = conclude(config, bench, folder, display, seconds, command)
    write_report(summary, exploration, annealing, folder.report)
    display.say(f"Report: {folder.report}")
    _show(summary, bench, folder, display)
    return _outcome(summary, bench, folder)


def _show(summary: Mapping[str, Any], bench: Bench, folder: StudyFolder, display: Display) -> None:
    """Let the dashboard show how the study ended, with its report and result as artifacts."""
    exploration = bench.studies["exploration"]
    kept = exploration.user_attrs.get(OUTCOME) or {}
    if kept.get("finished") != summary["finished"]:
        artifacts = {}
        try:
            artifacts = publish(
                [folder.report, folder.result], list(bench.studies.values()), bench.store
            )
        except OSError as error:
            display.say(f"The report is not among the study's artifacts: {error}")
        exploration.set_user_attr(OUTCOME, outcome_facts(summary, artifacts))
    annotate(bench.studies)


def _store(study: Study, place: str) -> ArtifactStore:
    """The artifact store of a study, in which it stays.

    Raises:
        StudyMismatch: If the study keeps its artifacts elsewhere.
    """
    kept = study.user_attrs.get(PLACE)
    if kept is not None and kept != place and ("://" in kept + place or _left(study, kept, place)):
        raise StudyMismatch(
            f"Study '{study.study_name}' keeps its artifacts in {kept}, not in {place}. Put "
            "run.artifacts back, or use a new name."
        )
    study.set_user_attr(PLACE, place)
    return open_artifacts(place)


def _left(study: Study, kept: str, place: str) -> bool:
    """Whether a study's artifacts are in the one folder still, and not in the other."""
    weights = study.user_attrs.get(BASELINE)
    return weights is not None and (
        Path(kept, weights).is_file() and not Path(place, weights).is_file()
    )


@contextmanager
def _crew(setting: _Setting, bench: Bench) -> Iterator[Crew]:
    """Those who carry out the trials of both stages; they are gone after the block."""
    config, orders = setting.config, setting.watch.orders
    place = Place(
        url=setting.url,
        study=config.name,
        device=config.run.device,
        data_root=config.data.root,
        # They wait for as long as this process lives.
        code=setting.modules or Path.cwd(),
        patience=1e9,
    )
    exploration = bench.studies["exploration"]
    exploration.set_user_attr(SEARCHING, True)
    workers = None
    if setting.task.origin is not None:
        workers = start_workers(
            place,
            config,
            exploration,
            lambda: bench.all_studies.values(),
            setting.folder.path / "cluster",
            setting.display,
            conducts=True,
        )
    with orders.patient():
        if workers is None:
            yield Solo(bench)
            return
        team = Team(workers)
        try:
            yield team
        except BaseException:
            orders.ask_to_stop()
            raise
        finally:
            team.close()


def _anneal(
    setting: _Setting,
    space: SearchSpace,
    bound: Mapping[str, Any],
    facts: Mapping[str, Any],
    runner: Runner,
) -> Study | None:
    """The second study: narrower, seeded from the exploration's best, with their weights."""
    config, display, bench = setting.config, setting.display, runner.bench
    stored = bench.studies.get("annealing")
    # The space stays what it was when the study began.
    labels = None if stored is None else stored.user_attrs.get(PARENTS)
    if labels is None:
        labels = [f"exploration/{t.number}" for t in _parents(bench.studies["exploration"], bench)]
    if not labels:
        display.say("No trial of the exploration can be annealed: none was fine-tuned.")
        return None
    annealing = _open(setting, "annealing", bound)
    if EPOCHS not in annealing.user_attrs:
        # As final_epochs may change later, and the trials of one study must be alike.
        annealing.set_user_attr(EPOCHS, annealing_epochs(bench.finetune))
    describe_study(annealing, facts)
    stage = annealing_stage(bench, config, space, annealing, labels)
    # From now on workers know the stage.
    annealing.set_user_attr(PARENTS, list(labels))
    longer = bench.finetune.final_epochs > annealing.user_attrs[EPOCHS]
    longer = longer and stage.total >= REHEARSED_FROM

    def rehearse(spent: int) -> None:
        finals = bench.finals
        due = longer and spent >= stage.total // REHEARSED_AFTER
        if due and finals is not None and not counted(finals):
            order(finals, Finals.of(bench).wanted(room=1), bench.finetune)

    runner.run(stage, between=rehearse)
    finished = finished_result(config, bench, setting.folder)
    allowed = config.search.extra_trials
    if finished is not None:
        # What is finished goes on only where more is allowed than then.
        allowed -= finished["config"]["search"].get("extra_trials", allowed)
    if longer and (finished is None or allowed > 0):
        # One that was interrupted goes on as it would have; one that is allowed more tries them.
        least = annealing.user_attrs.get(PAID_FOR) if finished is None else None
        _go_on(config, stage, runner, math.inf if least is None else least)
    return annealing


def _go_on(config: StudyConfig, stage: Stage, runner: Runner, least: float) -> None:
    """Trials beyond those planned, while they pay or the tolerance is far from spent.

    Args:
        config: The study file.
        stage: The annealing.
        runner: Carries trials out.
        least: What the winner cost before the last of such trials; infinity for none.
    """
    bench, annealing = runner.bench, stage.study
    display = bench.display
    while True:
        # After the last trials who would be idle begins with second seeds.
        last = annealing.user_attrs.get(EXTRA, 0) >= config.search.extra_trials
        runner.fit_long(again=last)
        cost, left = standing(bench) or (math.inf, math.inf)
        ended = at_the_end(trials_spent(annealing)[-AT_A_TIME:])
        enough = (ended or left <= LEFT * config.delta) and cost > PAID * least
        if enough and runner.fit_long(again=True):
            continue  # the second seed may spoil it
        given = annealing.user_attrs.get(EXTRA, 0)
        more = min(max(AT_A_TIME, runner.crew.alive), config.search.extra_trials - given)
        unused = f"{bench.task.scale.difference(left)} of the allowed drop would be left unused"
        if enough and left > LEFT * config.delta:
            display.say(
                f"{unused}, but the search space holds nothing much cheaper. It is larger with "
                "channels, more transforms or more layers: search.channels, search.transforms, "
                "search.include."
            )
        if more <= 0 or enough:
            return
        why = unused if math.isfinite(left) else "No network is within delta yet"
        display.say(f"{why}: {more} more trials.")
        least = min(least, cost)
        annealing.set_user_attr(PAID_FOR, least if math.isfinite(least) else None)
        annealing.set_user_attr(EXTRA, given + more)
        stage = replace(stage, total=stage.total + more)
        runner.run(stage)


def annealing_length(finetune: Recipe, trials: int) -> float:
    """Passes over the training data in a whole annealing, with its rehearsal of the finals."""
    each = annealing_epochs(finetune)
    rehearsed = trials >= REHEARSED_FROM and finetune.final_epochs > each
    return trials * each + (finetune.final_epochs if rehearsed else 0.0)


def _parents(study: Study, bench: Bench) -> list[FrozenTrial]:
    """Where annealing starts: the cheapest Pareto trials that promise to end within delta, cheaper
    ones that miss it narrowly, and, should the promise not be kept, the cheapest within delta
    already; where nothing comes near, the one that lost least."""
    usable = [t for t in study.get_trials(deepcopy=False) if has_weights(t)]
    front = [t for t in usable if not any(_dominates(other, t) for other in usable)]
    front.sort(key=lambda t: t.values[1])
    outlook = bench.outlook
    missed = {t.number: outlook.shortfall("exploration", t) for t in front}
    promising = [t for t in front if missed[t.number] <= 0]
    nearly = [t for t in front if 0 < missed[t.number] <= (NEARLY - 1) * bench.delta]
    within = [t for t in front if within_delta(t)]
    chosen = promising[:MAX_PARENTS] + nearly[-MAX_PARENTS // 2 :] + within[:1]
    known = {t.number: t for t in chosen}
    return list(known.values()) or sorted(usable, key=violation)[:1]


def _dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
    better = all(a <= b for a, b in zip(one.values, other.values, strict=True))
    return better and one.values != other.values


def _outcome(summary: Mapping[str, Any], bench: Bench, folder: StudyFolder) -> Outcome:
    if not summary["met"]:
        return Outcome(None, None, summary, folder.path)
    plan = Plan.from_json((folder.best / "plan.json").read_text(encoding="utf-8"))
    model = build_plan(bench.baseline.model, plan)
    load_state(model, load_file(folder.best / "model.safetensors"))
    return Outcome(model.cpu().eval(), plan, summary, folder.path)


def _open(setting: _Setting, stage: str, bound: Mapping[str, Any]) -> Study:
    """The Optuna study of a stage, made now or earlier."""
    return open_study(
        setting.storage,
        setting.config.name,
        stage,
        bound=bound,
        drop_name=setting.task.scale.drop_name,
        cost_name=OBJECTIVES[setting.config.objective].label,
    )


def _bury(bench: Bench, display: Display) -> None:
    """End the trials whose workers are gone."""
    for stage, study in bench.all_studies.items():
        dead, spent = cut_off_gone(study), len(trials_spent(study))
        if dead:
            display.say(f"{stage}: {dead} interrupted trial(s) will be run again.")
        if spent:
            display.say(f"Going on with the {stage} after {spent} trials.")


def _withdraw(bench: Bench, display: Display) -> None:
    """Take back the long fine-tunings that wait, where the study file's length of these changed."""
    if bench.finals is None:
        return
    others = withdraw_others(bench.finals, bench.finetune)
    for trial in others:
        remove_artifact(trial.user_attrs.get(CHECKPOINT), bench.store)
    if others:
        display.say(
            f"{len(others)} long fine-tuning(s) of another length or learning rate are withdrawn."
        )


def _spent(study: Study) -> float:
    """Seconds that the study's trials took in all."""
    durations = [t.duration for t in trials_spent(study)]
    return round(sum(d.total_seconds() for d in durations if d is not None), 2)


def log_of(config: StudyConfig, folder: StudyFolder, command: str) -> AbstractContextManager[None]:
    """A block in which everything that is said goes to the study's log, without passwords."""
    url, settings = config.run.storage, flatten(config.model_dump(mode="json"))
    if url is None:
        return study_log(folder.log, command, settings, {})
    shown = hide_password(url)
    return study_log(folder.log, command, settings | {"run.storage": shown}, {url: shown})
