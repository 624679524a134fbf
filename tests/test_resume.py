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
"""
PATIENCE = 180.0
"""Seconds that a study may take to come to the next trial."""


def start(study: Path) -> subprocess.Popen[bytes]:
    with (study.parent / "output.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "autocompress.study", str(study), "--out", str(study.parent)],
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


def kill_when(study: Path, stage: str, finished: int, name: str = "SIGKILL") -> int:
    """Run the study, and end it while a trial runs after `finished` others of the stage."""
    process = start(study)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        own = states(study).get(stage, [])
        if own.count("COMPLETE") >= finished and own[-1] == "RUNNING":
            process.send_signal(getattr(signal, name))
            return process.wait(PATIENCE)
        assert process.poll() is None, (study.parent / "output.txt").read_text()
        time.sleep(0.01)
    process.kill()
    pytest.fail("the study never came to the trial at which it is to be killed")


def test_a_killed_study_goes_on_to_exactly_the_same_total(tmp_path: Path) -> None:
    study = tmp_path / "killed.toml"
    study.write_text(STUDY)
    assert kill_when(study, "exploration", finished=1) == -signal.SIGKILL
    assert states(study)["exploration"][-1] == "RUNNING"
    assert kill_when(study, "exploration", finished=3, name="SIGINT") == 130
    assert kill_when(study, "annealing", finished=1) == -signal.SIGKILL
    last = start(study)
    assert last.wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()

    output = (tmp_path / "output.txt").read_text()
    assert "Interrupted. Kept in" in output
    assert "Traceback" not in output
    # All that was lost are the three trials that ran when the study was ended.
    exploration, annealing = states(study)["exploration"], states(study)["annealing"]
    assert exploration.count("COMPLETE") == 4 and exploration.count("FAIL") == 2
    assert annealing.count("COMPLETE") == 2 and annealing.count("FAIL") == 1
    assert len(exploration) == 6 and len(annealing) == 3
    # The baseline was trained by the first process only.
    assert output.count("Trained the baseline") == 1
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["trials"] == {"exploration": 4, "annealing": 2}
    assert (tmp_path / "killed" / "best" / "model.safetensors").exists()
