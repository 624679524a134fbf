"""The network and the data that a study file names, as a task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from autocompress.config import DataConfig, StudyConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import calibration_loader
from autocompress.models import PRETRAINED, build_model, pretrained_normalization
from autocompress.task import Task


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: If this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device = {name!r} can't be used here: {str(error).splitlines()[0]} "
            "Give cpu, cuda, cuda:0 or auto."
        ) from error
    return device


def task_from_config(config: StudyConfig, folder: Path | None = None) -> Task:
    """Load the network and the data that a study file names.

    Args:
        config: The study.
        folder: The study file's folder, where its Python modules are looked for too.

    Raises:
        ConfigError: If there is no such network, data or device, or they don't fit each other.
    """
    device = pick_device(config.run.device)
    torch.manual_seed(config.seed)
    model = build_model(config.model.source, config.model.arguments, config.model.weights, folder)
    data = load_data(_like_pretrained(config, model), config.seed, device, folder)
    return Task(
        model=model,
        train=data.train,
        val=data.val,
        test=data.test,
        calibration=calibration_loader(data.train),
        classes=data.classes,
        origin={"source": config.model.source, "arguments": dict(config.model.arguments)},
        fingerprint=data.fingerprint,
        normalization=data.normalization,
        val_seen=data.val_from == "train" and config.model.weights is not None,
        device=device,
    )


def _like_pretrained(config: StudyConfig, model: nn.Module) -> DataConfig:
    """The data section, with the normalization that the library's weights were trained with."""
    if config.model.weights != PRETRAINED or config.data.mean is not None:
        return config.data
    mean, std = pretrained_normalization(model)
    return config.data.model_copy(update={"mean": mean, "std": std})
