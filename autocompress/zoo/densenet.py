"""DenseNet-121 for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.zoo.width import scaled


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after its norm and ReLU, whose outputs join the inputs."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x (growth + inputs) x h x w`."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return torch.cat((y, x), 1)


class Transition(nn.Module):
    """Halves the channels and the image between two dense blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x outputs x h/2 x w/2`."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC of Huang et al. (2017), DenseNet-121 by default, as in pytorch-cifar.

    Its stem is one 3x3 convolution without pooling. Names are pytorch-cifar's.

    Args:
        blocks: Layers in each dense block; a transition follows each but the last.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplier of the growth rate, on which all channels depend.
        growth: Channels that a layer adds, at a width of 1.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (6, 12, 24, 16),
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        growth: int = 32,
    ) -> None:
        super().__init__()
        growth = scaled(growth, width)
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.parts = []
        for index, count in enumerate(blocks, start=1):
            layers = [DenseLayer(channels + step * growth, growth) for step in range(count)]
            self.parts.append(f"dense{index}")
            self.add_module(self.parts[-1], nn.Sequential(*layers))
            channels += count * growth
            if index < len(blocks):
                self.parts.append(f"trans{index}")
                self.add_module(self.parts[-1], Transition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = self.conv1(x)
        for name in self.parts:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(F.relu(self.bn(x)).mean((2, 3)))
        return logits
