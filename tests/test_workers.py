"""Worker processes, on real studies: counted, joined from elsewhere, hung, killed, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import typer
from conftest import tiny_config
from optuna.trial import TrialState

from autocompress import joining, serving
from autocompress import study as command_line
from autocompress.artifacts import FolderStore, save_text
from autocompress.database import open_storage
from autocompress.errors import AutocompressError, ConfigError, DamagedArtifact
from autocompress.joining import Place, read_settings
from autocompress.progress import NullDisplay
from autocompress.slots import STOPPED, WORKER, running, worker_name
from autocompress.store import load_study, trials_spent
from autocompress.trials import INTERRUPTED
from autocompress.workers import (
    MOST_ON_CPU,
    Launch,
    Pool,
    cores,
    count_workers,
    last_words,
    shares,
    visible_gpus,
)

MODULE = '''
"""A network and images of the user's own."""
import os, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from conftest import TinyNet, make_images

HERE = Path(__file__).parent


def net():
    network = TinyNet()
    network.stem.weight.requires_grad_(False)
    return network


class Loader(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            hang = HERE / "hang"
            if os.environ.get("CHILD") and hang.exists():
                hang.unlink()
                time.sleep(1000)
            yield batch


def data():
    train = Loader(TensorDataset(*make_images(512, 1)), batch_size=32, shuffle=True)
    val = DataLoader(TensorDataset(*make_images(256, 2)), batch_size=64)
    test = DataLoader(TensorDataset(*make_images(256, 3)), batch_size=64)
    return train, val, test
'''

STUDY = """
name = "mine"
delta = 50.0
[model]
source = "owncode:net"
[data]
source = "owncode:data"
[baseline]
epochs = 3
[search]
include = ["*"]
channels = false
trials = {trials}
annealing_trials = 1
[finetune]
epochs = {epochs}
learning_rate = 0.01
final_epochs = 1
gate = 100.0
[run]
device = "cpu"
formats = []
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The study file of a tiny network and images, made by code beside it."""
    (tmp_path / "owncode.py").write_text(MODULE)
    return write(tmp_path)


def write(folder: Path, trials: int = 4, epochs: float = 1.0, more: str = "") -> Path:
    path = folder / "mine.toml"
    path.write_text(STUDY.format(trials=trials, epochs=epochs) + more)
    return path


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "AUTOCOMPRESS_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "CHILD": "1",
        "OMP_NUM_THREADS": "1",
    }


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autocompress.study", *arguments],
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def end(process: subprocess.Popen[str], seconds: float = 240.0) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def conductor(mine: Path, *more: str) -> subprocess.Popen[str]:
    return start(mine.parent, "run", str(mine), "--out", str(mine.parent / "runs"), *more)


def run(mine: Path, *more: str) -> tuple[int, str]:
    return end(conductor(mine, *more))


def storage(mine: Path) -> str:
    return f"sqlite:///{mine.parent / 'runs' / 'mine' / 'study.db'}"


def exploration(mine: Path) -> optuna.Study:
    study = load_study(open_storage(storage(mine)), "mine", "exploration")
    assert study is not None
    return study


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.05)


def begun(mine: Path) -> bool:
    database = mine.parent / "runs" / "mine" / "study.db"
    return database.exists() and "layer_table" in exploration_attrs(mine)


def exploration_attrs(mine: Path) -> dict[str, Any]:
    try:
        return exploration(mine).user_attrs
    except (AssertionError, ConfigError):
        return {}


def test_two_workers_share_a_study(mine: Path) -> None:
    write(mine.parent, trials=8)
    code, output = run(mine, "--workers", "2")
    assert code == 0, output
    study = exploration(mine)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 8
    assert len({t.user_attrs["plan_digest"] for t in study.trials}) == 8
    names = {t.user_attrs[WORKER] for t in study.trials}
    assert len(names) == 2 and f"{os.getpid()}" not in str(names)
    assert "[exploration 8/8]" in output and "Traceback" not in output
    assert "The study runs code of its own: model.source = 'owncode:net'." in output
    result = json.loads((mine.parent / "runs/mine/result.json").read_text())
    assert result["trials"] == {"exploration": 8, "annealing": 1}
    # They do the long fine-tunings, too.
    finals = load_study(open_storage(storage(mine)), "mine", "finals")
    assert finals is not None and len(finals.trials) >= 2
    assert {t.user_attrs[WORKER] for t in finals.trials} <= names
    assert "worker 0: Fine-tuned" not in output and "Fine-tuned" in output


def test_a_worker_joins_from_the_database_alone(mine: Path, tmp_path_factory: Any) -> None:
    """Elsewhere there are the package, the data and the user's code, and nothing of the study."""
    # The folder of the artifacts is named from where the study is run.
    write(mine.parent, trials=30, epochs=4, more='artifacts = "kept"\n')
    first = conductor(mine, "--workers", "0")
    wait_for(lambda: begun(mine))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    url = storage(mine)
    with pytest.raises(ConfigError, match="owncode:net.* --code FOLDER"):
        read_settings(Place(url, "mine"))
    joins = ("worker", "--study", "mine", "--storage", url, "--workers", "0")
    code, output = end(start(elsewhere, *joins, "--code", str(mine.parent)))
    assert code == 0 and "trials ended here" in output, output
    code, said = end(first)
    assert code == 0, said
    study = exploration(mine)
    assert len(study.trials) == 30 and len(trials_spent(study)) == 30
    assert (mine.parent / "kept").is_dir() and not (elsewhere / "kept").exists()
    code, output = end(start(mine.parent, "export", str(mine), *("--trial", "exploration/29")))
    assert code == 0 and "exports/exploration-29" in output, output
    theirs = [t for t in study.trials if t.user_attrs[WORKER] != study.trials[0].user_attrs[WORKER]]
    assert theirs and all(t.state == TrialState.COMPLETE for t in theirs)
    assert said.count("/30]") >= 30, "the conductor tells of those, too"
    config, study = read_settings(Place(url, "mine", code=mine.parent))
    joined = joining.join(config, study, NullDisplay(), mine.parent).bench.task.model
    assert [n for n, p in joined.named_parameters() if not p.requires_grad] == ["stem.weight"]


@pytest.mark.slow
def test_a_group_of_processes_is_one_worker(mine: Path) -> None:
    """As torchrun starts them: each trial is fine-tuned by both."""
    write(mine.parent, trials=30, epochs=6)
    first = conductor(mine, "--workers", "0")
    wait_for(lambda: begun(mine))
    url = storage(mine)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m autocompress.study"
    joins = ("worker", "--study", "mine", "--storage", url, "--code", str(mine.parent))
    group = subprocess.Popen(
        [sys.executable, *torchrun.split(), *joins, "--device", "cpu"],
        env=environment(mine.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=mine.parent,
    )
    code, output = end(group)
    assert code == 0, output
    ended = [int(line.split()[0]) for line in output.splitlines() if "trials ended here" in line]
    assert sorted(ended)[0] == 0 < sorted(ended)[1], "rank 0 has the trials"
    assert end(first)[0] == 0
    spent = trials_spent(exploration(mine))
    names = {t.user_attrs[WORKER] for t in spent}
    assert len(spent) == 30 and len(names) == 2
    assert all(t.state == TrialState.COMPLETE for t in spent)


def test_other_data_is_refused(mine: Path, tmp_path_factory: Any) -> None:
    write(mine.parent, trials=1)
    code, output = run(mine, "--workers", "0", "--stage", "exploration")
    assert code == 0, output
    other = tmp_path_factory.mktemp("other")
    text = MODULE.replace("make_images(256, 2)", "make_images(256, 9)")
    (other / "owncode.py").write_text(text)
    url = storage(mine)
    joins = ("worker", "--study", "mine", "--storage", url, "--workers", "0", "--code", str(other))
    code, output = end(start(other, *joins))
    assert code == 2 and "The data here is not that of study 'mine'" in output


@pytest.mark.slow
def test_a_trial_that_hangs_is_ended_and_the_study_goes_on(mine: Path) -> None:
    write(mine.parent, trials=3, more="workers = 1\nstall_limit = 0.1\n")
    first = conductor(mine)
    wait_for(lambda: begun(mine) and running(exploration(mine)))
    (mine.parent / "hang").touch()
    code, output = end(first)
    assert code == 0, output
    failed = [t for t in exploration(mine).trials if t.state == TrialState.FAIL]
    assert [t.user_attrs["reason"] for t in failed] == [
        "TrialTimeout: it hung: no step in 0.1 minutes (run.stall_limit). A data loader that waits "
        "for ever does that."
    ]
    assert len(exploration(mine).trials) == 3 and "ended a trial that hung" in output


def test_a_trial_has_a_limit(mine: Path) -> None:
    write(mine.parent, trials=2, epochs=500.0, more="workers = 0\ntrial_limit = 0.02\n")
    code, output = run(mine, "--stage", "exploration")
    assert code == 2 and "2 trials of the exploration failed" in output
    assert "more than 0.02 minutes (run.trial_limit)" in output


@pytest.mark.slow
def test_ten_killed_workers_of_a_real_study_lose_nothing(mine: Path) -> None:
    write(mine.parent, trials=44, epochs=20)
    first = conductor(mine, "--workers", "2")
    wait_for(lambda: begun(mine))
    study = exploration(mine)
    killed: set[int] = set()
    chance = random.Random(0)
    while len(killed) < 10 and first.poll() is None:
        for trial in running(study):
            pid = int(trial.user_attrs[WORKER].rpartition("/")[2])
            if pid not in killed and "plan" in trial.user_attrs:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                # A worker that dies five times without ending a trial is given up.
                time.sleep(chance.uniform(6.0, 12.0))
                break
        time.sleep(0.1)
    code, output = end(first, 600)
    assert code == 0, output
    spent = trials_spent(exploration(mine))
    assert len(spent) == 44 and len(killed) == 10
    assert all(
        t.state == TrialState.COMPLETE or "its worker died 3 times" in t.user_attrs["reason"]
        for t in spent
    )
    print(len(killed), [t.state.name for t in exploration(mine).trials])


def test_a_damaged_layer_table_is_noticed(tmp_path: Path) -> None:
    store, study = FolderStore(tmp_path), optuna.create_study()
    kept = {"artifact": save_text("{}", "table.json", study, store), "digest": "0" * 12}
    with pytest.raises(DamagedArtifact, match="The layer table .* makes it anew"):
        joining._table(kept, store)


def test_how_many_workers() -> None:
    assert count_workers(3, "cpu", 0, 64) == 3 and count_workers(0, "cuda", 8, 64) == 0
    assert count_workers(None, "auto", 8, 64) == 8 and count_workers(None, "cuda", 2, 64) == 2
    assert count_workers(None, "cuda:1", 8, 64) == 1
    assert count_workers(None, "cpu", 8, 64) == MOST_ON_CPU
    assert count_workers(None, "auto", 0, 2) == 2
    assert count_workers(None, "auto", 0, 1) == 1


def test_latencies_on_the_cpu_are_measured_by_one_worker(tmp_path: Path) -> None:
    study = optuna.create_study()

    def count(**settings: Any) -> int:
        config = tiny_config(tmp_path, **{"run.device": "cpu", **settings})
        place = Place("sqlite:///x.db", "tiny", device="cpu")
        pool = serving.start_workers(place, config, study, lambda: [], tmp_path, Said(), True)
        assert isinstance(pool, Pool)
        return len(pool._places)

    assert count(objective="latency") == 1
    assert count(objective="macs") == count_workers(None, "cpu", 0, cores())
    assert count(objective="latency", **{"run.workers": 3}) == 3


def test_each_worker_has_its_gpu_and_its_share_of_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = shares(3, "auto", ["0", "1"], 8)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["0", "1", "0"]
    assert {env["OMP_NUM_THREADS"] for env in found} == {"2"}
    (only,) = shares(1, "cuda:1", ["4", "6"], 8)
    assert only["CUDA_VISIBLE_DEVICES"] == "6"
    assert [env["CUDA_VISIBLE_DEVICES"] for env in shares(2, "cpu", ["0"], 1)] == ["", ""]
    for most, threads in (("3", "3"), ("3,1", "3"), ("9", "4"), ("0", "4"), ("many", "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", most)
        assert {env["OMP_NUM_THREADS"] for env in shares(2, "cpu", [], 8)} == {threads}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible_gpus(2) == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]


def test_what_an_exit_code_says() -> None:
    assert last_words(3) == "exit code 3"
    assert "SIGKILL (out of memory?)" in last_words(-9) and last_words(-11) == "SIGSEGV"


class Said(NullDisplay):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_worker_that_dies_again_and_again_is_given_up() -> None:
    code = "import sys; sys.exit('no such data here')"
    display = Said()
    pool = Pool(
        [Launch([sys.executable, "-c", code])] * 2,
        lambda: [],
        display,
        max_deaths=2,
        longest_pause=0.1,
    )
    with pytest.raises(AutocompressError, match="All 2 workers died 2 times .*no such data here"):
        while True:
            pool.tend()
    pool.stop()
    assert sum("It is given up" in line for line in display.lines) == 2
    assert sum("It is started again" in line for line in display.lines) == 2


def test_what_does_not_end_when_it_is_told_to_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.workers.STOPPING", 0.3)
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path / 'one.db'}"))
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    pool = Pool([Launch([sys.executable, "-c", code])], lambda: [study], Said())
    assert pool.alive == 1, "it is about to be started"
    pool.tend()
    assert pool.alive == 1
    while not (pid.exists() and pid.read_text()):
        pool.tend()
    study.ask().set_user_attr(WORKER, worker_name(int(pid.read_text())))
    pool.stop()
    assert pool.alive == 0
    [trial] = study.trials
    assert trial.user_attrs[INTERRUPTED] == STOPPED, "no death of its own"


def test_a_password_does_not_stay_among_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of processes shows the arguments of all programs to everyone."""
    url = "postgresql://me:s3cret@host/db"
    called: list[tuple[Any, ...]] = []

    class Replaced(Exception):
        pass

    def execve(*arguments: Any) -> None:
        called.append(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    commands = ("run", "worker", "upgrade", "status", "report", "export", "dashboard")
    for name in commands:
        words = ["--study", "mine"] if name == "worker" else ["mine.toml"]
        for form in (["--storage", url], [f"--storage={url}"]):
            argv = ["study", name, *words, *form]
            monkeypatch.setattr(sys, "argv", argv)
            with pytest.raises(Replaced):
                typer.main.get_command(command_line.app)(argv[1:], standalone_mode=False)
            _, command, environ = called.pop()
            hidden = [part.replace("s3cret", "***") for part in form]
            assert command[-len(argv) + 1 :] == [name, *words, *hidden]
            assert environ["AUTOCOMPRESS_STORAGE"] == url
    assert len(commands) == sum(
        any("storage" in option.name for option in command.params if option.name)
        for command in typer.main.get_command(command_line.app).commands.values()  # type: ignore[attr-defined]
    )
