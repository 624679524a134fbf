"""Small folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

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
