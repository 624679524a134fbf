"""Two processes that `torchrun` starts, on CPUs; this file is also the program that they run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, kept_in, make_images, make_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress import training
from autocompress.distributed import ask_first, join_group, leave_group, rank, share, world
from autocompress.errors import ConfigError
from autocompress.evaluation import evaluate
from autocompress.task import Task
from autocompress.training import FitResult, fit

CPU = torch.device("cpu")
DEVICE = CPU
"""Of this process."""
SETTINGS: dict[str, Any] = {"epochs": 2.5, "learning_rate": 0.1, "seed": 3}
STEPS = 10


class PlainNet(nn.Module):
    """A network that treats each image alone; one of its layers is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().amax((2, 3)))


class DropoutNet(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def plain_task() -> Task:
    """Batches of 33, 33, 33 and 1: of odd sizes, and of fewer images than processes."""
    torch.manual_seed(rank())
    train = DataLoader(TensorDataset(*make_images(100, 1)), batch_size=33, shuffle=True)
    return Task(PlainNet(), train, make_loader(128, 2), make_loader(128, 3), device=DEVICE)


def normed_task() -> Task:
    torch.manual_seed(rank())
    train = DataLoader(TensorDataset(*make_images(512, 1)), batch_size=32, shuffle=True)
    return Task(DropoutNet(), train, make_loader(256, 2), make_loader(128, 3), device=DEVICE)


def teacher() -> nn.Module:
    torch.manual_seed(9)
    return PlainNet()


def run(task: Task, **settings: Any) -> dict[str, Any]:
    """What a call of `fit` led to."""
    settings = {**SETTINGS, **settings}
    result: FitResult | None = None
    ended = ""
    try:
        result = fit(task.model, task, **settings)
    except (Exception, KeyboardInterrupt) as error:
        ended = f"{type(error).__name__}: {error}"
    return {
        "state": deepcopy(task.model.state_dict()),
        "result": result and asdict(result),
        "ended": ended,
        "accuracy": evaluate(task.model, task, task.val).score,
    }


def averages(folder: Path) -> dict[str, Any]:
    return run(plain_task(), teacher=teacher(), distillation=0.5)


def shares(folder: Path) -> dict[str, Any]:
    return {
        "world": world(),
        "rank": rank(),
        "shared": share({"seed": rank(), "plan": ["é", None, 0.5]}),
        "answered": ask_first(lambda: rank() + 7),
    }


def learns(folder: Path) -> dict[str, Any]:
    """In two runs."""
    task = normed_task()
    run(task, epochs=2)
    return run(task, epochs=3)


def ends_at_a_rung(folder: Path) -> dict[str, Any]:
    """Only the first process knows of rungs."""
    rungs = {"rungs": (0.2, 0.5), "hopeless": lambda rung: rung == 2} if rank() == 0 else {}
    return run(normed_task(), **rungs)


def fails_at_a_rung(folder: Path) -> dict[str, Any]:
    def hopeless(rung: int) -> bool:
        raise OSError("the database is gone")

    return run(plain_task(), rungs=(0.5,), hopeless=hopeless)


def diverges(folder: Path) -> dict[str, Any]:
    """In the second process alone."""
    task = plain_task()
    task.loss = lambda output, batch: output.sum() * (float("inf") if rank() == 1 else 0.0)
    return run(task)


def stops(folder: Path) -> dict[str, Any]:
    """The first process is told to, after step 4, and keeps the state."""

    def on_step(done: float, total: float, loss: float) -> None:
        if rank() > 0:
            raise AssertionError("only the first process is asked")
        if round(done / total * STEPS) == 4:
            raise KeyboardInterrupt("enough")

    training.LOOK_SECONDS, usual = 0.0, training.LOOK_SECONDS
    checkpoint = {"checkpoint": kept_in(folder)} if rank() == 0 else {}
    found = run(plain_task(), teacher=teacher(), distillation=0.5, on_step=on_step, **checkpoint)
    training.LOOK_SECONDS = usual
    return found


def goes_on(folder: Path) -> dict[str, Any]:
    told: list[float] = []
    more: dict[str, Any] = {}
    if rank() == 0:
        more["checkpoint"] = kept_in(folder)
        more["on_step"] = lambda done, total, loss: told.append(round(done / total * STEPS))
    found = run(plain_task(), teacher=teacher(), distillation=0.5, **more)
    return {**found, "told": told}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    case.__name__: case
    for case in (
        *(shares, averages, learns, ends_at_a_rung, fails_at_a_rung),
        *(diverges, stops, goes_on),
    )
}


