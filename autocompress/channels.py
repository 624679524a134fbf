"""Channel groups: channels that can only be removed together, found once and then plain data.

A channel runs through several layers: the one that makes it, its batch norm, the layers that read
it, and, along a residual sum, all others that add to it. Torch-Pruning's dependency graph (Fang et
al. 2023, arXiv 2301.12900) tells which; each group is then checked on the network itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.batch import tensors_in
from autocompress.errors import ConfigError, UnsupportedLayer
from autocompress.layers import LayerSpec, is_depthwise

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
        width_in, width_out = _widths(module, name)
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
                removed.update(_positions(member, part.removed))
    return [position for position in range(width) if position not in removed]


def _positions(member: Member, channels: Sequence[int]) -> Iterator[int]:
    for channel in channels:
        begin = member.offset + channel * member.repeat
        yield from range(begin, begin + member.repeat)


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
        width_in, width_out = _widths(module, name)
        inputs = kept_positions(kept, name, "in", width_in)
        outputs = kept_positions(kept, name, "out", width_out)
        cuts[name] = _cut(module, inputs, outputs)
    return cuts


def _widths(module: nn.Module, name: str) -> tuple[int, int]:
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


def find_groups(
    model: nn.Module,
    example: tuple[Tensor, ...],
) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """Find the channel groups of a network, and check each of them on it.

    The check: the network without half of a group's channels must compute what the whole one does
    when nobody reads them. So a group that was traced wrongly is never offered.

    Args:
        model: The network; left as it is.
        example: Its inputs for one image.

    Returns:
        The groups in execution order, and why others can't be used: name to reason.
    """
    work = deepcopy(model).eval().requires_grad_(True)
    device = next((parameter.device for parameter in work.parameters()), torch.device("cpu"))
    inputs = tuple(value.to(device) for value in example)
    try:
        traced = _trace(work, inputs)
    except Exception as error:  # the graph's own code may stumble over any network
        reason = f"{type(error).__name__}: {error}"
        return (), {"*": f"Torch-Pruning's graph can't follow its channels ({reason})"}
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    order = {name: place for place, name in enumerate(dict(work.named_modules()))}
    for items in sorted(traced, key=lambda rows: order.get(_first(rows, order), 0)):
        name = _first(items, order)
        try:
            groups.append(_group_of(work, name, items))
        except UnsupportedLayer as error:
            refused[name] = str(error)
    good = _checked(work, inputs, groups, refused)
    return tuple(good), refused


def removable(
    groups: Sequence[ChannelGroup],
    layers: Sequence[LayerSpec],
    every: Sequence[LayerSpec],
    left_alone: Mapping[str, str],
    refused: dict[str, str],
    ends: Collection[str] = (),
) -> tuple[ChannelGroup, ...]:
    """The groups that the user's patterns leave free.

    Args:
        groups: From `find_groups`.
        layers: Layers that may be transformed.
        every: All layers that could be.
        left_alone: Why the others of these may not.
        refused: Takes the reasons of the groups that are not returned.
        ends: Layers that stay by default: what they read may become less, but not what they make.
    """
    free, known = {layer.name for layer in layers}, {layer.name for layer in every}
    found = []
    for group in groups:
        weighted = [m for m in group.members if m.layer in known or m.side != "both"]
        blocked = next(
            (
                member.layer
                for member in weighted
                if member.layer not in free and not (member.side == "in" and member.layer in ends)
            ),
            None,
        )
        if blocked is None:
            found.append(group)
        else:
            why = left_alone.get(blocked, "it can't be changed")
            refused[group.name] = f"its channels run through {blocked}: {why}"
    return tuple(found)


@dataclass(frozen=True)
class _Item:
    """One layer of a traced group: which of its positions go with which channel."""

    name: str
    module: object
    side: Literal["in", "out"]
    positions: Sequence[int]
    channels: Sequence[int]


def _trace(work: nn.Module, inputs: tuple[Tensor, ...]) -> list[list[_Item]]:
    """Torch-Pruning's groups, as plain rows."""
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            work, inputs, forward_fn=lambda net, values: net(*values), verbose=False
        )
        names = {module: name for name, module in work.named_modules()}
        found = []
        for group in graph.get_all_groups():
            rows = []
            for item in group:
                module = item.dep.target.module
                inward = graph.is_in_channel_pruning_fn(item.dep.handler)
                outward = graph.is_out_channel_pruning_fn(item.dep.handler)
                side: Literal["in", "out"] = "in" if inward and not outward else "out"
                name = names.get(module, type(module).__name__)
                rows.append(_Item(name, module, side, list(item.idxs), list(item.root_idxs)))
            found.append(rows)
    return found


def _first(items: Sequence[_Item], order: Mapping[str, int]) -> str:
    """The first layer that makes a traced group's channels."""
    makers = [i.name for i in items if i.side == "out" and _makes_channels(i.module)]
    return min(makers or [items[0].name], key=lambda name: order.get(name, len(order)))


def _makes_channels(module: object) -> bool:
    if isinstance(module, nn.Conv2d):
        return not is_depthwise(module)
    return isinstance(module, nn.Linear)


