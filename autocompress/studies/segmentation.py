"""Segmentation: which digit each pixel belongs to, judged by the mean intersection over union.

python -m autocompress.study segmentation
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import JaccardIndex

from autocompress import TorchMetric
from autocompress.studies.scenes import scene_loaders

CLASSES = 11
"""The background and ten digits."""


class Block(nn.Sequential):
    """Two 3 x 3 convolutions with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597) of three levels.

    Its output is a dict, `{"out": logits}`, like that of torchvision's segmentation networks.

    Args:
        width: Channels of the first level; each further one has twice as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = Block(1, width), Block(width, 2 * width)
        self.bottom = Block(2 * width, 4 * width)
        self.up2, self.up1 = Block(6 * width, 2 * width), Block(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """From `n x 1 x h x w` to logits `n x 11 x h x w`; h and w are multiples of 4."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.bottom(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([F.interpolate(three, scale_factor=2.0), two], dim=1))
        one = self.up1(torch.cat([F.interpolate(two, scale_factor=2.0), one], dim=1))
        return {"out": self.head(one)}


def network(width: int = 16) -> nn.Module:
    """The untrained network: `model.source` of the study file."""
    return UNet(width)


def data(batch_size: int, seed: int) -> dict[str, Any]:
    """Images and masks: `data.source` of the study file."""
    return scene_loaders(lambda scene: scene.mask, batch_size, seed)


def loss(output: dict[str, Tensor], batch: Any) -> Tensor:
    """Cross entropy over the pixels."""
    return F.cross_entropy(output["out"], batch[1])


def imitation(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Kullback-Leibler divergence from the baseline's distribution over the pixels."""
    own, aim = (F.log_softmax(one["out"].float(), dim=1) for one in (student, teacher))
    return F.kl_div(own, aim, reduction="none", log_target=True).sum(dim=1).mean()


def task() -> dict[str, Any]:
    """Loss and metric: `task.source` of the study file."""
    miou = TorchMetric(
        JaccardIndex("multiclass", num_classes=CLASSES),
        pairs=lambda output, batch: (output["out"].argmax(1), batch[1]),
        name="mIoU",
        unit="%",
        factor=100.0,
    )
    return {"loss": loss, "distillation": imitation, "metric": miou}
