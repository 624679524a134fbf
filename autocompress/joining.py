"""Join a study from its database alone: what a worker needs, on this machine or another one.

The study file, the baseline's weights and the layer table come from the database and the artifact
store; only the data must be here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study

from autocompress.artifacts import fetch_text, open_artifacts
from autocompress.baseline import Baseline
from autocompress.config import StudyConfig, cache_folder, flatten, own_code, parse_config
from autocompress.costs import is_timed
from autocompress.database import hide_password, open_storage
from autocompress.distributed import join_group, leave_group, rank
from autocompress.errors import ConfigError, DamagedArtifact, StudyMismatch
from autocompress.evaluation import evaluate
from autocompress.launchers import RayWorkers, SlurmWorkers, Workers
from autocompress.logs import attached, study_log, warnings_in_log
from autocompress.models import PRETRAINED, load_state
from autocompress.observation import observe_layers
from autocompress.preparation import (
    BASELINE,
    DATA,
    TABLE,
    Prepared,
    equip,
    search_space,
    table_digest,
    time_baseline,
)
from autocompress.probe import settle
from autocompress.process import STORAGE_VARIABLE, EventDisplay, EventHandler, follow
from autocompress.profiler import Profile
from autocompress.progress import Display, NullDisplay, make_display
from autocompress.sensitivity import LayerTable
from autocompress.slots import host_name
from autocompress.sources import pick_device, task_from_config
from autocompress.store import PLACE, SETTINGS, StudyFolder, load_stages, load_study
from autocompress.task import Task
from autocompress.watch import Orders, Watch
from autocompress.weights import fetch_weights
from autocompress.worker import Worker, follow_first
from autocompress.workers import Launch, Pool, cores, count_workers, shares, visible_gpus


@dataclass(frozen=True)
class Place:
    """A machine on which a study's trials are to run, and what is different there.

    Attributes:
        url: The database's URL.
        study: The study's name.
        workers: How many processes, "auto", or 0 for this one.
        device: "cpu", "cuda", "cuda:1" or "auto".
        data_root: The data's folder; None: as in the study.
        data_source: The data; None likewise.
        artifacts: Where the artifacts are; None likewise.
        code: The folder of the user's own modules, which may run here then.
        patience: Seconds without a trial, after which a worker ends.
        launcher: What starts the workers; None: as in the study.
        options: Its options.
    """

    url: str
    study: str
    workers: int | str | None = "auto"
    device: str = "auto"
    data_root: str | None = None
    data_source: str | None = None
    artifacts: str | None = None
    code: Path | None = None
    patience: float = 3600.0
    launcher: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that are others there, by dotted key."""
        changes = {
            "data.root": self.data_root,
            "data.source": self.data_source,
            "run.artifacts": self.artifacts,
            "run.device": self.device,
            "run.workers": self.workers,
            "run.launcher": self.launcher,
            "run.launcher_options": dict(self.options) or None,
        }
        return {key: value for key, value in changes.items() if value is not None}

    def command(self, device: str) -> list[str]:
        """The command of one worker process, without the database's URL."""
        argv = [sys.executable, "-m", "autocompress.study", "worker", "--child"]
        options = {
            "--study": self.study,
            "--device": device,
            "--data-root": self.data_root,
            "--data-source": self.data_source,
            "--artifacts": self.artifacts,
            "--code": self.code,
            "--patience": self.patience / 60,
        }
        for option, value in options.items():
            if value is not None:
                argv += [option, str(value)]
        return argv


