"""GoogLeNet for 32x32 images."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from autocompress.zoo.vgg import convolution
from autocompress.zoo.width import scaled


@dataclass(frozen=True)
class Branches:
    """Channels of an Inception module: of its outputs, and of what its 3x3 and 5x5 parts read."""

    one: int
    before_three: int
    three: int
    before_five: int
    five: int
    pooled: int

    @property
    def outputs(self) -> int:
        """Channels of all branches together."""
        return self.one + self.three + self.five + self.pooled

    def scaled(self, width: float) -> Branches:
        """The same with all channels times `width`."""
        return Branches(*(scaled(channels, width) for channels in astuple(self)))


STAGES = {
    3: {"a": Branches(64, 96, 128, 16, 32, 32), "b": Branches(128, 128, 192, 32, 96, 64)},
    4: {
        "a": Branches(192, 96, 208, 16, 48, 64),
        "b": Branches(160, 112, 224, 24, 64, 64),
        "c": Branches(128, 128, 256, 24, 64, 64),
        "d": Branches(112, 144, 288, 32, 64, 64),
        "e": Branches(256, 160, 320, 32, 128, 128),
    },
    5: {"a": Branches(256, 160, 320, 32, 128, 128), "b": Branches(384, 192, 384, 48, 128, 128)},
}
"""Table 1 of Szegedy et al. (2015); the image is halved between stages."""


class Inception(nn.Module):
    """Four branches side by side; two 3x3 convolutions stand for the 5x5 one."""

    def __init__(self, inputs: int, size: Branches) -> None:
        super().__init__()
        self.b1 = nn.Sequential(*convolution(inputs, size.one, 1))
        self.b2 = nn.Sequential(
            *convolution(inputs, size.before_three, 1),
            *convolution(size.before_three, size.three, 3),
        )
        self.b3 = nn.Sequential(
            *convolution(inputs, size.before_five, 1),
            *convolution(size.before_five, size.five, 3),
            *convolution(size.five, size.five, 3),
        )
        pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.b4 = nn.Sequential(pool, *convolution(inputs, size.pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x size.outputs x h x w`."""
        return torch.cat((self.b1(x), self.b2(x), self.b3(x), self.b4(x)), 1)


class GoogLeNet(nn.Module):
    """GoogLeNet of Szegedy et al. (2015) with batch norm, as in pytorch-cifar.

    Its stem is one 3x3 convolution without pooling, and it has no auxiliary classifiers. Names are
    pytorch-cifar's.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplier of all channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(192, width)
        self.pre_layers = nn.Sequential(*convolution(in_channels, channels, 3))
        for stage, modules in STAGES.items():
            for letter, branches in modules.items():
                size = branches.scaled(width)
                self.add_module(f"{letter}{stage}", Inception(channels, size))
                channels = size.outputs
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = self.pre_layers(x)
        for stage, modules in STAGES.items():
            for letter in modules:
                x = self.get_submodule(f"{letter}{stage}")(x)
            # One module, run twice, as in pytorch-cifar.
            x = self.maxpool(x) if stage < max(STAGES) else x
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits
