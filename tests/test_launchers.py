"""Workers on a cluster: Ray on this machine, and submitit's local engine in SLURM's place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest

from autocompress.database import open_storage
from autocompress.errors import AutocompressError, ConfigError
from autocompress.heartbeat import StaleWatch
from autocompress.launchers import RayWorkers, SlurmWorkers, WorkerJob, Workers
from autocompress.process import SEARCHING, work
from autocompress.progress import NullDisplay
from autocompress.slots import WORKER, take, top_up
from autocompress.store import load_study, open_study, trials_spent
from autocompress.watch import Orders

TOTAL = 8
COSTS = [1.0, 2.0]

pytestmark = pytest.mark.usefixtures("closed_storages")


def be_worker(url: str, folder: str, seconds: float = 0.1) -> int:
    """Carry out trials that are files; the first worker of all dies with its trial."""
    study = load_study(open_storage(url), "one", "exploration")
    assert study is not None

    def carry_out(trial: optuna.Trial) -> bool:
        first = Path(folder) / "first"
        if not first.exists():
            first.touch()
            os._exit(1)
        time.sleep(seconds)
        study.tell(trial, COSTS)
        return True

    over = partial(_over, study)
    return work(lambda: take(study), carry_out, Orders(), over, 60.0)


def _over(study: optuna.Study) -> bool:
    return not study.user_attrs[SEARCHING]


def fail(*_: str) -> int:
    raise LookupError("no such data here")


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    found = open_study(
        open_storage(f"sqlite:///{tmp_path / 'study.db'}"),
        "one",
        "exploration",
        bound={},
        cost_name="x",
    )
    found.set_user_attr(SEARCHING, True)
    return found


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray")
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    found.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield found
    found.shutdown()


Make = Callable[[Callable[[], int], optuna.Study], Workers]


@pytest.fixture(params=["ray", "slurm"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    if request.param == "ray":
        request.getfixturevalue("ray")
        return lambda job, study: RayWorkers(job, 2, {}, study, NullDisplay(), True, tmp_path)
    pytest.importorskip("submitit")
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    options = {"cluster": "local", "timeout_min": 5}
    return lambda job, study: SlurmWorkers(
        job, 2, options, study, NullDisplay(), True, tmp_path / "cluster"
    )


def conduct(
    workers: Workers, study: optuna.Study, seconds: float = 90.0, grace: float = 60.0
) -> None:
    stale, last = StaleWatch(grace), time.monotonic() + seconds
    while len(trials_spent(study)) < TOTAL:
        assert time.monotonic() < last
        top_up(study, TOTAL)
        workers.tend()
        stale.cut_off_stale(study)


def test_two_workers_do_the_trials(make: Make, study: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "first").touch()
    url = f"sqlite:///{tmp_path / 'study.db'}"
    workers = make(partial(be_worker, url, str(tmp_path)), study)
    assert workers.alive == 2
    conduct(workers, study)
    workers.drain()
    while not workers.over:
        workers.tend()
    assert workers.finished == TOTAL
    assert all(trial.values == COSTS for trial in study.trials) and len(study.trials) == TOTAL
    assert str(os.getpid()) not in {t.user_attrs[WORKER].rpartition("/")[2] for t in study.trials}


def test_they_can_be_stopped(make: Make, study: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "first").touch()
    url = f"sqlite:///{tmp_path / 'study.db'}"
    workers = make(partial(be_worker, url, str(tmp_path)), study)
    workers.tend()
    workers.stop()
    assert workers.over and study.user_attrs[SEARCHING] is False


def test_all_that_fail_are_an_error(make: Make, study: optuna.Study, tmp_path: Path) -> None:
    workers = make(partial(fail), study)
    last = time.monotonic() + 90
    with pytest.raises(AutocompressError, match="All 2 workers failed on the cluster"):
        while time.monotonic() < last:
            workers.tend()


def test_ray_begins_a_worker_anew_that_died(ray: Any, study: optuna.Study, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    workers = RayWorkers(
        partial(be_worker, url, str(tmp_path)), 1, {}, study, NullDisplay(), True, tmp_path
    )
    conduct(workers, study, 120.0, grace=3.0)
    workers.stop()
    assert len(study.trials) == TOTAL + 1, "the one with which it died came again"


@pytest.mark.slow
def test_a_slurm_job_is_submitted_again_when_its_time_is_over(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    (tmp_path / "first").touch()
    url = f"sqlite:///{tmp_path / 'study.db'}"
    workers = SlurmWorkers(
        partial(be_worker, url, str(tmp_path), 6.0),
        1,
        # The signal that SLURM sends before it takes the machine away comes after 30 s.
        {"cluster": "local", "timeout_min": 1},
        study,
        NullDisplay(),
        True,
        tmp_path / "cluster",
    )
    conduct(workers, study, 200.0, grace=12.0)
    workers.stop()
    log = "".join(path.read_text() for path in (tmp_path / "cluster").glob("*_log.*"))
    assert "this job is timed-out" in log and "Requeued job" in log


def test_a_job_can_be_pickled_and_submitted_again() -> None:
    pytest.importorskip("submitit")
    job = WorkerJob(partial(len, "abc"))
    assert job() == 3 and job.checkpoint().function == job


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_a_missing_engine_is_named(
    name: str, extra: str, study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'autocompress\[{extra}\]'"):
        if name == "ray":
            RayWorkers(partial(fail), 1, {}, study, NullDisplay(), True, tmp_path)
        else:
            SlurmWorkers(partial(fail), 1, {}, study, NullDisplay(), True, tmp_path)


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_options_that_an_engine_does_not_know_are_refused(
    name: str, study: optuna.Study, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = {"cluster": "local"} if name == "slurm" else {}
    pytest.importorskip("submitit") if name == "slurm" else request.getfixturevalue("ray")
    with pytest.raises(ConfigError, match=r"run.launcher_options .*num_gpsu"):
        if name == "ray":
            RayWorkers(partial(fail), 1, {"num_gpsu": 1}, study, NullDisplay(), True, tmp_path)
        else:
            SlurmWorkers(
                partial(fail), 1, options | {"num_gpsu": 1}, study, NullDisplay(), True, tmp_path
            )
