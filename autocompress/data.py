"""The data of a study: training, validation and test batches of what the study file names.

Images that fit into memory are served by `ArrayLoader`, which is many times faster than decoding
them in every epoch; more and larger ones go through a DataLoader with workers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from autocompress.archives import open_archive
from autocompress.coco import open_visual_wake_words
from autocompress.config import NAMED_DATA, DataConfig
from autocompress.datasets import open_digits, open_torchvision
from autocompress.errors import ConfigError, did_you_mean
from autocompress.folders import open_folder
from autocompress.imagenet import open_imagenet, open_tiny_imagenet
from autocompress.imagesets import Arrays, Encoded, Part, Pixels, Split, only
from autocompress.loaders import (
    ArrayLoader,
    Labels,
    LazyImages,
    cut_validation,
    given_loaders,
    like,
    stratified_split,
    unaugmented,
)
from autocompress.models import IMAGENET_MEAN, IMAGENET_STD, load_function

if TYPE_CHECKING:
    from autocompress.task import Loader

_SHARE_OF_GPU = 0.25
"""Images are kept on the GPU if they take no more than this share of what is free there."""

# For images too many to hold in memory, where the study file gives no other.
_IMAGENET = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
_LAZY_SIZE = 224

_MOST_WORKERS = 8
_STATISTICS_IMAGES = 5_000
_FINGERPRINT_IMAGES = 64

_SOURCES = (*NAMED_DATA, "torchvision", "folder", "array", "package.module")


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
    found = _open(config)
    if found is None:
        return _user_loaders(config, seed, folder)
    if isinstance(found, Encoded):
        return _lazy_data(found, config, seed, torch.device(device))
    return _array_data(found, config, seed, torch.device(device))


def _open(config: DataConfig) -> Arrays | Encoded | None:
    """The images of the classes that a study file names; None if the source is the user's own."""
    kind, _, name = config.source.partition(":")
    root = Path(config.root).expanduser() if config.root is not None else None
    if kind == "torchvision":
        return open_torchvision(name, root, config)
    if kind == "folder":
        return open_folder((root or Path()) / Path(name).expanduser(), config)
    if kind == "imagenet":
        return open_imagenet(root, config)
    if kind == "tiny-imagenet":
        return open_tiny_imagenet(root, config)
    if kind == "vww":
        return open_visual_wake_words(root, config)
    if kind not in ("digits", "array"):
        return None
    path = (root or Path()) / Path(name).expanduser()
    whole = open_digits() if kind == "digits" else open_archive(path)
    return whole if config.classes is None else only(whole, config.classes)


def _array_data(found: Arrays, config: DataConfig, seed: int, device: torch.device) -> Data:
    train, val, test = (
        _resized(part, config.image_size) for part in (found.train, found.val, found.test)
    )
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

    def loader(part: Split, training: bool) -> ArrayLoader:
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


def _lazy_data(found: Encoded, config: DataConfig, seed: int, device: torch.device) -> Data:
    size = config.image_size or _LAZY_SIZE
    workers = _workers()
    normalization = _given_normalization(config, 3) or _IMAGENET

    def loader(part: Part, training: bool) -> DataLoader[Any]:
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
    """Processes that decode images: as many as this process has cores for.

    Of several processes that run trials on one machine each is told its share of the cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = os.environ.get("OMP_NUM_THREADS", "")
    mine = int(share) if share.isdecimal() else _MOST_WORKERS
    return max(1, min(_MOST_WORKERS, cores or 1, mine))


def _settings(name: str, config: DataConfig, seed: int, split: bool) -> bytes:
    """What decides, besides the images, what a network is trained on."""
    cut: list[Any] | None = [config.val_fraction, seed] if split else None
    if cut is not None and config.val_from == "test":
        cut.append(config.val_from)
    facts: list[Any] = [name, config.image_size, config.augment, config.batch_size, cut]
    if config.mean is not None:
        facts += [config.mean, config.std]
    if config.classes is not None:
        facts.append({"classes": config.classes})
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


def _plain_normalization(given: Any, source: str) -> dict[str, list[float]] | None:
    """What a function of the user's tells of the normalization, as plain numbers.

    Raises:
        ConfigError: If it is something else than a mean and a deviation for each channel.
    """
    if given is None:
        return None
    try:
        return {key: [float(value) for value in given[key]] for key in ("mean", "std")}
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.source = '{source}': normalization must be {{'mean': [...], 'std': [...]}} with "
            f"a number for each channel, got {given!r}."
        ) from error


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


def _resized(part: Split | None, size: int | None) -> Split | None:
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
    return Split(result, part.labels)


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
    if config.classes is not None and "classes" not in asked:
        raise ConfigError(
            f"data.classes: '{config.source}' has no parameter 'classes' to take them; add it, or "
            "leave data.classes out."
        )
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
        normalization=_plain_normalization(given.get("normalization"), config.source),
        val_from=config.val_from if given.get("val") is None else "",
    )
