"""Networks that are trained apart from a study, and studies that find them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import watch_fits
from safetensors import safe_open
from typer.testing import CliRunner

from autocompress import baseline
from autocompress.baseline import train_baseline
from autocompress.config import load_config
from autocompress.errors import ConfigError
from autocompress.models import build_model
from autocompress.pretrain import pretrain, settings_of
from autocompress.progress import NullDisplay
from autocompress.recipes import recipe_of
from autocompress.sources import task_from_config
from autocompress.study import app

NETWORK = ["models", "train", "resnet_small", "--data", "digits", "--width", "8"]


def call(*arguments: str) -> str:
    ended = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return watch_fits(monkeypatch, baseline)


def test_a_study_finds_what_was_trained_before(fits: list[Any], tmp_path: Path) -> None:
    weights = tmp_path / "it.safetensors"
    said = call(*NETWORK, "--short", "--epochs", "2", "--to", str(weights))
    accuracy = float(re.findall(r"([\d.]+) % on test data", said)[0])
    assert accuracy > 60 and "images/s" in said and len(fits) == 1
    assert fits[0]["epochs"] == 2
    file = tmp_path / "it.toml"
    file.write_text('name = "it"\n' + said[said.index("seed = 0") :], encoding="utf-8")
    config = load_config(file)
    task = task_from_config(config)
    assert train_baseline(task, recipe_of(config, False), config.seed, NullDisplay()) is None
    assert len(fits) == 1
    # And without the cache, from the file.
    given = build_model(config.model.source, config.model.arguments, str(weights))
    images = next(iter(task.test))[0]
    with torch.no_grad():
        assert torch.equal(given(images), task.model.eval()(images))
    with safe_open(weights, "pt") as opened:
        facts = opened.metadata()
    assert facts["network"] == "zoo:resnet_small" and facts["seed"] == "0"
    assert json.loads(facts["arguments"]) == {"width": 8, "num_classes": 10, "in_channels": 1}
    assert float(facts["test_accuracy"]) == pytest.approx(accuracy, abs=0.006)
    assert json.loads(facts["recipe"])["epochs"] == 2
    assert json.loads(facts["data"])["augment"] == "crop"
    assert set(json.loads(facts["versions"])) == {"autocompress", "torch", "python"}
    # The same command trains nothing.
    assert "was trained before" in call(*NETWORK, "--short", "--epochs", "2")
    assert len(fits) == 1


def test_another_seed_is_another_network(fits: list[Any]) -> None:
    for seed in (0, 1):
        pretrain(settings_of("resnet_small", "digits", baseline__epochs=0.5, seed=seed), _QUIET)
    assert len(fits) == 2


_QUIET = NullDisplay()


def test_the_recipe_fills_what_is_not_given() -> None:
    config = settings_of("resnet_small", "digits", short=True)
    assert (config.data.augment, config.data.batch_size) == ("crop", 64)
    recipe = recipe_of(config, given=False)
    assert (recipe.epochs, recipe.learning_rate) == (20, 0.1)
    config = settings_of(
        "resnet_small", "digits", data__augment="none", baseline__learning_rate=1.0
    )
    assert config.data.augment == "none"
    assert recipe_of(config, given=False).learning_rate == 1.0


def test_classes_and_channels_are_those_of_the_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        f"{what}_{part}": value
        for part in ("train", "test")
        for what, value in (
            ("x", random.integers(0, 255, (30, 8, 8, 3), np.uint8)),
            ("y", np.arange(30) % 3),
        )
    }
    np.savez(tmp_path / "three.npz", **arrays)
    config = settings_of("resnet_small", f"array:{tmp_path / 'three.npz'}")
    assert config.model.arguments == {"num_classes": 3}
    own = {"num_classes": 7, "in_channels": 3}
    config = settings_of("resnet_small", f"array:{tmp_path / 'three.npz'}", arguments=own)
    assert config.model.arguments == own
    config = settings_of("resnet_small", "digits", classes=12)
    assert config.model.arguments == {"num_classes": 12, "in_channels": 1}


def test_a_relative_path_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings_of("a.module:net", "folder:images")
    assert config.data.source == f"folder:{tmp_path / 'images'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "train", "resnet21", "--data", "digits"], "Did you mean 'resnet"),
        ([*NETWORK, "--to", "it.pt"], "ends in .safetensors"),
        ([*NETWORK, "--argument", "blocks"], "--argument blocks: give key=value, e.g. width=16"),
        ([*NETWORK, "--classes", "3"], "The data has 10 classes, the network has 3"),
        ([*NETWORK, "--epochs", "-1"], "baseline.epochs = -1.0 must be >= 0"),
    ],
)
def test_mistakes_are_said_before_any_work(
    fits: list[Any], arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert message in str(caught.value) and not fits


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.pretrain.train_baseline", interrupted)
    ended = CliRunner().invoke(app, [*NETWORK, "--short"])
    assert ended.exit_code == 130 and "goes on from the last checkpoint" in ended.output
    assert "20 epochs, learning rate 0.1, weight decay 0.0005, label smoothing 0" in ended.output


def test_models_are_listed_with_what_training_reaches() -> None:
    said = call("models", "resnet18")
    assert said == call("models", "list", "resnet18")
    assert re.search(r"resnet18 +cifar10 +95\.28 % +arXiv 1708\.04552 +200, 30", said)
    assert "in the literature" in said
    assert "in the literature" not in call("models", "squeezenet")
    assert "train" in call("models", "--help")
