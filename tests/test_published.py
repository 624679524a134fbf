"""Checkpoints as others publish them load into networks of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.models import build_model
from autocompress.published import RENAMINGS, translate

State = dict[str, Tensor]


def trained(source: str, arguments: dict[str, Any]) -> nn.Module:
    """A network whose every weight and statistic is its own."""
    torch.manual_seed(1)
    model = build_model(source, arguments, None)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 1)
    return model


def kuangliu(state: State) -> State:
    """Names of kuangliu/pytorch-cifar; its networks are DataParallel's when they are saved."""
    return {
        "module." + name.replace("downsample", "shortcut").replace("fc.", "linear."): value
        for name, value in state.items()
    }


def akamaster(state: State) -> State:
    """Names that are ours, as in akamaster's CIFAR ResNets, from DataParallel."""
    return {f"module.{name}": value for name, value in state.items()}


def chenyaofo(state: State) -> State:
    """Names of chenyaofo/pytorch-cifar-models."""
    return {
        name.replace("shortcut", "downsample").replace("linear.", "fc."): value
        for name, value in state.items()
    }


def weiaicunzai(state: State) -> State:
    """Names of weiaicunzai/pytorch-cifar100."""
    places = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    found = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first in places:
            first = f"conv1.{places[first]}"
        elif first.startswith("layer"):
            first = f"conv{int(first[-1]) + 1}_x"
            layer = rest[1]
            rest[1] = "shortcut" if layer == "downsample" else f"residual_function.{places[layer]}"
        found[".".join([first, *rest])] = value
    return found


BASIC = {"num_classes": 10, "width": 4}


@pytest.mark.parametrize(
    ("source", "arguments", "rename", "wrap"),
    [
        ("zoo:resnet18", BASIC, kuangliu, "net"),
        ("zoo:resnet50", BASIC, kuangliu, "net"),
        ("zoo:resnet20", BASIC, akamaster, "state_dict"),
        ("zoo:resnet20", {**BASIC, "shortcut": "B"}, chenyaofo, None),
        ("zoo:resnet18", BASIC, weiaicunzai, None),
        ("zoo:resnet50", BASIC, weiaicunzai, "model_state_dict"),
        ("zoo:resnet18", BASIC, dict, "model"),
        # Named as kuangliu's already.
        ("zoo:mobilenet_v2", {"width": 0.25}, akamaster, "net"),
        ("zoo:googlenet", {"width": 0.25}, akamaster, "net"),
    ],
)
def test_published_layouts_load(
    source: str,
    arguments: dict[str, Any],
    rename: Callable[[State], State],
    wrap: str | None,
    tmp_path: Path,
) -> None:
    model = trained(source, arguments)
    content: Any = rename(dict(model.state_dict()))
    if wrap is not None:
        content = {wrap: content, "acc": 95.1, "epoch": 199}
    torch.save(content, tmp_path / "ckpt.pth")
    loaded = build_model(source, arguments, str(tmp_path / "ckpt.pth"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


def test_a_layout_that_explains_only_a_part_is_not_taken(tmp_path: Path) -> None:
    state = kuangliu(dict(trained("zoo:resnet18", BASIC).state_dict()))
    state["module.head.weight"] = torch.zeros(1)
    torch.save({"net": state}, tmp_path / "ckpt.pth")
    with pytest.raises(ConfigError, match=r"unexpected: .*shortcut"):
        build_model("zoo:resnet18", BASIC, str(tmp_path / "ckpt.pth"))


def test_a_part_of_a_known_layout_says_what_is_missing_in_our_names(tmp_path: Path) -> None:
    state = kuangliu(dict(trained("zoo:resnet18", BASIC).state_dict()))
    del state["module.layer2.0.shortcut.1.bias"]
    torch.save({"net": state}, tmp_path / "ckpt.pth")
    with pytest.raises(ConfigError, match=r"missing: layer2.0.downsample.1.bias\. "):
        build_model("zoo:resnet18", BASIC, str(tmp_path / "ckpt.pth"))


def test_two_names_never_become_one() -> None:
    own = ["a.downsample.0", "fc.weight"]
    both = ["a.downsample.0", "a.shortcut.0"]
    assert translate(both, own) == {name: name for name in both}
    assert translate(["a.shortcut.0"], own) == {"a.shortcut.0": "a.downsample.0"}
    assert set(RENAMINGS) == {"kuangliu", "chenyaofo", "weiaicunzai"}
