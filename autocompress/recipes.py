"""How baselines are trained: a recipe for each architecture and data set, after the literature.

`autocompress.training.Recipe` says how compressed networks recover; these here say how a network is
trained from random weights. All share SGD with Nesterov momentum and one cycle of the learning rate
(Smith and Topin 2017, arXiv 1708.07120); they differ in the numbers below.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any

from autocompress.config import BaselineConfig, StudyConfig
from autocompress.errors import ConfigError
from autocompress.task import (
    WARM_UP_SHARE,
    WEIGHT_DECAY,
    Task,
    cross_entropy,
    one_cycle,
    sgd,
)


@dataclass(frozen=True)
class BaselineRecipe:
    """How a network is trained from random weights. The defaults are those of a bare study file.

    Attributes:
        epochs: Passes over the training data.
        short_epochs: The same in the short form, for a first look or for a CPU.
        learning_rate: Peak of the cycle.
        weight_decay: Of convolutions and linear layers; biases and norms have none.
        label_smoothing: Share of the target that is spread over all classes.
        warm_up: Share of the steps in which the learning rate rises.
        batch_size: Images in a batch; what the learning rate is meant for.
        augment: Random changes of the training images, as `data.augment` names them.
        accuracy: Top-1 test accuracy, %, that the source reports of training much like the full
            form, with a schedule of its own; None where we know of none. It is not our result.
        source: Where the accuracy comes from.
    """

    epochs: float = 10.0
    short_epochs: float = 10.0
    learning_rate: float = 0.1
    weight_decay: float = WEIGHT_DECAY
    label_smoothing: float = 0.0
    warm_up: float = WARM_UP_SHARE
    batch_size: int = 128
    augment: str = "none"
    accuracy: float | None = None
    source: str = ""


_Change = Mapping[str, Any]

# DeVries and Taylor (2017), without Cutout: mean of five runs.
CUTOUT = "arXiv 1708.04552"
KUANGLIU = "kuangliu/pytorch-cifar"
WEIAICUNZAI = "weiaicunzai/pytorch-cifar100"
CHENYAOFO = "chenyaofo/pytorch-cifar-models"
AKAMASTER = "akamaster/pytorch_resnet_cifar10"
# The networks of kuangliu and weiaicunzai after 70 epochs.
FAST = "WeihaoZhuang/cifar10-100-fast-training"
# The checkpoints that Neutrino's results start from; how they were trained isn't said.
DEEPLITE = "Deeplite/deeplite-torch-zoo"
# Its reference scripts.
TORCHVISION = "pytorch/vision"

# 200 epochs, batches of 128, a rate of 0.1 and a decay of 5e-4: kuangliu (cosine), weiaicunzai and
# DeVries and Taylor (steps). The short form is as long as DAWNBench's entries with one cycle were.
_CIFAR: _Change = {"epochs": 200.0, "short_epochs": 30.0, "augment": "crop-flip"}
# torchvision: 90 epochs, 256 images in a batch, a rate of 0.1, a decay of 1e-4.
_IMAGENET: _Change = {
    "epochs": 90.0,
    "short_epochs": 16.0,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "augment": "crop-flip",
}
# Photographs of 10 or 16 classes, or with and without a person: lengths are ours.
_PHOTOGRAPHS: _Change = {"epochs": 60.0, "short_epochs": 10.0, "augment": "crop-flip"}

DATA: dict[str, _Change] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tinyimagenet": {"epochs": 100.0, "short_epochs": 20.0, "augment": "crop-flip"},
    "imagenet": _IMAGENET,
    "imagenette": _PHOTOGRAPHS,
    "imagenet10": _PHOTOGRAPHS,
    "imagenet16": _PHOTOGRAPHS,
    "vww": _PHOTOGRAPHS,
    "svhn": {"epochs": 60.0, "short_epochs": 10.0, "augment": "crop"},
    # Ours, for small networks on a CPU. Cropped, too, a network of 0.08 M parameters came to 89.9 %
    # in 10 epochs on 14x14 pixels, and to 90.9 % without (test data, one seed).
    "fashionmnist": {"epochs": 60.0, "short_epochs": 10.0, "augment": "flip"},
    "mnist": {"epochs": 20.0, "short_epochs": 4.0, "augment": "crop"},
    "digits": {"epochs": 60.0, "short_epochs": 20.0, "batch_size": 64, "augment": "crop"},
}
"""What a data set changes."""

ELSEWHERE: _Change = {"epochs": 100.0, "short_epochs": 20.0}
"""Data that we don't know; whether it may be cropped or mirrored can't be told."""

# Smoothing pays where a network can learn its training data by heart (Mueller et al. 2019, arXiv
# 1906.02629, who also find that it costs a teacher some of its worth); small ones can't.
FAMILIES: dict[str, _Change] = {
    "cifar_resnet": {},
    "resnet_small": {},
    "resnet": {"label_smoothing": 0.1},
    "densenet": {"label_smoothing": 0.1},
    "googlenet": {"label_smoothing": 0.1},
    # Without shortcuts a rate of 0.1 can fail.
    "vgg": {"label_smoothing": 0.1, "learning_rate": 0.05},
    "mobilenet": {},
}
"""What a family of architectures changes."""

_FAMILY_OF: dict[str, str] = {
    r"resnet_small": "resnet_small",
    r"resnet(20|32|44|56|110)": "cifar_resnet",
    r"(wide_|pre_?act_?)?resne(x?)t\d+.*": "resnet",
    r"densenet.*": "densenet",
    r"(googlenet|inception).*": "googlenet",
    r"vgg.*": "vgg",
    r"mobilenet.*": "mobilenet",
}


def _said(accuracy: float, source: str, **changes: Any) -> _Change:
    return {"accuracy": accuracy, "source": source, **changes}


RECIPES: dict[tuple[str, str], _Change] = {
    ("resnet18", "cifar10"): _said(95.28, CUTOUT),
    ("resnet34", "cifar10"): _said(95.57, FAST),
    ("resnet50", "cifar10"): _said(95.62, FAST),
    ("pre_act_resnet18", "cifar10"): _said(95.11, KUANGLIU),
    ("vgg19", "cifar10"): _said(94.22, FAST),
    ("densenet121", "cifar10"): _said(95.04, KUANGLIU),
    ("googlenet", "cifar10"): _said(95.35, FAST),
    ("mobilenet_v1", "cifar10"): _said(92.25, FAST),
    ("mobilenet_v2", "cifar10"): _said(94.43, KUANGLIU),
    ("resnet20", "cifar10"): _said(92.60, CHENYAOFO),
    ("resnet32", "cifar10"): _said(93.53, CHENYAOFO),
    ("resnet44", "cifar10"): _said(94.01, CHENYAOFO),
    ("resnet56", "cifar10"): _said(94.37, CHENYAOFO),
    # A decay of 1e-4 is that of He et al. (2015), whom akamaster follows.
    ("resnet110", "cifar10"): _said(93.68, AKAMASTER, weight_decay=1e-4),
    ("resnet18", "cifar100"): _said(77.54, CUTOUT),
    ("resnet34", "cifar100"): _said(76.76, WEIAICUNZAI),
    ("resnet50", "cifar100"): _said(77.39, WEIAICUNZAI),
    ("pre_act_resnet18", "cifar100"): _said(72.92, WEIAICUNZAI),
    ("vgg19", "cifar100"): _said(72.23, WEIAICUNZAI),
    ("densenet121", "cifar100"): _said(77.01, WEIAICUNZAI),
    ("googlenet", "cifar100"): _said(78.03, WEIAICUNZAI),
    ("mobilenet_v1", "cifar100"): _said(65.98, WEIAICUNZAI),
    ("mobilenet_v2", "cifar100"): _said(68.08, WEIAICUNZAI),
    ("resnet20", "cifar100"): _said(68.83, CHENYAOFO),
    ("resnet32", "cifar100"): _said(70.16, CHENYAOFO),
    ("resnet44", "cifar100"): _said(71.63, CHENYAOFO),
    ("resnet56", "cifar100"): _said(72.63, CHENYAOFO),
    ("resnet18", "vww"): _said(93.55, DEEPLITE),
    ("resnet50", "vww"): _said(94.37, DEEPLITE),
    ("mobilenet_v1", "vww"): _said(92.44, DEEPLITE),
    ("resnet18", "imagenet10"): _said(93.83, DEEPLITE),
    ("mobilenet_v2_0.35", "imagenet10"): _said(81.05, DEEPLITE),
    ("resnet18", "imagenet16"): _said(94.51, DEEPLITE),
    ("resnet50", "imagenet16"): _said(96.85, DEEPLITE),
    ("resnet18", "imagenet"): _said(69.76, TORCHVISION, label_smoothing=0.0),
    ("resnet34", "imagenet"): _said(73.31, TORCHVISION, label_smoothing=0.0),
    ("resnet50", "imagenet"): _said(76.13, TORCHVISION, label_smoothing=0.0),
}
"""What an architecture changes on a data set, and how far others came; the closest entry wins."""


def recipe_for(network: str, data: str) -> BaselineRecipe:
    """The recipe of an architecture on a data set, by the names that a study file has.

    Args:
        network: "resnet18", "zoo:resnet18", "torchvision:vgg19_bn"; the library doesn't matter.
        data: "torchvision:CIFAR10", "digits", "folder:PATH" or "array:FILE"; of a path the last
            part counts ("data/cifar10-jpg" is CIFAR-10).
    """
    name = network.rpartition(":")[2].removesuffix("_bn")
    found = data_name(data)
    changes = DATA.get(found, ELSEWHERE)
    family = FAMILIES.get(family_of(name), {})
    return replace(BaselineRecipe(), **{**changes, **family, **RECIPES.get((name, found), {})})


def family_of(network: str) -> str:
    """The family of an architecture, by its bare name; "" for one that is in none."""
    for pattern, family in _FAMILY_OF.items():
        if re.fullmatch(pattern, network):
            return family
    return ""


def data_name(source: str) -> str:
    """The data set that `data.source` names, as in `DATA`; "" for an unknown one."""
    name = re.sub(r"[^a-z0-9]", "", PurePath(source.rpartition(":")[2]).stem.lower())
    known = sorted(DATA, key=len, reverse=True)
    return next((data for data in known if name.startswith(data)), "")


def recipe_of(config: StudyConfig, given: bool) -> BaselineRecipe:
    """How a study's baseline is trained: its recipe, and over it what the file says.

    Args:
        config: The study.
        given: Whether the network has its weights already; then it is trained only for
            `baseline.epochs`.
    """
    said: BaselineConfig = config.baseline
    recipe = BaselineRecipe()
    if said.recipe is not None:
        recipe = recipe_for(config.model.source, config.data.source)
    if said.recipe == "short":
        recipe = replace(recipe, epochs=recipe.short_epochs)
    if given:
        recipe = replace(recipe, epochs=0.0)
    own = said.model_dump(exclude={"recipe"}, exclude_none=True)
    return replace(recipe, **own)


def describe(recipe: BaselineRecipe) -> str:
    """The numbers that a recipe trains with, in words."""
    return (
        f"{recipe.epochs:g} epochs, learning rate {recipe.learning_rate:g}, weight decay "
        f"{recipe.weight_decay:g}, label smoothing {recipe.label_smoothing:g}"
    )


def follow(task: Task, recipe: BaselineRecipe) -> Task:
    """The task with the recipe's loss, optimizer and schedule, where these are not the user's own.

    Raises:
        ConfigError: If the recipe asks for something that a function of the user's can't do.
    """
    smoothing, decay = recipe.label_smoothing, recipe.weight_decay
    changes: dict[str, Any] = {}
    if smoothing:
        if task.loss is not cross_entropy or task.training is not None:
            raise ConfigError(
                f"baseline.label_smoothing = {smoothing:g} is for the default loss, cross entropy, "
                "and the task has another one or a training loop of its own; set "
                "baseline.label_smoothing = 0."
            )
        changes["loss"] = partial(cross_entropy, label_smoothing=smoothing)
    if decay != WEIGHT_DECAY:
        if task.optimizer is not sgd or task.training is not None:
            raise ConfigError(
                f"baseline.weight_decay = {decay:g} is for the default optimizer, and the task has "
                f"one or a training loop of its own; set baseline.weight_decay = {WEIGHT_DECAY:g}, "
                "which leaves it as it is."
            )
        changes["optimizer"] = partial(sgd, weight_decay=decay)
    if recipe.warm_up != WARM_UP_SHARE and task.scheduler is one_cycle:
        changes["scheduler"] = partial(one_cycle, warm_up=recipe.warm_up)
    return replace(task, **changes) if changes else task


def recipe_table(networks: Container[str] | None = None) -> list[tuple[str, str, BaselineRecipe]]:
    """All pairs in `RECIPES` with their recipes, for showing.

    Args:
        networks: Only these architectures, by bare name; None for all.
    """
    return [
        (network, data, recipe_for(network, data))
        for network, data in RECIPES
        if networks is None or network in networks
    ]
