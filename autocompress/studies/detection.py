"""Object detection: digits in scenes, by a detector of torchvision, judged by the mAP.

python -m autocompress.study detection
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from autocompress import TorchMetric
from autocompress.studies.scenes import SIZE, Scene, scene_loaders
from autocompress.zoo import resnet_small

DIGITS = 10
CHANNELS = 64


class Backbone(nn.Module):
    """Features of a small residual network: `n x 64 x h/4 x w/4`.

    Args:
        width: Channels of the first of its three stages.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = resnet_small(in_channels=3, width=width)
        self.body.fc = nn.Identity()  # type: ignore[assignment]
        self.lateral = nn.Conv2d(4 * width, CHANNELS, 1)
        self.out_channels = CHANNELS

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The features, by name, as torchvision's detectors take them."""
        body = self.body
        x = torch.relu(body.bn1(body.conv1(x)))
        for name in body.stages:
            x = body.get_submodule(name)(x)
        return OrderedDict([("0", self.lateral(x))])


def network(width: int = 16) -> nn.Module:
    """An FCOS detector (Tian et al. 2019, arXiv 1904.01355): `model.source` of the study file."""
    detector: nn.Module = FCOS(
        Backbone(width),
        num_classes=DIGITS,
        anchor_generator=AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),)),
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        detections_per_img=20,
    )
    return detector


def boxes(scene: Scene) -> dict[str, Tensor]:
    """Boxes, `k x 4`, and labels, `k`, as torchvision's detectors take them."""
    return {"boxes": scene.boxes, "labels": scene.digits}


def collate(samples: list[Any]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images, `n x 3 x 32 x 32`, and a list with a dict for each image."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images).expand(-1, 3, -1, -1), list(targets)


def data(batch_size: int, seed: int) -> dict[str, Any]:
    """Images and boxes: `data.source` of the study file."""
    return scene_loaders(boxes, batch_size, seed, collate=collate)


def forward(model: nn.Module, batch: Any) -> Any:
    """Losses in training; in evaluation boxes, labels and scores of each image."""
    images, targets = batch
    return model(images, list(targets)) if model.training else model(images)


def loss(output: dict[str, Tensor], batch: Any) -> Tensor:
    """The sum of the detector's own losses."""
    return torch.stack(list(output.values())).sum()


def task() -> dict[str, Any]:
    """Forward pass, loss and metric: `task.source` of the study file."""
    precision = TorchMetric(
        MeanAveragePrecision(backend="faster_coco_eval"),
        pairs=lambda output, batch: (list(output), list(batch[1])),
        name="mAP",
        key="map",
        higher_is_better=True,
    )
    return {"forward": forward, "loss": loss, "metric": precision}
