from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_images, all_labels
from PIL import Image
from torch.utils.data import DataLoader

from autocompress import data as data_module
from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    ArrayLoader,
    LazyImages,
    unaugmented,
)

RNG = np.random.default_rng(0)


def write_folder(
    path: Path,
    parts: tuple[str, ...] = ("train", "test"),
    mode: str = "RGB",
    size: tuple[int, int] = (8, 8),
) -> None:
    """Ten images of each of three colours in every part; a class is told by its brightness."""
    for part in parts:
        for label, name in enumerate(("ant", "bee", "cat")):
            place = path / part / name
            place.mkdir(parents=True)
            for index in range(10):
                image = Image.new(mode, size, 80 * label if mode == "L" else (80 * label,) * 3)
                image.save(place / f"{index}.png")


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


def test_validation_data_may_be_cut_from_the_test_data() -> None:
    whole = load_data(DataConfig(source="digits", val_fraction=0.2), 0)
    found = load_data(DataConfig(source="digits", val_fraction=0.5, val_from="test"), 0)
    assert isinstance(found.train, ArrayLoader) and isinstance(whole.test, ArrayLoader)
    assert isinstance(found.val, ArrayLoader) and isinstance(found.test, ArrayLoader)
    assert len(found.train.labels) == 1438
    assert len(found.val.labels) + len(found.test.labels) == len(whole.test.labels) == 359
    both = torch.cat([found.val.images, found.test.images]).flatten(1)
    assert torch.equal(both.sort(0).values, whole.test.images.flatten(1).sort(0).values)
    assert not found.test.shuffle and found.fingerprint != whole.fingerprint
    assert (whole.val_from, found.val_from) == ("train", "test")


def test_images_are_resized() -> None:
    found = load_data(DataConfig(source="digits", image_size=16), 0)
    assert found.input_shape == (1, 16, 16)


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


def test_decoded_images_are_kept_and_noticed_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    config = DataConfig(source=f"folder:{tmp_path}")
    before = load_data(config, 0)
    decoded: list[str] = []
    real_read = data_module._read_file

    def spy(*arguments: Any) -> Any:
        decoded.append("read")
        return real_read(*arguments)

    monkeypatch.setattr(data_module, "_read_file", spy)
    again = load_data(config, 0)
    # Only the first image, to learn the size.
    assert len(decoded) == 1 and again.fingerprint == before.fingerprint
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "train" / "ant" / "0.png")
    changed = load_data(config, 0)
    assert len(decoded) == 1 + 1 + 30
    assert changed.fingerprint != before.fingerprint


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


def test_images_of_different_size_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("RGB", (12, 10)).save(tmp_path / "train" / "bee" / "big.png")
    with pytest.raises(ConfigError, match="8 x 8 and 12 x 10 pixels.: set data.image_size"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    found = load_data(DataConfig(source=f"folder:{tmp_path}", image_size=6), 0)
    assert found.input_shape == (3, 6, 6)


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*train.*Expected train/<class>"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    write_folder(tmp_path, ("train",))
    with pytest.raises(ConfigError, match="no test data"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(ConfigError, match="folders that 'train' has not: dog"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


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
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 100)
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


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8, 8), np.uint8), ((8, 8, 3), np.uint8), ((3, 8, 8), np.uint8), ((8, 8, 3), np.float32)],
)
def test_an_array_archive(shape: tuple[int, ...], kind: Any, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, *shape))
    stored = images.astype(np.uint8) if kind is np.uint8 else (images / 255).astype(kind)
    labels = np.arange(40) % 4
    np.savez(
        tmp_path / "a.npz", x_train=stored, y_train=labels, x_test=stored[:8], y_test=labels[:8]
    )
    found = load_data(DataConfig(source="array:a.npz", root=str(tmp_path)), 0)
    assert found.classes == ("0", "1", "2", "3")
    assert found.input_shape == ((1 if len(shape) == 2 else 3), 8, 8)
    assert isinstance(found.test, ArrayLoader)
    expected = images[:8, None] if len(shape) == 2 else images[:8]
    if shape[-1] == 3:
        expected = expected.transpose(0, 3, 1, 2)
    assert np.array_equal(found.test.images.numpy(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.full((4, 8, 8), 300)}, "x_train must be uint8"),
        ({"x_train": np.zeros((4, 8), np.uint8)}, r"got shape \(4, 8\)"),
        ({"y_train": np.zeros(3, np.int64)}, "y_train must be 4 whole numbers, got 3"),
        ({"y_train": np.zeros(4)}, "y_train must be 4 whole numbers, got 4 of type float64"),
        ({"x_test": np.zeros((4, 9, 9), np.uint8)}, "differ in shape"),
        ({"x_train": np.full((4, 8, 8), np.nan)}, "x_train must be uint8"),
        ({"x_train": np.full((4, 8, 8), "a")}, "x_train must be uint8"),
        ({"x_valid": np.zeros(1)}, "holds 'x_valid'. Did you mean 'x_val'?"),
        ({"x_val": np.zeros((4, 8, 8), np.uint8)}, "only one of x_val and y_val"),
        ({"classes": np.array(["a"])}, "go from 0 to 1, but it names 1 classes"),
    ],
)
def test_archives_of_another_form_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    content = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **change}
    np.savez(tmp_path / "a.npz", **{k: v for k, v in content.items() if v is not None})
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(source=f"array:{tmp_path / 'a.npz'}", val_fraction=0.5), 0)


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:CIFAR11", "has no 'CIFAR11'. Did you mean 'CIFAR10'"),
        ("torchvision:EuroSAT", "no separate training and test data"),
        ("fodler:x", "no such source. Did you mean 'folder'"),
        ("python:loaders", "only Python can give them again"),
        ("array:nothing.npz", "can't be read"),
        ("nosuch.module:load", "no module 'nosuch.module'"),
    ],
)
def test_unknown_data_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source=source), 0)
    assert message in str(caught.value)


