"""Residual networks for small images, trained here or loaded from published checkpoints.

Names of layers are those of the usual implementations (akamaster's `pytorch_resnet_cifar10` for the
CIFAR ResNets, torchvision for ResNet-18/34/50), so that their checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A of He et al. (2015): every second pixel, new channels filled with zeros.

    Args:
        added: Channels to add, half of them in front.
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """From `n x c x h x w` to `n x (c + added) x ceil(h/2) x ceil(w/2)`."""
        before = self.added // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.added - before))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in the CIFAR ResNets."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                PaddedShortcut(outputs - inputs)
                if shortcut == "A"
                else _projection(inputs, outputs, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x outputs x h/stride x w/stride`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet of He et al. (2015), section 4.2, for 32x32 images: three stages of 3x3 blocks.

    Args:
        depth: 6 k + 2 layers with k blocks a stage: 20, 32, 44, 56 or 110.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Channels of the first stage; the others have two and four times as many.
        shortcut: "A" adds no parameters where the shape changes, "B" is a 1x1 convolution there.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        shortcut: Shortcut = "A",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 k + 2 with k >= 1 (20, 32, 44 ...), got {depth}.")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}.")
        blocks = (depth - 2) // 6

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = CifarBlock(inputs, outputs, stride, shortcut)
            rest = [CifarBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, named as in torchvision."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != planes:
            self.downsample = _projection(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x planes x h/stride x w/stride`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut, named as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x (4 planes) x h/stride x w/stride`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """An ImageNet ResNet with a stem for small images: one 3x3 convolution, no pooling.

    Args:
        block: The kind of block.
        blocks: Blocks in each stage; each stage after the first halves the image and doubles the
            channels.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Channels of the first stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages, outputs = _add_stages(self, block, blocks, width)
        self.fc = nn.Linear(outputs, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its norm and ReLU, as in He et al. (2016).

    Names and order are those of pytorch-cifar: the shortcut starts after the first ReLU where the
    shape changes, and at the block's input elsewhere.
    """

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """From `n x inputs x h x w` to `n x planes x h/stride x w/stride`."""
        y = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        z: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return z + kept


class PreActResNet(nn.Module):
    """A ResNet of pre-activation blocks for 32x32 images, as in pytorch-cifar.

    Unlike the paper's, it has no norm after the last block.

    Args:
        blocks: Blocks in each stage; each stage after the first halves the image and doubles the
            channels.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        width: Channels of the first stage.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages, outputs = _add_stages(self, PreActBlock, blocks, width)
        self.linear = nn.Linear(outputs, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `n x num_classes`, of images `n x in_channels x h x w`."""
        x = self.conv1(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet_small(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 32,
    blocks: Sequence[int] = (1, 1, 1),
) -> ResNet:
    """A small residual network for images from 8x8 (digits) to 32x32 pixels."""
    return ResNet(BasicBlock, blocks, num_classes, in_channels, width)


def _add_stages(
    network: nn.Module,
    block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
    blocks: Sequence[int],
    width: int,
) -> tuple[list[str], int]:
    """Give a network its stages; the names of these, and the channels that leave the last one."""
    names = [f"layer{index + 1}" for index in range(len(blocks))]
    inputs = width
    for index, (name, count) in enumerate(zip(names, blocks, strict=True)):
        planes = width * 2**index
        outputs = planes * block.expansion
        first = block(inputs, planes, 1 if index == 0 else 2)
        rest = [block(outputs, planes, 1) for _ in range(count - 1)]
        network.add_module(name, nn.Sequential(first, *rest))
        inputs = outputs
    return names, inputs


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
