"""A study that is killed without warning, again and again, and still comes to the same end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = """
name = "killed"
delta = 100.0
[model]
source = "zoo:resnet_small"
arguments = { num_classes = 10, in_channels = 1, width = 8 }
[data]
source = "digits"
val_fraction = 0.2
[baseline]
epochs = 1
[search]
transforms = ["svd", "tucker2"]
trials = 4
annealing_trials = 2
[finetune]
epochs = 1
final_epochs = 1
gate = 100.0
[run]
formats = []
"""
PATIENCE = 180.0
"""Seconds that a study may take to come to the next trial."""


def start(study: Path, workers: int) -> subprocess.Popen[bytes]:
    with (study.parent / "output.txt").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "autocompress.study", str(study)),
                *("--out", str(study.parent), "--workers", str(workers)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AUTOCOMPRESS_HOME": str(study.parent / "home")},
            # What a shell runs in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def states(study: Path) -> dict[str, list[str]]:
    """States of all trials in the database, by stage."""
    database = study.parent / "killed" / "study.db"
    if not database.exists():
        return {}
    query = (
        "SELECT study_name, state FROM trials JOIN studies ON trials.study_id = studies.study_id "
        "ORDER BY trial_id"
    )
    found: dict[str, list[str]] = {}
    connection = sqlite3.connect(database, timeout=60)
    try:
        for name, state in connection.execute(query):
            found.setdefault(name.removeprefix("killed-"), []).append(state)
    except sqlite3.OperationalError:  # the tables are not there yet
        return {}
    finally:
        connection.close()
    return found


def kill_when(study: Path, workers: int, stage: str, finished: int, name: str) -> int:
    """Run the study, and send it a signal while a trial runs after `finished` others of a stage."""
    process = start(study, workers)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        own = states(study).get(stage, [])
        if own.count("COMPLETE") >= finished and "RUNNING" in own:
            process.send_signal(getattr(signal, name))
            code = process.wait(PATIENCE)
            if workers:  # the orders of its workers have ended, which means stop
                wait_for_workers(study, deadline)
            return code
        assert process.poll() is None, (study.parent / "output.txt").read_text()
        time.sleep(0.01)
    process.kill()
    pytest.fail("the study never came to the trial at which it is to be killed")


def wait_for_workers(study: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if not any("RUNNING" in own for own in states(study).values()):
            return
        time.sleep(0.05)
    pytest.fail("a worker went on without the process that started it")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_study_goes_on_to_exactly_the_same_total(workers: int, tmp_path: Path) -> None:
    study = tmp_path / "killed.toml"
    study.write_text(STUDY)
    assert kill_when(study, workers, "exploration", 1, "SIGKILL") == -signal.SIGKILL
    assert ("RUNNING" in states(study)["exploration"]) == (not workers)
    # Once: the running trial comes to its end.
    before = states(study)["exploration"].count("FAIL")
    assert kill_when(study, workers, "exploration", 2, "SIGINT") == 130
    # One more at most: that which the first process left running.
    assert states(study)["exploration"].count("FAIL") <= before + (not workers)
    assert kill_when(study, workers, "annealing", 0, "SIGTERM") == 130
    last = start(study, workers)
    assert last.wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()

    output = (tmp_path / "output.txt").read_text()
    assert "Interrupted. Kept in" in output
    assert "Traceback" not in output
    exploration, annealing = states(study)["exploration"], states(study)["annealing"]
    assert exploration.count("COMPLETE") == 4 and annealing.count("COMPLETE") == 2
    # All that was lost is what ran at a kill, and came again.
    assert exploration.count("FAIL") <= 1 and annealing.count("FAIL") <= 1
    assert not {"RUNNING", "WAITING"} & {*exploration, *annealing}
    # The baseline was trained by the first process only.
    assert output.count("Trained the baseline") == 1
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["trials"] == {"exploration": 4, "annealing": 2}
    assert (tmp_path / "killed" / "best" / "model.safetensors").exists()
