"""How far a study is, read from its database alone."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import tiny_config
from optuna.trial import TrialState, create_trial
from rich.console import Console

from autocompress.config import StudyConfig
from autocompress.database import open_storage
from autocompress.news import DOING, NEWS, SILENT
from autocompress.situation import Situation, read_situation, watch_study
from autocompress.slots import WORKER
from autocompress.store import open_study
from autocompress.tally import Tally
from autocompress.trials import TRACEBACK, set_constraint

BASELINE = {"params": 1000, "size_bytes": 4000, "macs": 9000, "latency": None, "layers": []}


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return tiny_config(tmp_path, trials=4, annealing_trials=2)


@pytest.fixture
def study() -> optuna.Study:
    storage = open_storage("sqlite:///:memory:")
    found = open_study(storage, "tiny", "exploration", bound={}, cost_name="parameters")
    found.set_user_attr("baseline", BASELINE)
    return found


def end(study: optuna.Study, drop: float, params: int, bound: float) -> None:
    """A trial that ends complete."""
    trial = study.ask()
    metrics = {"drop": drop, "drop_bound": bound + 5.0, "params": params, "macs": 3000}
    trial.set_user_attr("metrics", {**metrics, "score": 90.0 - drop})
    set_constraint(trial, bound)
    study.tell(trial, (drop, float(params)))


def tell(study: optuna.Study, state: str, age: float = 1.0, **rows: Any) -> None:
    """News as the process that conducts the study writes them."""
    tally = Tally(time.time)
    tally.stage("exploration", 4, 0, 5.0, "params", None, 3.0, tally.scale)
    for worker, number in rows.items():
        tally.trial_started(number, worker)
        tally.step("fine-tune", 0.5, 2.0, "loss 0.3", worker)
    told = {**tally.to_dict(), "state": state, "at": time.time() - age}
    told |= {"host": "elsewhere", "process": 7}
    study._storage.set_study_system_attr(study._study_id, NEWS, told)


def read(config: StudyConfig, study: optuna.Study, has_result: bool = False) -> Situation:
    return read_situation(config, {"exploration": study}, "runs/tiny", has_result)


def text(now: Situation, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(now.render())
    return console.export_text()


def test_it_says_what_each_worker_does(config: StudyConfig, study: optuna.Study) -> None:
    end(study, 1.0, 250, -2.0)
    end(study, 9.0, 100, 6.0)
    study.ask()
    other = study.ask()  # of a machine that joined, of which nobody has told yet
    other.set_user_attr(WORKER, "far/12")
    doing = ["evaluate", 0.0, 0.0, ""]
    study._storage.set_trial_system_attr(other._trial_id, DOING, doing)
    tell(study, "running", worker_0=2)
    now = read(config, study)
    said = text(now)
    assert max(map(len, said.splitlines())) <= 80
    assert "2 of 4 trials" in said and "fine-tune 0.5 of 2, loss 0.3" in said
    assert "trial 3" in said and "evaluate" in said
    assert "params 4.00x, drop 1.00 of 5.00 allowed (exploration 0)" in said
    assert "running on elsewhere (process 7), heard of 1s ago" in said
    assert "far/12" in text(now, 200)
    found = json.loads(json.dumps(now.to_dict()))
    assert found["state"] == "running" and found["stages"]["exploration"]["running"] == 2
    assert found["best"]["trial"] == "exploration/0" and found["best"]["ratio"] == 4.0
    workers = {row["worker"]: row for row in found["workers"]}
    assert workers["worker_0"]["trial"] == 2 and workers["worker_0"]["note"] == "loss 0.3"
    assert workers["far/12"]["phase"] == "evaluate" and workers["far/12"]["total"] is None


@pytest.mark.parametrize(
    ("state", "age", "words"),
    [
        ("running", SILENT + 100, "no sign of life of elsewhere (process 7) for 3m10s"),
        ("interrupted", 3600, "interrupted 1h00m ago"),
        ("failed", 60, "ended by an error 1m00s ago"),
    ],
)
def test_how_a_study_was_left(
    config: StudyConfig, study: optuna.Study, state: str, age: float, words: str
) -> None:
    tell(study, state, age)
    now = read(config, study)
    assert f"Not finished: {words}" in now.state_words()
    assert now.to_dict()["left_seconds"] is None


def test_finished_is_what_has_all_its_trials_and_a_result(
    config: StudyConfig, study: optuna.Study
) -> None:
    for _ in range(4):
        end(study, 1.0, 250, -2.0)
    alone = tiny_config(
        Path("runs"), trials=4, annealing_trials=2, **{"search.stage": "exploration"}
    )
    assert read(alone, study, has_result=True).state == "finished"
    assert read(config, study, has_result=True).state == "unknown"  # no annealing yet
    tell(study, "finished")
    assert read(alone, study).state == "finished"  # from another machine, without the folder
    more = tiny_config(Path("runs"), trials=5, **{"search.stage": "exploration"})
    assert read(more, study, has_result=True).state == "unknown"


def test_a_study_without_any_trial_can_be_looked_at(
    config: StudyConfig, study: optuna.Study
) -> None:
    study._storage.delete_study(study._study_id)
    storage = study._storage
    new: Any = open_study(storage, "new", "exploration", bound={}, cost_name="parameters")  # type: ignore[arg-type]
    now = read(config, new)
    assert "0/4" in text(now) and now.to_dict()["best"] is None


def test_tracebacks_of_failed_trials_are_kept(config: StudyConfig, study: optuna.Study) -> None:
    trial = study.ask()
    study._storage.set_trial_system_attr(trial._trial_id, TRACEBACK, "Traceback: here")
    study.tell(trial, state=TrialState.FAIL)
    assert read(config, study).tracebacks() == [("exploration/0", "Traceback: here")]


def play(study: optuna.Study, steps: int) -> Any:
    """Each pause of the watcher lets a trial end; after the last the study is left."""
    left = [steps]

    def pause(_: float) -> None:
        left[0] -= 1
        end(study, 1.0, 100 * (left[0] + 1), -2.0)
        tell(study, "running" if left[0] else "interrupted")

    return pause


def test_a_study_is_watched_line_by_line_in_a_pipe(
    config: StudyConfig, study: optuna.Study
) -> None:
    end(study, 1.0, 500, -2.0)
    tell(study, "running", worker_0=1)
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    now = watch_study(lambda: read(config, study), console, play(study, 2))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert now.state == "interrupted" and "\x1b" not in console.file.getvalue()
    assert lines[0].startswith("[exploration 1/4] ") and "worker_0 trial 1 fine-tune" in lines[0]
    assert lines[1].startswith("[exploration 2/4] trial 1  drop 1.00 <= 5.00  params 5.00x")
    assert lines[2].startswith("[exploration 3/4] trial 2  drop 1.00 <= 5.00  params 10.0x")
    assert len(lines) == 3


def test_a_study_is_watched_live_on_a_terminal(
    config: StudyConfig, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "GITHUB_ACTIONS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    tell(study, "running")
    environ = {"TERM": "xterm"}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=environ)
    watch_study(lambda: read(config, study), console, play(study, 2))
    assert isinstance(console.file, io.StringIO)
    assert "exploration 1   drop 1.00 <= 5.00" in console.file.getvalue()
    assert "best so far" in console.file.getvalue()


def test_no_trial_is_taken_for_the_work_of_a_process_that_is_gone(
    config: StudyConfig, study: optuna.Study
) -> None:
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={}))
    assert not read(config, study).tally.rows
