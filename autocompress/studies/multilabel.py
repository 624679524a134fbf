"""Multi-label classification: which digits are in a scene, judged by the mean average precision.

python -m autocompress.study multilabel
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from autocompress import TorchMetric
from autocompress.studies.scenes import Scene, scene_loaders

DIGITS = 10


def present(scene: Scene) -> Tensor:
    """Ten numbers: 1 for each digit in the scene, 0 for the others."""
    return torch.zeros(DIGITS).index_fill_(0, scene.digits, 1.0)


def data(batch_size: int, seed: int) -> dict[str, Any]:
    """Images and labels, `n x 10`: `data.source` of the study file."""
    return scene_loaders(present, batch_size, seed)


def loss(output: Tensor, batch: Any) -> Tensor:
    """Binary cross entropy, the mean over images and digits."""
    return F.binary_cross_entropy_with_logits(output, batch[1])


def imitation(student: Tensor, teacher: Tensor) -> Tensor:
    """The same, with the baseline's probabilities as labels."""
    return F.binary_cross_entropy_with_logits(student.float(), teacher.float().sigmoid())


def task() -> dict[str, Any]:
    """Loss and metric: `task.source` of the study file."""
    precision = TorchMetric(
        MultilabelAveragePrecision(DIGITS),
        pairs=lambda output, batch: (output, batch[1].long()),
        name="mean average precision",
        unit="%",
        factor=100.0,
    )
    return {"loss": loss, "distillation": imitation, "metric": precision}
