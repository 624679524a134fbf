"""Images in one .npz archive of numpy's."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ConfigError, did_you_mean
from autocompress.imagesets import Arrays, Pixels, Split, numbered


def open_archive(path: Path) -> Arrays:
    """An archive that holds x_train, y_train, x_test and y_test.

    It may also hold x_val and y_val, and classes.

    Raises:
        ConfigError: If it can't be read, lacks something, or has pixels or labels out of range.
    """
    content = _content(path)
    required = {"x_train", "y_train", "x_test", "y_test"}
    known = required | {"x_val", "y_val", "classes"}
    if unknown := sorted(content.keys() - known):
        raise ConfigError(
            f"data.source = 'array:{path}' holds '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
        )
    if ("x_val" in content) != ("y_val" in content):
        raise ConfigError(f"data.source = 'array:{path}' has only one of x_val and y_val.")
    if missing := sorted(required - content.keys()):
        raise ConfigError(
            f"data.source = 'array:{path}' lacks {', '.join(missing)}; it must hold x_train, "
            "y_train, x_test and y_test, and may hold x_val, y_val and classes."
        )

    def part(name: str) -> Split | None:
        if f"x_{name}" not in content or f"y_{name}" not in content:
            return None
        pixels = as_nchw(content[f"x_{name}"], f"x_{name}")
        labels = content[f"y_{name}"].reshape(-1)
        if not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(pixels):
            raise ConfigError(
                f"data.source = 'array:{path}': y_{name} must be {len(pixels)} whole numbers, got "
                f"{len(labels)} of type {labels.dtype}."
            )
        return Split(pixels, labels.astype(np.int64))

    names = content["classes"].tolist() if "classes" in content else None
    return numbered("array", [part("train"), part("val"), part("test")], names)


def _content(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array; save several with numpy.savez")
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"data.source = 'array:{path}' can't be read: {error}") from error


def as_nchw(array: NDArray[Any], name: str) -> Pixels:
    """`n x h x w`, `n x h x w x c` or `n x c x h x w` of uint8 or of 0..1 as `n x c x h x w`.

    Raises:
        ConfigError: If it has another shape, or other numbers.
    """
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or not len(array):
        raise ConfigError(
            f"{name} must be images n x h x w, n x h x w x c or n x c x h x w, got shape "
            f"{array.shape}."
        )
    if array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype != np.uint8:
        _check_pixels(array, name)
        array = np.rint(array * 255).astype(np.uint8)
    return np.ascontiguousarray(array)


def _check_pixels(array: NDArray[Any], name: str) -> None:
    """Refuse what is not floating-point between 0 and 1."""
    numeric = np.issubdtype(array.dtype, np.number)
    if not np.issubdtype(array.dtype, np.floating):
        found = f" between {array.min():g} and {array.max():g}" if numeric else ""
        raise ConfigError(
            f"{name} must be uint8, or floating-point between 0 and 1, got {array.dtype}{found}."
        )
    # Written so that NaN is refused too.
    wrong = ~((array >= 0) & (array <= 1)).all(axis=(1, 2, 3))
    if wrong.any():
        index = int(wrong.argmax())
        image = array[index]
        pixel = image[~((image >= 0) & (image <= 1))][0]
        raise ConfigError(
            f"{name} must be uint8, or floating-point between 0 and 1, got a pixel of {pixel:g} in "
            f"image {index} ({int(wrong.sum())} of {len(array)} images have such)."
        )
