"""ImageNet and Tiny ImageNet, in the folders in which they are published.

Their validation images are the test data here: no others have published labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from autocompress.config import DataConfig, cache_folder
from autocompress.decoding import decoded
from autocompress.errors import ConfigError
from autocompress.folders import (
    check_all_there,
    encoded,
    in_class_folders,
    list_images,
    training_classes,
)
from autocompress.imagesets import Arrays, Encoded, positions

LAYOUT = (
    "Expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or the archives of image-net.org, which "
    "torchvision unpacks to that: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
    "ILSVRC2012_devkit_t12.tar.gz."
)

TINY_FOLDER = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY_FOLDER}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_LAYOUT = (
    "Expected train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt and words.txt."
)

Names = list[tuple[str, ...]]
"""The names of each class, the first of which is shown."""


def open_imagenet(root: Path | None, config: DataConfig) -> Arrays | Encoded:
    """ImageNet (ILSVRC 2012).

    Args:
        root: The folder that holds train/ and val/, or its archives; None for one in the cache.
        config: The study file's section; its classes are wnids or names.

    Raises:
        ConfigError: If it is not there, or is incomplete.
    """
    path = cache_folder() / "data" / "imagenet" if root is None else root
    if not (path / "train").is_dir():
        _unpack(path)
    wnids = training_classes(path, "imagenet", LAYOUT)
    if not (path / "val").is_dir():
        raise ConfigError(f"data.source = 'imagenet': no folder '{path / 'val'}'. {LAYOUT}")
    names = _names(path, wnids)
    chosen = _chosen(config, wnids, names)
    classes = [wnids[index] for index in chosen]
    train, test = (in_class_folders(path / part, wnids, classes) for part in ("train", "val"))
    check_all_there(train, classes, path / "train", "imagenet")
    shown = [names[index][0] for index in chosen]
    return decoded(encoded("imagenet", shown, train, None, test), config.image_size)


def open_tiny_imagenet(root: Path | None, config: DataConfig) -> Arrays | Encoded:
    """Tiny ImageNet (Stanford CS231N): 200 classes, 64 x 64 pixels; downloaded where it is absent.

    Args:
        root: The folder that holds train/, or one in which its folder is; None for the cache.
        config: The study file's section; its classes are wnids or names.

    Raises:
        ConfigError: If it is not there and can't be downloaded, or is incomplete.
    """
    path = _tiny_folder(root)
    wnids = training_classes(path, "tiny-imagenet", TINY_LAYOUT)
    names = _words(path / "words.txt", wnids)
    chosen = _chosen(config, wnids, names)
    classes = [wnids[index] for index in chosen]
    train = in_class_folders(path / "train", wnids, classes)
    check_all_there(train, classes, path / "train", "tiny-imagenet")
    test = list_images(path / "val", _tiny_validation(path / "val", classes))
    if not test.files:
        raise ConfigError(
            f"'{path / 'val' / 'val_annotations.txt'}' names no image of the classes in "
            f"'{path / 'train'}'."
        )
    shown = [names[index][0] for index in chosen]
    return decoded(encoded("tiny-imagenet", shown, train, None, test), config.image_size)


def _chosen(config: DataConfig, wnids: Sequence[str], names: Names) -> Sequence[int]:
    """The classes that `data.classes` names by wnid, or by a name that only one class has."""
    if config.classes is None:
        return range(len(wnids))
    found: dict[str, int] = {}
    shared: set[str] = set()
    for index, own in enumerate(names):
        for name in set(own):
            if name in found:
                shared.add(name)
            found[name] = index
    synonyms = {name: index for name, index in found.items() if name not in shared}
    return positions(config.classes, wnids, synonyms)


def _unpack(path: Path) -> None:
    """Let torchvision unpack ImageNet's archives, if they are in the folder."""
    from torchvision.datasets import ImageNet

    try:
        for split in ("train", "val"):
            ImageNet(str(path), split=split)
    except (RuntimeError, OSError, ImportError) as error:
        raise ConfigError(
            f"data.source = 'imagenet': it is not in '{path}', and can't be downloaded without an "
            f"account at image-net.org. {LAYOUT} Set data.root to its folder."
        ) from error


def _names(path: Path, wnids: Sequence[str]) -> Names:
    for name in ("words.txt", "LOC_synset_mapping.txt"):
        if (path / name).is_file():
            return _words(path / name, wnids)
    if len(wnids) == 1000:
        from torchvision.models import ResNet18_Weights

        # In the order of the wnids, which is that of the outputs of torchvision's networks.
        return [(name,) for name in ResNet18_Weights.DEFAULT.meta["categories"]]
    return [(wnid,) for wnid in wnids]


def _words(file: Path, wnids: Sequence[str]) -> Names:
    """Names from lines `wnid name, other name`; a class that is not there is called by its wnid."""
    known: dict[str, tuple[str, ...]] = {wnid: (wnid,) for wnid in wnids}
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for line in text.splitlines():
        wnid, _, words = line.replace("\t", " ", 1).partition(" ")
        if wnid in known and words.strip():
            known[wnid] = tuple(word.strip() for word in words.split(","))
    return [known[wnid] for wnid in wnids]


def _tiny_folder(root: Path | None) -> Path:
    """Where Tiny ImageNet is, once it is there."""
    base = cache_folder() / "data" if root is None else root
    for path in (base, base / TINY_FOLDER):
        if (path / "train").is_dir():
            return path
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(TINY_URL, str(base), md5=TINY_MD5)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.source = 'tiny-imagenet': it is not in '{base / TINY_FOLDER}' and can't be "
            f"downloaded ({reason}). Unpack {TINY_URL} there, or set data.root. {TINY_LAYOUT}"
        ) from error
    return base / TINY_FOLDER


def _tiny_validation(place: Path, wnids: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Label, wnid and path of each validation image of some classes."""
    table = place / "val_annotations.txt"
    if not table.is_file():
        raise ConfigError(f"data.source = 'tiny-imagenet': no file '{table}'. {TINY_LAYOUT}")
    number = {wnid: label for label, wnid in enumerate(wnids)}
    for line in table.read_text(encoding="utf-8").splitlines():
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid in number:
            yield number[wnid], wnid, str(place / "images" / name)
