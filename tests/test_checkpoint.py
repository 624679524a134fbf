"""Runs of `fit` that are cut off and gone on with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_images, make_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.answers import Answers
from autocompress.checkpoint import Checkpoint
from autocompress.loaders import ArrayLoader
from autocompress.task import Loader, Task
from autocompress.training import FitResult, fit

EPOCHS = 2.5
"""Of 16 batches each."""


def kept_at(path: Path, every: float = 1e9) -> Checkpoint:
    """A checkpoint in a file, kept where a run is interrupted."""
    return Checkpoint.in_file(path, every)


class Dropping(nn.Module):
    """A network whose training draws lots."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = TinyNet(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


def array_loader() -> Loader:
    images, labels = make_images(512, 1)
    pixels = (60 * images + 128).clamp(0, 255).to(torch.uint8)
    return ArrayLoader(pixels, labels, 32, [0.5], [0.25], augment="crop-flip", shuffle=True)


def plain_loader() -> Loader:
    """Draws its order from PyTorch's own lots."""
    return DataLoader(TensorDataset(*make_images(512, 1)), batch_size=32, shuffle=True)


def new_task(train: Loader) -> Task:
    torch.manual_seed(0)
    return Task(Dropping(), train, make_loader(64, 2), make_loader(64, 3))


def stop_at(step: int) -> Callable[[float, float, float], None]:
    def on_step(done: float, total: float, loss: float) -> None:
        if round(16 * done) >= step:
            raise KeyboardInterrupt

    return on_step


def run(task: Task, checkpoint: Checkpoint | None = None, **more: Any) -> FitResult:
    return fit(
        task.model, task, epochs=EPOCHS, learning_rate=0.05, seed=3, checkpoint=checkpoint, **more
    )


@pytest.fixture(params=[array_loader, plain_loader])
def loader(request: pytest.FixtureRequest) -> Iterator[Callable[[], Loader]]:
    yield request.param


