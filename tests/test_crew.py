"""Who carries out the trials."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from autocompress import crew
from autocompress.crew import Solo, Team
from autocompress.database import open_storage
from autocompress.objective import Bench
from autocompress.slots import top_up
from autocompress.stages import Stage
from autocompress.store import open_study


class Workers:
    """Stands for processes, of which a trial ends at every second call."""

    alive, over = 2, False

    def __init__(self) -> None:
        self.calls: list[str] = []

    @property
    def finished(self) -> int:
        return len(self.calls) // 2

    def tend(self) -> None:
        self.calls.append("tend")

    def drain(self) -> None:
        self.calls.append("drain")

    def stop(self) -> None:
        self.calls.append("stop")


def test_the_conductor_looks_at_once_where_a_trial_has_ended() -> None:
    workers = Workers()
    team = Team(workers)
    team.tend([])
    assert workers.calls == ["tend", "tend"] and team.alive == 2
    team.drain()
    team.close()
    assert workers.calls[2:] == ["drain", "stop"]


def test_alone_one_carries_out_the_first_stages_trials_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    stages = []
    for name, count in (("finals", 1), ("annealing", 2)):
        study = open_study(storage, "one", name, bound={}, cost_name="parameters")
        top_up(study, count)
        stages.append(Stage(name, study, None, count))
    done: list[str] = []
    monkeypatch.setattr(crew, "perform", lambda bench, stage, trial: done.append(stage.name))
    monkeypatch.setattr(crew, "PAUSE", 0.0)
    solo = Solo(cast(Bench, None))
    for _ in range(4):
        solo.tend(stages)
    assert done == ["finals", "annealing", "annealing"]