def test_loaders_from_a_function_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "my_data_1.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def loader(n, size):\n"
        "    images = torch.arange(n * 64.0).view(n, 1, 8, 8)\n"
        "    return DataLoader(TensorDataset(images, torch.arange(n) % 2), batch_size=size)\n"
        "def two(batch_size):\n    return loader(40, batch_size), loader(8, batch_size)\n"
        "def named():\n"
        "    return {'train': loader(8, 4), 'val': loader(4, 4), 'test': loader(4, 4),\n"
        "            'classes': ['a', 'b']}\n"
        "def wrong():\n    return loader(8, 4)\n"
        "def once():\n    return (b for b in loader(8, 4)), loader(8, 4)\n",
        encoding="utf-8",
    )
    path = list(sys.path)
    try:
        config = DataConfig(source="my_data_1:two", batch_size=5, val_fraction=0.25)
        found = load_data(config, 0, folder=tmp_path)
        assert (len(found.train), len(found.val), len(found.test)) == (6, 2, 2)
        assert found.input_shape == (1, 8, 8) and len(found.classes) == 0
        assert found.fingerprint == load_data(config, 0, folder=tmp_path).fingerprint
        found = load_data(DataConfig(source="my_data_1:named"), 0, folder=tmp_path)
        assert found.classes == ("a", "b") and len(found.val) == 1
        with pytest.raises(ConfigError, match=r"must return loaders .* got DataLoader"):
            load_data(DataConfig(source="my_data_1:wrong"), 0, folder=tmp_path)
        with pytest.raises(ConfigError, match="train must be batches that can be counted"):
            load_data(DataConfig(source="my_data_1:once"), 0, folder=tmp_path)
    finally:
        sys.path[:] = path


def test_a_given_normalization_is_applied(tmp_path: Path) -> None:
    found = load_data(DataConfig(source="digits", mean=(0.5,), std=(0.25,)), 0)
    assert found.normalization == {"mean": [0.5], "std": [0.25]}
    assert isinstance(found.test, ArrayLoader)
    expected = (found.test.images.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(all_images(found.test).contiguous(), expected)
    assert found.fingerprint != load_data(DataConfig(source="digits"), 0).fingerprint
    with pytest.raises(ConfigError, match="data.mean has 3 numbers, the images have 1 channels"):
        load_data(DataConfig(source="digits", mean=(0.5,) * 3, std=(0.25,) * 3), 0)


def test_hidden_folders_are_no_classes_and_empty_ones_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    assert load_data(DataConfig(source=f"folder:{tmp_path}"), 0).classes == ("ant", "bee", "cat")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ConfigError, match=r"no images in .* of dog"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    deep = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    deep.save(tmp_path / "train" / "ant" / "0.png")
    with pytest.raises(ConfigError, match="convert it to 8 bits"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut off", b"no archive"])
def test_broken_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="can't be read"):
        load_data(DataConfig(source=f"array:{tmp_path / 'a.npz'}"), 0)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"numpy.savez"):
        load_data(DataConfig(source=f"array:{tmp_path / 'a.npy'}"), 0)


def test_images_that_would_crowd_the_gpu_stay_in_main_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert data_module._place(gpu, 250) == gpu
    assert data_module._place(gpu, 251) == cpu
    assert data_module._place(cpu, 10**12) == cpu
