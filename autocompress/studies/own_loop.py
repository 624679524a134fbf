"""A training loop of one's own, passed whole: AdamW, mixed images, and a schedule by hand.

Nothing of autocompress's own training is used: the baseline, each trial and the winner are trained
by `train` below. The metric stays accuracy.

    python -m autocompress.study own-loop
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 64


def _digits() -> tuple[Tensor, Tensor]:
    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(raw.target).long()[order]


def data(batch_size: int) -> dict[str, Any]:
    """Loaders of digits: `data.source` of the study file."""
    images, labels = _digits()
    parts = {"train": slice(0, 1100), "val": slice(1100, 1450), "test": slice(1450, None)}
    return {
        name: DataLoader(TensorDataset(images[part], labels[part]), batch_size, name == "train")
        for name, part in parts.items()
    }


def train(
    model: nn.Module,
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
    teacher: nn.Module | None,
    on_step: Callable[[float, float, float], None],
) -> None:
    """Train `model` in place, as `autocompress.task.TrainingLoop` says."""
    images, labels = (values[:1100] for values in _digits())
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, round(epochs * len(images) / BATCH_SIZE))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        other = chosen[torch.randperm(BATCH_SIZE, generator=generator)]
        share = float(torch.rand((), generator=generator)) * 0.3
        mixed = ((1 - share) * images[chosen] + share * images[other]).to(device)
        output = model(mixed)
        loss = (1 - share) * F.cross_entropy(output, labels[chosen].to(device))
        loss = loss + share * F.cross_entropy(output, labels[other].to(device))
        if teacher is not None:
            with torch.no_grad():
                target = teacher(mixed).softmax(1)
            loss = 0.5 * loss + 0.5 * F.cross_entropy(output, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step((step + 1) * epochs / steps, epochs, loss.item())


def task() -> dict[str, Any]:
    """The training loop: `task.source` of the study file."""
    return {"training": train}
