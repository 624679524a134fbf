"""Milliseconds of every layer and of every choice in the layer table, on the runtime that serves.

Fewer multiply-adds are not always less time: a chain of small layers, or widths that a runtime
must fill up, may cost more than the layer that they replace. So each distinct shape is run by
itself, once, and the times are kept in a file that later studies read.

A layer alone takes longer than in its network: by the call of the runtime, which is measured and
left out, by the order that its inputs are put into, by weights that are not at hand. Where the
layers' sum is more than the network takes, all times are scaled down to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.cache import keep
from autocompress.latency import Deployment, Runner, lower_quartile, prepare, threads_of
from autocompress.layers import LayerSpec, is_depthwise, without_channels
from autocompress.plan import transform_to_dict
from autocompress.profiler import time_in_turns
from autocompress.sensitivity import Choice, LayerTable
from autocompress.transforms.base import Transform

TOGETHER = 16
"""Choices that are timed turn by turn: bounds the memory for their weights."""
CALL = "call"
"""Key of what the runtime needs to run next to nothing."""
LEAST = 1e-6
"""Milliseconds of what takes no time beside the call."""
SECONDS = 0.02
"""Time for each choice, the warm-up not counted."""
MIN_RUNS = 5
WIDTHS = (0.25, 0.5)
"""Shares of a layer's channels at which it is timed, too, where channels may be removed."""
MOST_WIDTHS = 6
"""Of the widths that its channel groups' keep-counts make, so many are timed besides: runtimes fill
up widths, so that time falls in steps."""
MOST_SECONDS = 90.0
"""Beyond this only some ranks of each ladder are run, and the others lie between them."""


class LayerTimes:
    """Times of layers by shape, kept in a file.

    Args:
        deployment: The runtime.
        folder: Where the files of all runtimes are; None to keep nothing.
    """

    def __init__(self, deployment: Deployment, folder: Path | None) -> None:
        # Compiling takes seconds for each shape, and calls the same convolutions in the end.
        eager = deployment.runtime == "torch-compile"
        self.deployment = replace(deployment, runtime="torch") if eager else deployment
        where = {
            "runtime": self.deployment.name,
            "device": self.deployment.device,
            "batch_size": self.deployment.batch_size,
            "threads": self.deployment.threads,
        }
        digest = hashlib.sha256(json.dumps(where).encode()).hexdigest()[:12]
        self._where = where
        self._path = None if folder is None else folder / f"{digest}.json"
        self._ms: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            self._ms = json.loads(self._path.read_text(encoding="utf-8"))["ms"]

    def __len__(self) -> int:
        return len(self._ms)

    def get(self, layer: LayerSpec, transform: Transform | None = None) -> float | None:
        """Milliseconds of a layer, or of what a transform makes of it; None if not measured.

        They are without those of the runtime's call.
        """
        found = self._ms.get(_key(layer, transform))
        return None if found is None else max(found - self._ms[CALL], LEAST)

    def measure(
        self,
        wanted: Mapping[LayerSpec, Sequence[Transform]],
        network: Runner,
        seconds: float = SECONDS,
    ) -> float:
        """Run what is not known yet, everything beside the layers as they are.

        Args:
            wanted: Layers, and what may replace each.
            network: Runs the whole network once.
            seconds: Time for each of them.

        Returns:
            Milliseconds of the network, as they would have been when the layers were measured, and
            likewise without the call.
        """
        layers = list({_key(layer, None): layer for layer in wanted}.values())
        with threads_of(self.deployment):
            network_ms = self._measure_layers(layers, network, seconds)
            for layer, transforms in wanted.items():
                new = [t for t in transforms if self.get(layer, t) is None]
                for start in range(0, len(new), TOGETHER):
                    self._measure_choices(layer, new[start : start + TOGETHER], seconds)
        self._save()
        return network_ms

    def _measure_layers(
        self, layers: Sequence[LayerSpec], network: Runner, seconds: float
    ) -> float:
        """Time the network in turns with its layers, which tell how fast the machine is now."""
        runners = [network, self._call(), *(self._runner(layer, None) for layer in layers)]
        whole, *parts = _times(runners, seconds, self.deployment.clock)
        keys = [CALL, *(_key(layer, None) for layer in layers)]
        known = [self._ms.get(key) for key in keys]
        then = sum(ms for ms in known if ms is not None)
        now = sum(ms for ms, old in zip(parts, known, strict=True) if old is not None)
        scale = then / now if now else 1.0
        for key, ms, old in zip(keys, parts, known, strict=True):
            if old is None:
                self._ms[key] = scale * ms
        return max(scale * whole - self._ms[CALL], LEAST)

    def _measure_choices(
        self, layer: LayerSpec, transforms: Sequence[Transform], seconds: float
    ) -> None:
        runners = [self._runner(layer, transform) for transform in (None, *transforms)]
        own, *others = _times(runners, seconds, self.deployment.clock)
        for transform, ms in zip(transforms, others, strict=True):
            self._ms[_key(layer, transform)] = ms / own * self._ms[_key(layer, None)]

    def _runner(self, layer: LayerSpec, transform: Transform | None) -> Runner:
        module, example = _alone(layer, transform)
        return prepare(module, (example,), self.deployment)

    def _call(self) -> Runner:
        return prepare(nn.ReLU(), (torch.zeros(1, 1, 1, 1),), self.deployment)

    def _save(self) -> None:
        if self._path is not None:
            text = json.dumps({"where": self._where, "ms": self._ms}, indent=0)
            keep(self._path, lambda path: path.write_text(text, encoding="utf-8"))


