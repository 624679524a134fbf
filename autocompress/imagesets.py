"""What a source of images hands over: arrays, or images that are still encoded.

Classes are numbered here, and chosen from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autocompress.errors import ConfigError
from autocompress.loaders import Labels

Pixels = NDArray[np.uint8]

T = TypeVar("T")

_FEW = 20
"""So many names an error lists."""


@dataclass(frozen=True)
class Split:
    """Images `n x c x h x w` and their labels."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class Part:
    """Images that are still encoded.

    Attributes:
        read: Gives the image at a position.
        labels: All labels.
        contents: Tells the images apart wherever they lie.
        listing: Also by place and time.
        name: What the image at a position is called in messages.
    """

    read: Callable[[int], Image.Image]
    labels: Labels
    contents: str
    listing: str
    name: Callable[[int], str]


@dataclass(frozen=True)
class Arrays:
    """Decoded images; `val` is None where it has to be cut off."""

    name: str
    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """Images that are still encoded; `val` is None where it has to be cut off."""

    name: str
    train: Part
    val: Part | None
    test: Part
    classes: tuple[str, ...]


def texts(names: Iterable[object]) -> tuple[str, ...]:
    """Class names as texts; ImageNet gives tuples of synonyms."""
    return tuple(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)


def numbered(
    name: str, splits: Sequence[Split | None], names: Sequence[object] | None = None
) -> Arrays:
    """Splits whose labels are 0 to the number of classes - 1.

    Args:
        name: Of the data set.
        splits: Training, validation (or None) and test data.
        names: Of the classes; None to number the labels that are there.

    Raises:
        ConfigError: If a label is negative, has no name, or is in no training image.
    """
    train, val, test = splits
    assert train is not None and test is not None
    for role, part in (("train", train), ("val", val), ("test", test)):
        if part is not None:
            _check_labels(name, role, part.labels, names, train.labels)
    if names is not None:
        return Arrays(name, train, val, test, texts(names))
    present = np.unique(train.labels)
    if present[-1] < 2 * len(present):
        # Classes that happen to be absent keep their output, as the network numbers them.
        present = np.arange(present[-1] + 1)

    def number(part: Split) -> Split:
        return Split(part.pixels, np.searchsorted(present, part.labels).astype(np.int64))

    return Arrays(
        name,
        number(train),
        None if val is None else number(val),
        number(test),
        tuple(str(label) for label in present),
    )


def _check_labels(
    name: str, role: str, labels: Labels, names: Sequence[object] | None, learned: Labels
) -> None:
    """Refuse labels that no class has, or no training image."""
    rule = "labels are whole numbers from 0"
    wrong = labels < 0
    if names is not None:
        wrong |= labels >= len(names)
        rule = f"it names {len(names)} classes, so labels must be 0 to {len(names) - 1}"
    if wrong.any():
        index = int(wrong.argmax())
        raise ConfigError(
            f"The label of image {index} of the {role} data of '{name}' is {labels[index]}; {rule}."
        )
    unlearned = ~np.isin(labels, learned)
    if unlearned.any():
        index = int(unlearned.argmax())
        raise ConfigError(
            f"The label of image {index} of the {role} data of '{name}' is {labels[index]}, which "
            "no training image has, so nothing can learn it. Check how labels are numbered, or "
            "leave those images out."
        )


def positions(
    wanted: Sequence[str], names: Sequence[str], synonyms: Mapping[str, int] | None = None
) -> list[int]:
    """Which classes `data.classes` names.

    Args:
        wanted: The setting.
        names: All classes.
        synonyms: Further names of classes, and where these are among `names`.

    Raises:
        ConfigError: If there is no such class, or one is named twice.
    """
    known = {**(synonyms or {}), **{name: index for index, name in enumerate(names)}}
    found: list[int] = []
    for word in wanted:
        if word not in known:
            near = get_close_matches(word, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            raise ConfigError(
                f"data.classes: there is no class '{word}'.{hint} Known: "
                f"{', '.join(names[:_FEW])}{more}."
            )
        if known[word] in found:
            raise ConfigError(
                f"data.classes names the class '{names[known[word]]}' twice; name each once."
            )
        found.append(known[word])
    return found


def only(
    found: Arrays | Encoded, wanted: Sequence[str], synonyms: Mapping[str, int] | None = None
) -> Arrays | Encoded:
    """The images of some classes, which are numbered in the order in which they are named.

    Raises:
        ConfigError: As `positions`, or if no training image is of one.
    """
    chosen = positions(wanted, found.classes, synonyms)
    classes = tuple(found.classes[index] for index in chosen)
    number = np.full(len(found.classes), -1, np.int64)
    number[chosen] = np.arange(len(chosen))
    absent = set(range(len(chosen))) - set(number[found.train.labels].tolist())
    if absent:
        raise ConfigError(f"data.classes: no training image is of '{classes[min(absent)]}'.")
    if isinstance(found, Arrays):
        return Arrays(
            found.name,
            _split_of(found.train, number),
            None if found.val is None else _split_of(found.val, number),
            _split_of(found.test, number),
            classes,
        )
    return Encoded(
        found.name,
        _part_of(found.train, number),
        None if found.val is None else _part_of(found.val, number),
        _part_of(found.test, number),
        classes,
    )


def _split_of(split: Split, number: Labels) -> Split:
    kept = number[split.labels] >= 0
    return Split(np.ascontiguousarray(split.pixels[kept]), number[split.labels[kept]])


def _part_of(part: Part, number: Labels) -> Part:
    kept = np.flatnonzero(number[part.labels] >= 0)
    which = f"classes {np.flatnonzero(number >= 0).tolist()}"
    return replace(
        part,
        read=_Chosen(part.read, kept),
        labels=number[part.labels[kept]],
        contents=f"{part.contents} {which}",
        listing=f"{part.listing} {which}",
        name=_Chosen(part.name, kept),
    )


@dataclass(frozen=True)
class _Chosen(Generic[T]):
    """`of` at some positions; processes that decode images get a copy, which a lambda has not."""

    of: Callable[[int], T]
    indices: Labels

    def __call__(self, index: int) -> T:
        return self.of(int(self.indices[index]))
