"""Workers on a cluster: handed to Ray or to SLURM, which place them, start them again, end them.

We write no scheduler. Each worker is one task (Ray) or one job (SLURM, by submitit) that joins the
study as `python -m autocompress.study worker` does, so database and artifacts must be within reach
of all machines.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from optuna.study import Study

from autocompress.errors import AutocompressError, ConfigError
from autocompress.process import SEARCHING
from autocompress.progress import Display
from autocompress.workers import STOPPING, TURN

RETRIES = 5
"""How often Ray starts a worker again that failed."""
TIMEOUTS = 100
"""How often a job whose time is over is submitted again."""


class Workers(Protocol):
    """Worker processes, wherever they are."""

    finished: int
    """Trials that ended."""

    @property
    def over(self) -> bool:
        """Whether all have ended by themselves."""
        ...

    @property
    def alive(self) -> int:
        """How many work."""
        ...

    def tend(self) -> None:
        """See to them for a moment.

        Raises:
            AutocompressError: If all of them failed.
        """
        ...

    def drain(self) -> None:
        """Let each end after its trial."""
        ...

    def stop(self) -> None:
        """End them and wait for that."""
        ...


@dataclass(frozen=True)
class WorkerJob:
    """What runs on the cluster: one worker. SLURM starts it again where it is preempted.

    Attributes:
        work: Be a worker; returns how many trials ended.
    """

    work: Callable[[], int]

    def __call__(self) -> int:
        """Work."""
        return self.work()

    def checkpoint(self) -> Any:
        """What submitit submits again when the job is preempted or its time is over.

        The trial that runs is cut off and comes again, from its last checkpoint, on any worker.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Jobs(ABC):
    """Workers on a cluster: jobs that end, and a word in the database to end them.

    Args:
        work: Be a worker; it must be picklable.
        count: How many workers.
        options: For the engine.
        study: The exploration.
        display: Told what happens.
        conducts: Whether the process that conducts the study starts them.
        folder: Where an engine that has no place of its own keeps scripts and logs; all machines
            must see it.
    """

    def __init__(
        self,
        work: Callable[[], int],
        count: int,
        options: Mapping[str, Any],
        study: Study,
        display: Display,
        conducts: bool,
        folder: Path,
    ) -> None:
        self._study, self._display, self._conducts = study, display, conducts
        self._folder = folder
        self._failed: list[str] = []
        self._count = count
        self.finished = 0
        self._jobs = self._submit(WorkerJob(work), options)

    @property
    def over(self) -> bool:
        return not self._jobs

    @property
    def alive(self) -> int:
        return len(self._jobs)

    def tend(self) -> None:
        for job in self._done():
            self._jobs.remove(job)
            try:
                self.finished += int(self._result(job))
            except Exception as error:
                # The engines wrap what happened elsewhere in errors of their own.
                words = str(error).strip().splitlines() or [type(error).__name__]
                self._failed.append(words[-1])
                self._display.say(f"A worker failed on the cluster: {words[-1]}")
        if self._failed and len(self._failed) == self._count:
            raise AutocompressError(
                f"All {self._count} workers failed on the cluster, the last with: "
                f"{self._failed[-1]}"
            )

    def drain(self) -> None:
        # Workers that others started for this study are none of a mere worker's business.
        if self._conducts:
            self._study.set_user_attr(SEARCHING, False)

    def stop(self) -> None:
        self.drain()
        for job in self._jobs:
            self._cancel(job)
        last = time.monotonic() + STOPPING
        while self._jobs and time.monotonic() < last:
            for job in self._done():
                self._jobs.remove(job)

    @abstractmethod
    def _submit(self, job: WorkerJob, options: Mapping[str, Any]) -> list[Any]:
        """Hand the job to the engine, as often as there are workers."""

    @abstractmethod
    def _done(self) -> Sequence[Any]:
        """The jobs that have ended, after a moment."""

    @abstractmethod
    def _result(self, job: Any) -> Any:
        """What an ended job returned; raises what it raised."""

    @abstractmethod
    def _cancel(self, job: Any) -> None:
        """End a job."""


class RayWorkers(_Jobs):
    """Each worker is a Ray task with its share of a node, begun anew where it fails.

    The options are the task's, such as num_gpus and num_cpus.
    """

    def _submit(self, job: WorkerJob, options: Mapping[str, Any]) -> list[Any]:
        self._ray = ray = _import("ray")
        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        settings = {"num_cpus": 1, "max_retries": RETRIES} | dict(options)
        with _checked(settings):
            task = ray.remote(_work_for_ray).options(retry_exceptions=True, **settings)
        return [task.remote(job) for _ in range(self._count)]

    def _done(self) -> Sequence[Any]:
        done, _ = self._ray.wait(self._jobs, num_returns=len(self._jobs), timeout=TURN)
        return list(done)

    def _result(self, job: Any) -> Any:
        return self._ray.get(job)

    def _cancel(self, job: Any) -> None:
        # It arrives as a KeyboardInterrupt, at which a worker gives its trial back.
        self._ray.cancel(job, force=False)


def _work_for_ray(job: WorkerJob) -> int:
    return job()


class SlurmWorkers(_Jobs):
    """Each worker is a SLURM job, submitted by submitit, and requeued where it is preempted.

    The options are those of `submitit.AutoExecutor.update_parameters`, such as timeout_min,
    gpus_per_node, slurm_partition; "cluster" chooses submitit's engine ("slurm", "local", "debug").
    """

    def _submit(self, job: WorkerJob, options: Mapping[str, Any]) -> list[Any]:
        submitit = _import("submitit")
        settings = {"name": self._study.study_name, "timeout_min": 24 * 60} | dict(options)
        executor = submitit.AutoExecutor(
            folder=self._folder,
            cluster=settings.pop("cluster", None),
            slurm_max_num_timeout=TIMEOUTS,
            local_max_num_timeout=TIMEOUTS,
        )
        with _checked(settings):
            executor.update_parameters(**settings)
        jobs = [executor.submit(job) for _ in range(self._count)]
        self._display.say(
            f"{self._count} jobs submitted to {executor.cluster}; their logs: {self._folder}"
        )
        return jobs

    def _done(self) -> Sequence[Any]:
        time.sleep(TURN)
        return [job for job in self._jobs if job.done()]

    def _result(self, job: Any) -> Any:
        return job.result()

    def _cancel(self, job: Any) -> None:
        job.cancel()


@contextmanager
def _checked(settings: Mapping[str, Any]) -> Iterator[None]:
    """What the engine says of its options, in our words.

    Raises:
        ConfigError: If it refuses them.
    """
    try:
        yield
    except Exception as error:
        # Each engine has errors of its own for that.
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"run.launcher_options = {dict(settings)} are refused: {words[0]}"
        ) from error


def _import(name: str) -> Any:
    """An engine's package.

    Raises:
        ConfigError: If it is not installed.
    """
    extra = {"ray": "ray", "submitit": "slurm"}[name]
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(
            f"run.launcher = '{extra}' needs {name}: pip install 'autocompress[{extra}]'."
        ) from error
