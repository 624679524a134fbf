"""The network and the data that a study file names, as a task."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autocompress.config import DataConfig, StudyConfig, own_transform
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import calibration_loader, check_batches
from autocompress.models import (
    PRETRAINED,
    build_model,
    load_function,
    pretrained_normalization,
    rebuilding_arguments,
)
from autocompress.scale import Scale
from autocompress.task import Task, with_functions
from autocompress.transforms import Transform, register

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PLAIN = (bool, int, float, str, Scale)
_PARTS = ("name", "refusal", "ladder", "full", "factorize", "cost", "build", "kernels")


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
    load_transforms(config, folder)
    functions = _functions(config, folder)
    torch.manual_seed(config.seed)
    model = build_model(config.model.source, config.model.arguments, config.model.weights, folder)
    data = load_data(_like_pretrained(config, model), config.seed, device, folder)
    task = Task(
        model=model,
        train=data.train,
        val=data.val,
        test=data.test,
        calibration=calibration_loader(data.train),
        classes=data.classes,
        origin={
            "source": config.model.source,
            "arguments": rebuilding_arguments(
                config.model.source, config.model.arguments, config.model.weights
            ),
        },
        fingerprint=_fingerprint(data.fingerprint, functions),
        normalization=data.normalization,
        val_seen=data.val_from == "train" and config.model.weights is not None,
        device=device,
    )
    task = with_functions(task, functions, f"task.source = '{config.task.source}'")
    check_batches(task)
    return task


def load_transforms(config: StudyConfig, folder: Path | None = None) -> None:
    """Register the transforms of the user's own that a study names.

    Args:
        config: The study.
        folder: Where modules are looked for, too.

    Raises:
        ConfigError: If there is no such class, or it is no transform.
    """
    for name in filter(own_transform, config.search.transforms):
        kind = load_function(name, "search.transforms", folder)
        missing = [part for part in _PARTS if not hasattr(kind, part)]
        if not isinstance(kind, type) or not is_dataclass(kind) or missing:
            lacks = f"; it lacks {', '.join(missing)}" if missing else ""
            raise ConfigError(
                f"search.transforms: '{name}' must be a frozen dataclass with the methods of "
                f"autocompress.transforms.Transform{lacks}."
            )
        register(cast(type[Transform], kind), alias=name)


def _functions(config: StudyConfig, folder: Path | None) -> dict[str, Any]:
    """The functions that the study file's task consists of; none for classification."""
    source = config.task.source
    if source is None:
        return {}
    make = load_function(source, "task.source", folder)
    try:
        found = make(**config.task.arguments)
    except TypeError as error:
        raise ConfigError(
            f"task.source = '{source}' can't be called with task.arguments = "
            f"{config.task.arguments}: {error}."
        ) from error
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"task.source = '{source}' must return a dict of functions by name (forward, loss, "
            f"metric, ...), got a {type(found).__name__}."
        )
    return dict(found)


def _fingerprint(data: str, functions: Mapping[str, Any]) -> str:
    """Identifies what is learned: the data, and the functions of the user's own."""
    if not functions:
        return data
    return hashlib.sha256(f"{data} {functions_text(functions)}".encode()).hexdigest()[:16]


def functions_text(functions: Mapping[str, Any]) -> str:
    """What tells functions from others, as far as can be told: source and plain values."""
    return "".join(f"{name}={_source(functions[name])}" for name in sorted(functions))


def _source(function: Any, whole: bool = True) -> str:
    """The source of a function, or the class of an object, and the plain values bound to it.

    Args:
        function: The function or object.
        whole: Whether functions and metrics that an object holds are told as well.
    """
    if isinstance(function, partial):
        bound = f"{function.args!r} {sorted(function.keywords.items())!r}"
        return f"{_source(function.func)} {_ADDRESS.sub('', bound)}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = f"{type(function).__qualname__}"
    own = [value for _, value in sorted(getattr(function, "__dict__", {}).items())]
    bound_to = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()] + own
    source += repr([value for value in bound_to if isinstance(value, _PLAIN)])
    return source + "".join(_source(value, False) for value in own if whole and callable(value))


def _like_pretrained(config: StudyConfig, model: nn.Module) -> DataConfig:
    """The data section, with the normalization that the library's weights were trained with."""
    if config.model.weights != PRETRAINED or config.data.mean is not None:
        return config.data
    mean, std = pretrained_normalization(model)
    return config.data.model_copy(update={"mean": mean, "std": std})