def _group_of(work: nn.Module, name: str, items: Sequence[_Item]) -> ChannelGroup:
    """A traced group as data.

    Raises:
        UnsupportedLayer: If a part of it can't lose channels.
    """
    modules = dict(work.named_modules())
    order = {name: place for place, name in enumerate(modules)}
    channels = len(items[0].positions)
    members: dict[Member, None] = {}
    chunks = 1
    for item in items:
        module = item.module
        if item.name not in modules or modules[item.name] is not module:
            if type(module).__name__ == "_OutputOp":
                raise UnsupportedLayer("its channels are outputs of the network")
            if isinstance(module, nn.Parameter):
                raise UnsupportedLayer("its channels run through a parameter outside any layer")
            continue  # a mere operation, such as a sum or a concatenation
        assert isinstance(module, nn.Module)
        side: Side = item.side
        if isinstance(module, _BatchNorm | nn.PReLU):
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                continue
            side = "both"
        elif isinstance(module, nn.Conv2d) and is_depthwise(module):
            side = "both"
        elif type(module) not in (nn.Conv2d, nn.Linear):
            if not any(True for _ in module.parameters()):
                continue
            raise UnsupportedLayer(
                f"its channels run through {item.name} ({type(module).__name__})"
            )
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            chunks = lcm(chunks, module.groups)
        members[_member(item, side, channels)] = None
    if not any(member.side == "in" for member in members):
        raise UnsupportedLayer("no layer reads its channels: they are outputs of the network")
    if channels % chunks or channels == chunks:
        raise UnsupportedLayer(f"its {channels} channels do not split into {chunks} groups")
    for member in members:
        module = modules[member.layer]
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1 and member.side != "both"
        if grouped and (member.offset or member.repeat > 1 or _width(module, member) != channels):
            raise UnsupportedLayer(f"{member.layer} groups its channels with others")
    ordered = tuple(sorted(members, key=lambda member: order[member.layer]))
    return ChannelGroup(name, channels, ordered, chunks)


def _width(module: nn.Module, member: Member) -> int:
    return _widths(module, member.layer)[member.side == "out"]


def _member(item: _Item, side: Side, channels: int) -> Member:
    """A row with its positions as offset and repeat.

    Raises:
        UnsupportedLayer: If they don't lie so.
    """
    own: dict[int, list[int]] = {}
    for channel, position in zip(item.channels, item.positions, strict=True):
        own.setdefault(channel, []).append(position)
    repeat = len(item.positions) // channels
    offset = min(item.positions, default=0)
    member = Member(item.name, side, offset, max(repeat, 1))
    if any(sorted(own.get(c, ())) != list(_positions(member, [c])) for c in range(channels)):
        raise UnsupportedLayer(f"its channels are mixed with others before {item.name}")
    return member


def _checked(
    work: nn.Module,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
    refused: dict[str, str],
) -> list[ChannelGroup]:
    """The groups that can be removed; all at once where that goes, else one by one."""
    trained = _trains_more(work, inputs)
    if _fault(work, inputs, groups, trained) is None:
        return list(groups)
    good = []
    for group in groups:
        reason = _fault(work, inputs, [group], trained)
        if reason is None:
            good.append(group)
        else:
            refused[group.name] = reason
    reason = _fault(work, inputs, good, trained)
    if reason is not None:
        for group in good:
            refused[group.name] = f"together with others {reason}"
        return []
    return good


def _trains_more(work: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether layers run in training that don't run otherwise, as auxiliary classifiers do.

    The graph is traced as the network is used, and knows nothing of them.
    """

    def ran(training: bool) -> set[str]:
        net = deepcopy(work).train(training)
        seen: set[str] = set()
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda *_, name=name: seen.add(name))
        with torch.no_grad():
            net(*_twice(inputs))
        return seen

    try:
        return bool(ran(True) - ran(False))
    except Exception:  # it does not train on such inputs, whatever its channels
        return False


def _twice(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch of two, which batch norms need in training."""
    return tuple(torch.cat([value, value]) for value in inputs)


def _fault(
    work: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[ChannelGroup], trained: bool
) -> str | None:
    """What goes wrong when half of the channels of some groups are removed; None if nothing.

    Where layers run in training alone (`trained`), the network must run in training, too.
    """
    if not groups:
        return None
    kept = [KeptChannels(group, _later_half(group)) for group in groups]
    try:
        with torch.no_grad():
            small, inside = _computed(remove_channels(work, kept), inputs, groups)
            whole, inside_whole = _computed(mute_channels(work, kept), inputs, groups)
    except Exception as error:  # whatever the network's own code raises at other shapes
        first = str(error).split("\n")[0]
        return f"without some of its channels the network fails: {type(error).__name__}: {first}"
    if trained:
        try:
            with torch.no_grad():
                remove_channels(work, kept).train()(*_twice(inputs))
        except Exception as error:
            first = str(error).split("\n")[0]
            return (
                "layers that run in training alone read its channels "
                f"({type(error).__name__}: {first})"
            )
    if not any(value.numel() for value in (*small, *whole)):
        # A detector that finds nothing would agree with any other; what it looks at tells more.
        small, whole = inside, inside_whole
    for one, other in zip(small, whole, strict=True):
        if one.shape != other.shape:
            return "its channels are outputs of the network"
        if other.numel() and not torch.allclose(
            one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())
        ):
            return "without some of its channels the others are computed differently"
    if not any(other.numel() for other in whole):
        return "the network's outputs for an image are empty, so nothing can be compared"
    return None


def _computed(
    network: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[ChannelGroup]
) -> tuple[list[Tensor], list[Tensor]]:
    """A network's outputs, and those of all layers that keep their channels, call by call."""
    changed = {m.layer for group in groups for m in group.members if m.side != "in"}
    seen: list[Tensor] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in changed:
            module.register_forward_hook(lambda _, __, output: seen.append(output))
    return list(tensors_in(network(*inputs))), seen


def _later_half(group: ChannelGroup) -> tuple[int, ...]:
    """The later half of each chunk, so that no offset goes unnoticed."""
    size = group.channels // group.chunks
    half = max(1, size // 2)
    return tuple(c for c in range(group.channels) if c % size >= size - half)
