"""Images by name: digits, torchvision's data sets, folders, array archives, or the user's loaders.

Data that fits into memory is decoded once to one uint8 array and served by `ArrayLoader`, which is
many times faster than decoding in every epoch; larger data goes through a DataLoader with workers.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Subset,
)

from autocompress.config import DataConfig, cache_folder
from autocompress.errors import ConfigError, did_you_mean
from autocompress.loaders import (
    ArrayLoader,
    Labels,
    LazyImages,
    cut_validation,
    given_loaders,
    labels_of,
    like,
    stratified_split,
    unaugmented,
)
from autocompress.models import IMAGENET_MEAN, IMAGENET_STD, load_function

if TYPE_CHECKING:
    from autocompress.task import Loader

Pixels = NDArray[np.uint8]

MEMORY_LIMIT = 4 * 2**30
"""Decoded images up to this many bytes are held in memory."""
_SHARE_OF_GPU = 0.25
"""Images are kept on the GPU if they take no more than this share of what is free there."""

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

# For images too many to hold in memory, where the study file gives no other.
_IMAGENET = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
_LAZY_SIZE = 224

_STATISTICS_IMAGES = 5_000
_FINGERPRINT_IMAGES = 64

_IDX_NAMES = frozenset({"MNIST", "FashionMNIST", "KMNIST"})
# Debian's package dataset-fashion-mnist.
_INSTALLED = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}

_SOURCES = ("digits", "torchvision", "folder", "array", "package.module")


@dataclass(frozen=True)
class Data:
    """Everything that a study reads images from.

    Attributes:
        train: Shuffled, augmented training batches.
        val: Validation batches, in a fixed mixed order.
        test: Test batches.
        classes: Class names; empty if unknown.
        fingerprint: Identifies images, labels, splits and augmentation.
        input_shape: Channels, height and width of an image.
        normalization: `{"mean": [...], "std": [...]}` per channel, of pixels scaled to 0..1; None
            for loaders of the user's.
        val_from: "train" or "test" where the validation data was cut from those, "" where it was
            given.
    """

    train: Loader
    val: Loader
    test: Loader
    classes: tuple[str, ...]
    fingerprint: str
    input_shape: tuple[int, int, int]
    normalization: Mapping[str, Any] | None = None
    val_from: str = ""


def load_data(
    config: DataConfig, seed: int, device: torch.device | str = "cpu", folder: Path | None = None
) -> Data:
    """Load the data that a study file names and cut off validation data where it has none.

    Args:
        config: The study file's section.
        seed: Fixes the split and the order.
        device: Where batches of data in memory are made.
        folder: Where modules of the user are looked for besides Python's path.

    Raises:
        ConfigError: If the data is not there, or not in the expected form.
    """
    kind, _, name = config.source.partition(":")
    root = Path(config.root).expanduser() if config.root is not None else None
    found: _Arrays | _Lazy
    if kind == "digits":
        found = _digits()
    elif kind == "torchvision":
        found = _torchvision(name, root, config)
    elif kind == "folder":
        found = _folder((root or Path()) / Path(name).expanduser(), config)
    elif kind == "array":
        found = _array((root or Path()) / Path(name).expanduser())
    else:
        return _user_loaders(config, seed, folder)
    if isinstance(found, _Lazy):
        return _lazy_data(found, config, seed, torch.device(device))
    return _array_data(found, config, seed, torch.device(device))


@dataclass(frozen=True)
class _Split:
    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class _Arrays:
    """Data in memory; `val` is None where it has to be cut from `train`."""

    name: str
    train: _Split
    val: _Split | None
    test: _Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """Images that are still encoded: how to read one, and all labels.

    `contents` tells them apart wherever they lie, `listing` also by place and time.
    """

    read: Callable[[int], Image.Image]
    labels: Labels
    contents: str
    listing: str


@dataclass(frozen=True)
class _Lazy:
    """Data too large for memory."""

    name: str
    train: _Part
    val: _Part | None
    test: _Part
    classes: tuple[str, ...]


def _array_data(found: _Arrays, config: DataConfig, seed: int, device: torch.device) -> Data:
    train, val, test = (_resized(part, config.image_size) for part in _parts(found))
    shapes = {part.pixels.shape[1:] for part in (train, val, test) if part is not None}
    if len(shapes) > 1:
        sizes = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
        raise ConfigError(
            f"The images of training, validation and test data differ in shape ({sizes}); set "
            "data.image_size."
        )
    assert train is not None and test is not None
    rest = None
    if val is None and config.val_from == "train":
        # The split below is the same; the statistics must not see validation images.
        rest, _ = stratified_split(train.labels, config.val_fraction, seed)
    keep_on = _place(device, sum(part.pixels.nbytes for part in (train, val, test) if part))
    channels, height, width = train.pixels.shape[1:]
    normalization = _given_normalization(config, channels) or _statistics(train.pixels, rest)

    def loader(part: _Split, training: bool) -> ArrayLoader:
        return ArrayLoader(
            torch.from_numpy(part.pixels),
            torch.from_numpy(part.labels),
            config.batch_size,
            normalization["mean"],
            normalization["std"],
            augment=config.augment if training else "none",
            shuffle=training,
            seed=seed,
            device=device,
            keep_on=keep_on,
        )

    learned: Loader = loader(train, True)
    unread: Loader = loader(test, False)
    if val is None:
        learned, chosen, unread = _cut(learned, unread, config, seed)
    else:
        # Mixed, for a part of the validation data must be like the whole.
        chosen = unaugmented(loader(val, False))
    digest = hashlib.sha256(_settings(found.name, config, seed, val is None))
    for part in (train, val, test):
        if part is not None:
            digest.update(str(part.pixels.shape).encode() + part.labels.tobytes())
            every = max(1, len(part.pixels) // _FINGERPRINT_IMAGES)
            digest.update(np.ascontiguousarray(part.pixels[::every]).tobytes())
    return Data(
        train=learned,
        val=chosen,
        test=unread,
        classes=found.classes,
        fingerprint=digest.hexdigest()[:16],
        input_shape=(channels, height, width),
        normalization=normalization,
        val_from=config.val_from if val is None else "",
    )


def _lazy_data(found: _Lazy, config: DataConfig, seed: int, device: torch.device) -> Data:
    size = config.image_size or _LAZY_SIZE
    workers = _workers()
    normalization = _given_normalization(config, 3) or _IMAGENET

    def loader(part: _Part, training: bool) -> DataLoader[Any]:
        augment = config.augment if training else "none"
        return DataLoader(
            LazyImages(part.read, part.labels, size, augment, normalization),
            batch_size=config.batch_size,
            shuffle=training,
            drop_last=training and len(part.labels) > config.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    train: Loader = loader(found.train, True)
    test: Loader = loader(found.test, False)
    if found.val is None:
        train, val, test = _cut(train, test, config, seed)
    else:
        whole = loader(found.val, False)
        order = np.random.default_rng(seed).permutation(len(found.val.labels))
        val = like(whole, Subset(whole.dataset, order.tolist()), False, False)
    digest = hashlib.sha256(_settings(found.name, config, seed, found.val is None))
    for part in (found.train, found.val, found.test):
        if part is not None:
            digest.update(part.contents.encode() + part.labels.tobytes())
    return Data(
        train=train,
        val=val,
        test=test,
        classes=found.classes,
        fingerprint=digest.hexdigest()[:16],
        input_shape=(3, size, size),
        normalization=normalization,
        val_from=config.val_from if found.val is None else "",
    )


def _cut(
    train: Loader, test: Loader, config: DataConfig, seed: int
) -> tuple[Loader, Loader, Loader]:
    return cut_validation(
        train, test, fraction=config.val_fraction, source=config.val_from, seed=seed
    )


def _place(device: torch.device, size: int) -> torch.device:
    """Where `size` bytes of images are kept: on the device, unless they crowd its memory."""
    if device.type == "cuda" and size > _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def _workers() -> int:
    """Processes that decode images."""
    return min(8, os.cpu_count() or 1)


def _settings(name: str, config: DataConfig, seed: int, split: bool) -> bytes:
    """What decides, besides the images, what a network is trained on."""
    cut: list[Any] | None = [config.val_fraction, seed] if split else None
    if cut is not None and config.val_from == "test":
        cut.append(config.val_from)
    facts: list[Any] = [name, config.image_size, config.augment, config.batch_size, cut]
    if config.mean is not None:
        facts += [config.mean, config.std]
    return json.dumps(facts).encode()


def _given_normalization(config: DataConfig, channels: int) -> dict[str, list[float]] | None:
    if config.mean is None or config.std is None:
        return None
    if len(config.mean) != channels:
        raise ConfigError(
            f"data.mean has {len(config.mean)} numbers, the images have {channels} channels; give "
            "one for each (a pretrained network of colour images needs colour images)."
        )
    return {"mean": list(config.mean), "std": list(config.std)}


def _parts(found: _Arrays) -> tuple[_Split | None, ...]:
    return found.train, found.val, found.test


def _statistics(pixels: Pixels, indices: Labels | None) -> dict[str, list[float]]:
    """Mean and standard deviation per channel, of pixels scaled to 0..1, over training images."""
    count = len(pixels) if indices is None else len(indices)
    chosen = np.arange(count)[:: max(1, count // _STATISTICS_IMAGES)]
    sample = pixels[chosen if indices is None else indices[chosen]]
    # A histogram is exact and needs no float copy of the images.
    grey = np.arange(256) / 255
    mean, std = [], []
    for channel in range(sample.shape[1]):
        weights = np.bincount(sample[:, channel].reshape(-1), minlength=256)
        middle = float(np.average(grey, weights=weights))
        mean.append(round(middle, 4))
        spread = float(np.average((grey - middle) ** 2, weights=weights)) ** 0.5
        std.append(round(max(spread, 1 / 255), 4))
    return {"mean": mean, "std": std}


def _resized(part: _Split | None, size: int | None) -> _Split | None:
    """`part` with its shorter side scaled to `size` and the middle cut out."""
    if part is None or size is None or part.pixels.shape[2:] == (size, size):
        return part
    height, width = part.pixels.shape[2:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    result = np.empty((len(part.pixels), part.pixels.shape[1], size, size), np.uint8)
    for start in range(0, len(result), 1024):
        chunk = torch.from_numpy(part.pixels[start : start + 1024]).float()
        scaled = F.interpolate(chunk, target, mode="bilinear", antialias=True, align_corners=False)
        scaled = scaled.round_().clamp_(0, 255).byte()
        result[start : start + 1024] = scaled[:, :, top : top + size, left : left + size].numpy()
    return _Split(result, part.labels)


def _digits() -> _Arrays:
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    # The same test images whatever the study's seed, so that studies can be compared.
    rest, chosen = stratified_split(labels, 0.2, 0)
    train = _Split(pixels[rest], labels[rest])
    test = _Split(pixels[chosen], labels[chosen])
    return _Arrays("digits", train, None, test, tuple("0123456789"))


def _torchvision(name: str, root: Path | None, config: DataConfig) -> _Arrays | _Lazy:
    from torchvision import datasets

    if name not in datasets.__all__:
        near = get_close_matches(name, datasets.__all__, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(
            f"data.source = 'torchvision:{name}': torchvision.datasets has no '{name}'.{hint}"
        )
    dataset_class = getattr(datasets, name)
    if root is None:
        installed = _INSTALLED.get(name)
        root = installed if installed and installed.is_dir() else cache_folder() / "data"
    if name in _IDX_NAMES and _idx_file(root, "train-images-idx3-ubyte") is not None:
        train, test = (
            _Split(
                _read_idx(root, f"{part}-images-idx3-ubyte")[:, None],
                _read_idx(root, f"{part}-labels-idx1-ubyte").astype(np.int64),
            )
            for part in ("train", "t10k")
        )
        return _Arrays(name, train, None, test, _texts(dataset_class.classes))
    opened = _open_splits(dataset_class, name, root)
    known_classes = getattr(opened[0], "classes", None)
    if all(isinstance(getattr(d, "data", None), (np.ndarray, Tensor)) for d in opened if d):
        splits = [None if d is None else _dataset_arrays(d) for d in opened]
        return _numbered(name, splits, known_classes)
    parts: list[_Part | None] = []
    for split, dataset in zip(("train", "val", "test"), opened, strict=True):
        if dataset is None:
            parts.append(None)
            continue
        labels = labels_of(dataset)
        if labels is None:
            labels = _read_labels(dataset, name)
        contents = f"{name} {split} {len(dataset)}"
        listing = f"{root.resolve()} {contents}"
        parts.append(_Part(partial(_read_item, dataset), labels, contents, listing))
    train_part, val_part, test_part = parts
    assert train_part is not None and test_part is not None
    every = np.concatenate([p.labels for p in parts if p is not None])
    classes = _texts(known_classes or range(int(every.max()) + 1))
    return _decoded(_Lazy(name, train_part, val_part, test_part, classes), config)


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


def _dataset_arrays(dataset: Any) -> _Split:
    pixels = _as_nchw(np.asarray(dataset.data), "data")
    labels = labels_of(dataset)
    if labels is None:
        raise ConfigError(f"{type(dataset).__name__} has no labels to learn.")
    return _Split(pixels, labels)


def _numbered(
    name: str, splits: Sequence[_Split | None], names: Sequence[Any] | None = None
) -> _Arrays:
    """Splits whose labels are 0 to the number of classes - 1."""
    train, val, test = splits
    assert train is not None and test is not None
    present = np.unique(np.concatenate([part.labels for part in splits if part is not None]))
    if names is not None:
        if present[0] < 0 or present[-1] >= len(names):
            raise ConfigError(
                f"The labels of '{name}' go from {present[0]} to {present[-1]}, but it names "
                f"{len(names)} classes; labels must be 0 to {len(names) - 1}."
            )
        return _Arrays(name, train, val, test, _texts(names))
    if present[0] >= 0 and present[-1] < 2 * len(present):
        # Classes that happen to be absent keep their output, as the network numbers them.
        present = np.arange(present[-1] + 1)

    def number(part: _Split) -> _Split:
        return _Split(part.pixels, np.searchsorted(present, part.labels).astype(np.int64))

    return _Arrays(
        name,
        number(train),
        None if val is None else number(val),
        number(test),
        tuple(str(label) for label in present),
    )


def _texts(names: Iterable[Any]) -> tuple[str, ...]:
    """Class names as texts; ImageNet gives tuples of synonyms."""
    return tuple(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)


def _folder(path: Path, config: DataConfig) -> _Arrays | _Lazy:
    layout = "Expected train/<class>/* and test/<class>/* (or val/<class>/*)."
    train = path / "train"
    if not train.is_dir():
        raise ConfigError(f"data.source = 'folder:{path}': no folder '{train}'. {layout}")
    classes = tuple(sorted(_class_folders(train)))
    if not classes:
        raise ConfigError(f"data.source = 'folder:{path}': no classes in '{train}'. {layout}")
    places = {name: path / name for name in ("val", "test") if (path / name).is_dir()}
    if not places:
        raise ConfigError(f"data.source = 'folder:{path}': no test data. {layout}")
    test = places.get("test", path / "val")
    val = places.get("val") if "test" in places else None
    found = {place: _list_images(place, classes) for place in (train, val, test) if place}
    absent = sorted(set(range(len(classes))) - set(found[train][1].tolist()))
    if absent:
        names = ", ".join(classes[index] for index in absent[:3])
        raise ConfigError(
            f"data.source = 'folder:{path}': no images in '{train}' of {names}. Every class needs "
            "some; remove folders that are none."
        )
    files = [file for place in found.values() for file in place[0]]
    grey = _all_grey(files[:: max(1, len(files) // 64)])

    def part(place: Path) -> _Part:
        paths, labels, contents, listing = found[place]
        return _Part(partial(_read_file, paths, "L" if grey else "RGB"), labels, contents, listing)

    lazy = _Lazy("folder", part(train), part(val) if val is not None else None, part(test), classes)
    return _decoded(lazy, config)


def _class_folders(place: Path) -> set[str]:
    """The folders in `place`, those aside that a program hid there (`.ipynb_checkpoints`)."""
    return {e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith(".")}


def _list_images(place: Path, classes: Sequence[str]) -> tuple[list[str], Labels, str, str]:
    """Files, labels and two listings of the images in a folder of classes.

    The first has names and sizes, the second also the place and times.
    """
    unknown = sorted(_class_folders(place) - set(classes))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ConfigError(
            f"'{place}' has folders that 'train' has not: {', '.join(unknown[:3])}{more}. Both "
            "must have one folder for each class, with the same names."
        )
    files: list[str] = []
    labels: list[int] = []
    contents: list[str] = []
    lines: list[str] = [str(place.resolve())]
    for label, name in enumerate(classes):
        for entry in sorted(_image_entries(place / name), key=lambda entry: entry.path):
            status = entry.stat()
            files.append(entry.path)
            labels.append(label)
            contents.append(f"{name}/{entry.name} {status.st_size}")
            lines.append(f"{contents[-1]} {status.st_mtime_ns}")
    if not files:
        raise ConfigError(f"'{place}' has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it.")
    return files, np.array(labels, np.int64), "\n".join(contents), "\n".join(lines)


def _image_entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_entries(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield entry


def _all_grey(files: Sequence[str]) -> bool:
    for file in files:
        with _opened(file) as image:
            if image.mode not in ("1", "L"):
                return False
    return True


def _read_file(files: Sequence[str], mode: str, index: int) -> Image.Image:
    with _opened(files[index]) as image:
        return image.convert(mode)


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """An image file; what goes wrong with it inside the block is named."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of mode {image.mode}; convert it to 8 bits")
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"The image '{file}' can't be read: {error}.") from error


