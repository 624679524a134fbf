"""What is said of a task's inputs and outputs is true, or nothing is said."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autocompress.config import DataConfig
from autocompress.data import Data, load_data
from autocompress.task import Task
from autocompress.usage import usage_of


def with_data(task: Task, data: Data) -> Task:
    return replace(task, train=data.train, val=data.val, normalization=data.normalization)


def test_images_in_memory(task: Task) -> None:
    data = load_data(DataConfig(source="digits", image_size=12), seed=0)
    usage = usage_of(with_data(task, data))
    assert usage["image"] == {"mode": "L", "resize": 12, "crop": [12, 12]}
    assert usage["normalization"] == data.normalization
    assert usage["task"]["kind"] == "classification"


def test_images_that_are_read_one_by_one(task: Task, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{number}.png")
    config = DataConfig(source=f"folder:{tmp_path}", image_size=28, val_fraction=0.5)
    usage = usage_of(with_data(task, load_data(config, seed=0)))
    assert usage["image"]["crop"] == [28, 28] and usage["image"]["resize"] in (28, 32)


def test_what_functions_of_the_users_do_is_not_guessed(task: Task) -> None:
    assert usage_of(task)["image"] is None  # its loaders are plain ones
    data = load_data(DataConfig(source="digits"), seed=0)
    own = replace(
        with_data(task, data),
        forward=lambda model, batch: model(batch[0] * 2),
        metric=partial(lambda output, batch: torch.ones(len(output))),
    )
    usage = usage_of(own)
    assert usage["image"] is None and usage["task"]["kind"] is None