def with_times(
    table: LayerTable,
    times: LayerTimes,
    network: Runner,
    seconds: float = SECONDS,
    most_seconds: float = MOST_SECONDS,
) -> LayerTable:
    """The layer table with the milliseconds of all layers, choices and of the network.

    Args:
        table: The layer table.
        times: What was measured earlier; it learns what was not.
        network: Runs the whole network once.
        seconds: Time for each layer and choice.
        most_seconds: Where all would take longer, each method's ladder is thinned out and the
            times of the ranks left out are read off a line through their neighbours.
    """
    specs = {layer.name: layer for layer in (*table.layers, *table.others)}
    narrower = {name: _narrower(specs[name], sides) for name, sides in _widths(table).items()}
    widths = [spec for sides in narrower.values() for own in sides.values() for _, spec in own]
    times.measure({layer: () for layer in (*specs.values(), *widths)}, network, seconds)
    distinct = {_key(specs[name], None): name for name in table.choices}
    expected = sum(
        len(table.choices[name]) * max(seconds, MIN_RUNS * (times.get(specs[name]) or 0.0) / 1e3)
        for name in distinct.values()
    )
    step = max(1, -(-int(1e3 * expected) // int(1e3 * most_seconds)))
    kept = {name: _thin(choices, step) for name, choices in table.choices.items()}
    wanted = {
        layer: [choice.transform for choice in kept.get(name, ())] for name, layer in specs.items()
    }
    network_ms = times.measure(wanted, network, seconds)
    alone = {name: _known(times.get(layer)) for name, layer in specs.items()}
    scale = min(1.0, network_ms / sum(alone.values()))
    choices = {}
    for name, own in table.choices.items():
        filled = _filled(specs[name], own, kept[name], times)
        choices[name] = tuple(replace(c, ms=scale * _known(c.ms)) for c in filled)
    return replace(
        table,
        choices=choices,
        layer_ms={name: scale * ms for name, ms in alone.items()},
        network_ms=network_ms,
        slowdown={
            name: {
                side: tuple((share, _slowdown(times, specs[name], spec)) for share, spec in own)
                for side, own in sides.items()
            }
            for name, sides in narrower.items()
        },
    )


def _widths(table: LayerTable) -> dict[str, dict[str, set[int]]]:
    """Layer name to the sides on which channels may be removed, and how many the keep-counts of
    each group leave there while all other groups are whole."""
    known = {layer.name: layer for layer in (*table.layers, *table.others)}
    found: dict[str, dict[str, set[int]]] = {}
    for ladder in table.ladders.values():
        removed = [ladder.group.channels - choice.keep for choice in ladder.choices]
        for member in ladder.group.members:
            layer = known.get(member.layer)
            if layer is None:
                continue
            for side in ("in", "out") if member.side == "both" else (member.side,):
                width = layer.in_channels if side == "in" else layer.out_channels
                left = {width - member.repeat * count for count in removed}
                found.setdefault(layer.name, {}).setdefault(side, set()).update(left)
    return found


def _narrower(
    layer: LayerSpec, sides: Mapping[str, set[int]]
) -> dict[str, list[tuple[float, LayerSpec]]]:
    """The layer with fewer channels on one side, and which share of them; a depthwise one on both,
    which counts as its outputs. Other grouped ones are not timed."""
    if layer.groups > 1:
        if not is_depthwise(layer):
            return {}
        sides = {"out": set().union(*sides.values())}
    found: dict[str, list[tuple[float, LayerSpec]]] = {}
    for side, left in sorted(sides.items()):
        inputs, outputs = layer.in_channels, layer.out_channels
        width = inputs if side == "in" else outputs
        counts = sorted(count for count in left if 0 < count < width)
        step = max(1, -(-len(counts) // MOST_WIDTHS))
        counts = counts[::step] + [max(1, round(share * width)) for share in WIDTHS]
        for count in sorted({*counts} - {width}):
            spec = without_channels(
                layer,
                count if side == "in" or layer.groups > 1 else inputs,
                count if side == "out" else outputs,
            )
            found.setdefault(side, []).append((count / width, spec))
    return found


def _slowdown(times: LayerTimes, whole: LayerSpec, layer: LayerSpec) -> float:
    """How many times as long a multiply-add takes in a layer that lost channels."""
    share = layer.cost.macs / whole.cost.macs
    return _known(times.get(layer)) / _known(times.get(whole)) / share


def _thin(choices: Sequence[Choice], step: int) -> list[Choice]:
    """Every `step`-th rank of each method, and both ends."""
    kept = []
    for own in _by_method(choices):
        kept += [c for i, c in enumerate(own) if i % step == 0 or i == len(own) - 1]
    return kept


def _filled(
    layer: LayerSpec, choices: Sequence[Choice], kept: Sequence[Choice], times: LayerTimes
) -> tuple[Choice, ...]:
    """The choices with their times; those that were left out lie on a line over the MACs."""
    lines = {}
    for own in _by_method(kept):
        points = sorted((c.macs, _known(times.get(layer, c.transform))) for c in own)
        lines[own[0].transform.name] = points

    def ms(choice: Choice) -> float:
        found = times.get(layer, choice.transform)
        if found is not None:
            return found
        macs, known = zip(*lines[choice.transform.name], strict=True)
        return float(np.interp(choice.macs, macs, known))

    return tuple(replace(choice, ms=ms(choice)) for choice in choices)


def _by_method(choices: Sequence[Choice]) -> list[list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        found.setdefault(choice.transform.name, []).append(choice)
    return list(found.values())


def _known(ms: float | None) -> float:
    assert ms is not None, "it has just been measured"
    return ms


def _times(runners: Sequence[Runner], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of each, turn by turn: the lower quartile, for disturbances only add."""
    spent = time_in_turns(runners, seconds * len(runners), MIN_RUNS, clock)
    return [1e3 * lower_quartile(times) for times in spent]


def _key(layer: LayerSpec, transform: Transform | None) -> str:
    """A layer's shape and what replaces it, as a text; layers of other names share it."""
    shape = {key: value for key, value in asdict(layer).items() if key != "name"}
    change = None if transform is None else transform_to_dict(transform)
    return json.dumps([*shape.values(), change], separators=(",", ":"))


def _alone(layer: LayerSpec, transform: Transform | None) -> tuple[nn.Module, Tensor]:
    """The layer, or its replacement, with random weights, and an input for one image."""
    with torch.device("meta"):
        module = _module(layer)
        module = (module if transform is None else transform.build(module)).eval()
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    if layer.kind == "conv2d":
        shape: tuple[int, ...] = (layer.in_channels, *layer.in_size)
    else:
        positions = layer.in_size[0]
        shape = (layer.in_channels,) if positions == 1 else (positions, layer.in_channels)
    return module, torch.rand(1, *shape, generator=generator)


def _module(layer: LayerSpec) -> nn.Module:
    if layer.kind == "linear":
        return nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias)
    mode: Any = layer.padding_mode
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias,
        padding_mode=mode,
    )
