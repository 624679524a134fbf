"""Channel groups: found, checked, removed and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from conftest import TinyNet
from torch import Tensor, nn

from autocompress.channels import (
    ChannelGroup,
    KeptChannels,
    Member,
    kept_positions,
    remove_channels,
    restore_channels,
)
from autocompress.errors import ConfigError, UnsupportedLayer
from autocompress.grouping import MOST_POSITIONS, _fault, find_groups, removable
from autocompress.layers import inspect_layers

SIZE = 8


def conv(ins: int, outs: int, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, padding=size // 2, **more)


class Residual(nn.Module):
    """A stem whose channels a block adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.inner = conv(8, 12)
        self.bn = nn.BatchNorm2d(12)
        self.back = conv(12, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.bn(self.inner(x)).relu())
        return self.fc(x.relu().mean((2, 3)))


class Dense(nn.Module):
    """Two branches, concatenated, normed, and read by a flattening classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 6), conv(3, 10)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * SIZE * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.fc(x.flatten(1))


class Depthwise(nn.Module):
    def __init__(self, groups: int = 12) -> None:
        super().__init__()
        self.expand = conv(3, 12, 1)
        self.act = nn.PReLU(12)
        self.middle = conv(12, 12, groups=groups)
        self.project = conv(12, 7, 1)
        self.head = conv(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.middle(self.act(self.expand(x))).relu()).relu()
        return self.head(x).mean((2, 3))


class Shuffled(nn.Module):
    """The channels of a layer change places before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.two(x).mean((2, 3))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = conv(3, 8), nn.GroupNorm(2, 8), conv(8, 5)
        self.three = conv(5, 5)
        self.scale = nn.Parameter(torch.rand(5, 1, 1))
        self.four = conv(5, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.norm(self.one(x)).relu()).relu()) * self.scale
        return self.fc(self.four(x).relu().mean((2, 3)))


