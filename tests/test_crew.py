"""Who carries out the trials, and what is done beside them."""

from __future__ import annotations

import time
from threading import Event
from typing import Any, cast

import pytest

from autocompress.crew import Team
from autocompress.progress import Display, NullDisplay
from autocompress.stages import Stage

STAGE = cast(Stage, None)


class Workers:
    """Stands for processes."""

    alive, over, finished = 2, False, 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def tend(self) -> None:
        self.calls.append("tend")

    def drain(self) -> None:
        self.calls.append("drain")

    def stop(self) -> None:
        self.calls.append("stop")


class Rows(NullDisplay):
    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        self.rows.append((phase, done, worker))


def test_work_beside_the_trials_is_done_once_while_they_are_tended() -> None:
    workers, display, go = Workers(), Rows(), Event()
    team = Team(workers, display)
    calls: list[int] = []

    def work(shown: Display) -> None:
        calls.append(1)
        shown.step("fine-tune", 3.0, 10.0)
        assert go.wait(10)

    assert not team.beside(work) and not team.beside(work)
    team.tend(STAGE)
    assert team.alive == 2 and set(workers.calls) == {"tend"}
    go.set()
    team.close()
    assert calls == [1] and workers.calls[-1] == "stop"
    assert display.rows == [("fine-tune", 3.0, "rehearsal"), ("", 0, "rehearsal")]


def test_what_is_done_beside_is_waited_for() -> None:
    workers, go = Workers(), Event()
    team = Team(workers, Rows())
    team.wait()
    assert not workers.calls

    def work(shown: Display) -> None:
        while len(workers.calls) < 3:
            time.sleep(0.001)
        go.set()

    team.beside(work)
    team.wait()
    assert go.is_set() and set(workers.calls) == {"tend"}


def test_an_error_beside_is_not_waited_away() -> None:
    team = Team(Workers(), Rows())

    def work(shown: Display) -> None:
        raise LookupError("a bad batch")

    team.beside(work)
    with pytest.raises(LookupError, match="a bad batch"):
        team.wait()


def test_an_error_beside_the_trials_ends_them_too() -> None:
    team = Team(Workers(), Rows())

    def work(shown: Display) -> None:
        raise LookupError("a bad batch")

    team.beside(work)
    last = time.monotonic() + 10
    with pytest.raises(LookupError, match="a bad batch"):
        while time.monotonic() < last:
            team.tend(STAGE)
    team.drain()
    team.close()


def test_the_conductor_looks_at_once_where_a_trial_has_ended() -> None:
    class Ending(Workers):
        def tend(self) -> None:
            super().tend()
            self.finished = len(self.calls) // 2

    workers = Ending()
    team = Team(workers, Rows())
    team.tend(STAGE)
    assert len(workers.calls) == 2
