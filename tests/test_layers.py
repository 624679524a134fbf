"""Which layers may be transformed, and why the others may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autocompress.layers import Cost, LayerSpec, inspect_layers, spec_of
from autocompress.profiler import profile_model


class _Same(nn.Conv2d):
    """A subclass, as timm's Conv2dSame."""


class _Tower(nn.Module):
    """One layer of every kind that is left alone, and three that aren't."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(8, 3)
        self.stem = nn.Conv2d(1, 4, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.same = _Same(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.sequence = nn.Conv1d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.one = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.one.weight
        self.spectral = parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.tokens = nn.Linear(4, 8)
        self.words = nn.Embedding(8, 4)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.up(self.same(x))
        x = self.twice(self.twice(x))
        x = self.spectral(self.other(self.one(x)))
        tokens = self.sequence(x.flatten(2)).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens)
        tokens = self.tokens(tokens) + self.tied(tokens)
        return self.late(input=tokens.mean(1))


EXAMPLE = (torch.zeros(1, 1, 8, 12),)


def test_layers_come_in_execution_order_with_their_shapes() -> None:
    layers, _ = inspect_layers(_Tower(), EXAMPLE)
    assert [layer.name for layer in layers] == ["stem", "tokens", "late"]
    stem, tokens, late = layers
    assert stem == LayerSpec(
        name="stem",
        kind="conv2d",
        in_channels=1,
        out_channels=4,
        kernel_size=(3, 5),
        stride=(2, 2),
        padding=(1, 2),
        dilation=(1, 1),
        groups=1,
        padding_mode="zeros",
        bias=False,
        in_size=(8, 12),
        out_size=(4, 6),
    )
    assert stem.cost == Cost(60, 60 * 24)
    assert (tokens.kind, tokens.in_size, tokens.out_size) == ("linear", (24, 1), (24, 1))
    assert tokens.cost == Cost(4 * 8 + 8, 32 * 24)
    assert late.in_size == (1, 1) and late.cost == Cost(27, 24)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("same", f"{__name__}._Same is neither a plain Conv2d nor a plain Linear"),
        ("up", "ConvTranspose2d is neither"),
        ("attention", "MultiheadAttention is neither"),
        ("sequence", "Conv1d is neither"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear is neither"),
        ("unused", "not called in the forward pass"),
        ("twice", "called 2 times in one forward pass"),
        ("one", "shared by one, other"),
        ("other", "shared by one, other"),
        ("tied", "shared by words, tied"),
        ("spectral", "parametrized"),
    ],
)
def test_reasons(name: str, words: str) -> None:
    layers, left_alone = inspect_layers(_Tower(), EXAMPLE)
    assert words in left_alone[name]
    assert name not in [layer.name for layer in layers]


def test_every_weighted_layer_is_either_found_or_explained() -> None:
    layers, left_alone = inspect_layers(_Tower(), EXAMPLE)
    assert len(layers) + len(left_alone) == 14
    assert "norm" not in left_alone and "words" not in left_alone


def test_patterns() -> None:
    layers, left_alone = inspect_layers(
        _Tower(), EXAMPLE, include=("st*", "late"), exclude=("l?te",)
    )
    assert [layer.name for layer in layers] == ["stem"]
    assert "include" in left_alone["tokens"] and "exclude" in left_alone["late"]


class _Heads(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 1)
        self.right = nn.Conv2d(2, 4, 1)
        self.body = nn.Conv2d(4, 4, 1)
        self.first = nn.Linear(4, 2)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(self.left(x) + self.right(y)).mean((2, 3))
        return self.first(z), self.second(z)


def test_by_default_first_layers_and_classifiers_stay() -> None:
    example = (torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
    layers, left_alone = inspect_layers(_Heads(), example, include=None)
    assert [layer.name for layer in layers] == ["body"]
    assert all(
        "the first layer; search.include = ['*']" in left_alone[n] for n in ("left", "right")
    )
    assert all("the classifier" in left_alone[n] for n in ("first", "second"))
    layers, left_alone = inspect_layers(_Heads(), example, include=("left", "body", "second"))
    assert [layer.name for layer in layers] == ["left", "body", "second"]


def test_exclude_is_told_before_the_default() -> None:
    example = (torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
    _, left_alone = inspect_layers(_Heads(), example, include=None, exclude=("left", "body"))
    assert left_alone["left"] == left_alone["body"] == "search.exclude names it"


def test_a_weight_that_is_used_elsewhere_keeps_its_layer() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called = nn.Linear(4, 4)
            self.read = nn.Linear(4, 4)
            self.plain = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.called(self.plain(x)) @ self.called.weight
            return nn.functional.linear(x, self.read.weight)

    layers, left_alone = inspect_layers(Reader(), (torch.zeros(1, 4),))
    assert [layer.name for layer in layers] == ["plain"]
    assert "also used outside of the layer" in left_alone["called"]
    assert "used without calling the layer" in left_alone["read"]


def test_a_module_in_two_places_is_shared() -> None:
    layer = nn.Conv2d(2, 2, 1)
    layers, left_alone = inspect_layers(nn.Sequential(layer, layer), (torch.zeros(1, 2, 4, 4),))
    assert layers == () and "shared by 0, 1" in left_alone["0"]


def test_a_forward_pass_of_ones_own() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.fc(batch["x"])

    def forward(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
        return model({"x": example[0]})

    (layer,), _ = inspect_layers(Pair(), (torch.zeros(1, 3),), forward)
    assert layer.name == "fc"


def test_the_network_is_left_as_it_was() -> None:
    model = _Tower().train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inspect_layers(model, EXAMPLE)
    assert model.training and model.same.training and not model.norm.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())


def test_hooks_go_away_when_the_forward_pass_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).train()
    with pytest.raises(RuntimeError):
        inspect_layers(model, (torch.zeros(1, 4),))
    assert model.training and not model[0]._forward_hooks


def test_spec_of_keeps_settings() -> None:
    conv = nn.Conv2d(4, 8, 3, padding="same", dilation=(1, 2), groups=2, padding_mode="reflect")
    spec = spec_of("a", conv, (1, 4, 6, 7), (1, 8, 6, 7))
    assert (spec.padding, spec.dilation, spec.groups) == ("same", (1, 2), 2)
    assert (spec.padding_mode, spec.bias, spec.out_size) == ("reflect", True, (6, 7))
    assert spec.weights == 8 * 2 * 9 and spec.cost == Cost(144 + 8, 144 * 42)


@pytest.mark.parametrize("views", [1, 4])
def test_views_that_are_folded_into_the_batch_all_count(views: int) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x.flatten(0, 1))
            return out

    model, example = Views(), (torch.zeros(1, views, 3, 9, 7),)
    (layer,), _ = inspect_layers(model, example)
    assert layer.cost == profile_model(model, example, latency=False).cost
    assert layer.cost.macs == views * layer.weights * 4 * 3


def test_what_gets_nothing_of_the_example_is_left_alone() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.first(x)
            unsure = out.amax(1) > 1e9
            return out.index_put((unsure,), self.second(out[unsure]))

    layers, left_alone = inspect_layers(Late(), (torch.zeros(1, 4),))
    assert [layer.name for layer in layers] == ["first"]
    assert left_alone["second"].startswith("it got nothing of the example image")


def test_times_add_up_where_both_are_known() -> None:
    assert Cost(1, 2, 0.5) + Cost(3, 4, 1.0) == Cost(4, 6, 1.5)
    assert Cost(1, 2, 0.5) + Cost(3, 4) == Cost(4, 6)