class Attention(nn.Module):
    """Heads of eight channels each, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.query, self.key, self.value = (nn.Linear(16, 32) for _ in range(3))
        self.mix, self.fc = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).relu().flatten(2).transpose(1, 2)
        count, length, _ = tokens.shape
        query, key, value = (
            part(tokens).reshape(count, length, -1, 8).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        seen = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        mixed = self.mix(seen.transpose(1, 2).reshape(count, length, -1))
        return self.fc(mixed.relu().mean(1))


class Reused(nn.Module):
    """One layer is called twice: its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    """The network with weights of a fixed seed and batch norms that do something, to evaluate."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def groups_of(
    model: nn.Module, channels: int = 3
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    groups, refused = find_groups(model, (torch.randn(1, channels, SIZE, SIZE),))
    return {group.name: group for group in groups}, refused


def members(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(member.layer, member.side) for member in group.members}


def test_a_chain() -> None:
    found, refused = groups_of(TinyNet().eval(), channels=1)
    assert members(found["stem"]) == {("stem", "out"), ("bn1", "both"), ("conv", "in")}
    assert members(found["conv"]) == {("conv", "out"), ("bn2", "both"), ("fc", "in")}
    assert found["conv"].channels == 32 and found["conv"].chunks == 1
    assert list(refused) == ["fc"] and "outputs of the network" in refused["fc"]


def test_a_residual_sum_couples_what_adds_and_what_reads() -> None:
    found, _ = groups_of(randomized(Residual()))
    assert members(found["stem"]) == {
        ("stem", "out"),
        ("inner", "in"),
        ("back", "out"),
        ("fc", "in"),
    }
    assert members(found["inner"]) == {("inner", "out"), ("bn", "both"), ("back", "in")}


def test_behind_a_concatenation_and_a_flattening() -> None:
    found, _ = groups_of(randomized(Dense()))
    area = SIZE * SIZE
    assert set(found["right"].members) == {
        Member("right", "out"),
        Member("bn", "both", offset=6),
        Member("fc", "in", offset=6 * area, repeat=area),
    }
    assert Member("bn", "both") in found["left"].members


def test_depthwise_and_grouped_convolutions() -> None:
    found, _ = groups_of(randomized(Depthwise()))
    assert ("middle", "both") in members(found["expand"])
    assert ("act", "both") in members(found["expand"])
    found, _ = groups_of(randomized(Depthwise(groups=4)))
    assert found["expand"].chunks == found["middle"].chunks == 4
    assert ("middle", "in") in members(found["expand"])


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Shuffled(), "one", "computed differently"),
        (Normed(), "one", "norm (GroupNorm)"),
        (Normed(), "three", "parameter outside any layer"),
    ],
)
def test_what_can_not_be_removed_is_refused_with_a_reason(
    model: nn.Module, name: str, reason: str
) -> None:
    found, refused = groups_of(randomized(model))
    assert name not in found
    assert reason in refused[name]


def test_parts_of_a_fixed_size_stay_whole() -> None:
    """Half of the channels are whole heads; most other numbers are not."""
    found, refused = groups_of(randomized(Attention()))
    assert set(found) == {"stem", "mix"}
    assert "the network fails" in refused["query"]


def test_as_many_outputs_as_channels() -> None:
    class Unbound(Residual):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x).relu()
            logits = self.fc(self.back(self.inner(x)).mean((2, 3)))
            return logits, [logits.new_zeros(()) for _ in range(x.shape[1])]

    found, refused = groups_of(randomized(Unbound()))
    assert "stem" not in found and refused["stem"] == "its channels are outputs of the network"


def test_of_a_network_with_a_wrong_group_the_others_remain() -> None:
    found, _ = groups_of(randomized(Normed()))
    assert {"two", "four"} <= set(found)


def test_of_groups_that_can_not_lose_channels_together_the_first_remain() -> None:
    class Wide(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if self.stem.out_channels + self.inner.out_channels < 13:
                raise ValueError("too narrow")
            return super().forward(x)

    found, refused = groups_of(randomized(Wide()))
    assert set(found) == {"stem"}
    assert refused["inner"] == (
        "together with others without some of its channels the network fails: "
        "ValueError: too narrow"
    )


def test_a_layer_that_is_called_twice_is_never_offered_wrongly(images: Tensor) -> None:
    model = randomized(Reused())
    found, _ = groups_of(model)
    for group in found.values():
        small = remove_channels(model, [KeptChannels(group, tuple(range(4)))])
        assert small(images).shape == (4, 5)


MODELS = [Residual(), Dense(), Depthwise(), Depthwise(groups=4)]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_without_channels_that_nobody_reads_it_computes_the_same(
    model: nn.Module, images: Tensor
) -> None:
    """Where the readers' weights for a channel are zero, the channel makes no difference."""
    model = randomized(model)
    found, _ = groups_of(model)
    kept = []
    for group in found.values():
        size = group.channels // group.chunks
        chosen = tuple(c for c in range(group.channels) if c % size != 0 or size == 1)
        kept.append(KeptChannels(group, chosen))
    with torch.no_grad():
        for part in kept:
            for member in part.group.of_side("in"):
                layer = model.get_submodule(member.layer)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                per_group = layer.weight.shape[1]
                for channel in part.removed:
                    for place in range(member.repeat):
                        position = member.offset + channel * member.repeat + place
                        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                            own = layer.out_channels // layer.groups
                            rows = slice(
                                position // per_group * own, (position // per_group + 1) * own
                            )
                            layer.weight[rows, position % per_group] = 0.0
                        else:
                            layer.weight[:, position] = 0.0
    small = remove_channels(model, kept)
    torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-5)
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < before
    for part in kept:
        layer = small.get_submodule(part.group.name)
        assert isinstance(layer, nn.Conv2d)
        assert layer.out_channels == len(part.kept) == len(layer.weight)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_what_was_removed_can_be_put_back(model: nn.Module, images: Tensor) -> None:
    model = randomized(model)
    found, _ = groups_of(model)
    kept = [
        KeptChannels(g, tuple(c for c in range(g.channels) if c % (g.channels // g.chunks)))
        for g in found.values()
    ]
    small = remove_channels(model, kept)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter))
    full = restore_channels(small, model, kept)
    assert {k: v.shape for k, v in full.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    again = remove_channels(full, kept)
    torch.testing.assert_close(again.state_dict(), small.state_dict())
    name = next(iter(found))
    gone = kept[0].removed[0]
    old, new = (m.get_submodule(name).get_parameter("weight") for m in (model, full))
    torch.testing.assert_close(old[gone], new[gone])


def test_the_network_itself_is_left_as_it_is(images: Tensor) -> None:
    model = randomized(Residual()).train()
    model.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, _ = groups_of(model)
    small = remove_channels(model, [KeptChannels(found["stem"], (1, 2))])
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model.training and not small.get_submodule("stem").weight.requires_grad
    assert small.get_submodule("fc").weight.requires_grad
    assert small.get_submodule("fc").weight.shape == (5, 2)


def test_positions_of_a_layer_that_several_groups_share() -> None:
    found, _ = groups_of(randomized(Dense()))
    kept = [
        KeptChannels(found["left"], (0, 5)),
        KeptChannels(found["right"], (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ]
    assert kept_positions(kept, "bn", "out", 16) == [0, 5, *range(7, 16)]
    assert kept_positions(kept, "left", "in", 3) == [0, 1, 2]


@pytest.mark.parametrize("kept", [(), (2, 1), (0, 0), (0, 8), (-1, 0)])
def test_numbers_that_are_no_channels_are_refused(kept: tuple[int, ...]) -> None:
    group = ChannelGroup("a", 8, (Member("a", "out"),))
    with pytest.raises(ConfigError, match="from 0 to 7"):
        KeptChannels(group, kept)


def test_a_grouped_convolution_keeps_as_many_in_each_part() -> None:
    group = ChannelGroup("a", 8, (Member("a", "out"),), chunks=2)
    KeptChannels(group, (0, 5))
    with pytest.raises(ConfigError, match=r"each of its 2 parts, got \[2, 0\]"):
        KeptChannels(group, (0, 1))


def test_a_member_that_the_network_lacks_is_named() -> None:
    group = ChannelGroup("gone", 8, (Member("gone", "out"),))
    with pytest.raises(ConfigError, match="'gone'"):
        remove_channels(TinyNet(), [KeptChannels(group, (0,))])
    group = ChannelGroup("pool", 8, (Member("0", "out"),))
    with pytest.raises(UnsupportedLayer, match="GroupNorm"):
        remove_channels(nn.Sequential(nn.GroupNorm(2, 8)), [KeptChannels(group, (0,))])


def test_a_layer_that_must_stay_keeps_its_channels() -> None:
    model = randomized(Residual())
    example = (torch.randn(1, 3, SIZE, SIZE),)
    groups, refused = find_groups(model, example)
    layers, left_alone = inspect_layers(model, example, exclude=["back"])
    assert removable(groups, layers, left_alone, refused) == ()
    assert refused["stem"] == "its channels run through back: search.exclude names it"
    layers, left_alone = inspect_layers(model, example, include=None)
    free = removable(groups, layers, left_alone, refused, ends={"stem", "fc"})
    assert [group.name for group in free] == ["inner"]
    assert "its channels run through stem: " in refused["stem"]
    layers, left_alone = inspect_layers(model, example, exclude=["fc"])
    free = removable(groups, layers, left_alone, refused)
    assert [group.name for group in free] == ["inner"]


def test_a_layer_that_can_not_change_passes_no_channels_that_do() -> None:
    """A depthwise convolution that is called twice would count once in the costs."""

    class Twice(Depthwise):
        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(self.middle(self.act(self.expand(x))).relu())
            return self.head(self.project(x.relu()).relu()).mean((2, 3))

    model, example = randomized(Twice()), (torch.randn(1, 3, SIZE, SIZE),)
    groups, refused = find_groups(model, example)
    assert {group.name for group in groups} == {"expand", "project"}
    layers, left_alone = inspect_layers(model, example)
    free = removable(groups, layers, left_alone, refused)
    assert [group.name for group in free] == ["project"]
    assert "through middle: it was called 2 times" in refused["expand"]


def test_an_output_may_be_a_mask() -> None:
    class Sure(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.one, self.two, self.fc, self.by = conv(3, 8), conv(8, 8), nn.Linear(8, 2), by

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            inner = self.one(x).relu()
            logits = self.fc(self.two(inner).relu().mean((2, 3)))
            # By the mean of the channels: fewer of them make another mask.
            sure = logits > 0 if self.by else inner.mean(1) > inner.mean(1).mean()
            return {"logits": logits, "sure": sure}

    torch.manual_seed(0)
    example = (torch.randn(1, 3, SIZE, SIZE),)
    assert {g.name for g in find_groups(Sure(1).eval(), example)[0]} == {"one", "two"}
    assert {g.name for g in find_groups(Sure(0).eval(), example)[0]} == {"two"}


def test_a_network_that_can_not_be_traced_has_no_groups() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("only without derivatives")
            return self.conv(x).mean((2, 3))

    groups, refused = find_groups(Fails(), (torch.randn(1, 3, SIZE, SIZE),))
    assert groups == ()
    assert "follow its channels (RuntimeError: only without derivatives" in refused["*"]


def test_of_a_network_that_counts_channels_in_circles_the_other_groups_remain() -> None:
    # Its attention repeats each channel, and a graph that goes on there never comes to an end.
    network = torchvision.models.swin_t().eval()
    groups, refused = find_groups(network, (torch.randn(1, 3, 224, 224),))
    assert len(groups) > 10
    assert any(f"than {MOST_POSITIONS:,} positions" in reason for reason in refused.values())


class Finder(Residual):
    """Hands out what is above a threshold, as detectors do."""

    threshold = float("inf")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return {"scores": found[found > self.threshold]}


class Biased(Finder):
    """Reads its stem's channels in a way that no graph shows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x * len(self.stem.weight))


def test_a_channel_shuffle_spoils_only_the_groups_that_run_through_it() -> None:
    """Half of a block passes, half is computed, and both are interleaved."""
    model = torchvision.models.ShuffleNetV2([3, 3, 3], [8, 8, 16, 24, 32], num_classes=5).eval()
    groups, refused = find_groups(model, (torch.randn(1, 3, 64, 64),))
    inner = {f"stage{stage}.{block}.branch2.0" for stage in (2, 3, 4) for block in range(3)}
    assert {group.name for group in groups} == {"conv1.0", *inner, "conv5.0"}
    assert "stage3.0.branch1.2" in refused


@pytest.mark.parametrize("threshold", [float("inf"), float("-inf")])
def test_of_a_network_that_finds_nothing_the_layers_are_compared(threshold: float) -> None:
    torch.manual_seed(0)
    found = {}
    for made in (Finder, Biased):
        network = made().eval()
        network.threshold = threshold
        groups, _ = find_groups(network, (torch.randn(1, 3, SIZE, SIZE),))
        found[made] = [group.name for group in groups]
    assert found == {Finder: ["stem", "inner"], Biased: ["inner"]}


def test_what_finds_nothing_and_has_no_other_layers_can_not_be_checked() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x).sum((1, 2, 3))[:0]

    group = ChannelGroup("stem", 8, (Member("stem", "out"),))
    reason = _fault(Bare(), (torch.randn(1, 3, SIZE, SIZE),), [group], trained=False)
    assert reason is not None and "nothing can be compared" in reason


def test_channels_that_an_auxiliary_classifier_reads_stay() -> None:
    class Auxiliary(nn.Module):
        """Its second head runs in training alone."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = conv(3, 8), conv(8, 8), conv(8, 8)
            self.extra, self.head = conv(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.one(x))
            if self.training:
                return self.head(self.three(x).mean((2, 3))) + self.extra(x).mean((2, 3))
            return self.head(self.three(x).mean((2, 3)))

    groups, refused = find_groups(Auxiliary(), (torch.randn(1, 3, SIZE, SIZE),))
    assert {group.name for group in groups} == {"one", "three"}
    assert "layers that run in training alone read its channels" in refused["two"]
