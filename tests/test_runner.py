"""What is seen to while trials run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocompress.database import open_storage
from autocompress.news import DOING
from autocompress.objective import Bench
from autocompress.progress import NullDisplay
from autocompress.runner import _Post
from autocompress.slots import WORKER, worker_name
from autocompress.space import SearchSpace
from autocompress.stages import Stage
from autocompress.store import open_study


class Heard(NullDisplay):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def trial_started(self, number: int, worker: str = "") -> None:
        self.heard.append((number, worker))

    def step(self, phase: str, done: float, total: float, note: str = "", worker: str = "") -> None:
        self.heard.append((phase, worker))


@pytest.mark.parametrize("stage", ["exploration", "finals"])
def test_workers_of_other_machines_are_shown_with_what_they_do(stage: str, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    study, display = open_study(storage, "one", stage, bound={}, cost_name="parameters"), Heard()
    space = None if stage == "finals" else cast(SearchSpace, object())
    post = _Post(cast(Bench, SimpleNamespace(display=display)), Stage(stage, study, space, 2))
    for worker in ("far/12", worker_name()):
        trial = study.ask()
        trial.set_user_attr(WORKER, worker)
        storage.set_trial_system_attr(trial._trial_id, DOING, ["evaluate", 0.0, 0.0, ""])
    for _ in range(2):
        post.look_out()
    # The number of a long fine-tuning would be taken for that of a trial of the search.
    began = [] if stage == "finals" else [(0, "far/12")]
    assert display.heard == [*began, ("evaluate", "far/12"), ("evaluate", "far/12")]
    study.tell(0, [1.0, 1.0])
    post.look_out()
    assert display.heard[-1] == ("", "far/12")
