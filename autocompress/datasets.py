"""Data sets that a library knows by name: scikit-learn's digits and torchvision's."""

from __future__ import annotations

import gzip
import inspect
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from autocompress.archives import as_nchw
from autocompress.config import DataConfig, cache_folder
from autocompress.decoding import decoded
from autocompress.errors import ConfigError
from autocompress.imagesets import Arrays, Encoded, Part, Pixels, Split, numbered, only, texts
from autocompress.loaders import Labels, labels_of, stratified_split

_IDX_NAMES = frozenset({"MNIST", "FashionMNIST", "KMNIST"})
# Debian's package dataset-fashion-mnist.
_INSTALLED = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}


def open_digits() -> Arrays:
    """scikit-learn's digits: 1,797 grey images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    # The same test images whatever the study's seed, so that studies can be compared.
    rest, chosen = stratified_split(labels, 0.2, 0)
    train = Split(pixels[rest], labels[rest])
    test = Split(pixels[chosen], labels[chosen])
    return Arrays("digits", train, None, test, tuple("0123456789"))


def open_torchvision(name: str, root: Path | None, config: DataConfig) -> Arrays | Encoded:
    """A data set of torchvision's, downloaded where it is not there.

    Args:
        name: Its class in torchvision.datasets.
        root: Where its files are; None for where the system has it installed, or the cache.
        config: The study file's section.

    Raises:
        ConfigError: If there is no such data set, it is not there and can't be downloaded, or it is
            not for classification.
    """
    from torchvision import datasets

    if name not in datasets.__all__:
        near = get_close_matches(name, datasets.__all__, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(
            f"data.source = 'torchvision:{name}': torchvision.datasets has no '{name}'.{hint}"
        )
    dataset_class = getattr(datasets, name)
    found, synonyms = _found(dataset_class, name, root)
    if config.classes is not None:
        found = only(found, config.classes, synonyms)
    return decoded(found, config.image_size) if isinstance(found, Encoded) else found


def _found(
    dataset_class: Any, name: str, root: Path | None
) -> tuple[Arrays | Encoded, dict[str, int]]:
    """All images of a data set, and further names of its classes."""
    if root is None:
        installed = _INSTALLED.get(name)
        root = installed if installed and installed.is_dir() else cache_folder() / "data"
    if name in _IDX_NAMES and _idx_file(root, "train-images-idx3-ubyte") is not None:
        train, test = (
            Split(
                _read_idx(root, f"{part}-images-idx3-ubyte")[:, None],
                _read_idx(root, f"{part}-labels-idx1-ubyte").astype(np.int64),
            )
            for part in ("train", "t10k")
        )
        return Arrays(name, train, None, test, texts(dataset_class.classes)), {}
    opened = _open_splits(dataset_class, name, root)
    known_classes = getattr(opened[0], "classes", None)
    if all(isinstance(getattr(d, "data", None), (np.ndarray, Tensor)) for d in opened if d):
        splits = [None if d is None else _dataset_arrays(d) for d in opened]
        return numbered(name, splits, known_classes), {}
    parts: list[Part | None] = []
    for split, dataset in zip(("train", "val", "test"), opened, strict=True):
        if dataset is None:
            parts.append(None)
            continue
        labels = labels_of(dataset, believed=True)
        if labels is None:
            labels = _read_labels(dataset, name)
        contents = f"{name} {split} {len(dataset)}"
        listing = f"{root.resolve()} {contents}"
        named = partial(_item_name, f"{split} data of {name}")
        parts.append(Part(partial(_read_item, dataset, named), labels, contents, listing, named))
    train_part, val_part, test_part = parts
    assert train_part is not None and test_part is not None
    every = np.concatenate([p.labels for p in parts if p is not None])
    classes = texts(known_classes or range(int(every.max()) + 1))
    return Encoded(name, train_part, val_part, test_part, classes), _synonyms(opened[0])


def _synonyms(dataset: Any) -> dict[str, int]:
    """Further names of classes: synonyms, and wnids where a data set has these."""
    found: dict[str, int] = {}
    for index, names in enumerate(getattr(dataset, "classes", ())):
        if isinstance(names, tuple):
            found.update(dict.fromkeys(map(str, names), index))
    found.update({wnid: index for index, wnid in enumerate(getattr(dataset, "wnids", ()))})
    return found


def _item_name(where: str, index: int) -> str:
    return f"image {index} of the {where}"


def _read_item(dataset: Any, name: Callable[[int], str], index: int) -> Image.Image:
    try:
        image: Image.Image = dataset[index][0].convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name(index).capitalize()} can't be read: {error}.") from error
    return image


def _read_labels(dataset: Any, name: str) -> Labels:
    try:
        return np.array([int(dataset[index][1]) for index in range(len(dataset))], np.int64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.source = 'torchvision:{name}' is not for classification: its labels are no "
            "whole numbers."
        ) from error


def _open_splits(dataset_class: Any, name: str, root: Path) -> tuple[Any, Any, Any]:
    """A torchvision data set's training, validation (or None) and test data."""
    parameters = inspect.signature(dataset_class).parameters
    if name == "EMNIST":
        # Its `split` names an alphabet; training or test is chosen by `train`, as in MNIST.
        make = partial(dataset_class, split="balanced")
        return _open(make, name, root, train=True), None, _open(make, name, root, train=False)
    if "train" in parameters:
        train, test = (_open(dataset_class, name, root, train=flag) for flag in (True, False))
        return train, None, test
    if "split" not in parameters:
        raise ConfigError(
            f"data.source = 'torchvision:{name}' has no separate training and test data; write a "
            "function that returns loaders and give package.module:function."
        )

    def first(*splits: str) -> Any:
        for split in splits:
            try:
                return _open(dataset_class, name, root, split=split)
            except ValueError:
                continue
        return None

    train, val, test = first("train", "trainval"), first("val"), first("test")
    if train is None or (val is None and test is None):
        raise ConfigError(
            f"data.source = 'torchvision:{name}' has no training and test data by these names."
        )
    return (train, val, test) if test is not None else (train, None, val)


def _open(make: Callable[..., Any], name: str, root: Path, **choice: Any) -> Any:
    """A data set from local files, else downloaded.

    Raises:
        ValueError: If the data set has no such split.
        ConfigError: If it is not there and can't be downloaded.
    """
    try:
        return make(str(root), **choice)
    except (RuntimeError, OSError):
        pass
    except TypeError as error:
        raise ConfigError(
            f"data.source = 'torchvision:{name}' can't be opened by its folder and "
            f"{' and '.join(choice)} alone ({error}); give package.module:function."
        ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(str(root), download=True, **choice)
    except (RuntimeError, OSError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.source = 'torchvision:{name}': its files are not in {root} and can't be "
            f"downloaded ({reason}). Put them there as torchvision expects them, or set data.root."
        ) from error


def _dataset_arrays(dataset: Any) -> Split:
    pixels = as_nchw(np.asarray(dataset.data), "data")
    labels = labels_of(dataset, believed=True)
    if labels is None:
        raise ConfigError(f"{type(dataset).__name__} has no labels to learn.")
    return Split(pixels, labels)


def _idx_file(root: Path, name: str) -> Path | None:
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    return None


def _read_idx(root: Path, name: str) -> Pixels:
    """An array of bytes in the IDX format of the MNIST files, gzipped or not."""
    path = _idx_file(root, name)
    if path is None:
        raise ConfigError(f"There is no file {name}.gz in {root}; it belongs to the data set.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if zero != 0 or kind != 8:
            raise ValueError("not an array of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is no complete IDX file of bytes: {error}.") from error
