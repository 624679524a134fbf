"""The architectures for small images, by name.

Those of the published table of Deeplite's Neutrino (ResNet-18 and 50, VGG-19, DenseNet-121,
GoogLeNet, MobileNet v1 and v2, pre-activation ResNet-18) are in the forms for 32x32 pixels that it
was measured on: deeplite-torch-zoo's, which are those of kuangliu/pytorch-cifar. Their counts of
parameters and MACs are the published ones to the last digit (`autocompress.compatible`). Forms for
224x224 pixels, with pretrained weights, are torchvision's and timm's (`torchvision:NAME`,
`timm:NAME`).

Every network takes `num_classes`, `in_channels` and `width`. For residual networks `width` is the
number of channels of the first stage; for all others it multiplies the channels of all layers.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from autocompress.zoo.densenet import DenseNet
from autocompress.zoo.googlenet import GoogLeNet
from autocompress.zoo.mobilenet import MobileNet, MobileNetV2
from autocompress.zoo.resnet import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    PaddedShortcut,
    PreActResNet,
    ResNet,
    resnet_small,
)
from autocompress.zoo.vgg import VGG

ZOO: dict[str, Callable[..., nn.Module]] = {
    "resnet_small": resnet_small,
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
    "resnet44": partial(CifarResNet, 44),
    "resnet56": partial(CifarResNet, 56),
    "resnet110": partial(CifarResNet, 110),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "pre_act_resnet18": PreActResNet,
    "vgg19": VGG,
    "densenet121": DenseNet,
    "googlenet": GoogLeNet,
    "mobilenet_v1": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_0.35": partial(MobileNetV2, width=0.35),
}

__all__ = [
    "VGG",
    "ZOO",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "DenseNet",
    "GoogLeNet",
    "MobileNet",
    "MobileNetV2",
    "PaddedShortcut",
    "PreActResNet",
    "ResNet",
    "resnet_small",
]
