"""Somebody's own network, loaders and metric; autocompress is known to none of them.

Images are 16 x 16 bright shapes on noise: bars across, bars down, discs and frames. Batches are
dicts. The network is no classifier from a library, and its metric counts the share of the right
class's probability, not hits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

KINDS = 4
SIDE = 16


def draw(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images, `count x 1 x 16 x 16`, and what they show, `count`."""
    chance = np.random.default_rng(seed)
    kinds = chance.integers(KINDS, size=count)
    images = chance.normal(0.0, 0.6, size=(count, 1, SIDE, SIDE)).astype(np.float32)
    down, across = np.mgrid[:SIDE, :SIDE]
    for image, kind in zip(images[:, 0], kinds, strict=True):
        y, x = chance.integers(5, SIDE - 5, size=2)
        far = np.maximum(abs(down - y), abs(across - x))
        shapes = (
            (abs(down - y) <= 1) & (abs(across - x) <= 5),
            (abs(across - x) <= 1) & (abs(down - y) <= 5),
            (down - y) ** 2 + (across - x) ** 2 <= 12,
            far == 4,
        )
        image[shapes[kind]] += 1.0
    return images, kinds


class Shapes(torch.utils.data.Dataset[dict[str, Any]]):
    """Drawn once, and served as dicts."""

    def __init__(self, count: int, seed: int) -> None:
        self.images, self.kinds = draw(count, seed)

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": torch.from_numpy(self.images[index]), "kind": int(self.kinds[index])}


class Net(nn.Module):
    """Two branches that are joined, a shortcut and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.fine = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.BatchNorm2d(width))
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, KINDS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores, `n x 4`, of images `n x 1 x 16 x 16`."""
        x = F.relu(self.stem(pixels))
        x = F.relu(torch.cat([self.fine(x), self.coarse(x)], dim=1))
        x = F.relu(self.norm(self.mix(x)))
        x = F.relu(x + self.deep(x))
        result: Tensor = self.head(x.mean(dim=(2, 3)))
        return result


def network(width: int) -> Net:
    """The network, untrained."""
    return Net(width)


def loaders(batch_size: int = 64, seed: int = 0) -> dict[str, Any]:
    """What it is trained, chosen and tested on."""
    counts = {"train": 512, "val": 256, "test": 256}
    return {
        part: DataLoader(
            Shapes(count, 3 * seed + index),
            batch_size,
            shuffle=part == "train",
            generator=torch.Generator().manual_seed(seed),
        )
        for index, (part, count) in enumerate(counts.items())
    }


def forward(model: nn.Module, batch: Any) -> Any:
    return model(batch["pixels"])


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch["kind"])


def certainty(output: Tensor, batch: Any) -> Tensor:
    """The right kind's probability, for each image."""
    return output.float().softmax(dim=1).gather(1, batch["kind"][:, None])[:, 0]


def functions() -> dict[str, Any]:
    """By their names in a study file's `[task]`."""
    return {"forward": forward, "loss": loss, "metric": certainty}
