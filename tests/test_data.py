"""The data of a study."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_images

from autocompress import data as data_module
from autocompress.config import DataConfig
from autocompress.data import load_data
from autocompress.errors import ConfigError
from autocompress.loaders import (
    ArrayLoader,
)

RNG = np.random.default_rng(0)


def test_validation_data_may_be_cut_from_the_test_data() -> None:
    whole = load_data(DataConfig(source="digits", val_fraction=0.2), 0)
    found = load_data(DataConfig(source="digits", val_fraction=0.5, val_from="test"), 0)
    assert isinstance(found.train, ArrayLoader) and isinstance(whole.test, ArrayLoader)
    assert isinstance(found.val, ArrayLoader) and isinstance(found.test, ArrayLoader)
    assert len(found.train.labels) == 1438
    assert len(found.val.labels) + len(found.test.labels) == len(whole.test.labels) == 359
    both = torch.cat([found.val.images, found.test.images]).flatten(1)
    assert torch.equal(both.sort(0).values, whole.test.images.flatten(1).sort(0).values)
    assert not found.test.shuffle and found.fingerprint != whole.fingerprint
    assert (whole.val_from, found.val_from) == ("train", "test")


def test_images_are_resized() -> None:
    found = load_data(DataConfig(source="digits", image_size=16), 0)
    assert found.input_shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:CIFAR11", "has no 'CIFAR11'. Did you mean 'CIFAR10'"),
        ("torchvision:EuroSAT", "no separate training and test data"),
        ("fodler:x", "no such source. Did you mean 'folder'"),
        ("python:loaders", "only Python can give them again"),
        ("array:nothing.npz", "can't be read"),
        ("nosuch.module:load", "no module 'nosuch.module'"),
    ],
)
def test_unknown_data_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_data(DataConfig(source=source), 0)
    assert message in str(caught.value)


def test_loaders_from_a_function_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "my_data_1.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def loader(n, size):\n"
        "    images = torch.arange(n * 64.0).view(n, 1, 8, 8)\n"
        "    return DataLoader(TensorDataset(images, torch.arange(n) % 2), batch_size=size)\n"
        "def two(batch_size):\n    return loader(40, batch_size), loader(8, batch_size)\n"
        "def named():\n"
        "    return {'train': loader(8, 4), 'val': loader(4, 4), 'test': loader(4, 4),\n"
        "            'classes': ['a', 'b']}\n"
        "def normal(values=None):\n"
        "    return named() | {'normalization': {'mean': torch.zeros(1), 'std': torch.ones(1)}}\n"
        "def odd():\n    return named() | {'normalization': 0.5}\n"
        "def wrong():\n    return loader(8, 4)\n"
        "def once():\n    return (b for b in loader(8, 4)), loader(8, 4)\n",
        encoding="utf-8",
    )
    path = list(sys.path)
    try:
        config = DataConfig(source="my_data_1:two", batch_size=5, val_fraction=0.25)
        found = load_data(config, 0, folder=tmp_path)
        assert (len(found.train), len(found.val), len(found.test)) == (6, 2, 2)
        assert found.input_shape == (1, 8, 8) and len(found.classes) == 0
        assert found.fingerprint == load_data(config, 0, folder=tmp_path).fingerprint
        found = load_data(DataConfig(source="my_data_1:named"), 0, folder=tmp_path)
        assert found.classes == ("a", "b") and len(found.val) == 1
        found = load_data(DataConfig(source="my_data_1:normal"), 0, folder=tmp_path)
        assert found.normalization == {"mean": [0.0], "std": [1.0]}
        with pytest.raises(ConfigError, match=r"normalization must be .* got 0.5"):
            load_data(DataConfig(source="my_data_1:odd"), 0, folder=tmp_path)
        with pytest.raises(ConfigError, match=r"must return loaders .* got DataLoader"):
            load_data(DataConfig(source="my_data_1:wrong"), 0, folder=tmp_path)
        with pytest.raises(ConfigError, match="train must be batches that can be counted"):
            load_data(DataConfig(source="my_data_1:once"), 0, folder=tmp_path)
    finally:
        sys.path[:] = path


def test_a_given_normalization_is_applied(tmp_path: Path) -> None:
    found = load_data(DataConfig(source="digits", mean=(0.5,), std=(0.25,)), 0)
    assert found.normalization == {"mean": [0.5], "std": [0.25]}
    assert isinstance(found.test, ArrayLoader)
    expected = (found.test.images.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(all_images(found.test).contiguous(), expected)
    assert found.fingerprint != load_data(DataConfig(source="digits"), 0).fingerprint
    with pytest.raises(ConfigError, match="data.mean has 3 numbers, the images have 1 channels"):
        load_data(DataConfig(source="digits", mean=(0.5,) * 3, std=(0.25,) * 3), 0)


def test_images_that_would_crowd_the_gpu_stay_in_main_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert data_module._place(gpu, 250) == gpu
    assert data_module._place(gpu, 251) == cpu
    assert data_module._place(cpu, 10**12) == cpu


def test_processes_that_share_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    for share, expected in (("", 8), ("2", 2), ("16", 8), ("0", 1), ("2,1", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", share)
        assert data_module._workers() == expected


def test_functions_of_the_users_are_given_the_classes_or_refuse_them(tmp_path: Path) -> None:
    (tmp_path / "my_data_2.py").write_text(
        "import torch\n"
        "def load(classes):\n"
        "    batch = torch.zeros(4, 1, 8, 8), torch.arange(4) % len(classes)\n"
        "    return {'train': [batch], 'val': [batch], 'test': [batch], 'classes': classes}\n"
        "def plain():\n    return load(('a', 'b'))\n",
        encoding="utf-8",
    )
    path = list(sys.path)
    try:
        config = DataConfig(source="my_data_2:load", classes=("cat", "ant"))
        assert load_data(config, 0, folder=tmp_path).classes == ("cat", "ant")
        with pytest.raises(ConfigError, match="'my_data_2:plain' has no parameter 'classes'"):
            config = DataConfig(source="my_data_2:plain", classes=("cat", "ant"))
            load_data(config, 0, folder=tmp_path)
    finally:
        sys.path[:] = path
