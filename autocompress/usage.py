"""What whoever runs a network must know of its task: how images become inputs, what comes out."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from autocompress.loaders import ArrayLoader, LazyImages
from autocompress.manifest import CLASSIFICATION
from autocompress.task import Task, call_on_images, correct

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for images of so many channels."""


def usage_of(task: Task) -> dict[str, Any]:
    """The arguments of `save_model` that tell how the network is used.

    Args:
        task: Network, data and functions.

    Returns:
        "classes", "normalization", "image" and "task", see `manifest.Manifest`.
    """
    return {
        "classes": list(task.classes),
        "normalization": None if task.normalization is None else dict(task.normalization),
        "image": _image(task),
        "task": {
            # With a metric of the user's own nobody knows what the outputs mean.
            "kind": CLASSIFICATION if task.metric is correct else None,
            "metric": task.scale.to_dict(),
        },
    }


def _image(task: Task) -> dict[str, Any] | None:
    """How our loaders make an input of an image; None where functions of the user's do."""
    if task.forward is not call_on_images:
        return None
    loader: Any = task.val
    if isinstance(loader, ArrayLoader):
        channels, height, width = loader.shape[1:]
        if channels not in MODES:
            return None
        crop = [height, width]
        return {"mode": MODES[channels], "resize": min(crop), "crop": crop}
    images = getattr(loader, "dataset", None)
    while isinstance(images, Subset):
        images = images.dataset
    if isinstance(images, LazyImages):
        return {"mode": "RGB", "resize": images.shorter_side, "crop": [images.size] * 2}
    return None
