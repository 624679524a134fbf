"""How the channel groups of a network are found, and each of them checked on the network itself.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) tells which layers a channel
runs through.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.batch import tensors_in
from autocompress.channels import (
    ChannelGroup,
    KeptChannels,
    Member,
    Side,
    mute_channels,
    remove_channels,
    widths,
)
from autocompress.errors import UnsupportedLayer
from autocompress.layers import LayerSpec, is_depthwise

MOST_POSITIONS = 2**19
"""Positions of a group's channels in all layers, beyond which it is not followed: many more than
flat feature maps have."""


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
    # What a network keeps of a forward pass with derivatives can't be copied with it any more.
    followed = deepcopy(work)
    try:
        traced, refused = _trace(followed, inputs)
    except Exception as error:  # the graph's own code may stumble over any network
        return (), {"*": _not_followed(error)}
    groups: list[ChannelGroup] = []
    order = {name: place for place, name in enumerate(dict(followed.named_modules()))}
    for items in sorted(traced, key=lambda rows: order.get(_first(rows, order), 0)):
        name = _first(items, order)
        try:
            groups.append(_group_of(followed, name, items))
        except UnsupportedLayer as error:
            refused[name] = str(error)
    good = _checked(work, inputs, groups, refused)
    return tuple(good), refused


def removable(
    groups: Sequence[ChannelGroup],
    layers: Sequence[LayerSpec],
    left_alone: Mapping[str, str],
    refused: dict[str, str],
    ends: Collection[str] = (),
) -> tuple[ChannelGroup, ...]:
    """The groups that only run through layers that may change.

    Args:
        groups: From `find_groups`.
        layers: Layers that may be transformed.
        left_alone: Why others with weights may not.
        refused: Takes the reasons of the groups that are not returned.
        ends: Layers that stay by default: what they read may become less, but not what they make.
    """
    free = {layer.name for layer in layers}
    found = []
    for group in groups:
        # What only passes channels on, such as batch norm, is in neither.
        weighted = [m for m in group.members if m.layer in left_alone or m.side != "both"]
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


def _trace(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[list[list[_Item]], dict[str, str]]:
    """Torch-Pruning's groups as plain rows, and the layers whose groups can't be followed."""
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad(), _shuffles_unmapped():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, inputs, forward_fn=lambda net, values: net(*values), verbose=False
        )
    names = {module: name for name, module in model.named_modules()}
    found: list[list[_Item]] = []
    refused: dict[str, str] = {}
    made: set[object] = set()
    for module in graph.module2node:
        if module in made or not _makes_channels(module):
            continue
        try:
            met = _follow(graph, module)
        except Exception as error:  # of one layer; the others' groups may be fine
            refused[names[module]] = _not_followed(error)
            continue
        rows = []
        for (node, handler), channels in met.items():
            inward = graph.is_in_channel_pruning_fn(handler)
            outward = graph.is_out_channel_pruning_fn(handler)
            if outward:
                made.add(node.module)
            side: Literal["in", "out"] = "in" if inward and not outward else "out"
            name = names.get(node.module, type(node.module).__name__)
            rows.append(_Item(name, node.module, side, list(channels), list(channels.values())))
        found.append(rows)
    return found, refused


@contextmanager
def _shuffles_unmapped() -> Iterator[None]:
    """A block in which a reshape behind which Torch-Pruning finds no channels is left as it is.

    It divides by their number, so one channel shuffle (ShuffleNet's) costs all groups. What runs
    through such a reshape is followed wrongly then, and fails the check; all else is found.
    """
    from torch_pruning.dependency import index_mapping

    update = index_mapping.update_reshape_index_mapping

    def tolerant(graph: Any, node: Any) -> None:
        with suppress(ZeroDivisionError):
            update(graph, node)

    index_mapping.update_reshape_index_mapping = tolerant
    try:
        yield
    finally:
        index_mapping.update_reshape_index_mapping = update


def _not_followed(error: Exception) -> str:
    if isinstance(error, UnsupportedLayer):
        return str(error)
    return f"Torch-Pruning's graph can't follow its channels ({type(error).__name__}: {error})"


def _follow(graph: Any, root: nn.Module) -> dict[tuple[Any, Any], dict[int, int]]:
    """Where the channels that a layer makes go, along the edges of a dependency graph.

    Torch-Pruning's own `get_pruning_group` follows a channel anew whenever it comes to a layer in
    other company, which takes minutes where sums of parts meet (timm's ReXNet), and never ends
    where attention repeats channels.

    Args:
        graph: A `torch_pruning.DependencyGraph`.
        root: The layer.

    Returns:
        A node of the graph and what removes channels there, to positions and their channels.

    Raises:
        UnsupportedLayer: If there are more than `MOST_POSITIONS` of them.
    """
    from torch_pruning._helpers import _HybridIndex

    pruner = graph.get_pruner_of_module(root)
    start = [_HybridIndex(channel, channel) for channel in range(pruner.get_out_channels(root))]
    met: dict[tuple[Any, Any], dict[Any, None]] = {}
    total = 0
    waiting = [(graph.module2node[root], pruner.prune_out_channels, start)]
    while waiting:
        node, handler, arrived = waiting.pop()
        known = met.setdefault((node, handler), {})
        new = [place for place in arrived if place not in known]
        if not new:
            continue
        known |= dict.fromkeys(new)
        total += len(new)
        _need_few(total)
        for edge in node.dependencies:
            if edge.is_triggered_by(handler):
                waiting.append((edge.target, edge.handler, _behind(edge, new)))
    return {key: _first_at_each(places) for key, places in met.items() if places}


def _first_at_each(places: Iterable[Any]) -> dict[int, int]:
    """Position to channel; where several channels come to one it is the first one's."""
    found: dict[int, int] = {}
    for place in places:
        found.setdefault(place.idx, place.root_idx)
    return found


def _behind(edge: Any, places: list[Any]) -> list[Any]:
    """The places of channels as they lie behind an edge of a dependency graph."""
    for mapping in edge.index_mapping:
        if mapping is None:
            continue
        backward = getattr(mapping, "reverse", False)
        _need_few(len(places) * (1 if backward else getattr(mapping, "_stride", 1)))
        places = mapping(places)
    return places


def _need_few(positions: int) -> None:
    if positions > MOST_POSITIONS:
        raise UnsupportedLayer(
            f"its channels come to more than {MOST_POSITIONS:,} positions in the layers behind them"
        )


def _first(items: Sequence[_Item], order: Mapping[str, int]) -> str:
    """The first layer that makes a traced group's channels."""
    makers = [i.name for i in items if i.side == "out" and _makes_channels(i.module)]
    return min(makers or [items[0].name], key=lambda name: order.get(name, len(order)))


def _makes_channels(module: object) -> bool:
    if isinstance(module, nn.Conv2d):
        return not is_depthwise(module)
    return isinstance(module, nn.Linear)


def _group_of(model: nn.Module, name: str, items: Sequence[_Item]) -> ChannelGroup:
    """A traced group as data.

    Raises:
        UnsupportedLayer: If a part of it can't lose channels.
    """
    modules = dict(model.named_modules())
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
    return widths(module, member.layer)[member.side == "out"]


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
    if any(sorted(own.get(c, ())) != list(member.positions([c])) for c in range(channels)):
        raise UnsupportedLayer(f"its channels are mixed with others before {item.name}")
    return member


def _checked(
    work: nn.Module,
    inputs: tuple[Tensor, ...],
    groups: Sequence[ChannelGroup],
    refused: dict[str, str],
) -> list[ChannelGroup]:
    """The groups that can be removed; of those that can't lose channels together the first ones."""
    trained = _trains_more(work, inputs)
    if _fault(work, inputs, groups, trained) is None:
        return list(groups)

    def sound(some: Sequence[ChannelGroup]) -> Iterator[ChannelGroup]:
        """Those that can be removed, found by halves, for few can't as a rule."""
        half = len(some) // 2
        for part in (some[:half], some[half:]):
            reason = _fault(work, inputs, part, trained)
            if reason is None:
                yield from part
            elif len(part) > 1:
                yield from sound(part)
            else:
                refused[part[0].name] = reason

    good = list(sound(groups))
    if _fault(work, inputs, good, trained) is None:
        return good
    together: list[ChannelGroup] = []
    for group in good:
        reason = _fault(work, inputs, [*together, group], trained)
        if reason is None:
            together.append(group)
        else:
            refused[group.name] = f"together with others {reason}"
    return together


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
    for choose in (_later_half, _every_other) if groups else ():
        kept = [KeptChannels(group, choose(group)) for group in groups]
        reason = _fault_without(work, inputs, kept, trained)
        if reason is not None:
            return reason
    return None


def _fault_without(
    work: nn.Module, inputs: tuple[Tensor, ...], kept: Sequence[KeptChannels], trained: bool
) -> str | None:
    """What goes wrong when these channels alone remain; None if nothing."""
    groups = [part.group for part in kept]
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
    if [one.shape for one in small] != [other.shape for other in whole]:
        return "its channels are outputs of the network"
    for one, other in zip(small, whole, strict=True):
        if other.dtype == torch.bool:  # a mask, which knows no small differences
            one, other = one.float(), other.float()
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


def _every_other(group: ChannelGroup) -> tuple[int, ...]:
    """Every other channel of each chunk, an odd number of them: a half may be whole parts of a
    fixed size that a network reshapes its channels to, such as the heads of an attention."""
    size = group.channels // group.chunks
    own = range(0, size - 2 if size % 4 in (0, 3) and size > 2 else size, 2)
    return tuple(c for c in range(group.channels) if c % size in own)
