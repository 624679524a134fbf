"""Worker processes on this machine: one for each GPU or share of the CPU, started and looked after.

The processes run `python -m autocompress.study worker`, and talk through their pipes: lines of
JSON come from them, orders go to them. What they do is in the database; what dies is begun anew.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from optuna.study import Study

from autocompress.errors import AutocompressError
from autocompress.process import EXIT_HUNG
from autocompress.progress import Display
from autocompress.slots import WORKER, cut_off, running, worker_name

logger = logging.getLogger("autocompress")

Clock = Callable[[], float]

MOST_ON_CPU = 4
"""Workers on the CPU, at most, where their number is left open. Two with a thread each did 1.62
times the trials of one with two threads, but each holds the data, and what trials at the same time
find out comes too late for each other."""
MAX_DEATHS = 5
"""A worker that died so often in a row, without ending a trial, is not started again."""
LONGEST_PAUSE = 60.0
"""Seconds before a dead worker is started again, at most; at first one, then twice as many."""
STOPPING = 60.0
"""Seconds that a worker has to end at the next step of its trial."""
TURN = 0.2
"""Seconds between two looks at the workers."""
LAST_WORDS = 20
"""Lines of a worker's errors that are kept for the message that it died."""


@dataclass(frozen=True)
class Launch:
    """How to start a worker.

    Attributes:
        argv: Its command.
        env: What is added to the environment.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def count_workers(wanted: int | None, device: str, gpus: int, cores: int) -> int:
    """How many workers this machine gets.

    Args:
        wanted: As the study file says; None where it is left open: one for each GPU, and on the
            CPU one for each core, `MOST_ON_CPU` at most.
        device: "cpu", "cuda", "cuda:1" or "auto".
        gpus: GPUs of this machine that PyTorch sees.
        cores: CPU cores that this process may use.
    """
    if wanted is not None:
        return wanted
    if device.startswith("cuda:"):
        return 1
    if device == "cpu" or not gpus:
        return max(1, min(cores, MOST_ON_CPU))
    return gpus


def shares(count: int, device: str, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """The environment of each of so many workers: its GPU and its share of the CPU's threads.

    OMP_NUM_THREADS is the most for each, where it is set: two threads that wait for each other on
    cores that others use are ten times as slow as one. A worker sees one GPU alone, as its first
    one. Where there are more workers than GPUs, they share them in turn.

    Args:
        count: How many workers.
        device: "cpu", "cuda", "cuda:1" or "auto".
        gpus: Names of the GPUs for `CUDA_VISIBLE_DEVICES`.
        cores: CPU cores that they share.
    """
    if device.startswith("cuda:"):
        gpus = gpus[int(device.removeprefix("cuda:")) :][:1]
    most = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    share = max(1, cores // count)
    threads = str(min(share, int(most)) if most.isdecimal() and int(most) > 0 else share)
    found = []
    for number in range(count):
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        if device == "cpu" or not gpus:
            env["CUDA_VISIBLE_DEVICES"] = ""
        else:
            env["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        found.append(env)
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` wants them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(count)]


class _Process:
    """One worker's process, and what it says."""

    def __init__(self, launch: Launch) -> None:
        self.process = subprocess.Popen(
            launch.argv,
            env={**os.environ, **launch.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A Ctrl-C of the terminal is for the conductor, which passes it on.
            start_new_session=True,
        )
        self.events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.errors: deque[str] = deque(maxlen=LAST_WORDS)
        self._threads = [
            Thread(target=self._read_events, args=(self.process.stdout,), daemon=True),
            Thread(target=self._read_errors, args=(self.process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, word: str) -> None:
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def exited(self) -> int | None:
        return self.process.poll()

    def close(self) -> None:
        """Read what it said last, and close the pipes."""
        for thread in self._threads:
            thread.join(timeout=5.0)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _read_events(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and "event" in event:
                self.events.put(event)
            elif line.strip():  # the user's own functions may print
                logger.debug("worker %d: %s", self.pid, line.rstrip())

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self.errors.append(line.rstrip())
            logger.debug("worker %d: %s", self.pid, line.rstrip())


@dataclass
class _Place:
    """A worker's place, in which one process follows another."""

    name: str
    launch: Launch
    process: _Process | None = None
    deaths: int = 0
    start_at: float = 0.0
    given_up: bool = False
    ended: bool = False
    killed: bool = False
    words: str = ""


class Pool:
    """Worker processes of this machine.

    Args:
        launches: How each is started.
        studies: Gives the studies whose trials they run.
        display: Told what they do.
        clock: Seconds that only go up.
        max_deaths: How often in a row a worker may die without ending a trial.
        longest_pause: Seconds before a dead worker is started again, at most.
        announces: Whether to tell of trials that ended; the process that conducts a study tells of
            all of them anyway.
    """

    def __init__(
        self,
        launches: Iterable[Launch],
        studies: Callable[[], Iterable[Study]],
        display: Display,
        clock: Clock = time.monotonic,
        max_deaths: int = MAX_DEATHS,
        longest_pause: float = LONGEST_PAUSE,
        announces: bool = False,
    ) -> None:
        self._announces = announces
        self._studies, self._display, self._clock = studies, display, clock
        self._max_deaths, self._longest_pause = max_deaths, longest_pause
        self._places = [_Place(f"worker {n}", launch) for n, launch in enumerate(launches)]
        self._ending = False
        self.finished = 0
        """Trials that ended."""

    @property
    def over(self) -> bool:
        """Whether all have ended by themselves."""
        return all(place.ended for place in self._places)

    @property
    def alive(self) -> int:
        """How many processes run, or are about to be started."""
        return sum(place.process is not None or self._is_due(place) for place in self._places)

    def tend(self) -> None:
        """Start what is to be started, see to what has died, pass on what they say; a moment long.

        Raises:
            AutocompressError: If all of them died again and again.
        """
        for place in self._places:
            if place.process is None:
                self._start(place)
            else:
                self._hear(place)
                code = place.process.exited()
                if code is not None:
                    self._bury(place, code)
        if not self._ending and all(place.given_up for place in self._places):
            raise AutocompressError(
                f"All {len(self._places)} workers died {self._max_deaths} times in a row without "
                f"ending a trial. The last words of one: {self._places[-1].words or 'none'}. "
                "--workers 0 runs the trials in this process, where a debugger sees them."
            )
        time.sleep(TURN)

    def drain(self) -> None:
        """Let each end after its trial, and start no other."""
        if not self._ending:
            self._ending = True
            self._order("drain")

    def stop(self) -> None:
        """Let each end at its trial's next step; those that don't are killed. Waits for all."""
        self._ending = True
        self._order("stop")
        last = self._clock() + STOPPING
        while self.alive:
            self.tend()
            if self._clock() > last:
                self._kill()

    def _order(self, word: str) -> None:
        for place in self._places:
            if place.process is not None:
                place.process.order(word)

    def _kill(self) -> None:
        for place in self._places:
            if place.process is not None:
                place.killed = True
                with suppress(OSError):
                    os.killpg(place.process.pid, signal.SIGKILL)

    def _is_due(self, place: _Place) -> bool:
        return not (self._ending or place.given_up or place.ended)

    def _start(self, place: _Place) -> None:
        if self._is_due(place) and self._clock() >= place.start_at:
            place.process = _Process(place.launch)

    def _hear(self, place: _Place) -> None:
        assert place.process is not None
        while True:
            try:
                event = place.process.events.get_nowait()
            except Empty:
                return
            self._pass_on(place, event)

    def _pass_on(self, place: _Place, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "say":
            self._display.say(f"{place.name}: {event['message']}")
        elif kind == "log":
            logger.log(event["level"], "%s: %s", place.name, event["message"])
        elif kind == "started":
            self._display.trial_started(event["number"], place.name)
        elif kind == "step":
            self._display.step(
                event["phase"], event["done"], event["total"], event["note"], place.name
            )
        elif kind == "finished":
            place.deaths = 0
            self.finished += 1
            if self._announces:
                self._display.say(f"{place.name}: {event['words']}")

    def _bury(self, place: _Place, code: int) -> None:
        process = place.process
        assert process is not None
        process.close()
        self._hear(place)
        place.process = None
        self._display.step("", 0, 0, worker=place.name)
        # One that is killed had been told to end.
        died = None if code == 0 or place.killed else last_words(code)
        for study in self._studies():
            for trial in running(study):
                if trial.user_attrs.get(WORKER) == worker_name(process.pid):
                    cut_off(study, trial, died)
        if code == EXIT_HUNG:
            self._display.say(f"{place.name} ended a trial that hung, and is started again.")
        place.ended = code == 0 or self._ending
        if place.ended or code == EXIT_HUNG:
            return
        place.deaths += 1
        place.words = " ".join(list(process.errors)[-3:])
        pause = min(self._longest_pause, 2.0 ** (place.deaths - 1))
        place.start_at = self._clock() + pause
        place.given_up = place.deaths >= self._max_deaths
        then = "It is given up." if place.given_up else f"It is started again in {pause:g} s."
        self._display.say(f"{place.name} died: {died}. {place.words} {then}")


def last_words(code: int) -> str:
    """What an exit code says."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (" (out of memory?)" if name == "SIGKILL" else "")
