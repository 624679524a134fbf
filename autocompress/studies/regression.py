"""Regression on images: where a digit is, judged by the root mean squared error in pixels.

The error is better when it is lower, so delta is by how much it may grow.

    python -m autocompress.study regression
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanSquaredError

from autocompress import TorchMetric
from autocompress.studies.scenes import SIZE, Scene, scene_loaders


def centre(scene: Scene) -> Tensor:
    """Column and row of the digit's middle, as shares of the scene's size: two numbers, 0 to 1."""
    left, top, right, bottom = scene.boxes[0]
    return Tensor([left + right, top + bottom]) / (2 * SIZE)


def data(batch_size: int, seed: int) -> dict[str, Any]:
    """Scenes of one digit and its middle, `n x 2`: `data.source` of the study file."""
    return scene_loaders(centre, batch_size, seed, most=1)


def loss(output: Tensor, batch: Any) -> Tensor:
    """Huber's loss, for outputs `n x 2`."""
    return F.smooth_l1_loss(output, batch[1], beta=0.02)


def task() -> dict[str, Any]:
    """Loss and metric: `task.source` of the study file."""
    error = TorchMetric(
        MeanSquaredError(squared=False),
        pairs=lambda output, batch: (SIZE * output, SIZE * batch[1]),
        name="RMSE",
        unit="px",
    )
    return {"loss": loss, "distillation": F.mse_loss, "metric": error}