@pytest.mark.parametrize("step", [1, 11, 31])
def test_a_run_that_was_cut_off_ends_as_if_it_was_not(
    loader: Callable[[], Loader], step: int, tmp_path: Path
) -> None:
    whole = new_task(loader())
    expected = run(whole)
    kept = kept_at(tmp_path / "kept.pt")
    with pytest.raises(KeyboardInterrupt):
        run(new_task(loader()), kept, on_step=stop_at(step))
    other = new_task(loader())
    steps: list[float] = []
    found = run(other, kept, on_step=lambda done, total, loss: steps.append(done))
    assert min(steps) > step / 16, "it went on where it was"
    assert (found.steps, found.loss) == (expected.steps, expected.loss)
    for mine, theirs in zip(
        other.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_what_was_answered_before_makes_no_difference(tmp_path: Path) -> None:
    """A run that goes on asks the teacher anew what it had answered in the process that ended."""
    torch.manual_seed(7)
    taught: dict[str, Any] = {"teacher": TinyNet(), "distillation": 0.5}
    whole, other = (new_task(array_loader()) for _ in range(2))
    run(whole, answers=Answers(), **taught)
    kept = kept_at(tmp_path / "kept.pt")
    with pytest.raises(KeyboardInterrupt):
        run(new_task(array_loader()), kept, on_step=stop_at(21), answers=Answers(), **taught)
    run(other, kept, answers=Answers(), **taught)
    for mine, theirs in zip(other.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_another_process_goes_on_with_it(tmp_path: Path) -> None:
    whole = new_task(array_loader())
    run(whole)
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_checkpoint import array_loader, kept_at, new_task, run, stop_at
import torch
torch.set_num_threads(1)
task = new_task(array_loader())
stop = stop_at(21) if sys.argv[2] == "stop" else None
try:
    run(task, kept_at(Path(sys.argv[1])), on_step=stop)
except KeyboardInterrupt:
    pass
torch.save(task.model.state_dict(), sys.argv[3])
"""
    for word in ("stop", "go"):
        argv = [sys.executable, "-c", code, str(tmp_path / "kept.pt"), word, str(tmp_path / word)]
        subprocess.run(argv, check=True)
    found = torch.load(tmp_path / "go", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in whole.model.state_dict().items())
    stopped = torch.load(tmp_path / "stop", weights_only=True)
    assert not torch.equal(stopped["net.fc.weight"], found["net.fc.weight"])


def test_rungs_that_were_passed_are_not_asked_for_again(tmp_path: Path) -> None:
    kept = kept_at(tmp_path / "kept.pt")
    asked: list[int] = []

    def hopeless(rung: int) -> bool:
        asked.append(rung)
        return False

    more: dict[str, Any] = {"rungs": (0.25, 0.75), "hopeless": hopeless}
    with pytest.raises(KeyboardInterrupt):
        run(new_task(array_loader()), kept, on_step=stop_at(21), **more)
    run(new_task(array_loader()), kept, **more)
    assert asked == [1, 2]


def test_a_state_is_kept_from_time_to_time(tmp_path: Path) -> None:
    kept = kept_at(tmp_path / "kept.pt", every=0.0)
    run(new_task(array_loader()), kept)
    state = torch.load(tmp_path / "kept.pt", weights_only=True)["state"]
    assert state["step"] == round(EPOCHS * 16)


@pytest.mark.parametrize("other", [{"seed": 4}, {"learning_rate": 0.1}, {"epochs": 3.0}])
def test_another_runs_state_is_not_used(other: dict[str, Any], tmp_path: Path) -> None:
    kept = kept_at(tmp_path / "kept.pt")
    with pytest.raises(KeyboardInterrupt):
        run(new_task(array_loader()), kept, on_step=stop_at(21))
    steps: list[float] = []
    task = new_task(array_loader())
    settings = {"epochs": EPOCHS, "learning_rate": 0.05, "seed": 3} | other
    fit(
        task.model,
        task,
        checkpoint=kept,
        on_step=lambda done, total, loss: steps.append(done),
        **settings,
    )
    assert steps[0] == 1 / 16


@pytest.mark.parametrize("damage", ["cut", "empty", "code"])
def test_a_damaged_state_is_as_good_as_none(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept.pt"
    kept = kept_at(path)
    with pytest.raises(KeyboardInterrupt):
        run(new_task(array_loader()), kept, on_step=stop_at(21))
    whole = path.read_bytes()
    if damage == "code":
        torch.save({"run": print}, path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert run(new_task(array_loader()), kept).steps == round(EPOCHS * 16)
    assert "checkpoint can't be read" in caplog.text


def test_a_full_disk_costs_the_state_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(path: Path) -> None:
        raise OSError(28, "No space left on device")

    full = Checkpoint(keep, lambda path: False, every=0.0)
    assert run(new_task(array_loader()), full).steps == round(EPOCHS * 16)
    assert "No space left" in caplog.text


def test_a_full_disk_as_pytorch_tells_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_at(tmp_path / "kept.pt")
    kept.save({}, {"step": 1})
    monkeypatch.setattr("autocompress.checkpoint.TemporaryDirectory", lambda: nullcontext("/dev"))
    monkeypatch.setattr("autocompress.checkpoint.NAME", "full")
    kept.save({}, {"step": 2, "weight": torch.zeros(1_000_000)})
    monkeypatch.undo()
    assert "could not be kept" in caplog.text and kept.load({}) == {"step": 1}


def test_what_holds_functions_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = kept_at(tmp_path / "kept.pt")
    kept.save({}, {"schedule": lambda step: 0.1})
    assert "could not be kept" in caplog.text and kept.load({}) is None


def test_the_next_state_is_due_so_long_after_the_last_one() -> None:
    now = iter([100.0, 159.0, 160.0, 500.0, 559.0, 560.0])
    checkpoint = Checkpoint(lambda path: None, lambda path: False, 60.0, lambda: next(now))
    assert [checkpoint.due(), checkpoint.due()] == [False, True]
    checkpoint.save({}, {})
    assert [checkpoint.due(), checkpoint.due()] == [False, True]
