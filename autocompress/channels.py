"""Channel groups: channels that can only be removed together, as plain data, and their removal.

A channel runs through several layers: the one that makes it, its batch norm, the layers that read
it, and, along a residual sum, all others that add to it. `grouping.find_groups` tells which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.errors import ConfigError, UnsupportedLayer
from autocompress.layers import is_depthwise

Side = Literal["in", "out", "both"]


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one layer.

    Channel c is at the positions `offset + c * repeat` to `offset + (c + 1) * repeat - 1`: behind a
    concatenation there is an offset, behind a flattened feature map a repeat.

    Attributes:
        layer: Name of the layer.
        side: The layer reads them ("in"), makes them ("out"), or passes each through by itself
            ("both": batch norm, depthwise convolution, PReLU).
        offset: Position of the first channel.
        repeat: Positions of each channel.
    """

    layer: str
    side: Side
    offset: int = 0
    repeat: int = 1

    def positions(self, channels: Sequence[int]) -> Iterator[int]:
        """Where these channels lie."""
        for channel in channels:
            begin = self.offset + channel * self.repeat
            yield from range(begin, begin + self.repeat)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, from all members at once.

    Attributes:
        name: Name of the first layer that makes them.
        channels: How many there are.
        members: The layers that they run through, in execution order.
        chunks: The same number must be kept in each of so many equal parts: the groups of grouped
            convolutions; 1 for none.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    chunks: int = 1

    def of_side(self, side: Side) -> tuple[Member, ...]:
        """The members of one side."""
        return tuple(member for member in self.members if member.side == side)


@dataclass(frozen=True)
class KeptChannels:
    """Which channels of a group remain.

    Attributes:
        group: The group.
        kept: Their numbers, ascending.
    """

    group: ChannelGroup
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If they are none, out of order or range, or unequal in the chunks.
        """
        group, kept = self.group, self.kept
        if (
            not kept
            or list(kept) != sorted(set(kept))
            or not 0 <= kept[0] <= kept[-1] < group.channels
        ):
            raise ConfigError(
                f"The channels kept of group '{group.name}' are ascending numbers from 0 to "
                f"{group.channels - 1}, at least one, got {list(kept)[:8]}."
            )
        size = group.channels // group.chunks
        counts = [sum(k // size == chunk for k in kept) for chunk in range(group.chunks)]
        if len(set(counts)) > 1:
            raise ConfigError(
                f"Group '{group.name}' runs through a grouped convolution: as many channels must "
                f"be kept in each of its {group.chunks} parts, got {counts}."
            )

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of the other channels."""
        kept = set(self.kept)
        return tuple(c for c in range(self.group.channels) if c not in kept)


def remove_channels(model: nn.Module, kept: Sequence[KeptChannels]) -> nn.Module:
    """A copy of `model` without the other channels of some groups; weights go with their channels.

    Raises:
        ConfigError: If the network lacks a member, or a member has too few channels.
        UnsupportedLayer: If a member is of a type whose channels can't be removed.
    """
    small = deepcopy(model)
    for name, cut in _cuts(small, kept).items():
        module = small.get_submodule(name)
        for key, index in cut.indices.items():
            old = getattr(module, key)
            new = old.detach().flatten()[index.to(old.device)].contiguous()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, key, new)
        for key, value in cut.sizes.items():
            setattr(module, key, value)
    return small


def mute_channels(model: nn.Module, kept: Sequence[KeptChannels]) -> nn.Module:
    """A copy of `model` in which the layers that read the removed channels don't weigh them."""
    whole = deepcopy(model)
    for name in dict.fromkeys(m.layer for part in kept for m in part.group.of_side("in")):
        module = whole.get_submodule(name)
        width_in, width_out = widths(module, name)
        seen = kept_positions(kept, name, "in", width_in)
        index = _cut(module, seen, range(width_out)).indices["weight"]
        weight = module.get_parameter("weight")
        mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        mask[index.flatten().to(mask.device)] = 1.0
        with torch.no_grad():
            weight.mul_(mask.reshape(weight.shape))
    return whole


