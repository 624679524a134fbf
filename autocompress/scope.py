"""What the study file lets the search do to which layers, and what that leaves of the layer table.

All of it acts before the search begins, so nothing after the layer table needs to know of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from autocompress.channels import ChannelGroup
from autocompress.config import BoundConfig, SearchConfig
from autocompress.grouping import find_groups, removable
from autocompress.layers import LayerSpec, check_patterns, inspect_layers
from autocompress.sensitivity import Choice, LayerTable
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import NO_SAVING


def check_names(model: nn.Module, search: SearchConfig) -> None:
    """Refuse names of layers in the study file that the network doesn't have.

    Raises:
        ConfigError: Naming the first such pattern.
    """
    bounded = [bound.layers for bound in search.bounds or ()]
    named = {"include": search.include or (), "exclude": search.exclude, "bounds": bounded}
    check_patterns(model, {f"search.{key}": patterns for key, patterns in named.items()})


def prospects(
    model: nn.Module, example: tuple[Tensor, ...], search: SearchConfig
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """What may become of each layer, as far as it can be told without data.

    Returns:
        Layer name to the transforms that it may get, and layer name to why it is left alone.
    """
    layers, left_alone = inspect_layers(
        model, example, include=search.include, exclude=search.exclude
    )
    possible: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        refusals = [(name, TRANSFORMS[name].refusal(layer)) for name in search.transforms]
        methods = tuple(name for name, reason in refusals if reason is None)
        if methods:
            possible[layer.name] = methods
        else:
            left_alone[layer.name] = why_refused([reason for _, reason in refusals if reason])
    return possible, left_alone


def channel_groups(
    model: nn.Module,
    example: tuple[Tensor, ...],
    layers: Sequence[LayerSpec],
    left_alone: Mapping[str, str],
    search: SearchConfig,
) -> tuple[tuple[ChannelGroup, ...], tuple[LayerSpec, ...], dict[str, str]]:
    """Which channels may be removed.

    A bounded layer keeps its channels, for the bound is one on all that happens to it.

    Args:
        model: The network.
        example: Its inputs for one image.
        layers: The layers that may be transformed.
        left_alone: Why others may not.
        search: What the study file says.

    Returns:
        The groups; the layers that may not be transformed, but through which groups run; and why
        the channels of other groups stay, by their name.
    """
    if not search.channels:
        return (), (), {}
    every, _ = inspect_layers(model, example)
    ends: set[str] = set()
    if search.include is None:
        # What the patterns don't leave alone, and yet is: the first layers and the classifiers.
        ends = {layer.name for layer in every} - {layer.name for layer in layers}
        ends -= {n for n in ends if any(fnmatchcase(n, pattern) for pattern in search.exclude)}
    bounded = {layer.name for layer in every if bound_text(layer.name, search.bounds or ())}
    reasons = {**left_alone, **dict.fromkeys(bounded, "search.bounds names it")}
    free, ends = [layer for layer in layers if layer.name not in bounded], ends - bounded
    found, refused = find_groups(model, example)
    groups = removable(found, free, reasons, refused, ends)
    names = {member.layer for group in groups for member in group.members}
    others = tuple(layer for layer in every if layer.name in names and layer not in layers)
    return groups, others, refused


def why_refused(reasons: Iterable[str]) -> str:
    """Why no method has a choice for a layer, in one text."""
    return "; ".join(dict.fromkeys(reasons)) or NO_SAVING


def bound_table(
    table: LayerTable, bounds: Sequence[BoundConfig]
) -> tuple[LayerTable, dict[str, str]]:
    """The layer table without the choices that the bounds forbid.

    Returns:
        It, and the reason for each layer that has no choice left.
    """
    choices: dict[str, tuple[Choice, ...]] = {}
    emptied: dict[str, str] = {}
    for layer in table.layers:
        own = table.choices.get(layer.name, ())
        held = [bound for bound in bounds if fnmatchcase(layer.name, bound.layers)]
        kept = tuple(c for c in own if all(_allows(bound, layer, c) for bound in held))
        if kept:
            choices[layer.name] = kept
        elif own:
            least = min(choice.error for choice in own)
            mildest = min(_compression(layer, choice) for choice in own)
            emptied[layer.name] = (
                f"search.bounds leaves it no choice ({bound_text(layer.name, bounds)}; the "
                f"mildest have {mildest:.2f}x and an error of {least:.3f})"
            )
    return replace(table, choices=choices), emptied


def bound_text(name: str, bounds: Sequence[BoundConfig]) -> str:
    """What the bounds that name a layer allow, such as "compression <= 4x"; "" for no bound."""
    held = [bound for bound in bounds if fnmatchcase(name, bound.layers)]
    words = []
    ratios = [bound.compression for bound in held if bound.compression is not None]
    if ratios:
        words.append(f"compression <= {min(ratios):g}x")
    errors = [bound.error for bound in held if bound.error is not None]
    if errors:
        words.append(f"error <= {min(errors):g}")
    return ", ".join(words)


def _allows(bound: BoundConfig, layer: LayerSpec, choice: Choice) -> bool:
    if bound.error is not None and choice.error > bound.error:
        return False
    return bound.compression is None or _compression(layer, choice) <= bound.compression


def _compression(layer: LayerSpec, choice: Choice) -> float:
    """The larger of a layer's two compression ratios."""
    return max(layer.cost.params / choice.params, layer.cost.macs / choice.macs)
