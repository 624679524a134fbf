"""From Python: the same study as from the command line, for a network and loaders in hand."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.conductor import Outcome, run_study
from autocompress.config import StudyConfig, load_config, parse_config
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import cut_validation, unaugmented
from autocompress.models import build_model, check_model
from autocompress.progress import Display, NullDisplay, make_display
from autocompress.store import state_digest
from autocompress.task import Loader, Task


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
    check_model(config.model.source, folder)
    data = load_data(config.data, config.seed, device, folder)
    torch.manual_seed(config.seed)
    model = build_model(config.model.source, config.model.arguments, config.model.weights, folder)
    return Task(
        model=model,
        train=data.train,
        val=data.val,
        test=data.test,
        calibration=unaugmented(data.train),
        classes=data.classes,
        origin={"source": config.model.source, "arguments": dict(config.model.arguments)},
        fingerprint=data.fingerprint,
        normalization=data.normalization,
        val_seen=data.val_from == "train" and config.model.weights is not None,
        device=device,
    )


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
            `settings={"data.val_from": "test"}`: the drop on images that it knows is larger.
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
            `optimizer` and `scheduler`; see `autocompress.Task`.

    Returns:
        The compressed network, its plan, and the study's summary and folder.

    Raises:
        ConfigError: If an argument is wrong; before any work is spent.
        StudyMismatch: If the folder holds a study that was made with other settings.

    Example:
        >>> outcome = autocompress.compress(model, train, test, delta=1.0)  # doctest: +SKIP
        >>> outcome.model, outcome.summary["best"]["test_drop"]  # doctest: +SKIP
    """
    known = {"forward", "loss", "metric", "distillation", "optimizer", "scheduler"}
    unknown = sorted(functions.keys() - known)
    if unknown:
        raise ConfigError(f"compress() takes no {unknown[0]!r}. Known: {', '.join(sorted(known))}.")
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
    device = pick_device(config.run.device)
    val_seen = val is None and config.data.val_from == "train"
    if val is None:
        train, val, test = cut_validation(
            train,
            test,
            fraction=config.data.val_fraction,
            source=config.data.val_from,
            seed=seed,
        )
    own = deepcopy(model).cpu()
    task = Task(
        model=own,
        train=train,
        val=val,
        test=test,
        calibration=unaugmented(train),
        val_seen=val_seen,
        fingerprint=_fingerprint(own, train, val, functions),
        device=device,
    )
    task = replace(task, **functions)
    shown = make_display() if display is True else (display or NullDisplay())
    with shown:
        return run_study(config, task, shown, command="autocompress.compress(...)")


def run(
    path: str | Path | None, overrides: Mapping[str, Any], display: Display, command: str = ""
) -> Outcome:
    """Run a study file, or the quickstart for None."""
    config = load_config(path, overrides)
    folder = Path(path).resolve().parent if path is not None else None
    return run_study(config, task_from_config(config, folder), display, command)


def _fingerprint(model: nn.Module, train: Loader, val: Loader, functions: Mapping[str, Any]) -> str:
    """Identifies what came from Python: weights, one batch and the functions' source."""
    digest = hashlib.sha256(state_digest(model.state_dict()).encode())
    digest.update(f"{len(train)}/{len(val)}".encode())
    batch = next(iter(val), None)
    if isinstance(batch, (tuple, list)) and isinstance(batch[0], Tensor):
        digest.update(batch[0].detach().cpu().contiguous().numpy().tobytes())
    for key in sorted(functions):
        try:
            digest.update(inspect.getsource(functions[key]).encode())
        except (OSError, TypeError):
            digest.update(repr(type(functions[key])).encode())
    return digest.hexdigest()[:16]
