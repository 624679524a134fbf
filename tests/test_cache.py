"""A cache that can't be written costs time and no result."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.cache import keep
from autocompress.config import cache_folder
from autocompress.latency import Deployment
from autocompress.layertimes import LayerTimes
from autocompress.recipes import BaselineRecipe


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder in which nothing can be written: its place is a file (root may write all)."""
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    return cache_folder()


def test_a_file_is_kept(tmp_path: Path) -> None:
    assert keep(tmp_path / "a" / "b.txt", lambda path: path.write_text("kept"))
    assert (tmp_path / "a" / "b.txt").read_text() == "kept"


def test_a_full_disk_leaves_nothing_behind_and_is_told(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(UserWarning) as told:
        assert not keep(tmp_path / "b.npy", full)
    (text,) = [str(warning.message) for warning in told]
    assert str(tmp_path / "b.npy") in text and "No space left" in text
    assert "AUTOCOMPRESS_HOME" in text
    assert list(tmp_path.iterdir()) == []


def test_times_of_layers_are_used_though_they_can_not_be_kept(lost: Path) -> None:
    times = LayerTimes(Deployment("torch", 1, 1), lost / "layer-times")
    with pytest.warns(UserWarning, match="AUTOCOMPRESS_HOME"):
        times.measure({}, lambda: None, seconds=0.001)
    assert len(times) == 1


def test_a_trained_baseline_is_used_though_it_can_not_be_kept(lost: Path) -> None:
    from conftest import TinyNet, make_loader

    from autocompress.baseline import train_baseline
    from autocompress.progress import NullDisplay
    from autocompress.task import Task

    model: nn.Module = TinyNet()
    before = model.get_parameter("fc.weight").clone()
    loader = make_loader(64, 0)
    task = Task(model, loader, loader, loader, origin={"source": "x"}, fingerprint="f")
    with pytest.warns(UserWarning, match="AUTOCOMPRESS_HOME"):
        train_baseline(task, BaselineRecipe(epochs=1.0), 0, NullDisplay())
    assert not torch.equal(model.get_parameter("fc.weight"), before)
