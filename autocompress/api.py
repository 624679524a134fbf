"""From Python: the same study as from the command line, for a network and loaders in hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from autocompress.batch import tensors_in
from autocompress.conductor import Outcome, run_study
from autocompress.config import flatten, parse_config
from autocompress.errors import ConfigError
from autocompress.loaders import calibration_loader, check_batches, given_loaders, labels_of
from autocompress.progress import Display, NullDisplay, make_display
from autocompress.sources import functions_text, load_transforms, pick_device
from autocompress.task import Loader, Task, with_functions

GIVEN = ("model.", "data.", "task.", "run.launcher")
"""Fields of a study file for what `compress` is given as objects, and for processes, which can't be
given them."""


def compress(
    model: nn.Module,
    train: Loader,
    test: Loader,
    *,
    val: Loader | None = None,
    delta: float = 1.0,
    name: str = "study",
    out: str | Path = "runs",
    trials: int = 30,
    annealing_trials: int = 15,
    seed: int = 0,
    display: Display | bool = True,
    settings: Mapping[str, Any] | None = None,
    **functions: Any,
) -> Outcome:
    """Make a trained network smaller, within `delta` points of accuracy.

    Calling it again with the same arguments goes on with an interrupted study.

    Args:
        model: The trained network; not edited.
        train: Training batches, `(images, labels)` unless `forward`, `loss` and `metric` say else.
        test: Test batches, read once at the end.
        val: Validation batches, on which all choices are made; None cuts a tenth of `train` off
            (seeded, stratified by label where labels can be read). Better give some that the
            network was not trained on, or cut them from `test` by
            `settings={"data.val_from": "test"}`: the drop on images that it knows is larger. One of
            these is needed where `train` augments its images at random.
        delta: Largest accepted drop, in points of the metric.
        name: The study's name, and that of its folder.
        out: Where the study's folder is made.
        trials: Trials of the exploration.
        annealing_trials: Trials of the annealing.
        seed: Fixes splits, proposals and training.
        display: True for a live display, False for none, or a display of your own.
        settings: Any other field of a study file by its dotted name, e.g.
            `{"finetune.epochs": 2, "objective": "macs"}`.
        **functions: Replacements for the task's `forward`, `loss`, `metric`, `distillation`,
            `optimizer`, `scheduler` and `training`; see `autocompress.Task`. With a loss of your
            own nothing is distilled, unless you give `distillation` too (`task.logit_distillation`
            for logits).

    Returns:
        The compressed network, its plan, and the study's summary and folder.

    Raises:
        ConfigError: If an argument is wrong; before any work is spent.
        StudyMismatch: If the folder holds a study that was made with other settings.

    Examples:
        >>> outcome = autocompress.compress(model, train, test, delta=1.0)  # doctest: +SKIP
        >>> outcome.model, outcome.summary["best"]["test_drop"]  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got a {type(model).__name__}.")
    fields: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "delta": delta,
        "model.source": f"python:{type(model).__qualname__}",
        "data.source": "python:loaders",
        "search.trials": trials,
        "search.annealing_trials": annealing_trials,
        "run.out": str(out),
        "baseline.epochs": 0.0,
        **(settings or {}),
    }
    config = parse_config(fields)
    _check_settings(settings or {})
    device = pick_device(config.run.device)
    load_transforms(config)
    val_seen = val is None and config.data.val_from == "train"
    train, val, test = given_loaders(
        train,
        val,
        test,
        fraction=config.data.val_fraction,
        source=config.data.val_from,
        seed=config.seed,
    )
    own = _copy(_unwrapped(model)).cpu()
    task = Task(
        model=own,
        train=train,
        val=val,
        test=test,
        calibration=calibration_loader(train),
        val_seen=val_seen,
        fingerprint=_fingerprint(train, val, test, functions),
        device=device,
    )
    task = with_functions(task, functions, "compress()")
    check_batches(task)
    shown = make_display() if display is True else (display or NullDisplay())
    with shown:
        return run_study(config, task, shown, command="autocompress.compress(...)")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network in what `torch.compile` or the data-parallel wrappers made of it: its weights
    are saved under its own names."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"A {type(model).__name__} can't be copied: {type(error).__name__}: {error} Keep no "
            "activations as attributes of modules, and use torch.nn.utils.parametrizations in "
            "place of torch.nn.utils.weight_norm and spectral_norm."
        ) from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of what `compress` is given as objects, and would leave unread.

    Raises:
        ConfigError: Naming them.
    """
    unread = [
        key
        for key in flatten(settings)
        if key.startswith(GIVEN) and key not in ("data.val_from", "data.val_fraction")
    ]
    if unread:
        raise ConfigError(
            f"settings: {', '.join(unread)} would not be read: compress() is given the network, "
            "the loaders and the functions (forward=, loss=, metric=, ...) themselves. Leave them "
            "out, or write a study file that names all of them."
        )


def _fingerprint(train: Loader, val: Loader, test: Loader, functions: Mapping[str, Any]) -> str:
    """Identifies data and functions that came from Python, as far as can be told.

    It covers the number of batches, all labels that can be read cheaply, the first batch of
    validation and test data (training batches are shuffled and augmented), and the functions'
    source with what it is bound to.
    """
    digest = hashlib.sha256()
    for loader in (train, val, test):
        digest.update(f"{len(loader)}/".encode())
        labels = labels_of(loader.dataset) if isinstance(loader, DataLoader) else None
        if labels is not None:
            digest.update(labels.tobytes())
    for loader in (val, test):
        for value in tensors_in(next(iter(loader), ())):
            plain = value.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    digest.update(functions_text(functions).encode())
    return digest.hexdigest()[:16]
