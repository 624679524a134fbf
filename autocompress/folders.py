"""Images in folders that are named after their classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autocompress.config import DataConfig
from autocompress.decoding import all_grey, decoded, file_name, read_file
from autocompress.errors import ConfigError
from autocompress.imagesets import Arrays, Encoded, Part, positions
from autocompress.loaders import Labels

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

LAYOUT = "Expected train/<class>/* and test/<class>/* (or val/<class>/*)."


class Listing(NamedTuple):
    """Image files of one part.

    Attributes:
        files: Their paths.
        labels: Their labels.
        contents: Names and sizes, as a text.
        lines: The same with times, and the place.
    """

    files: list[str]
    labels: Labels
    contents: str
    lines: str


def open_folder(path: Path, config: DataConfig) -> Arrays | Encoded:
    """A folder that holds train/<class>/*, test/<class>/* and perhaps val/<class>/*.

    Without test/, val/ is the test data.

    Raises:
        ConfigError: If it is of another form, or images can't be read.
    """
    source = f"folder:{path}"
    known = training_classes(path, source, LAYOUT)
    chosen = positions(config.classes, known) if config.classes else range(len(known))
    places = {name: path / name for name in ("val", "test") if (path / name).is_dir()}
    if not places:
        raise ConfigError(f"data.source = '{source}': no test data. {LAYOUT}")
    test = places.get("test", path / "val")
    val = places.get("val") if "test" in places else None
    classes = [known[index] for index in chosen]
    train, test_part = (in_class_folders(place, known, classes) for place in (path / "train", test))
    val_part = None if val is None else in_class_folders(val, known, classes)
    check_all_there(train, classes, path / "train", source)
    return decoded(encoded("folder", classes, train, val_part, test_part), config.image_size)


def training_classes(path: Path, source: str, layout: str) -> list[str]:
    """Names of the folders in train/, sorted.

    Args:
        path: The folder that holds train/.
        source: The setting, for messages.
        layout: What is expected, for messages.

    Raises:
        ConfigError: If there are none.
    """
    train = path / "train"
    if not train.is_dir():
        raise ConfigError(f"data.source = '{source}': no folder '{train}'. {layout}")
    classes = sorted(_class_folders(train))
    if not classes:
        raise ConfigError(f"data.source = '{source}': no classes in '{train}'. {layout}")
    return classes


def in_class_folders(place: Path, known: Sequence[str], classes: Sequence[str]) -> Listing:
    """The images of some classes in a folder of classes.

    Args:
        place: The folder.
        known: Names of all classes.
        classes: Those that are wanted, in the order of their labels.

    Raises:
        ConfigError: If it has folders of other classes, or no image.
    """
    unknown = sorted(_class_folders(place) - set(known))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ConfigError(
            f"'{place}' has folders that 'train' has not: {', '.join(unknown[:3])}{more}. Both "
            "must have one folder for each class, with the same names."
        )
    found = list_images(
        place,
        (
            (label, name, file)
            for label, name in enumerate(classes)
            for file in sorted(_image_files(place / name))
        ),
    )
    if not found.files:
        raise ConfigError(f"'{place}' has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it.")
    return found


def list_images(place: Path, images: Iterable[tuple[int, str, str]]) -> Listing:
    """A listing of image files.

    Args:
        place: The folder that they are in.
        images: Label, class and path of each.

    Raises:
        ConfigError: If one is not there, or empty.
    """
    files: list[str] = []
    labels: list[int] = []
    contents: list[str] = []
    lines: list[str] = [str(place.resolve())]
    for label, name, file in images:
        try:
            status = os.stat(file)
        except OSError as error:
            raise ConfigError(f"The image '{file}' is not there: {error.strerror}.") from error
        if not status.st_size:
            raise ConfigError(f"The image '{file}' is an empty file; mend or remove it.")
        files.append(file)
        labels.append(label)
        contents.append(f"{name}/{os.path.basename(file)} {status.st_size}")
        lines.append(f"{contents[-1]} {status.st_mtime_ns}")
    return Listing(files, np.array(labels, np.int64), "\n".join(contents), "\n".join(lines))


def check_all_there(train: Listing, classes: Sequence[str], place: Path, source: str) -> None:
    """Refuse training data without images of some class.

    Raises:
        ConfigError: If so.
    """
    absent = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if absent:
        names = ", ".join(classes[index] for index in absent[:3])
        raise ConfigError(
            f"data.source = '{source}': no images in '{place}' of {names}. Every class needs "
            "some; remove folders that are none."
        )


def encoded(
    name: str, classes: Sequence[str], train: Listing, val: Listing | None, test: Listing
) -> Encoded:
    """Image files, which are all read as grey or all as coloured ones."""
    files = [file for listing in (train, val, test) if listing for file in listing.files]
    mode = "L" if all_grey(files[:: max(1, len(files) // 64)]) else "RGB"

    def part(listing: Listing) -> Part:
        return Part(
            partial(read_file, listing.files, mode),
            listing.labels,
            listing.contents,
            listing.lines,
            partial(file_name, listing.files),
        )

    own = None if val is None else part(val)
    return Encoded(name, part(train), own, part(test), tuple(classes))


def _class_folders(place: Path) -> set[str]:
    """The folders in `place`, those aside that a program hid there (`.ipynb_checkpoints`)."""
    return {e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith(".")}


def _image_files(folder: Path | str) -> Iterator[str]:
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_files(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield entry.path
