"""Reading image files, and keeping what was decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_images, all_labels
from image_files import write_folder
from PIL import Image
from torch.utils.data import DataLoader

from autocompress import data as data_module
from autocompress import decoding, folders
from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    LazyImages,
    unaugmented,
)

RNG = np.random.default_rng(0)


def test_decoded_images_are_kept_and_noticed_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    config = DataConfig(source=f"folder:{tmp_path}")
    before = load_data(config, 0)
    decoded: list[str] = []
    real_read = folders.read_file

    def spy(*arguments: Any) -> Any:
        decoded.append("read")
        return real_read(*arguments)

    monkeypatch.setattr(folders, "read_file", spy)
    again = load_data(config, 0)
    # Only the first image, to learn the size.
    assert len(decoded) == 1 and again.fingerprint == before.fingerprint
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "train" / "ant" / "0.png")
    changed = load_data(config, 0)
    assert len(decoded) == 1 + 1 + 30
    assert changed.fingerprint != before.fingerprint


def test_images_of_different_size_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("RGB", (12, 10)).save(tmp_path / "train" / "bee" / "big.png")
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    small, big = tmp_path / "train" / "ant" / "0.png", tmp_path / "train" / "bee" / "big.png"
    assert f"8 x 8 pixels: {small}; 12 x 10: {big}): set data.image_size" in str(caught.value)
    found = load_data(DataConfig(source=f"folder:{tmp_path}", image_size=6), 0)
    assert found.input_shape == (3, 6, 6)


@pytest.mark.parametrize(("name", "index"), [("cat", 5), ("ant", 0)])
def test_broken_images_are_named(name: str, index: int, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / name / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=rf"{name}.{index}\.png' can't be read"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


def test_images_too_large_for_memory_are_read_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, mode="L", size=(20, 10))
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 100)
    monkeypatch.setattr(decoding, "MAPPED_SIZE", 7)
    settings: dict[str, Any] = {"augment": "crop-flip", "image_size": 8, "batch_size": 4}
    monkeypatch.setattr(data_module, "_workers", lambda: 0)
    found = load_data(DataConfig(source=f"folder:{tmp_path}", val_fraction=0.2, **settings), 0)
    assert found.input_shape == (3, 8, 8)
    assert isinstance(found.train, DataLoader) and isinstance(found.val, DataLoader)
    images, labels = next(iter(found.train))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.bincount(all_labels(found.val)).tolist() == [2] * 3
    assert isinstance(found.val.dataset.dataset, LazyImages)  # type: ignore[attr-defined]
    assert found.val.dataset.dataset.augment == "none"  # type: ignore[attr-defined]
    quiet = unaugmented(found.train)
    assert isinstance(quiet, DataLoader)
    assert quiet.dataset.dataset.augment == "none"  # type: ignore[attr-defined]
    grey = all_images(found.test)[all_labels(found.test) == 1][0, 0]
    torch.testing.assert_close(grey, torch.full((8, 8), (80 / 255 - 0.485) / 0.229))


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    deep = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    deep.save(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(ConfigError, match="convert it to 8 bits"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
