"""A network by name, trained by its recipe apart from any study: `models train`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autocompress import __version__
from autocompress.baseline import kept_baseline, train_baseline
from autocompress.config import StudyConfig, parse_config
from autocompress.data import Data, load_data
from autocompress.evaluation import evaluate
from autocompress.loaders import loader_labels
from autocompress.models import portable_state
from autocompress.progress import Display
from autocompress.recipes import BaselineRecipe, describe, recipe_for, recipe_of
from autocompress.sources import task_from_config
from autocompress.task import Task, check_outputs
from autocompress.training import FitResult, fastest_precision
from autocompress.weights import write_weights


@dataclass(frozen=True)
class Pretrained:
    """A network that `pretrain` made.

    Attributes:
        task: The network with its data.
        config: What a study must say to find these weights in the cache.
        recipe: How it was trained.
        fit: What the training did; None where the weights were in the cache.
        val_accuracy: On validation data, %.
        test_accuracy: On test data, %.
    """

    task: Task
    config: StudyConfig
    recipe: BaselineRecipe
    fit: FitResult | None
    val_accuracy: float
    test_accuracy: float

    def facts(self) -> dict[str, str]:
        """What a file of the weights says about them; JSON where it isn't text."""
        model, data = self.config.model, self.config.data
        return {
            "network": model.source,
            "arguments": json.dumps(model.arguments),
            "data": json.dumps(data.model_dump(mode="json", exclude_none=True)),
            "normalization": json.dumps(self.task.normalization),
            "recipe": json.dumps(asdict(self.recipe)),
            "precision": _precision(self.task),
            "seed": str(self.config.seed),
            "val_accuracy": f"{self.val_accuracy:.4f}",
            "test_accuracy": f"{self.test_accuracy:.4f}",
            "versions": json.dumps(
                {
                    "autocompress": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
            ),
        }

    def write(self, path: Path) -> None:
        """Write the weights as safetensors, with `facts` as metadata."""
        write_weights(path, portable_state(self.task.model), self.facts())

    def study_lines(self) -> str:
        """The sections of a study file that find these weights in the cache."""
        sections = {
            "model": self.config.model.model_dump(exclude_defaults=True),
            "data": self.config.data.model_dump(mode="json", exclude_defaults=True),
            "baseline": self.config.baseline.model_dump(exclude_defaults=True),
        }
        lines = [f"seed = {self.config.seed}"]
        for name, fields in sections.items():
            lines.append(f"[{name}]")
            lines += [f"{key} = {_toml(value)}" for key, value in fields.items()]
        return "\n".join(lines)


def settings_of(
    network: str,
    data: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    classes: int | None = None,
    short: bool = False,
    **fields: Any,
) -> StudyConfig:
    """The settings of a study whose baseline is this network, trained by its recipe.

    Args:
        network: A name in the zoo, or "torchvision:NAME" and so on, as `model.source`.
        data: As `data.source`.
        arguments: Of the network. What isn't among them is taken from the data: the number of
            classes and, where it isn't three, that of the images' channels.
        classes: Number of classes; None for that of the data.
        short: Whether to train by the short form.
        **fields: Other fields, as `data__root` for `data.root`; None for the default, which for
            `data.augment` and `data.batch_size` is the recipe's.

    Raises:
        ConfigError: If something is wrong, or the data is not there.
    """
    source = network if ":" in network else f"zoo:{network}"
    recipe = recipe_for(source, data)
    given = {key.replace("__", "."): value for key, value in fields.items() if value is not None}
    if "data.root" in given:
        given["data.root"] = str(Path(given["data.root"]).expanduser().absolute())
    config = parse_config(
        {
            "name": "pretrained",
            "model.source": source,
            "data.source": _absolute(data, given.get("data.root")),
            "data.augment": recipe.augment,
            "data.batch_size": recipe.batch_size,
            "baseline.recipe": "short" if short else "full",
            **given,
        }
    )
    own = dict(arguments or {})
    kind = source.partition(":")[0]
    if kind in _CHANNELS and not {"num_classes", _CHANNELS[kind]} <= own.keys():
        found = load_data(config.data, config.seed)
        own.setdefault("num_classes", classes or _classes(found))
        channels = found.input_shape[0]
        # Study files leave three channels out, and the cache knows networks by their arguments.
        if channels not in (0, 3) and kind != "torchvision":
            own.setdefault(_CHANNELS[kind], channels)
    model = config.model.model_copy(update={"arguments": own})
    return config.model_copy(update={"model": model})


# Which argument of a library's networks is the number of the images' channels.
_CHANNELS = {"zoo": "in_channels", "timm": "in_chans", "torchvision": ""}


def pretrain(config: StudyConfig, display: Display, folder: Path | None = None) -> Pretrained:
    """Train a network by its recipe, or take it from the cache that studies share.

    Args:
        config: What `settings_of` made.
        display: Told about the progress.
        folder: Where modules of the user's are looked for.

    Raises:
        ConfigError: If network, data or device don't exist or don't fit each other.
    """
    task = task_from_config(config, folder)
    check_outputs(task)
    recipe = recipe_of(config, given=config.model.weights is not None)
    kept = kept_baseline(task, recipe, config.seed)
    if kept is None or not kept.exists():
        task.amp_dtype = fastest_precision(task)
        display.say(f"Training in {_precision(task)}: {describe(recipe)}.")
    result = train_baseline(task, recipe, config.seed, display)
    task.model.to(task.device).eval()
    val = evaluate(task.model, task, task.val)
    test = evaluate(task.model, task, task.test)
    return Pretrained(task, config, recipe, result, val.score, test.score)


def _precision(task: Task) -> str:
    """The name of the type that most of a training step is computed in."""
    return str(task.amp_dtype or torch.float32).removeprefix("torch.")


def _absolute(data: str, root: str | None) -> str:
    """A source whose path doesn't depend on the current folder; with a root it is as it is."""
    kind, _, place = data.partition(":")
    if root is not None or kind not in ("folder", "array"):
        return data
    # Links stay: their names may tell the data set.
    return f"{kind}:{Path(place).expanduser().absolute()}"


def _classes(data: Data) -> int:
    """How many classes the data has: their names, or the largest label."""
    if data.classes:
        return len(data.classes)
    labels = [loader_labels(loader) for loader in (data.train, data.val, data.test)]
    found = [int(part.max()) + 1 for part in labels if part is not None and len(part)]
    return max(found, default=10)


def _toml(value: Any) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)
