"""What the smaller network got worse at: by class, and the images that it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autocompress.batch import Batch

MOST_IMAGES = 12
"""Images of which a report shows that they were lost."""


class Predictions:
    """Watches an evaluation of a classifier and keeps what it said of each image.

    Of outputs that are no logits `n x classes`, or labels that are no whole numbers, it keeps
    nothing.

    Args:
        before: What the baseline said of the same images in the same order; images that it got
            right and this network gets wrong are kept, at most `MOST_IMAGES`, those first of
            whose class the network has become least sure.
    """

    def __init__(self, before: Predictions | None = None) -> None:
        self.lost: list[_Lost] = []
        self._before = before
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def __call__(self, output: Any, batch: Batch) -> None:
        """Look at a batch's logits and labels."""
        labels = _labels_of(output, batch)
        if labels is None:
            return
        chances = output.detach().float().softmax(dim=1).cpu()
        labels = labels.cpu()
        if self._before is not None:
            self._keep_lost(chances, labels, batch[0])
        self._parts.append((labels, chances.argmax(dim=1), _of(chances, labels)))
        self._count += len(labels)

    @property
    def labels(self) -> Tensor:
        """The labels, `n`; empty where nothing could be kept."""
        return self._column(0)

    @property
    def guesses(self) -> Tensor:
        """The class that the network takes each image for, `n`."""
        return self._column(1)

    @property
    def chances(self) -> Tensor:
        """The probability that the network gives to each image's label, `n`."""
        return self._column(2)

    def _column(self, index: int) -> Tensor:
        return torch.cat([part[index] for part in self._parts]) if self._parts else torch.empty(0)

    def _keep_lost(self, chances: Tensor, labels: Tensor, images: Any) -> None:
        before = self._before
        assert before is not None
        place = slice(self._count, self._count + len(labels))
        theirs, guesses = before.guesses[place], chances.argmax(dim=1)
        if len(theirs) != len(labels) or not _are_images(images):
            return
        gaps = before.chances[place] - _of(chances, labels)
        lost = ((theirs == labels) & (guesses != labels)).nonzero()[:, 0].tolist()
        sure = _of(chances, guesses)
        for index in sorted(lost, key=lambda i: -float(gaps[i]))[:MOST_IMAGES]:
            self.lost.append(
                _Lost(
                    index=self._count + index,
                    gap=float(gaps[index]),
                    label=int(labels[index]),
                    sure_before=float(before.chances[place][index]),
                    guess=int(guesses[index]),
                    sure_after=float(sure[index]),
                    image=images[index].detach().cpu().clone(),
                )
            )
        self.lost = sorted(self.lost, key=lambda one: -one.gap)[:MOST_IMAGES]


@dataclass(frozen=True)
class _Lost:
    index: int
    gap: float
    label: int
    sure_before: float
    guess: int
    sure_after: float
    image: Tensor


def class_changes(
    before: Predictions, after: Predictions, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """What became of each class.

    Args:
        before: What the baseline said.
        after: What the compressed network said of the same images.
        classes: Names in the order of the outputs, as far as known.

    Returns:
        For each class of which there are images, the one that lost most first: its "name"; how many
        "images"; accuracies "before" and "after", in percent; how many images were "lost" (right
        before, wrong now) and "won". Empty for what is no classifier.
    """
    labels = after.labels
    if not len(labels) or len(labels) != len(before.labels):
        return []
    was, now = before.guesses == labels, after.guesses == labels
    rows = []
    for label in sorted(set(labels.tolist())):
        own = labels == label
        rows.append(
            {
                "name": _name(label, classes),
                "images": int(own.sum()),
                "before": 100 * float(was[own].float().mean()),
                "after": 100 * float(now[own].float().mean()),
                "lost": int((own & was & ~now).sum()),
                "won": int((own & ~was & now).sum()),
            }
        )
    return sorted(rows, key=lambda row: (row["after"] - row["before"], -row["lost"]))


def write_lost_images(
    after: Predictions,
    folder: Path,
    classes: Sequence[str],
    normalization: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Write the lost images as PNG files.

    Args:
        after: What the compressed network said.
        folder: For the files; it is made, and those of an earlier call are removed.
        classes: Names in the order of the outputs, as far as known.
        normalization: `{"mean": [...], "std": [...]}` that the images have; None where that is not
            known, and their least and largest values become black and white.

    Returns:
        For each image, the worst first: "file", its "index" in the test data, its "label", how sure
        the baseline was of that ("sure_before", 0 to 1), what the compressed network took it for
        ("guess"), and how sure it was ("sure_after").
    """
    for old in folder.glob("*.png"):
        old.unlink()
    rows = []
    for number, one in enumerate(after.lost):
        path = folder / f"{number:02d}.png"
        folder.mkdir(parents=True, exist_ok=True)
        _picture(one.image, normalization).save(path, optimize=True)
        rows.append(
            {
                "file": f"{folder.name}/{path.name}",
                "index": one.index,
                "label": _name(one.label, classes),
                "sure_before": one.sure_before,
                "guess": _name(one.guess, classes),
                "sure_after": one.sure_after,
            }
        )
    return rows


def _labels_of(output: Any, batch: Batch) -> Tensor | None:
    """The labels of a batch, if it is one of a classifier."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        return None
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        return None
    labels = labels.long()
    fits = len(labels) == len(output) and 0 <= int(labels.min()) <= int(labels.max())
    return labels if fits and int(labels.max()) < output.shape[1] else None


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] in (1, 3)


def _of(chances: Tensor, classes: Tensor) -> Tensor:
    """The probability of one class for each image."""
    return chances.gather(1, classes[:, None])[:, 0]


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label < len(classes) else str(label)


def _picture(image: Tensor, normalization: Mapping[str, Any] | None) -> Image.Image:
    """A normalized image, `channels x height x width`, as it looked before."""
    pixels = image.float()
    if normalization is not None:
        mean, std = (torch.tensor(normalization[key]).view(-1, 1, 1) for key in ("mean", "std"))
        pixels = pixels * std + mean
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    values = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).numpy()
    return Image.fromarray(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1))
