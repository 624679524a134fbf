"""Which classes a study learns, and how they are numbered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_labels
from image_files import write_folder

from autocompress import decoding
from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import ArrayLoader


def test_classes_are_chosen_and_numbered_in_the_order_in_which_they_are_named(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path)
    whole = load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    found = load_data(DataConfig(source=f"folder:{tmp_path}", classes=("cat", "ant")), 0)
    assert found.classes == ("cat", "ant") and found.fingerprint != whole.fingerprint
    assert isinstance(found.test, ArrayLoader) and len(found.test.labels) == 20
    brightness = found.test.images[:, 0, 0, 0].long()
    assert torch.equal(brightness, torch.where(found.test.labels == 0, 160, 0))
    other = load_data(DataConfig(source=f"folder:{tmp_path}", classes=("ant", "cat")), 0)
    assert other.fingerprint != found.fingerprint


def test_classes_of_digits_are_chosen() -> None:
    whole = load_data(DataConfig(source="digits"), 0)
    found = load_data(DataConfig(source="digits", classes=("7", "1")), 0)
    assert isinstance(found.test, ArrayLoader) and isinstance(whole.test, ArrayLoader)
    assert found.classes == ("7", "1") and set(found.test.labels.tolist()) == {0, 1}
    sevens = whole.test.images[whole.test.labels == 7]
    assert torch.equal(found.test.images[found.test.labels == 0], sevens)


def test_classes_of_an_archive_are_chosen_by_their_names(tmp_path: Path) -> None:
    images, labels = np.arange(12, dtype=np.uint8).repeat(16).reshape(12, 4, 4), np.arange(12) % 3
    content = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "a.npz", classes=np.array(["a", "b", "c"]), **content)
    config = DataConfig(source=f"array:{tmp_path / 'a.npz'}", classes=("c", "a"), val_fraction=0.5)
    found = load_data(config, 0)
    assert isinstance(found.test, ArrayLoader)
    assert found.test.images[:, 0, 0, 0].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert found.test.labels.tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("ant", "bea"), "no class 'bea'. Did you mean 'bee'. Known: ant, bee, cat"),
        (("ant", "bee", "ant"), "names the class 'ant' twice"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(source=f"folder:{tmp_path}", classes=classes), 0)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 4, 4), np.uint8), np.array([0, 1, 0, 1])
    content = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "a.npz", classes=np.array(["a", "b", "c"]), **content)
    config = DataConfig(source=f"array:{tmp_path / 'a.npz'}", classes=("a", "c"))
    with pytest.raises(ConfigError, match="no training image is of 'c'"):
        load_data(config, 0)


@pytest.mark.parametrize("limit", [2**30, 100])
def test_classes_of_a_torchvision_data_set_of_files_are_chosen(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only their images are read, be they decoded once or in every pass."""
    from PIL import Image

    monkeypatch.setattr(decoding, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(decoding, "MAPPED_SIZE", 4)
    monkeypatch.setattr("autocompress.data._workers", lambda: 0)
    read: set[int] = set()

    class Files:
        """Looks like ImageNet: classes have synonyms and wnids."""

        classes = (("tench", "Tinca tinca"), ("goldfish",), ("stingray",))
        wnids = ("n1", "n2", "n3")

        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            if split not in ("train", "val"):
                raise ValueError(split)
            self.targets = [index % 3 for index in range(18)]

        def __len__(self) -> int:
            return 18

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            read.add(index % 3)
            return Image.new("RGB", (8, 8), (100 * (index % 3),) * 3), index % 3

    monkeypatch.setattr("torchvision.datasets.Flowers102", Files)
    settings: dict[str, Any] = {"classes": ("n3", "Tinca tinca"), "val_fraction": 0.5}
    settings |= {"mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": 8}
    found = load_data(
        DataConfig(source="torchvision:Flowers102", root=str(tmp_path), **settings), 0
    )
    assert found.classes == ("stingray", "tench")
    assert torch.bincount(all_labels(found.test)).tolist() == [6, 6]
    for images, labels in found.test:
        expected = torch.where(labels == 0, 200 / 255, 0.0)
        torch.testing.assert_close(images[:, 0, 4, 4], expected)
    assert read == {0, 2}
