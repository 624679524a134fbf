"""Visual Wake Words: is there a person in the image? Labels are made from COCO's annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autocompress.config import DataConfig
from autocompress.decoding import decoded
from autocompress.errors import ConfigError
from autocompress.folders import Listing, encoded, list_images
from autocompress.imagesets import Arrays, Encoded, only

LEAST_AREA = 0.005
"""A person counts who takes more than this share of the image, by COCO's `area`, which is that of
the outline (Chowdhery et al. 2019, arXiv 1906.05721, and their script)."""

CLASSES = ("no person", "person")

LAYOUT = (
    "Expected annotations/instances_train2014.json, annotations/instances_val2014.json, "
    "train2014/*.jpg and val2014/*.jpg (or 2017), as cocodataset.org gives them."
)


def open_visual_wake_words(root: Path | None, config: DataConfig) -> Arrays | Encoded:
    """COCO's images, labelled by whether a person is in them.

    COCO's training images are the training data and its validation images the test data. The
    authors put both together and tested on 8,059 images that a list of theirs names (minival), so
    that figures on their split don't compare to the point.

    Args:
        root: The folder that holds annotations/ and the images' folders.
        config: The study file's section.

    Raises:
        ConfigError: If it is not there, or is incomplete.
    """
    if root is None:
        raise ConfigError(
            f"data.source = 'vww' is made from COCO: set data.root to its folder. {LAYOUT}"
        )
    for year in ("2014", "2017"):
        if (root / "annotations" / f"instances_train{year}.json").is_file():
            break
    else:
        raise ConfigError(
            f"data.source = 'vww': no instances_train2014.json or instances_train2017.json in "
            f"'{root / 'annotations'}'. {LAYOUT}"
        )
    train, test = (_listing(root, f"{part}{year}") for part in ("train", "val"))
    found = encoded("vww", CLASSES, train, None, test)
    chosen = only(found, config.classes) if config.classes else found
    assert isinstance(chosen, Encoded)
    return decoded(chosen, config.image_size)


def _listing(root: Path, part: str) -> Listing:
    file = root / "annotations" / f"instances_{part}.json"
    try:
        labels = list(_labels(json.loads(file.read_bytes())))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.source = 'vww': '{file}' can't be read: {error}. {LAYOUT}"
        ) from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"data.source = 'vww': '{file}' has not the form of COCO's instances ({error})."
        ) from error
    if not labels:
        raise ConfigError(f"data.source = 'vww': '{file}' names no images.")
    place = root / part
    images = ((label, CLASSES[label], str(place / name)) for name, label in labels)
    return list_images(place, images)


def _labels(content: Any) -> Iterator[tuple[str, int]]:
    """File name and label of each image in a file of COCO's."""
    person = next(
        (category["id"] for category in content["categories"] if category["name"] == "person"), None
    )
    if person is None:
        raise KeyError("no category 'person'")
    largest: dict[int, float] = {}
    for annotation in content["annotations"]:
        if annotation["category_id"] == person:
            image = annotation["image_id"]
            largest[image] = max(largest.get(image, 0.0), float(annotation["area"]))
    for image in content["images"]:
        share = largest.get(image["id"], 0.0) / (image["height"] * image["width"])
        yield image["file_name"], int(share > LEAST_AREA)
