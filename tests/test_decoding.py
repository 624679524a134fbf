"""Reading image files, and keeping what was decoded."""

from __future__ import annotations

import resource
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
from autocompress.config import DataConfig, cache_folder
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.imagesets import Arrays, Encoded
from autocompress.loaders import ArrayLoader, LazyImages, unaugmented

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


def test_decoded_images_are_mapped_from_the_cache(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config = DataConfig(source=f"folder:{tmp_path}")
    for _ in range(2):
        found = decoding.decoded(encoded_folder(tmp_path), None)
        assert isinstance(found, Arrays) and isinstance(found.train.pixels, np.memmap)
        assert found.train.pixels[25].tolist() == np.full((3, 8, 8), 160).tolist()
    # What a loader does with them never gets into the file.
    loaded = load_data(config, 0).train
    assert isinstance(loaded, ArrayLoader)
    loaded._images.zero_()
    again = load_data(config, 0).train
    assert isinstance(again, ArrayLoader) and int(again.images.max()) == 160


def encoded_folder(path: Path) -> Encoded:
    """The images that `write_folder` wrote, not decoded yet."""
    classes = ["ant", "bee", "cat"]
    parts = [folders.in_class_folders(path / part, classes, classes) for part in ("train", "test")]
    return folders.encoded("folder", classes, parts[0], None, parts[1])


def test_small_images_are_decoded_once_however_many_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 100)
    assert isinstance(decoding.decoded(encoded_folder(tmp_path), None), Arrays)
    assert isinstance(decoding.decoded(encoded_folder(tmp_path), 97), Encoded)


def test_a_damaged_cache_is_decoded_anew(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config = DataConfig(source=f"folder:{tmp_path}")
    before = load_data(config, 0)
    kept = list((cache_folder() / "images").iterdir())
    assert len(kept) == 2
    for file in kept:
        file.write_bytes(file.read_bytes()[:-100])
    assert load_data(config, 0).fingerprint == before.fingerprint


def test_without_a_cache_images_are_decoded_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    before = load_data(DataConfig(source=f"folder:{tmp_path}"), 0).fingerprint
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    with pytest.warns(UserWarning, match="AUTOCOMPRESS_HOME"):
        assert load_data(DataConfig(source=f"folder:{tmp_path}"), 0).fingerprint == before
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 100)
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="set AUTOCOMPRESS_HOME"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


def test_a_disk_that_gets_full_keeps_no_half_file(tmp_path: Path) -> None:
    write_folder(tmp_path)

    # A limit of the system's stops writing midway, as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.warns(UserWarning, match=r"keep .*images.* \(File too large\): free"):
            found = load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(found.test, ArrayLoader) and len(found.test.labels) == 30
    assert list((cache_folder() / "images").iterdir()) == []


def break_images(path: Path) -> None:
    """Cut four images off, of which a program can still read the size."""
    for name in ("ant/1", "bee/2", "bee/3", "cat/9"):
        file = path / "train" / f"{name}.png"
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:-60])


@pytest.mark.parametrize(("size", "among"), [(8, "of 30"), (97, "of 30 that were tried")])
def test_all_broken_images_are_counted_and_the_first_are_named(
    size: int, among: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    break_images(tmp_path)
    monkeypatch.setattr(decoding, "MEMORY_LIMIT", 100)
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source=f"folder:{tmp_path}", image_size=size), 0)
    lines = str(caught.value).splitlines()
    named = ["ant/1.png", "bee/2.png", "bee/3.png"]
    assert [name in line for name, line in zip(named, lines, strict=False)] == [True] * 3
    assert lines[3:] == [f"4 images {among} are broken; mend or remove them."]
    assert not (cache_folder() / "images").exists() or not any(
        file.name.startswith(".") for file in (cache_folder() / "images").iterdir()
    )


def test_empty_files_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "test" / "bee" / "4.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"bee/4\.png' is an empty file"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("L", (8, 8), 33).save(tmp_path / "test" / "ant" / "0.png")
    Image.new("RGBA", (8, 8), (44, 44, 44, 0)).save(tmp_path / "test" / "ant" / "1.png")
    found = load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
    assert isinstance(found.test, ArrayLoader) and found.input_shape == (3, 8, 8)
    assert found.test.images[:2, :, 0, 0].tolist() == [[33] * 3, [44] * 3]


def test_a_coloured_image_among_many_grey_ones_is_never_read_as_grey(tmp_path: Path) -> None:
    write_folder(tmp_path, mode="L")
    for index in range(10, 60):
        Image.new("L", (8, 8), 5).save(tmp_path / "train" / "ant" / f"{index}.png")
    # Of 110 images every one is looked at; of 200 every third.
    for index in range(60, 150):
        Image.new("L", (8, 8), 5).save(tmp_path / "train" / "ant" / f"{index}.png")
    (tmp_path / "train" / "ant" / "10.png").unlink()
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "train" / "ant" / "10.png")
    with pytest.raises(ConfigError, match=r"ant/10\.png' can't be read: it has colours"):
        load_data(DataConfig(source=f"folder:{tmp_path}"), 0)
