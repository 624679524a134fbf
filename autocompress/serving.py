"""Doing a study's trials on this machine: in this process, in others beside it, or on a cluster."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.study import Study

from autocompress.config import StudyConfig, cache_folder
from autocompress.costs import is_timed
from autocompress.database import hide_password
from autocompress.distributed import join_group, leave_group, rank
from autocompress.errors import ConfigError
from autocompress.joining import Place, join, read_settings
from autocompress.launchers import RayWorkers, SlurmWorkers, Workers
from autocompress.logs import attached, study_log, warnings_in_log
from autocompress.process import STORAGE_VARIABLE, EventDisplay, EventHandler, follow
from autocompress.progress import Display, make_display
from autocompress.slots import host_name
from autocompress.sources import pick_device
from autocompress.store import StudyFolder, folder_of, load_all
from autocompress.watch import Orders, Watch
from autocompress.worker import Worker, follow_first
from autocompress.workers import Launch, Pool, cores, count_workers, shares, visible_gpus


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
            folder = folder_of(config).path / "cluster"
            workers = start_workers(
                place,
                config,
                study,
                lambda: load_all(study._storage, config.name).values(),
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
