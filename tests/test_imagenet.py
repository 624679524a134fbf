"""ImageNet and Tiny ImageNet as they are published, a few images of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.imagenet import TINY_FOLDER, TINY_MD5
from autocompress.loaders import ArrayLoader

WNIDS = ("n01", "n02", "n03")
WORDS = "n01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane, derrick\nn99\tnone of these\n"


def write_image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey,) * 3).save(path)


def write_tiny(path: Path) -> None:
    """Six training and two validation images of each class, told apart by their brightness."""
    lines = []
    for label, wnid in enumerate(WNIDS):
        for index in range(6):
            write_image(path / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 80 * label)
        (path / "train" / wnid / f"{wnid}_boxes.txt").touch()
        for index in range(2):
            name = f"val_{3 * index + label}.JPEG"
            write_image(path / "val" / "images" / name, 80 * label)
            lines.append(f"{name}\t{wnid}\t0\t0\t7\t7\n")
    (path / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (path / "test" / "images").mkdir(parents=True)
    (path / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (path / "words.txt").write_text(WORDS)


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet(inside: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path / TINY_FOLDER)
    root = tmp_path if inside else tmp_path / TINY_FOLDER
    found = load_data(DataConfig(source="tiny-imagenet", root=str(root)), 0)
    assert found.classes == ("goldfish", "crane", "crane")
    assert isinstance(found.train, ArrayLoader) and isinstance(found.val, ArrayLoader)
    assert isinstance(found.test, ArrayLoader)
    assert len(found.train.labels) + len(found.val.labels) == 18
    assert found.test.labels.tolist() == [2, 2, 1, 1, 0, 0]
    for part in (found.train, found.test):
        assert (part.images[:, 0, 0, 0] - 80 * part.labels).abs().max() < 3


def test_classes_of_tiny_imagenet_are_chosen_by_wnid_or_name(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = DataConfig(source="tiny-imagenet", root=str(tmp_path), val_fraction=0.5)
    found = load_data(config.model_copy(update={"classes": ("n03", "Carassius auratus")}), 0)
    assert found.classes == ("crane", "goldfish")
    assert isinstance(found.test, ArrayLoader) and len(found.test.labels) == 4
    bright = found.test.images[:, 0, 0, 0] > 100
    assert bright.tolist() == (found.test.labels == 0).tolist() and bright.any()
    with pytest.raises(ConfigError, match="no class 'crane'"):
        # Two classes have this name.
        load_data(config.model_copy(update={"classes": ("crane", "n01")}), 0)


def test_an_incomplete_tiny_imagenet_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = DataConfig(source="tiny-imagenet", root=str(tmp_path))
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(ConfigError, match=r"val_2\.JPEG' is not there"):
        load_data(config, 0)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ConfigError, match=r"no file .*val_annotations.txt"):
        load_data(config, 0)


def test_tiny_imagenet_is_downloaded_where_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(url: str, root: str, md5: str) -> None:
        asked.append((url, md5))
        write_tiny(Path(root) / TINY_FOLDER)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    config = DataConfig(source="tiny-imagenet", root=str(tmp_path))
    assert len(load_data(config, 0).classes) == 3
    assert asked == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", TINY_MD5)]
    load_data(config, 0)
    assert len(asked) == 1


def test_a_failed_download_names_folder_and_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, root: str, md5: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", offline)
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source="tiny-imagenet", root=str(tmp_path)), 0)
    text = str(caught.value)
    assert str(tmp_path / TINY_FOLDER) in text and "(no network)" in text
    assert "val/val_annotations.txt" in text


def write_imagenet(path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            for index in range(count):
                write_image(path / part / wnid / f"{part}_{index}.JPEG", 80 * label)


def test_imagenet_in_folders(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    config = DataConfig(source="imagenet", root=str(tmp_path), val_fraction=0.25)
    assert load_data(config, 0).classes == WNIDS
    mapping = "n01 goldfish, Carassius auratus\nn02 crane\nn03 derrick\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(mapping)
    found = load_data(config, 0)
    assert found.classes == ("goldfish", "crane", "derrick")
    assert isinstance(found.test, ArrayLoader) and len(found.test.labels) == 6
    chosen = load_data(config.model_copy(update={"classes": ("derrick", "n01")}), 0)
    assert isinstance(chosen.test, ArrayLoader) and chosen.classes == ("derrick", "goldfish")
    assert chosen.test.labels.tolist() == [0, 0, 1, 1]


def test_where_imagenet_is_absent_the_layout_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source="imagenet", root=str(tmp_path)), 0)
    text = str(caught.value)
    assert str(tmp_path) in text and "ILSVRC2012_img_train.tar" in text and "data.root" in text
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no folder .*val"):
        load_data(DataConfig(source="imagenet", root=str(tmp_path)), 0)
