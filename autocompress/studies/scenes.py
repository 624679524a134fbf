"""Scenes of real handwritten digits, for the examples of tasks that are no classification.

The digits ship with scikit-learn, so nothing is downloaded. Each scene is a grey image of 32 x 32
pixels with up to four digits of different sizes at random places, and noise. Training, validation
and test scenes are made of different digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZE = 32
"""Height and width of a scene, pixels."""
SIDES = (10, 15)
"""Least and largest side of a digit in it, pixels."""
COUNTS = {"train": 2000, "val": 500, "test": 500}
"""Scenes of each part."""


@dataclass(frozen=True)
class Scene:
    """One image and all that is known of it.

    Attributes:
        image: `1 x 32 x 32`, about 0 to 1.
        mask: `32 x 32`, 0 for the background, 1 to 10 for pixels of the digits 0 to 9.
        boxes: `k x 4`: left, top, right and bottom of each digit, pixels.
        digits: `k` digits.
    """

    image: Tensor
    mask: Tensor
    boxes: Tensor
    digits: Tensor


def make_scenes(part: str, seed: int = 0, most: int = 4) -> list[Scene]:
    """The scenes of a part of the data; the same for the same seed.

    Args:
        part: "train", "val" or "test".
        seed: Fixes places, sizes and noise.
        most: Digits in a scene at most; one at least.
    """
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.images))
    cuts = dict(zip(COUNTS, np.split(order, [1197, 1497]), strict=True))
    own = cuts[part]
    generator = np.random.default_rng([seed, list(COUNTS).index(part)])
    images = torch.from_numpy(raw.images).float() / 16
    return [_scene(images, raw.target, own, most, generator) for _ in range(COUNTS[part])]


def _scene(
    images: Tensor, labels: Any, own: Any, most: int, generator: np.random.Generator
) -> Scene:
    canvas = torch.zeros(SIZE, SIZE)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    boxes: list[list[float]] = []
    digits: list[int] = []
    wanted = int(generator.integers(1, most + 1))
    # Digits that would lie upon each other find another place, or stay away.
    for _ in range(5 * wanted):
        if len(boxes) == wanted:
            break
        side = int(generator.integers(SIDES[0], SIDES[1] + 1))
        top, left = (int(place) for place in generator.integers(0, SIZE - side + 1, 2))
        place = (slice(top, top + side), slice(left, left + side))
        chosen = int(generator.choice(own))
        if bool(mask[place].any()):
            continue
        scaled = F.interpolate(images[chosen][None, None], (side, side), mode="bilinear")[0, 0]
        ink = scaled > 0.25
        canvas[place] = torch.maximum(canvas[place], scaled)
        mask[place][ink] = int(labels[chosen]) + 1
        rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
        boxes.append(
            [
                left + float(columns[0]),
                top + float(rows[0]),
                left + float(columns[-1]) + 1,
                top + float(rows[-1]) + 1,
            ]
        )
        digits.append(int(labels[chosen]))
    noise = torch.from_numpy(generator.normal(0.0, 0.1, (SIZE, SIZE))).float()
    return Scene(
        (canvas + noise)[None],
        mask,
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(digits, dtype=torch.int64),
    )


class Scenes(Dataset[tuple[Tensor, Any]]):
    """Scenes, each with what `target` makes of it."""

    def __init__(self, scenes: list[Scene], target: Callable[[Scene], Any]) -> None:
        self._samples = [(scene.image, target(scene)) for scene in scenes]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self._samples[index]


def scene_loaders(
    target: Callable[[Scene], Any],
    batch_size: int,
    seed: int,
    most: int = 4,
    collate: Callable[[list[Any]], Any] | None = None,
) -> dict[str, DataLoader[Any]]:
    """Loaders of batches `(images n x 1 x 32 x 32, targets)`: "train", "val" and "test".

    Args:
        target: What is to be learned of a scene.
        batch_size: Scenes in a batch.
        seed: Of the scenes.
        most: Digits in a scene at most.
        collate: Makes a batch of samples; by default targets are stacked.
    """
    return {
        part: DataLoader(
            Scenes(make_scenes(part, seed, most), target),
            batch_size=batch_size,
            shuffle=part == "train",
            drop_last=part == "train",
            collate_fn=collate,
        )
        for part in COUNTS
    }
