"""Faults, made for real: killed processes, restarted servers, full disks. Nothing may be lost.

What is promised is in docs/faults.md. The core of it runs always; `-m slow` runs it at length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import optuna
import pytest
from optuna.trial import TrialState
from postgres import Postgres

from autocompress.slots import MAX_DEATHS, RETRY, WORKER, running
from autocompress.store import trials_spent
from autocompress.trials import INTERRUPTED
from autocompress.workers import Pool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import simulation  # noqa: E402

pytestmark = pytest.mark.usefixtures("closed_storages")


def check(study: optuna.Study, total: int) -> None:
    """Each trial of the budget ended once, each that was cut off came again with its plan."""
    trials = study.trials
    spent = trials_spent(study)
    assert len(spent) == total
    again = [t.user_attrs[RETRY]["of"] for t in trials if RETRY in t.user_attrs]
    assert len(again) == len(set(again)), "no trial comes again twice"
    for trial in trials:
        if RETRY in trial.user_attrs and trial.state == TrialState.COMPLETE:
            assert trial.params == trials[trial.user_attrs[RETRY]["of"]].params
        if trial.state == TrialState.COMPLETE:
            assert trial.values is not None and INTERRUPTED not in trial.user_attrs
        elif INTERRUPTED not in trial.user_attrs:
            deaths = trial.user_attrs["reason"]
            assert trial.state == TrialState.FAIL and f"died {MAX_DEATHS + 1} times" in deaths
    # What the Pareto front is made of is whole.
    front = study.best_trials
    assert front and all(t.values is not None for t in front)


def simulate(
    url: str, total: int, workers: int, seconds: float, disturb: Callable[..., None]
) -> optuna.Study:
    simulation.conduct(url, "one", total, workers, seconds, disturb, steadfast=True)
    study = simulation.open_simulated(url, "one")
    check(study, total)
    return study


def test_killed_workers_lose_no_trial(url: str) -> None:
    killer = simulation.Killer(4, 0.5)
    study = simulate(url, 14, 2, 0.8, killer)
    assert killer.left <= 1
    assert sum(INTERRUPTED in t.user_attrs for t in study.trials) >= 2


@pytest.mark.slow
def test_two_hundred_killed_workers_lose_no_trial(url: str) -> None:
    killer = simulation.Killer(200, 0.6)
    study = simulate(url, 120, 4, 1.0, killer)
    assert killer.left == 0
    print(simulation.tally(study))


def test_a_server_that_crashes_and_comes_back_loses_no_trial(server: Postgres) -> None:
    self_restarts(server, total=20, workers=3, restarts=1)


@pytest.mark.slow
def test_eight_workers_ride_out_restarts_of_the_server(server: Postgres) -> None:
    self_restarts(server, total=400, workers=8, restarts=5)


def self_restarts(server: Postgres, total: int, workers: int, restarts: int) -> None:
    url = server.new_database(f"d{uuid4().hex}")
    left = [restarts]
    last = [time.monotonic()]

    def restart(pool: Pool, study: optuna.Study) -> None:
        if left[0] and running(study) and time.monotonic() - last[0] > 4.0:
            server.stop("immediate" if left[0] % 2 else "fast")
            time.sleep(1.0)
            server.start()
            left[0] -= 1
            last[0] = time.monotonic()

    study = simulate(url, total, workers, 0.5, restart)
    assert left == [0]
    # A worker waits for the server, and no trial is begun anew.
    assert not any(INTERRUPTED in t.user_attrs for t in study.trials)


@pytest.mark.slow
def test_eight_workers_write_one_sqlite_file(tmp_path: Path) -> None:
    study = simulate(f"sqlite:///{tmp_path / 'study.db'}", 100, 8, 0.1, lambda pool, study: None)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)


def test_who_conducts_may_be_killed_and_the_workers_end(tmp_path: Path) -> None:
    """The next one goes on to the same total, and no worker is left behind."""
    import subprocess

    url = f"sqlite:///{tmp_path / 'study.db'}"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport simulation\n"
        "simulation.conduct(sys.argv[2], 'one', 10, 2, 1.0)\n"
    )
    scripts = str(Path(simulation.__file__).parent)
    first = subprocess.Popen([sys.executable, "-c", code, scripts, url])
    study = simulation.open_simulated(url, "one")
    end = time.monotonic() + 60
    while len(trials_spent(study)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    workers = [int(t.user_attrs[WORKER].rpartition("/")[2]) for t in running(study)]
    first.kill()
    first.wait()
    assert workers
    end = time.monotonic() + 30
    while any(_lives(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_lives(pid) for pid in workers)
    assert not running(study), "they ended their trials themselves"
    simulate(url, 10, 2, 0.3, lambda pool, study: None)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
