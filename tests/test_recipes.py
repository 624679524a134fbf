"""Recipes by architecture and data set, and what a study file says over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from autocompress.compatible import compatible_profile
from autocompress.config import StudyConfig, bound_settings, differences, parse_config
from autocompress.errors import ConfigError
from autocompress.profiler import profile_model
from autocompress.recipes import (
    DATA,
    FAMILIES,
    RECIPES,
    BaselineRecipe,
    data_name,
    family_of,
    follow,
    recipe_for,
    recipe_of,
    recipe_table,
)
from autocompress.task import Task, cross_entropy, one_cycle, sgd
from autocompress.training import fit
from autocompress.zoo import ZOO


def study(**settings: Any) -> StudyConfig:
    return parse_config(
        {
            "name": "it",
            "model.source": "zoo:resnet18",
            "data.source": "torchvision:CIFAR10",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision:CIFAR10", "cifar10"),
        ("torchvision:CIFAR100", "cifar100"),
        ("torchvision:FashionMNIST", "fashionmnist"),
        ("digits", "digits"),
        ("array:data/cifar-10.npz", "cifar10"),
        ("tiny-imagenet", "tinyimagenet"),
        ("folder:/data/tiny-imagenet-200", "tinyimagenet"),
        ("folder:/imagenet/mine", ""),
        ("my.module:loaders", ""),
    ],
)
def test_data_sets_are_known_by_the_last_part_of_their_source(source: str, name: str) -> None:
    assert data_name(source) == name


@pytest.mark.parametrize(
    ("network", "family"),
    [
        ("resnet18", "resnet"),
        ("resnet20", "cifar_resnet"),
        ("resnet200", "resnet"),
        ("pre_act_resnet18", "resnet"),
        ("resnet_small", "resnet_small"),
        ("vgg19", "vgg"),
        ("densenet121", "densenet"),
        ("mobilenet_v2_0.35", "mobilenet"),
        ("googlenet", "googlenet"),
        ("unheard_of", ""),
    ],
)
def test_architectures_have_families(network: str, family: str) -> None:
    assert family_of(network) == family
    assert not family or family in FAMILIES


def test_the_closest_entry_wins() -> None:
    recipe = recipe_for("zoo:resnet18", "torchvision:CIFAR10")
    assert (recipe.epochs, recipe.short_epochs, recipe.augment) == (200, 30, "crop-flip")
    assert recipe.label_smoothing == 0.1 and recipe.accuracy == 95.28
    assert recipe_for("zoo:resnet18", "torchvision:ImageNet").label_smoothing == 0.0
    assert recipe_for("torchvision:vgg19_bn", "torchvision:CIFAR10").learning_rate == 0.05
    assert recipe_for("zoo:vgg19", "digits").epochs == 60
    # Unknown images are neither cropped nor mirrored.
    assert recipe_for("my.module:net", "my.module:loaders").augment == "none"


def test_every_entry_is_sound() -> None:
    for network, data, recipe in recipe_table():
        assert data in DATA and family_of(network), (network, data)
        assert 0 < recipe.short_epochs < recipe.epochs
        assert recipe.accuracy is not None and 50 < recipe.accuracy < 100 and recipe.source
    assert len(recipe_table()) == len(RECIPES)
    assert {network for network, _, _ in recipe_table(["resnet20"])} == {"resnet20"}


def test_a_bare_study_file_trains_as_it_always_did() -> None:
    recipe = recipe_of(study(), given=False)
    assert recipe == BaselineRecipe(epochs=10.0, learning_rate=0.1)
    assert recipe_of(study(), given=True).epochs == 0
    assert recipe_of(study(baseline__epochs=3.0), given=True).epochs == 3


def test_what_the_file_says_wins_over_the_recipe() -> None:
    full = recipe_of(study(baseline__recipe="full"), given=False)
    assert (full.epochs, full.label_smoothing, full.weight_decay) == (200, 0.1, 5e-4)
    assert recipe_of(study(baseline__recipe="short"), given=False).epochs == 30
    assert recipe_of(study(baseline__recipe="full"), given=True).epochs == 0
    own = study(
        baseline__recipe="short",
        baseline__epochs=2.0,
        baseline__learning_rate=0.3,
        baseline__label_smoothing=0.0,
        baseline__weight_decay=0.0,
    )
    recipe = recipe_of(own, given=False)
    assert (recipe.epochs, recipe.learning_rate) == (2, 0.3)
    assert (recipe.label_smoothing, recipe.weight_decay) == (0, 0)


def test_studies_that_began_before_there_were_recipes_go_on(tmp_path: Path) -> None:
    stored = bound_settings(tiny_config(tmp_path))
    before = {k: v for k, v in stored.items() if k.rpartition(".")[2] not in _NEW}
    assert before["baseline.learning_rate"] == 0.1
    assert differences(before, stored) == []
    other = bound_settings(tiny_config(tmp_path, **{"baseline.recipe": "short"}))
    assert differences(before, other)


_NEW = ("recipe", "label_smoothing", "weight_decay")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipe", "ful", "Did you mean 'full'"),
        ("label_smoothing", 1.0, "must be < 1"),
        ("weight_decay", -1.0, "must be >= 0"),
        ("learning_rate", 0.0, "must be > 0"),
    ],
)
def test_wrong_settings_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"baseline.{field}.*{message}"):
        study(**{f"baseline__{field}": value})


def test_a_recipe_changes_loss_optimizer_and_schedule(task: Task) -> None:
    recipe = BaselineRecipe(label_smoothing=0.2, weight_decay=1e-4, warm_up=0.5)
    changed = follow(task, recipe)
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    batch = (torch.zeros(6), labels)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.equal(changed.loss(logits, batch), expected)
    assert not torch.equal(task.loss(logits, batch), expected)
    optimizer = changed.optimizer(task.model, 0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    scheduler = changed.scheduler(optimizer, 0.1, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == rates[49] == pytest.approx(0.1, rel=0.05)
    assert changed.model is task.model


def test_the_usual_recipe_changes_nothing(task: Task) -> None:
    assert follow(task, BaselineRecipe()) is task


def test_functions_of_the_users_are_not_replaced(task: Task) -> None:
    task.loss = lambda output, batch: cross_entropy(output, batch)
    with pytest.raises(ConfigError, match=r"label_smoothing = 0\.1 .* another one"):
        follow(task, BaselineRecipe(label_smoothing=0.1))
    task.optimizer = lambda model, rate: sgd(model, rate)
    with pytest.raises(ConfigError, match=r"weight_decay = 0\.01 .* loop of its own"):
        follow(task, BaselineRecipe(weight_decay=0.01))
    task.scheduler = lambda optimizer, rate, steps: one_cycle(optimizer, rate, steps)
    assert follow(task, BaselineRecipe(warm_up=0.3)).scheduler is task.scheduler
    task = replace(task, loss=cross_entropy, optimizer=sgd, training=lambda *_: None)
    assert follow(task, BaselineRecipe()) is task
    with pytest.raises(ConfigError, match="label_smoothing"):
        follow(task, BaselineRecipe(label_smoothing=0.1))
    with pytest.raises(ConfigError, match="weight_decay"):
        follow(task, BaselineRecipe(weight_decay=0.01))


def test_smoothing_is_trained_with(task: Task) -> None:
    changed = follow(task, BaselineRecipe(label_smoothing=0.5))
    torch.manual_seed(0)
    for layer in task.model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    fit(task.model, changed, epochs=20, learning_rate=0.1, seed=0)
    with torch.no_grad():
        largest = torch.cat([task.model(x).softmax(1).max(1).values for x, _ in task.val])
    # Half of the target is shared by four classes: 0.625 is left for the right one.
    assert 0.5 < float(largest.mean()) < 0.7


def test_the_documented_tables_are_those_of_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs" / "baselines.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    documented = [line for line in rows if not line.startswith(("| `zoo", "| name", "| network"))]
    assert documented == [
        f"| {network} | {data} | {r.epochs:g} ({r.short_epochs:g}) | {r.learning_rate:g} | "
        f"{r.weight_decay:g} | {r.label_smoothing:g} | {r.augment} | {r.accuracy:.2f} %, "
        f"{r.source} |"
        for network, data, r in recipe_table()
    ]
    for line in rows:
        if line.startswith("| `zoo:"):
            name, params, macs, published = (cell.strip() for cell in line.strip("|").split("|"))
            network = ZOO[name.strip("`").removeprefix("zoo:")](num_classes=100)
            example = (torch.zeros(1, 3, 32, 32),)
            ours = profile_model(network, example, latency=False)
            theirs = compatible_profile(network, example)
            assert params == f"{ours.params / 1e6:.4f} M" == f"{theirs.params_m:.4f} M"
            assert (macs, published) == (f"{ours.macs / 1e9:.4f} G", f"{theirs.macs_g:.4f} G")
