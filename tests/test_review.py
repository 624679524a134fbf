"""What became of each class, and which images were lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autocompress.review import MOST_IMAGES, Predictions, class_changes, write_lost_images

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
BEFORE = [0, 0, 1, 1, 1, 2]
AFTER = [0, 1, 0, 1, 0, 2]


def logits(classes: list[int], sure: list[float] | float = 4.0) -> torch.Tensor:
    """Logits whose largest is that of the class."""
    found = torch.zeros(len(classes), 3)
    heights = sure if isinstance(sure, list) else [sure] * len(classes)
    for row, (label, height) in enumerate(zip(classes, heights, strict=True)):
        found[row, label] = height
    return found


def watched(
    images: torch.Tensor | None = None, sure: list[float] | float = 4.0, size: int = 2
) -> tuple[Predictions, Predictions]:
    """Both networks' predictions, batch by batch."""
    if images is None:
        images = torch.zeros(6, 1, 4, 4)
    before = Predictions()
    after = Predictions(before)
    for watcher, guesses, height in ((before, BEFORE, 4.0), (after, AFTER, sure)):
        outputs = logits(guesses, height)
        for start in range(0, 6, size):
            part = slice(start, start + size)
            watcher(outputs[part], (images[part], LABELS[part]))
    return before, after


@pytest.mark.parametrize("size", [1, 2, 6])
def test_classes_are_counted_the_worst_first(size: int) -> None:
    rows = class_changes(*watched(size=size), ("cat", "dog", "eel"))
    assert [row["name"] for row in rows] == ["dog", "cat", "eel"]
    assert rows[0] == {
        "name": "dog",
        "images": 2,
        "before": 100.0,
        "after": 50.0,
        "lost": 1,
        "won": 0,
    }
    assert (rows[1]["lost"], rows[1]["won"]) == (1, 1)
    assert rows[1]["before"] == pytest.approx(200 / 3) == rows[1]["after"]
    assert [row["name"] for row in class_changes(*watched(), ())] == ["1", "0", "2"]


def test_lost_images_are_written_as_they_looked(tmp_path: Path) -> None:
    pixels = torch.rand(6, 3, 4, 5)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    shaped = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    # The image at 4 is missed by more than that at 1.
    _, after = watched((pixels - shaped[0]) / shaped[1], sure=[4.0, 1.0, 4.0, 4.0, 9.0, 4.0])
    folder = tmp_path / "lost_images"
    folder.mkdir()
    (folder / "07.png").write_bytes(b"of an earlier run")
    rows = write_lost_images(after, folder, ("cat", "dog", "eel"), {"mean": mean, "std": std})
    assert [(row["index"], row["label"], row["guess"]) for row in rows] == [
        (4, "dog", "cat"),
        (1, "cat", "dog"),
    ]
    assert 0.9 < rows[0]["sure_before"] < 1 and 0.99 < rows[0]["sure_after"] < 1
    assert [row["file"] for row in rows] == ["lost_images/00.png", "lost_images/01.png"]
    assert sorted(file.name for file in folder.iterdir()) == ["00.png", "01.png"]
    seen = np.asarray(Image.open(tmp_path / rows[0]["file"]), dtype=float) / 255
    assert np.abs(seen - np.moveaxis(pixels[4].numpy(), 0, -1)).max() < 0.01


def test_grey_images_without_known_normalization_use_their_own_range(tmp_path: Path) -> None:
    images = torch.zeros(6, 1, 4, 4)
    images[:, 0, 0, 0] = 7.0
    _, after = watched(images)
    row = write_lost_images(after, tmp_path / "lost", (), None)[0]
    assert np.asarray(Image.open(tmp_path / row["file"])).tolist()[0] == [255, 0, 0, 0]


def test_only_so_many_images_are_kept_over_all_batches() -> None:
    before = Predictions()
    after = Predictions(before)
    for _ in range(3):
        batch = (torch.zeros(8, 1, 2, 2), torch.zeros(8, dtype=torch.long))
        before(logits([0] * 8), batch)
        after(logits([1] * 8), batch)
    assert len(after.lost) == MOST_IMAGES < 24


@pytest.mark.parametrize(
    ("output", "batch"),
    [
        (torch.zeros(2, 1), (torch.zeros(2, 1, 4, 4), torch.zeros(2))),  # regression
        (torch.zeros(2, 3), (torch.zeros(2, 1, 4, 4), torch.zeros(2, 3))),  # many labels
        (torch.zeros(2, 3, 4, 4), (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).long())),
        ({"out": torch.zeros(2, 3)}, (torch.zeros(2, 1, 4, 4), torch.zeros(2).long())),
        (torch.zeros(2, 3), (torch.zeros(2, 1, 4, 4), torch.tensor([0, 5]))),
        (torch.zeros(2, 3), {"image": torch.zeros(2, 1, 4, 4)}),
    ],
)
def test_what_is_no_classifier_has_no_classes(output: object, batch: object) -> None:
    before = Predictions()
    after = Predictions(before)
    before(output, batch)
    after(output, batch)
    assert class_changes(before, after, ()) == [] == after.lost


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_may_be_whole_numbers_of_any_size(dtype: torch.dtype) -> None:
    watcher = Predictions()
    watcher(torch.eye(2), (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]).to(dtype)))
    assert watcher.labels.tolist() == watcher.guesses.tolist() == [0, 1]


def test_inputs_that_are_no_images_are_not_shown() -> None:
    before, after = watched(torch.zeros(6, 16))
    assert after.lost == [] and len(class_changes(before, after, ())) == 3
