"""Folders of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_folder

from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    ArrayLoader,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder(mode: str, tmp_path: Path) -> None:
    write_folder(tmp_path, mode=mode)
    (tmp_path / "train" / "ant" / "notes.txt").touch()
    found = load_data(DataConfig(source=f"folder:{tmp_path}", batch_size=8, val_fraction=0.2), 0)
    assert found.classes == ("ant", "bee", "cat")
    assert found.input_shape == ((3 if mode == "RGB" else 1), 8, 8)
    assert isinstance(found.train, ArrayLoader) and isinstance(found.test, ArrayLoader)
    assert len(found.train.labels) == 24 and len(found.test.labels) == 30
    assert torch.equal(found.test.images[:, 0, 0, 0].long(), 80 * found.test.labels)


def test_validation_folders_are_used(tmp_path: Path) -> None:
    write_folder(tmp_path / "three", ("train", "val", "test"))
    found = load_data(DataConfig(source=f"folder:{tmp_path / 'three'}"), 0)
    assert isinstance(found.val, ArrayLoader) and isinstance(found.train, ArrayLoader)
    assert len(found.train.labels) == len(found.val.labels) == 30
    assert len(set(found.val.labels[:10].tolist())) > 1, "a part must be like the whole"
    write_folder(tmp_path / "two", ("train", "val"))
    found = load_data(DataConfig(source="folder:two", root=str(tmp_path), val_fraction=0.2), 0)
    assert isinstance(found.test, ArrayLoader) and isinstance(found.val, ArrayLoader)
    assert len(found.test.labels) == 30 and len(found.val.labels) == 6


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*train.*Expected train/<class>"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    write_folder(tmp_path, ("train",))
    with pytest.raises(ConfigError, match="no test data"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(ConfigError, match="folders that 'train' has not: dog"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


def test_hidden_folders_are_no_classes_and_empty_ones_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    assert load_data(DataConfig(source=f"folder:{tmp_path}"), 0).classes == ("ant", "bee", "cat")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ConfigError, match=r"no images in .* of dog"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
