"""VGG-19 with batch norm for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from autocompress.zoo.width import scaled

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and convolutions between one max-pooling and the next."""


class VGG(nn.Module):
    """VGG-19 of Simonyan and Zisserman (2015) with batch norm, as in pytorch-cifar.

    One linear layer stands for the paper's three. Names are pytorch-cifar's. Images must have
    32x32 pixels or more; those of more are averaged at the end.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Multiplier of all channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for channels, count in STAGES:
            outputs = scaled(channels, width)
            for _ in range(count):
                layers += convolution(inputs, outputs)
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def convolution(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    """A convolution that keeps the image's size, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