def _read_item(dataset: Any, index: int) -> Image.Image:
    image: Image.Image = dataset[index][0].convert("RGB")
    return image


def _decoded(lazy: _Lazy, config: DataConfig) -> _Arrays | _Lazy:
    """The images in memory if they fit there, else as they are."""
    first = lazy.train.read(0)
    channels = len(first.getbands())
    width, height = first.size
    if config.image_size is not None:
        width = height = config.image_size
    parts = (lazy.train, lazy.val, lazy.test)
    count = sum(len(part.labels) for part in parts if part is not None)
    if count * channels * height * width > MEMORY_LIMIT:
        return lazy
    train, val, test = (
        None
        if part is None
        else _Split(_decode(part, (channels, height, width), config.image_size), part.labels)
        for part in parts
    )
    assert train is not None and test is not None
    return _Arrays(lazy.name, train, val, test, lazy.classes)


def _decode(part: _Part, shape: tuple[int, int, int], size: int | None) -> Pixels:
    """All images of a part as `n x c x h x w`; kept in the cache folder."""
    key = hashlib.sha256(f"{shape} {size}\n{part.listing}".encode()).hexdigest()[:24]
    path = cache_folder() / "images" / f"{key}.npy"
    if path.exists():
        cached: Pixels = np.load(path)
        return cached
    pixels = np.empty((len(part.labels), *shape), np.uint8)

    def decode(index: int) -> None:
        image = part.read(index)
        if size is not None:
            image = _fitted(image, size)
        array = np.asarray(image)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if array.shape != shape:
            raise ConfigError(
                f"The images differ in size ({shape[2]} x {shape[1]} and {image.width} x "
                f"{image.height} pixels): set data.image_size."
            )
        pixels[index] = array

    def decode_all(indices: range) -> None:
        for index in indices:
            decode(index)

    step = 256
    chunks = [range(i, min(i + step, len(pixels))) for i in range(0, len(pixels), step)]
    # Decoding happens outside Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_all, chunks):
            pass
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with beside.open("wb") as file:
        np.save(file, pixels)
    os.replace(beside, path)
    return pixels


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """`image` with its shorter side scaled to `size` and the middle cut out."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))


def _array(path: Path) -> _Arrays:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array; save several with numpy.savez")
            content = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"data.source = 'array:{path}' can't be read: {error}") from error
    required = {"x_train", "y_train", "x_test", "y_test"}
    known = required | {"x_val", "y_val", "classes"}
    if unknown := sorted(content.keys() - known):
        raise ConfigError(
            f"data.source = 'array:{path}' holds '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
        )
    if ("x_val" in content) != ("y_val" in content):
        raise ConfigError(f"data.source = 'array:{path}' has only one of x_val and y_val.")
    if missing := sorted(required - content.keys()):
        raise ConfigError(
            f"data.source = 'array:{path}' lacks {', '.join(missing)}; it must hold x_train, "
            "y_train, x_test and y_test, and may hold x_val, y_val and classes."
        )

    def part(name: str) -> _Split | None:
        if f"x_{name}" not in content or f"y_{name}" not in content:
            return None
        pixels = _as_nchw(content[f"x_{name}"], f"x_{name}")
        labels = content[f"y_{name}"].reshape(-1)
        if not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(pixels):
            raise ConfigError(
                f"data.source = 'array:{path}': y_{name} must be {len(pixels)} whole numbers, got "
                f"{len(labels)} of type {labels.dtype}."
            )
        return _Split(pixels, labels.astype(np.int64))

    names = content["classes"].tolist() if "classes" in content else None
    return _numbered("array", [part("train"), part("val"), part("test")], names)


def _as_nchw(array: NDArray[Any], name: str) -> Pixels:
    """`n x h x w`, `n x h x w x c` or `n x c x h x w` of uint8 or of 0..1 as `n x c x h x w`."""
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or not len(array):
        raise ConfigError(
            f"{name} must be images n x h x w, n x h x w x c or n x c x h x w, got shape "
            f"{array.shape}."
        )
    if array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype != np.uint8:
        numeric = np.issubdtype(array.dtype, np.number)
        low, high = (float(array.min()), float(array.max())) if numeric else (0.0, 0.0)
        # Written so that NaN is refused too.
        if not np.issubdtype(array.dtype, np.floating) or not (low >= 0 and high <= 1):
            found = f" between {low:g} and {high:g}" if numeric else ""
            raise ConfigError(
                f"{name} must be uint8, or floating-point between 0 and 1, got {array.dtype}"
                f"{found}."
            )
        array = np.rint(array * 255).astype(np.uint8)
    return np.ascontiguousarray(array)


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


def _user_loaders(config: DataConfig, seed: int, folder: Path | None) -> Data:
    """Data from a function of the user's, which may ask for settings by its parameters' names."""
    kind = config.source.partition(":")[0]
    if kind == "python":
        raise ConfigError(
            f"data.source = '{config.source}': these loaders were given to autocompress.compress();"
            " only Python can give them again."
        )
    if kind.partition(".")[0] not in _SOURCES and "." not in kind:
        near = did_you_mean(kind, _SOURCES)
        if "Did you mean" in near:
            raise ConfigError(f"data.source = '{config.source}': no such source.{near}")
    function = load_function(config.source, "data.source", folder)
    offered = {**config.model_dump(exclude={"source"}), "seed": seed}
    asked = inspect.signature(function).parameters
    result = function(**{name: value for name, value in offered.items() if name in asked})
    if isinstance(result, Mapping):
        given = dict(result)
    elif isinstance(result, (tuple, list)) and len(result) in (2, 3):
        names = ("train", "test") if len(result) == 2 else ("train", "val", "test")
        given = dict(zip(names, result, strict=True))
    else:
        given = {}
    if "train" not in given or "test" not in given:
        raise ConfigError(
            f"data.source = '{config.source}' must return loaders (train, test) or (train, val, "
            f"test), or a dict with these keys, got {type(result).__name__}."
        )
    train, val, test = given_loaders(
        given["train"],
        given.get("val"),
        given["test"],
        fraction=config.val_fraction,
        source=config.val_from,
        seed=seed,
        where=f"data.source = '{config.source}': ",
    )
    digest = hashlib.sha256(_settings(config.source, config, seed, "val" not in given))
    shape: tuple[int, int, int] = (0, 0, 0)
    for loader in (val, test):
        batch = next(iter(loader), None)
        digest.update(str((len(train), len(loader))).encode())
        for value in batch if isinstance(batch, (tuple, list)) else ():
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
                if value.ndim == 4:
                    shape = (value.size(1), value.size(2), value.size(3))
    return Data(
        train=train,
        val=val,
        test=test,
        classes=tuple(map(str, given.get("classes", ()))),
        fingerprint=digest.hexdigest()[:16],
        input_shape=shape,
        normalization=given.get("normalization"),
        val_from=config.val_from if given.get("val") is None else "",
    )