def serve(place: Place, child: bool, display: Display | None = None) -> int:
    """Carry out trials of a study until none is left, or this process is told to end.

    Args:
        place: Which study, and what is different here.
        child: Whether this process was started by another one, which listens to its output.
        display: Told what happens, where nobody listens; by default as the terminal has it.

    Returns:
        How many trials ended.

    Raises:
        ConfigError: If there is no such study, or it can't run here.
        StudyMismatch: If the data here is another.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if child:
        config, study = read_settings(place, waits=True)
        lines, sys.stdout = sys.stdout, sys.stderr
        watch = Watch()
        follow(watch.orders, sys.stdin)
        events = EventDisplay(lines)
        logger = logging.getLogger("autocompress")
        with attached(EventHandler(events), logger, logging.DEBUG), warnings_in_log(False):
            return _work(place, config, study, watch, events)
    with display or make_display() as display:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun has started the processes already.
            place = replace(place, workers=0)
        config, study = read_settings(place)
        watch = Watch()
        path = _log_of(config, study)
        display.say(f"Log: {path}")
        secrets = {place.url: hide_password(place.url)}
        command = f"worker --study {place.study}"
        with (
            study_log(path, command, secrets=secrets),
            watch.orders.listening(display.say),
            watch.orders.patient(),
        ):
            folder = Path(config.run.out) / config.name / "cluster"
            workers = start_workers(
                place,
                config,
                study,
                lambda: load_stages(study._storage, config.name).values(),
                folder,
                display,
                conducts=False,
            )
            if workers is None:
                return _work(place, config, study, watch, display)
            return _supervise(workers, watch.orders)


def _log_of(config: StudyConfig, study: Study) -> Path:
    """Where the workers of this machine log: in the study's folder, if it is seen from here."""
    folder = StudyFolder(Path(study.user_attrs.get("folder", "")))
    name = f"{host_name()}-{os.getpid()}.log"
    kept = folder.identity
    if kept.is_file() and kept.read_text(encoding="utf-8") == study.user_attrs["identity"]:
        path = folder.path / "workers" / name
    else:
        path = cache_folder() / "logs" / f"{config.name}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def serve_here(place: Place) -> int:
    """Be one worker, in this process, as `serve` has it."""
    return serve(replace(place, workers=0), child=False)


def start_workers(
    place: Place,
    config: StudyConfig,
    study: Study,
    studies: Callable[[], Iterable[Study]],
    folder: Path,
    display: Display,
    conducts: bool,
) -> Workers | None:
    """Start the workers that a study file asks for; None where trials run in this process.

    Args:
        place: Which study, and what is different here.
        config: The study file.
        study: The exploration.
        studies: Gives the studies of both stages.
        folder: For the logs of a cluster's jobs.
        display: Told what happens.
        conducts: Whether this is the process that conducts the study.

    Raises:
        ConfigError: If the launcher isn't installed, or their number isn't given for a cluster.
    """
    run, gpus = config.run, torch.cuda.device_count()
    if run.launcher != "local":
        if not run.workers:
            raise ConfigError(
                f"run.launcher = '{run.launcher}': give the number of workers, --workers N."
            )
        work = partial(serve_here, replace(place, launcher="local", options={}))
        told = (study, display, conducts, folder)
        if run.launcher == "slurm":
            return SlurmWorkers(work, run.workers, run.launcher_options, *told)
        on_gpus = run.device.startswith("cuda") or (run.device == "auto" and gpus > 0)
        options = {"num_gpus": int(on_gpus)} | run.launcher_options
        return RayWorkers(work, run.workers, options, *told)
    count = count_workers(run.workers, run.device, gpus, cores())
    if run.workers is None and is_timed(config.objective) and config.latency.runtime != "cuda":
        # Latencies on the CPU are those of a machine that does little else.
        count = 1
    if count == 0:
        return None
    argv = place.command("cuda" if gpus and run.device != "cpu" else "cpu")
    environments = shares(count, run.device, visible_gpus(gpus), cores())
    launches = [Launch(argv, {**env, STORAGE_VARIABLE: place.url}) for env in environments]
    return Pool(launches, studies, display, announces=not conducts)


def _work(place: Place, config: StudyConfig, study: Study, watch: Watch, display: Display) -> int:
    """Be a worker, or a part of one: a process of a group that torchrun started."""
    device = join_group(pick_device(config.run.device))
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"device": str(device)})}
    )
    watch.set_limits(config.run)
    try:
        with watch.orders.listening(display.say), watch.orders.patient():
            prepared = join(config, study, display, place.code)
            prepared.bench.watch = watch
            if rank() > 0:
                return follow_first(prepared.bench)
            return Worker(prepared.bench, config, prepared.space, place.patience).run()
    finally:
        leave_group()


def _supervise(workers: Workers, orders: Orders) -> int:
    """Look after workers until they have ended."""
    try:
        while not (workers.over or orders.stop):
            if orders.drain:
                workers.drain()
            workers.tend()
    finally:
        workers.stop()
    return workers.finished