def main(folder: Path, device: str) -> None:
    """Run all cases in the group; each process writes down what it saw."""
    global DEVICE
    torch.set_num_threads(1)
    DEVICE = join_group(torch.device(device))
    assert str(DEVICE) == (f"cuda:{rank()}" if device == "cuda" else "cpu")
    for name, case in CASES.items():
        torch.save(case(folder), folder / f"{name}-{rank()}.pt")
    leave_group()
    assert world() == 1


Found = dict[str, list[dict[str, Any]]]


def run_cases(folder: Path, device: str) -> Found:
    """What each of two processes saw in each case."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *command, __file__, str(folder), device],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def load(path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    return {name: [load(folder / f"{name}-{one}.pt") for one in (0, 1)] for name in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(tmp_path_factory.mktemp("group"), "cpu")


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_values_of_the_first_process_reach_all(found: Found) -> None:
    expected = {"world": 2, "shared": {"seed": 0, "plan": ["é", None, 0.5]}, "answered": 7}
    assert found["shares"] == [{**expected, "rank": one} for one in (0, 1)]


def test_two_processes_do_what_one_does_with_whole_batches(found: Found, tmp_path: Path) -> None:
    alone = averages(tmp_path)
    first, second = found["averages"]
    assert_equal(first["state"], second["state"])
    for key, value in alone["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-4, atol=1e-6)
    for one in (first, second):
        assert one["result"]["steps"] == STEPS
        assert one["result"]["loss"] == pytest.approx(alone["result"]["loss"], rel=1e-4)


def test_a_network_with_batch_norm_and_dropout_learns(found: Found) -> None:
    first, second = found["learns"]
    assert_equal(first["state"], second["state"])
    assert first["accuracy"] > 80


def test_a_rung_ends_all_processes(found: Found) -> None:
    first, second = found["ends_at_a_rung"]
    for one in (first, second):
        assert one["result"]["stopped"] and one["result"]["steps"] == 20
    assert_equal(first["state"], second["state"])


def test_no_process_waits_for_one_that_failed(found: Found) -> None:
    first, second = found["fails_at_a_rung"]
    assert first["ended"] == "OSError: the database is gone"
    assert second["ended"].startswith("AutocompressError")
    assert "the database is gone" in second["ended"]


def test_a_run_that_diverges_in_one_process_ends_in_all(found: Found) -> None:
    for one in found["diverges"]:
        assert one["ended"].startswith("TrainingDiverged: The loss became"), one["ended"]


def test_a_stop_reaches_all_and_what_was_done_is_kept(found: Found) -> None:
    first, second = found["stops"]
    assert first["ended"] == "KeyboardInterrupt: enough"
    assert second["ended"] == "KeyboardInterrupt: "
    assert_equal(first["state"], second["state"])
    whole = found["averages"][0]
    assert found["goes_on"][0]["told"][0] == 5
    for one in found["goes_on"]:
        assert_equal(one["state"], whole["state"])
        assert one["result"]["steps"] == STEPS
        assert one["result"]["loss"] == pytest.approx(whole["result"]["loss"], rel=1e-6)


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group(CPU) == CPU and (world(), rank()) == (1, 0)
    assert share({"ranks": (1, 2)}) == {"ranks": [1, 2]}
    with pytest.raises(TypeError):
        share(CPU)
    assert ask_first(lambda: 5) == 5
    leave_group()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*torchrun"):
        join_group(CPU)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {
        "WORLD_SIZE": "3",
        "RANK": "2",
        "LOCAL_RANK": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="LOCAL_RANK is 2, this machine has 2"):
        join_group(torch.device("cuda"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
