"""What the study file lets the search do to which layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, tiny_config

from autocompress.config import BoundConfig, SearchConfig
from autocompress.errors import ConfigError
from autocompress.layers import inspect_layers
from autocompress.scope import bound_table, bound_text, channel_groups, check_names, prospects
from autocompress.sensitivity import Choice, LayerTable
from autocompress.transforms import SVD

EXAMPLE = (torch.zeros(1, 1, 8, 8),)


def table() -> LayerTable:
    """Three ranks of each layer: half, a quarter and an eighth of its cost, errors 0.1 to 0.4."""
    layers, _ = inspect_layers(TinyNet(), EXAMPLE)
    choices = {
        layer.name: tuple(
            Choice(
                SVD(rank), rank / 4, layer.cost.params // part, layer.cost.macs // part, error, 1.0
            )
            for rank, part, error in ((1, 8, 0.4), (2, 4, 0.2), (4, 2, 0.1))
        )
        for layer in layers
    }
    return LayerTable(layers, choices, {layer.name: {} for layer in layers})


def bound(**values: Any) -> BoundConfig:
    return BoundConfig(**values)


def ranks(bounds: list[BoundConfig]) -> dict[str, list[Any]]:
    found, _ = bound_table(table(), bounds)
    return {n: [c.transform.rank for c in own] for n, own in found.choices.items()}  # type: ignore[attr-defined]


def test_bounds_take_choices_away() -> None:
    everything = {"stem": [1, 2, 4], "conv": [1, 2, 4], "fc": [1, 2, 4]}
    assert ranks([]) == everything
    assert ranks([bound(layers="conv", error=0.2)]) == everything | {"conv": [2, 4]}
    # `stem` has 144 params, a quarter is 36: exactly 4x.
    assert ranks([bound(layers="stem", compression=4.0)]) == everything | {"stem": [2, 4]}
    both = [bound(layers="*", error=0.3), bound(layers="c*", compression=2.5)]
    assert ranks(both) == {"stem": [2, 4], "conv": [4], "fc": [2, 4]}


def test_a_layer_that_is_left_no_choice_is_named() -> None:
    found, emptied = bound_table(table(), [bound(layers="conv", error=0.05)])
    assert set(found.choices) == {"stem", "fc"}
    assert set(emptied) == {"conv"}
    assert "error <= 0.05" in emptied["conv"] and "0.100" in emptied["conv"]


def test_the_tightest_bound_is_shown() -> None:
    bounds = [bound(layers="*", compression=8.0), bound(layers="fc", compression=4.0, error=0.1)]
    assert bound_text("fc", bounds) == "compression <= 4x, error <= 0.1"
    assert bound_text("conv", bounds) == "compression <= 8x"
    assert bound_text("conv", bounds[1:]) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ("cnov",)}, "search.include: no layer matches 'cnov'. Did you mean 'conv'"),
        ({"exclude": ("bn1",)}, "search.exclude: no layer matches 'bn1'"),
        ({"bounds": (bound(layers="st", error=1.0),)}, "search.bounds: no layer matches 'st'. Did"),
    ],
)
def test_patterns_that_name_no_layer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check_names(TinyNet(), SearchConfig(**settings))


def test_prospects_need_no_data() -> None:
    possible, left_alone = prospects(TinyNet(), EXAMPLE, SearchConfig(transforms=("svd", "tt")))
    assert possible == {"conv": ("svd", "tt")}
    assert "first layer" in left_alone["stem"] and "classifier" in left_alone["fc"]
    possible, left_alone = prospects(
        TinyNet(4), EXAMPLE, SearchConfig(include=("*",), transforms=("spatial_svd",))
    )
    assert set(possible) == {"stem", "conv"} and set(left_alone) == {"fc"}


def test_bounds_reach_the_study(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{"search.bounds": [{"layers": "conv", "compression": 3}]})
    assert config.search.bounds == (bound(layers="conv", compression=3.0),)


def groups_of(**settings: Any) -> tuple[list[str], list[str], dict[str, str]]:
    model, search = TinyNet().eval(), SearchConfig(**settings)
    layers, left_alone = inspect_layers(
        model, EXAMPLE, include=search.include, exclude=search.exclude
    )
    groups, others, refused = channel_groups(model, EXAMPLE, layers, left_alone, search)
    return [group.name for group in groups], [layer.name for layer in others], refused


def test_by_default_the_first_layer_keeps_its_outputs_and_the_classifier_reads_less() -> None:
    groups, others, refused = groups_of()
    assert (groups, others) == (["conv"], ["fc"])
    assert "runs through stem" in refused["stem"].replace("run ", "runs ")


def test_a_bounded_classifier_reads_all_channels() -> None:
    bounds = (bound(layers="fc", compression=1.5),)
    groups, others, refused = groups_of(bounds=bounds)
    assert groups == [] and others == []
    assert "runs through fc: search.bounds names it" in refused["conv"].replace("run ", "runs ")


def test_named_layers_lose_channels() -> None:
    assert groups_of(include=("*",))[0] == ["stem", "conv"]
    assert groups_of(include=("stem", "conv"))[0] == ["stem"]
    assert groups_of(include=("*",), channels=False) == ([], [], {})


def test_a_bounded_layer_keeps_its_channels() -> None:
    bounds = (bound(layers="fc", error=0.5),)
    groups, _, refused = groups_of(include=("*",), bounds=bounds)
    assert groups == ["stem"]
    assert refused["conv"] == "its channels run through fc: search.bounds names it"
