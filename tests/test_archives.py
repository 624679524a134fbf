"""Archives of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    ArrayLoader,
)

RNG = np.random.default_rng(0)


def float_images(index: int, pixel: float) -> np.ndarray[Any, Any]:
    """Four images of zeros but for one pixel of one of them."""
    images = np.zeros((4, 8, 8), np.float32)
    images[index, 3, 4] = pixel
    return images


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
        ({"classes": np.array(["a"])}, "image 1 of the train data .* names 1 classes, .* 0 to 0"),
        ({"y_train": np.array([0, 1, -1, 1])}, "image 2 of the train data of 'array' is -1"),
        ({"y_test": np.array([0, 1, 0, 7])}, "image 3 of the test data .* no training image has"),
        (
            {"x_test": float_images(2, np.nan)},
            "a pixel of nan in image 2 .1 of 4",
        ),
        ({"x_test": float_images(1, 1.5)}, "a pixel of 1.5 in image 1"),
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


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut off", b"no archive"])
def test_broken_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="can't be read"):
        load_data(DataConfig(source=f"array:{tmp_path / 'a.npz'}"), 0)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"numpy.savez"):
        load_data(DataConfig(source=f"array:{tmp_path / 'a.npy'}"), 0)