def read_settings(place: Place, waits: bool = False) -> tuple[StudyConfig, Study]:
    """The study file and the exploration of a study, from its database.

    Raises:
        ConfigError: If there is no such study, or it has not begun to search; or if it names code
            and `code` doesn't say that this may run.
    """
    study = load_study(open_storage(place.url, waits=waits), place.study, "exploration")
    settings = None if study is None else study.user_attrs.get(SETTINGS)
    if study is None or settings is None or TABLE not in study.user_attrs:
        raise ConfigError(
            f"Study '{place.study}' of this database has not begun to search yet. Start it first: "
            "python -m autocompress.study my.toml --storage URL."
        )
    known = flatten(json.loads(settings)) | {"run.storage": None}
    facts = study.user_attrs
    if known.get("model.weights") == PRETRAINED and known.get("data.mean") is None:
        # What the library's weights asked for, which are not loaded here.
        known |= {f"data.{key}": list(facts["normalization"][key]) for key in ("mean", "std")}
    threads = (facts["baseline"].get("latency") or {}).get("threads")
    config = parse_config(
        known | {"model.weights": None, "latency.threads": threads} | place.overrides
    )
    _check_code(config, place.code)
    return config, study


def _check_code(config: StudyConfig, code: Path | None) -> None:
    """Let no database choose which code runs here.

    Raises:
        ConfigError: If the study names functions and no folder of code was given.
    """
    own = own_code(config)
    if own and code is None:
        raise ConfigError(
            f"Study '{config.name}' runs code of its own ({', '.join(own)}). If you trust it, name "
            "the folder in which that code is on this machine: --code FOLDER."
        )


def join(config: StudyConfig, study: Study, display: Display, code: Path | None = None) -> Prepared:
    """Make what the study's trials need.

    Args:
        config: As `read_settings` gave it.
        study: Likewise.
        display: Told about the progress.
        code: The folder of the user's own modules.

    Raises:
        ConfigError: If network or data can't be had here.
        StudyMismatch: If the data here is another.
        DamagedArtifact: If weights or table can't be read from the artifact store.
    """
    facts = study.user_attrs
    store = open_artifacts(config.run.artifacts or facts[PLACE])
    task = task_from_config(config, code)
    if task.fingerprint != facts["config"][DATA]:
        raise StudyMismatch(
            f"The data here is not that of study '{config.name}' (fingerprint {task.fingerprint}, "
            f"expected {facts['config'][DATA]}). Give the same data: --data-root FOLDER."
        )
    task.amp_dtype = torch.bfloat16 if facts["precision"] == "bfloat16" else None
    task.model.requires_grad_(True)
    baseline, example = _baseline(task, study, store)
    # What it says of the latency was said when the study began.
    baseline, meter = time_baseline(config, baseline, example, study, NullDisplay())
    table = _table(facts[TABLE], store)
    observations = observe_layers(
        baseline.model, task, (*table.layers, *table.others), seed=config.seed
    )
    bench = equip(config, task, baseline, example, meter, observations, store, study, display)
    space = search_space(config, table, baseline.profile)
    bench.finetune = settle(bench, space, config.finetune, study)
    return Prepared(bench, space, {})


def _table(kept: Mapping[str, Any], store: ArtifactStore) -> LayerTable:
    text = fetch_text(kept["artifact"], store)
    if table_digest(text) != kept["digest"]:
        raise DamagedArtifact(
            f"The layer table in artifact {kept['artifact']} is damaged. Run the study's own "
            "command again, which makes it anew."
        )
    return LayerTable.from_json(json.loads(text))


def _baseline(
    task: Task, study: Study, store: ArtifactStore
) -> tuple[Baseline, tuple[torch.Tensor, ...]]:
    """The baseline with the weights and the costs that the study has, scored here."""
    facts = study.user_attrs
    load_state(task.model, fetch_weights(facts[BASELINE], store))
    task.model.to(task.device).eval()
    val = evaluate(task.model, task, task.val)
    profile = Profile.from_dict(facts["baseline"])
    return Baseline(task.model, val, profile, facts["baseline_digest"]), task.example()
