"""A tiny network on tiny generated data, on which a whole study takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import pytest
import torch
from postgres import Postgres, Unavailable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.checkpoint import Checkpoint
from autocompress.config import DEFAULT_FORMATS, StudyConfig, parse_config
from autocompress.progress import NullDisplay
from autocompress.task import Loader, Task

CLASSES = 4
LONG = ("conductor", "resume", "workers", "docs", "study", "examples", "int8", "architectures")
LONG += ("table", "export", "faults", "training", "wheel", "database", "samplers", "scripts")
"""The files that take longest. They run first, so that none of them is left over at the end while
the other processes have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


class TinyNet(nn.Module):
    """Two convolutions, batch norm and a classifier: one layer of each kind that matters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.bn2(self.conv(x)).relu()
        return self.fc(x.mean((2, 3)))


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stripes of four directions under noise: `count x 1 x 8 x 8` and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([rows, columns, rows + columns, rows - columns]).mul(1.6).sin()
    noise = torch.randn(count, 8, 8, generator=generator)
    return (waves[labels] + 0.8 * noise)[:, None], labels


def make_loader(count: int, seed: int, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of `make_images` in batches of 32."""
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(*make_images(count, seed))
    return DataLoader(dataset, batch_size=32, shuffle=shuffle, generator=generator)


EXPORTED = {"run.formats": DEFAULT_FORMATS}
"""A setting for `tiny_config`: the files that users get."""


def tiny_config(out: Path, **settings: Any) -> StudyConfig:
    """A study of `TinyNet` that takes seconds; `trials=` or any dotted name replace a setting."""
    short = {"trials": "search.trials", "annealing_trials": "search.annealing_trials"}
    return parse_config(
        {
            "name": "tiny",
            "delta": 5.0,
            "model.source": "python:TinyNet",
            "data.source": "python:loaders",
            "baseline.epochs": 0.0,
            # All of its three layers; by default only the middle one may change.
            "search.include": ["*"],
            "search.trials": 6,
            "search.annealing_trials": 3,
            "finetune.epochs": 1.0,
            "finetune.learning_rate": 0.01,
            "finetune.final_epochs": 1.0,
            "finetune.gate": 100.0,
            "run.out": str(out),
            # They take most of such a study's time.
            "run.formats": [],
            **{short.get(key, key): value for key, value in settings.items()},
        }
    )


def count_reads(loader: Loader) -> tuple[Loader, list[str]]:
    """The loader, and a list that gets one entry whenever it is read from the start."""
    reads: list[str] = []

    class Counted:
        def __iter__(self) -> Iterator[Any]:
            reads.append("start")
            return iter(loader)

        def __len__(self) -> int:
            return len(loader)

    return Counted(), reads


def kept_in(folder: Path, **settings: Any) -> Checkpoint:
    """A checkpoint in a folder."""
    return Checkpoint.in_file(folder / "kept.pt", **settings)


class Stopping(NullDisplay):
    """Remembers how far a training's steps were, and interrupts it at the first.

    Args:
        stops: Whether it does that.
    """

    def __init__(self, stops: bool = True) -> None:
        self._stops = stops
        self.done: list[float] = []

    def step(self, phase: str, done: float, *rest: Any, **more: Any) -> None:
        self.done.append(done)
        if self._stops:
            raise KeyboardInterrupt


def watch_fits(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[dict[str, Any]]:
    """Keyword arguments of each later call of `fit` by a module."""
    calls: list[dict[str, Any]] = []
    real = module.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "fit", watched)
    return calls


def all_images(loader: Any) -> Tensor:
    return torch.cat([images for images, _ in loader])


def all_labels(loader: Any) -> Tensor:
    return torch.cat([labels for _, labels in loader])


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _brief_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test needs latencies that are exact."""
    monkeypatch.setattr("autocompress.selection.TIMING_SECONDS", 0.02)
    monkeypatch.setattr("autocompress.latency.REFERENCE_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tests' networks are too small for threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_task(state: dict[str, Tensor]) -> Task:
    """A task of `TinyNet` with these weights."""
    model = TinyNet()
    model.load_state_dict(state)
    return Task(
        model.eval(),
        make_loader(512, 1, shuffle=True),
        make_loader(256, 2),
        make_loader(256, 3),
        classes=tuple("abcd"),
        fingerprint="tiny",
    )


@pytest.fixture(scope="session")
def trained_state() -> dict[str, Tensor]:
    """Weights of a `TinyNet` that knows the tiny data."""
    from autocompress.training import fit

    torch.manual_seed(0)
    task = Task(TinyNet(), make_loader(512, 1), make_loader(128, 2), make_loader(128, 3))
    fit(task.model, task, epochs=6, learning_rate=0.1, seed=0)
    return task.model.state_dict()


@pytest.fixture
def task(trained_state: dict[str, Tensor]) -> Task:
    """A task whose network is trained."""
    return tiny_task(trained_state)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A PostgreSQL server of the tests' own."""
    try:
        with Postgres() as found:
            yield found
    except Unavailable as error:
        pytest.skip(f"no PostgreSQL: {error}")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    found: Postgres = request.getfixturevalue("server")
    return found.new_database(f"d{uuid4().hex}")


@pytest.fixture
def closed_storages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection of this process is left open."""
    from autocompress.database import PatientStorage

    made: WeakSet[PatientStorage] = WeakSet()
    init = PatientStorage.__init__

    def noted(self: PatientStorage, *args: Any, **kwargs: Any) -> None:
        made.add(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(PatientStorage, "__init__", noted)
    yield
    for storage in list(made):
        if hasattr(storage, "engine"):
            storage.close()