def restore_channels(small: nn.Module, model: nn.Module, kept: Sequence[KeptChannels]) -> nn.Module:
    """A copy of `model` in which what remains in `small` has the weights that it has there.

    Args:
        small: What `remove_channels` makes of `model`, perhaps trained further.
        model: Gives the weights of the channels that `small` lacks.
        kept: The channels that `small` has.
    """
    full = deepcopy(model)
    cuts = _cuts(full, kept)
    others = small.state_dict()
    state = {
        key: others.pop(key)
        for name, cut in cuts.items()
        for key in (f"{name}.{part}" for part in cut.indices)
    }
    full.load_state_dict(others, strict=False)
    with torch.no_grad():
        for name, cut in cuts.items():
            module = full.get_submodule(name)
            for key, index in cut.indices.items():
                value = getattr(module, key)
                flat = value.detach().clone().flatten()
                flat[index.to(flat.device)] = state[f"{name}.{key}"].to(flat)
                value.copy_(flat.reshape(value.shape))
    return full


def kept_positions(
    kept: Sequence[KeptChannels], layer: str, side: Literal["in", "out"], width: int
) -> list[int]:
    """Which of a layer's `width` input or output channels remain, ascending."""
    removed: set[int] = set()
    for part in kept:
        for member in part.group.members:
            if member.layer == layer and member.side in (side, "both"):
                removed.update(member.positions(part.removed))
    return [position for position in range(width) if position not in removed]


@dataclass(frozen=True)
class _Cut:
    """What remains of one module.

    Attributes:
        indices: Name of each parameter or buffer to the places in it, flattened, that remain, in
            the shape of what remains.
        sizes: Attributes of the module and their new values.
    """

    indices: dict[str, Tensor]
    sizes: dict[str, int]


def _cuts(model: nn.Module, kept: Sequence[KeptChannels]) -> dict[str, _Cut]:
    modules = dict(model.named_modules())
    names = dict.fromkeys(member.layer for part in kept for member in part.group.members)
    cuts = {}
    for name in names:
        if name not in modules:
            raise ConfigError(f"A channel group has layer {name!r}, which the network lacks.")
        module = modules[name]
        width_in, width_out = widths(module, name)
        inputs = kept_positions(kept, name, "in", width_in)
        outputs = kept_positions(kept, name, "out", width_out)
        cuts[name] = _cut(module, inputs, outputs)
    return cuts


def widths(module: nn.Module, name: str) -> tuple[int, int]:
    """Input and output channels of a module."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _BatchNorm):
        return module.num_features, module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters, module.num_parameters
    raise UnsupportedLayer(
        f"Layer {name!r}: no channels can be removed from {type(module).__name__}."
    )


def _cut(module: nn.Module, inputs: Sequence[int], outputs: Sequence[int]) -> _Cut:
    if isinstance(module, nn.Conv2d):
        depthwise = is_depthwise(module)
        index = _remaining_weights(module, inputs, outputs)
        sizes = {"in_channels": len(inputs), "out_channels": len(outputs)}
        if depthwise:
            sizes["groups"] = len(outputs)
        indices = {"weight": index}
    elif isinstance(module, nn.Linear):
        places = torch.arange(module.weight.numel()).reshape(module.weight.shape)
        indices = {"weight": places[list(outputs)][:, list(inputs)]}
        sizes = {"in_features": len(inputs), "out_features": len(outputs)}
    elif isinstance(module, _BatchNorm):
        indices, sizes = {}, {"num_features": len(outputs)}
        for key in ("weight", "running_mean", "running_var"):
            if getattr(module, key) is not None:
                indices[key] = torch.tensor(outputs)
    else:
        indices, sizes = {"weight": torch.tensor(outputs)}, {"num_parameters": len(outputs)}
    if getattr(module, "bias", None) is not None:
        indices["bias"] = torch.tensor(outputs)
    return _Cut(indices, sizes)


def _remaining_weights(module: nn.Conv2d, inputs: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """Places in a kernel, flattened, of the inputs and outputs that remain."""
    places = torch.arange(module.weight.numel()).reshape(module.weight.shape)
    if is_depthwise(module):
        return places[list(outputs)]
    # Each group of outputs sees its own chunk of the inputs, counted from the chunk's first.
    size_in, size_out = module.in_channels // module.groups, module.out_channels // module.groups
    parts = []
    for group in range(module.groups):
        own = [o for o in outputs if o // size_out == group]
        seen = [i - group * size_in for i in inputs if i // size_in == group]
        parts.append(places[own][:, seen])
    return torch.cat(parts)
