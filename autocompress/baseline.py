"""The baseline: the user's trained network, or one trained here once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial

import numpy as np
from safetensors.torch import load_file
from torch import nn

from autocompress.cache import keep
from autocompress.config import BaselineConfig, cache_folder
from autocompress.errors import ConfigError
from autocompress.evaluation import Evaluation
from autocompress.loaders import loader_labels
from autocompress.models import load_state
from autocompress.profiler import Profile
from autocompress.progress import Display
from autocompress.task import Task, correct
from autocompress.training import fit
from autocompress.weights import portable_state, state_digest, write_weights


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
    task: Task, recipe: BaselineConfig, epochs: float, seed: int, display: Display
) -> None:
    """Train the task's network in place, or load what the same recipe trained before.

    The recipe's fingerprint is made of the initial weights, the data, the length, the learning rate
    and the seed; the trained weights are kept under it, so that nothing is trained twice. A network
    or data that came from Python have no complete fingerprint and are not kept there.
    """
    if epochs <= 0:
        return
    facts = {
        "origin": task.origin,
        "weights": state_digest(task.model.state_dict()),
        "data": task.fingerprint,
        "epochs": epochs,
        "learning_rate": recipe.learning_rate,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    path = cache_folder() / "baselines" / f"{digest[:16]}.safetensors"
    known = task.origin is not None and bool(task.fingerprint)
    if known and path.exists():
        load_state(task.model, load_file(path))
        display.say(f"The baseline was trained before: {path}")
        return

    def on_step(done: float, total: float, loss: float) -> None:
        display.step("train", done, total, f"loss {loss:.3f}")

    display.stage("baseline", 1)
    result = fit(
        task.model,
        task,
        epochs=epochs,
        learning_rate=recipe.learning_rate,
        seed=seed,
        on_step=on_step,
    )
    display.say(
        f"Trained the baseline for {epochs:g} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s)."
    )
    if known:
        keep(path, partial(write_weights, state=portable_state(task.model)))
