"""MobileNet v1 and v2 for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.zoo.width import scaled, scaled_by_eights

V1_LAYERS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
"""Channels and stride of each block."""

V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, and stride of the first block."""


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x outputs x h/stride x w/stride`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)))


class MobileNet(nn.Module):
    """MobileNet v1 of Howard et al. (2017) with a stem of stride 1, as in pytorch-cifar.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplier of all channels, the paper's alpha.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for wanted, stride in V1_LAYERS:
            outputs = scaled(wanted, width)
            blocks.append(SeparableBlock(channels, outputs, stride))
            channels = outputs
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class InvertedBlock(nn.Module):
    """A 1x1, a depthwise 3x3 and a 1x1 convolution; the input is added where the size stays.

    As in pytorch-cifar, the first convolution is there even without expansion, and where only the
    channels change, a 1x1 convolution fits the input to them.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        planes = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=planes, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.added = stride == 1
        self.shortcut: nn.Module = nn.Sequential()
        if self.added and inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x outputs x h/stride x w/stride`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        z: Tensor = self.bn3(self.conv3(y))
        return z + self.shortcut(x) if self.added else z


class MobileNetV2(nn.Module):
    """MobileNet v2 of Sandler et al. (2018) for 32x32 images, as in pytorch-cifar.

    The stem and the second stage have stride 1, ReLU stands for ReLU6, and see `InvertedBlock`.
    pytorch-cifar knows no narrow form: channels are rounded as in torchvision, to multiples of 8.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplier of all channels; as in the paper, a width below 1 leaves the last
            convolution its 1280.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled_by_eights(32, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for expansion, wanted, count, first in V2_STAGES:
            outputs = scaled_by_eights(wanted, width)
            for stride in (first, *(1,) * (count - 1)):
                blocks.append(InvertedBlock(channels, outputs, expansion, stride))
                channels = outputs
        self.layers = nn.Sequential(*blocks)
        last = scaled_by_eights(1280, max(1.0, width))
        self.conv2 = nn.Conv2d(channels, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
