"""Visual Wake Words from a few images in COCO's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import ArrayLoader

PERSON, DOG = 1, 18


def write_coco(root: Path, year: str = "2014") -> None:
    """Of every four images one has a person, one a tiny person, one a dog, and one nothing."""
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", 16), ("val", 8)):
        images, annotations = [], []
        for index in range(count):
            name = f"COCO_{part}{year}_{index}.jpg"
            path = root / f"{part}{year}" / name
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 10), (60 * (index % 4),) * 3).save(path)
            images.append({"id": index + 7, "file_name": name, "width": 20, "height": 10})
            # 0.5 % of 20 x 10 pixels is one.
            for kind, category, area in ((0, PERSON, 1.1), (1, PERSON, 1.0), (2, DOG, 90.0)):
                if index % 4 == kind:
                    annotations.append(
                        {"image_id": index + 7, "category_id": category, "area": area}
                    )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": DOG, "name": "dog"}, {"id": PERSON, "name": "person"}],
        }
        file = root / "annotations" / f"instances_{part}{year}.json"
        file.write_text(json.dumps(content))


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="vww", root=str(root), image_size=8, val_fraction=0.5, **settings)


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_images_with_a_person_are_told_apart(year: str, tmp_path: Path) -> None:
    write_coco(tmp_path, year)
    found = load_data(config(tmp_path), 0)
    assert found.classes == ("no person", "person") and found.input_shape == (3, 8, 8)
    assert isinstance(found.train, ArrayLoader) and isinstance(found.test, ArrayLoader)
    assert found.test.labels.tolist() == [1, 0, 0, 0] * 2
    assert (found.test.images[:, 0, 0, 0] < 10).tolist() == [True, False, False, False] * 2
    assert len(found.train.labels) == 8 and int(found.train.labels.sum()) == 2


def test_where_coco_is_absent_its_layout_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data.root .* annotations/instances_train2014.json"):
        load_data(DataConfig(source="vww"), 0)
    with pytest.raises(ConfigError, match="no instances_train2014.json or .* in '.*annotations'"):
        load_data(config(tmp_path), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ('{"images": []}', "has not the form of COCO's instances"),
        ('{"images": [], "annotations": [], "categories": []}', "no category 'person'"),
    ],
)
def test_other_annotations_are_refused(content: str, message: str, tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2014.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_data(config(tmp_path), 0)


def test_an_absent_image_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_3.jpg").unlink()
    with pytest.raises(ConfigError, match=r"COCO_val2014_3\.jpg' is not there"):
        load_data(config(tmp_path), 0)
