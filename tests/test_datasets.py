"""scikit-learn's and torchvision's data sets."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_images
from PIL import Image

from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    ArrayLoader,
)

RNG = np.random.default_rng(0)


def test_digits() -> None:
    found = load_data(DataConfig(source="digits", val_fraction=0.2, augment="crop"), 0)
    assert found.input_shape == (1, 8, 8) and len(found.classes) == 10
    assert isinstance(found.train, ArrayLoader) and isinstance(found.val, ArrayLoader)
    assert isinstance(found.test, ArrayLoader)
    sizes = [len(part.labels) for part in (found.train, found.val, found.test)]
    assert sizes == [1150, 288, 359]
    assert int(found.train.images.max()) == 255
    images = all_images(found.val)
    assert abs(float(images.mean())) < 0.1 and abs(float(images.std()) - 1) < 0.1
    other = load_data(DataConfig(source="digits", val_fraction=0.2, augment="crop"), 1)
    assert other.fingerprint != found.fingerprint
    assert isinstance(other.test, ArrayLoader)
    assert torch.equal(other.test.images, found.test.images)
    again = load_data(DataConfig(source="digits", val_fraction=0.2, augment="crop"), 0)
    assert again.fingerprint == found.fingerprint


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_where_they_lie(suffix: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, 28, 28))
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    found = load_data(DataConfig(source="torchvision:FashionMNIST", root=str(tmp_path)), 0)
    assert found.classes[0] == "T-shirt/top" and found.input_shape == (1, 28, 28)
    assert isinstance(found.test, ArrayLoader)
    assert np.array_equal(found.test.images[:, 0].numpy(), images[:20])
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(ConfigError, match="no file t10k-labels-idx1-ubyte.gz"):
        load_data(DataConfig(source="torchvision:FashionMNIST", root=str(tmp_path)), 0)


def test_classes_of_arrays_are_chosen_and_numbered_anew(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8)[:, None, None] + np.zeros((40, 8, 8), np.uint8)
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    chosen = ("Bag", "Trouser")  # 8 and 1
    source = {"source": "torchvision:FashionMNIST", "root": str(tmp_path)}
    found = load_data(DataConfig(**source, classes=chosen), 0)
    assert found.classes == chosen
    assert isinstance(found.test, ArrayLoader)
    assert found.test.labels.tolist() == [1, 0, 1, 0]
    assert found.test.images[:, 0, 0, 0].tolist() == [1, 8, 11, 18]


def test_broken_idx_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no complete IDX file"):
        load_data(DataConfig(source="torchvision:MNIST", root=str(tmp_path)), 0)


def test_a_torchvision_data_set_is_opened_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local:
        """Looks like CIFAR10."""

        classes = ("a", "b")

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            assert not download
            self.data = RNG.integers(0, 256, (40 if train else 8, 16, 16, 3)).astype(np.uint8)
            self.targets = [index % 2 for index in range(len(self.data))]

        def __len__(self) -> int:
            return len(self.data)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Local)
    found = load_data(DataConfig(source="torchvision:CIFAR10", root=str(tmp_path)), 0)
    assert found.classes == ("a", "b") and found.input_shape == (3, 16, 16)


def test_a_torchvision_data_set_of_files_with_three_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Files:
        """Looks like Flowers102: images are opened one by one, and validation data exists."""

        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            if split not in ("train", "val", "test"):
                raise ValueError(split)
            self.count = {"train": 12, "val": 6, "test": 9}[split]

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index >= self.count:
                raise IndexError
            return Image.new("RGB", (9, 8 + index)), index % 3

    monkeypatch.setattr("torchvision.datasets.Flowers102", Files)
    config = DataConfig(source="torchvision:Flowers102", root=str(tmp_path), image_size=8)
    found = load_data(config, 0)
    parts = (found.train, found.val, found.test)
    assert [len(part.labels) for part in parts if isinstance(part, ArrayLoader)] == [12, 6, 9]
    assert len(found.classes) == 3


def test_a_failed_download_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(root: str, train: bool = True, download: bool = False) -> None:
        raise RuntimeError("no network" if download else "not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source="torchvision:CIFAR10", root=str(tmp_path)), 0)
    assert str(tmp_path) in str(caught.value) and "(no network)" in str(caught.value)
