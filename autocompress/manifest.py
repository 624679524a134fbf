"""What a saved network says of itself in `model.json`: its origin, its inputs and its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autocompress import __version__
from autocompress.errors import ConfigError

SCHEMA_VERSION = 1
CLASSIFICATION = "classification"


@dataclass(frozen=True)
class Manifest:
    """What `model.json` says about a saved network.

    Attributes:
        origin: `{"source": "zoo:resnet20", "arguments": {...}}`, from which the untrained network
            is built again; None for a network that came from Python.
        classes: Class names in the order of the outputs, as far as known.
        inputs: Shape of each input for one image, batch included.
        dtypes: Type of each input: "float32", "uint8"; empty where an earlier version wrote it.
        normalization: `{"mean": [...], "std": [...]}` that the images must have, as far as known.
        versions: Versions of autocompress and torch that wrote the folder, and of the library that
            the network is from.
        image: How an image becomes the input: `{"mode": "RGB", "resize": 256, "crop": [224, 224]}`,
            the mode as Pillow names it, the length of the shorter side, height and width of the
            middle that is cut out. None where only the user's loaders know.
        task: `{"kind": "classification", "metric": {...}}`: the kind is None for other tasks, the
            metric a `Scale` as plain values. None where nothing is known.
    """

    origin: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ()
    normalization: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    image: Mapping[str, Any] | None = None
    task: Mapping[str, Any] | None = None
    dtypes: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits, one for each class."""
        return self.task is not None and self.task.get("kind") == CLASSIFICATION

    def to_dict(self) -> dict[str, Any]:
        """The content of `model.json`."""
        return {"version": SCHEMA_VERSION, **asdict(self)}

    def notes(self) -> dict[str, str]:
        """What of it an exported file says of itself: JSON by name, without what is not known."""
        known = {
            "classes": list(self.classes),
            "normalization": self.normalization,
            "image": self.image,
            "task": self.task,
        }
        return {name: json.dumps(value) for name, value in known.items() if value}


def dtype_name(value: Any) -> str:
    """The name of a tensor's type, without its library's."""
    return str(value.dtype).removeprefix("torch.")


def read_manifest(folder: str | Path) -> Manifest:
    """Classes, input shapes, normalization and origin of a saved network.

    Raises:
        ConfigError: If `folder` is no saved network, or one of a newer autocompress.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"There is no folder {place}; give one that save_model or a study wrote.")
    path = place / "model.json"
    try:
        data = json.loads(read_text(path))
        if data["version"] != SCHEMA_VERSION:
            raise ConfigError(
                f"{path} has version {data['version']}, this autocompress {__version__} reads "
                f"{SCHEMA_VERSION}; use the version that wrote it: {data.get('versions')}."
            )
        return Manifest(
            origin=data["origin"],
            classes=tuple(data["classes"]),
            inputs=tuple(tuple(shape) for shape in data["inputs"]),
            normalization=data["normalization"],
            versions=data["versions"],
            image=data.get("image"),
            task=data.get("task"),
            dtypes=tuple(data.get("dtypes", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); export the network again.") from error


def read_text(path: Path) -> str:
    """The text of a file of a saved network.

    Raises:
        ConfigError: If it is not there.
    """
    return existing(path).read_text(encoding="utf-8")


def existing(path: Path) -> Path:
    """The path itself, of a file that must be there.

    Raises:
        ConfigError: If it is not.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path.parent} has no {path.name}, so it is no complete saved network; export it "
            "again."
        )
    return path
