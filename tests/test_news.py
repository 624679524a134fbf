"""What processes tell in the database, for those who look from elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autocompress.database import end_if, open_storage
from autocompress.heartbeat import Heartbeat
from autocompress.news import NEWS, Bulletin, Phase, doing_of
from autocompress.progress import NullDisplay
from autocompress.store import open_study
from autocompress.tally import Tally


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    return open_study(storage, "one", "exploration", bound={}, cost_name="parameters")


def news(study: optuna.Study) -> Any:
    return study._storage.get_study_system_attrs(study._study_id).get(NEWS)


def until(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


class Heard(NullDisplay):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def step(self, *told: Any) -> None:
        self.heard.append(told)

    def close(self) -> None:
        self.heard.append("closed")


def test_what_a_display_is_told_is_in_the_database(study: optuna.Study) -> None:
    display = Heard()
    with Bulletin(display, study, every=0.01) as bulletin:
        bulletin.stage("exploration", 4, delta=1.0)
        bulletin.trial_started(2, "worker 0")
        bulletin.step("fine-tune", 0.5, 2.0, "loss 0.1", "worker 0")
        assert until(lambda: (news(study) or {}).get("rows"))
        kept = Tally.from_dict(news(study))
        assert kept.counter() == "exploration 0/4" and kept.delta == 1.0
        assert kept.rows["worker 0"].number == 2
        assert news(study)["state"] == "running" and news(study)["process"] > 0
    assert news(study)["state"] == "finished"
    # It has heard it too, and is its owner's to close.
    assert display.heard == [("fine-tune", 0.5, 2.0, "loss 0.1", "worker 0")]


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")]
)
def test_how_a_study_was_left_is_told(
    study: optuna.Study, error: type[BaseException], state: str
) -> None:
    with pytest.raises(error), Bulletin(NullDisplay(), study, every=0.01):
        raise error
    assert news(study)["state"] == state


def test_a_database_that_is_away_ends_no_study(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def failing(*_: Any) -> None:
        calls.append(1)
        raise OSError("away")

    monkeypatch.setattr(study._storage, "set_study_system_attr", failing)
    with Bulletin(NullDisplay(), study, every=0.01) as bulletin:
        bulletin.stage("exploration", 4)
        assert until(lambda: len(calls) > 2)


def test_the_log_has_the_steps(study: optuna.Study, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="autocompress")
    bulletin = Bulletin(NullDisplay(), study)
    bulletin.stage("exploration", 4)
    bulletin.trial_started(2, "worker 0")
    for done in (0.5, 0.6):
        bulletin.step("fine-tune", done, 2.0, "", "worker 0")
    lines = [r.getMessage() for r in caplog.records if "fine-tune" in r.getMessage()]
    assert lines == ["[exploration 0/4] worker 0 trial 2: fine-tune 0.5 of 2"]


def test_a_worker_tells_what_it_does_with_its_heartbeats(study: optuna.Study) -> None:
    trial = study.ask()
    now: list[Phase] = [("build", 0.0, 0.0, "")]

    def told() -> Phase | None:
        return doing_of(study.get_trials()[0])

    assert told() is None
    with Heartbeat(study, trial._trial_id, every=0.01, doing=lambda: now[0]):
        assert until(lambda: told() == ("build", 0.0, 0.0, ""))
        now[0] = ("fine-tune", 0.5, 2.0, "loss 0.1")
        assert until(lambda: told() == now[0])
        end_if(study, trial._trial_id, TrialState.RUNNING, TrialState.FAIL, {})
        now[0] = ("evaluate", 0.0, 0.0, "")
    assert told() != now[0]
