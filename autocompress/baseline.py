"""The baseline: the user's trained network, or one trained here once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from autocompress.cache import keep
from autocompress.checkpoint import Checkpoint
from autocompress.config import cache_folder
from autocompress.errors import ConfigError
from autocompress.evaluation import Evaluation
from autocompress.loaders import loader_labels
from autocompress.models import load_state, portable_state
from autocompress.profiler import Profile
from autocompress.progress import Display
from autocompress.recipes import BaselineRecipe, follow
from autocompress.task import Task, correct
from autocompress.training import FitResult, fit
from autocompress.weights import state_digest, write_weights


@dataclass(frozen=True)
class Baseline:
    """What every trial is measured against.

    Attributes:
        model: The trained network, on the task's device, in evaluation mode.
        val: Its scores on the validation data.
        profile: Its costs.
        digest: Identifies its weights.
    """

    model: nn.Module
    val: Evaluation
    profile: Profile
    digest: str


def check_better_than_guessing(task: Task, val: Evaluation) -> None:
    """Refuse a baseline that does no better than always naming the most frequent class.

    Nothing can be lost by compressing it, so every result would look like a success. Where another
    metric than accuracy is used, or labels can't be read cheaply, nothing is checked.

    Raises:
        ConfigError: If so.
    """
    labels = loader_labels(task.val) if task.metric is correct else None
    if labels is None or len(labels) != val.size:
        return
    share = np.bincount(labels).max() / len(labels)
    noise = 2 * (share * (1 - share) / len(labels)) ** 0.5
    if val.score <= 100 * (share + noise):
        raise ConfigError(
            f"The network is right on {val.score:.2f} % of {len(labels)} validation images, no "
            f"better than always naming the most frequent class ({100 * share:.2f} %). Check its "
            "weights, the order of the classes and data.mean and data.std, or train it "
            "(baseline.epochs)."
        )


def train_baseline(
    task: Task, recipe: BaselineRecipe, seed: int, display: Display
) -> FitResult | None:
    """Train the task's network in place, or load what the same recipe trained before.

    The trained weights are kept under what they follow from (see `kept_baseline`), so that nothing
    is trained twice. A run that is interrupted goes on from its last checkpoint there.

    Args:
        task: The network and the data.
        recipe: How it is trained.
        seed: Fixes the order of the data.
        display: Told about the progress.

    Returns:
        What the training did; None if there was none.

    Raises:
        ConfigError: If the recipe asks for something that a function of the user's can't do.
        TrainingDiverged: If the loss stops being finite.
    """
    if recipe.epochs <= 0:
        return None
    task = follow(task, recipe)
    path = kept_baseline(task, recipe, seed)
    if path is not None and path.exists():
        load_state(task.model, load_file(path))
        display.say(f"The baseline was trained before: {path}")
        return None

    def on_step(done: float, total: float, loss: float) -> None:
        display.step("train", done, total, f"loss {loss:.3f}")

    display.stage("baseline", 1)
    result = fit(
        task.model,
        task,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        seed=seed,
        on_step=on_step,
        checkpoint=None if path is None else Checkpoint.in_file(_state_of(path)),
    )
    display.say(
        f"Trained the baseline for {recipe.epochs:g} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s)."
    )
    if path is not None and keep(path, partial(write_weights, state=portable_state(task.model))):
        _state_of(path).unlink(missing_ok=True)
    return result


def kept_baseline(task: Task, recipe: BaselineRecipe, seed: int) -> Path | None:
    """Where the weights that a recipe makes of the task's untrained network are kept.

    The file's name is made of the network and its initial weights, the data, the recipe's numbers
    and the seed. A network or data that came from Python have no complete fingerprint: None.
    """
    if task.origin is None or not task.fingerprint:
        return None
    facts = {
        "origin": task.origin,
        "weights": state_digest(task.model.state_dict()),
        "data": task.fingerprint,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "seed": seed,
    }
    # Left out where they are as always, for the sake of what was kept before there was a choice.
    for name in ("weight_decay", "label_smoothing", "warm_up"):
        if getattr(recipe, name) != getattr(BaselineRecipe, name):
            facts[name] = getattr(recipe, name)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "baselines" / f"{digest[:16]}.safetensors"


def _state_of(path: Path) -> Path:
    """The checkpoint of the run that will make a file of weights."""
    return path.with_suffix(".checkpoint")
