"""The layer table: for every layer, transform and rank what it costs and what it breaks.

Where channels may be removed, it has a ladder of keep-counts for each channel group, too.

It is built once from one pass over real training images and makes the search small: an allocator
can turn a single budget into a plan for all layers by looking things up here.

What a choice breaks is told twice. `error` is the relative error of the layer's own output, which a
person understands. `impact` predicts what the network's outputs make of it: a layer may lose half
of its output without harm, another not a tenth. But of what the network makes of it fine-tuning
wins back more than of a layer's own error, for all that follows adapts. So choices are compared by
`damage`, the geometric mean of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from autocompress.damage import damage
from autocompress.importance import ChannelChoice, ChannelLadder
from autocompress.layers import Cost, LayerSpec
from autocompress.observation import Observations, output_change
from autocompress.plan import (
    group_from_dict,
    group_to_dict,
    transform_from_dict,
    transform_to_dict,
)
from autocompress.surgery import ErrorMeter, FactorCache
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import Transform


@dataclass(frozen=True)
class Choice:
    """One row of the layer table.

    Attributes:
        transform: What would replace the layer.
        fraction: Its place on the ladder of its method, in (0, 1]; 1 is the largest useful rank.
        params: Parameters of the replacement.
        macs: Multiply-adds of the replacement for one image.
        error: Relative error of the layer's output on real inputs, norm of the difference divided
            by norm of the output.
        impact: Predicted mean squared change of the network's outputs for one image, summed over
            the outputs (`output_change`); the squared error where that can't be told.
        ms: Milliseconds of the replacement, beside `LayerTable.layer_ms`; None if not measured.
    """

    transform: Transform
    fraction: float
    params: int
    macs: int
    error: float
    impact: float
    ms: float | None = None

    @property
    def damage(self) -> float:
        """What choices are compared by: the geometric mean of the squared error and the impact."""
        return damage(self)

    @property
    def cost(self) -> Cost:
        """What the replacement costs."""
        return Cost(self.params, self.macs, self.ms)


@dataclass(frozen=True)
class LayerTable:
    """All choices for all layers that can be transformed.

    Attributes:
        layers: The layers, in execution order.
        choices: Layer name to its choices; no entry stands for a layer without any.
        refused: Layer name to `{method: reason}`.
        ladders: Channel group to its keep-counts; none where no channels may be removed.
        others: Layers that may not be transformed, but through which channel groups run.
        refused_groups: Channel group to why its channels all stay.
        layer_ms: Layer name to the milliseconds of the layer as it is; empty if not measured.
        network_ms: Milliseconds of the whole network in the same run; None if not measured.
        slowdown: Layer name to side ("in" or "out") to pairs, ascending: a share of the channels on
            that side, and how many times as long a multiply-add takes with it; without an entry as
            long as in the whole layer.
    """

    layers: tuple[LayerSpec, ...]
    choices: Mapping[str, tuple[Choice, ...]]
    refused: Mapping[str, Mapping[str, str]]
    ladders: Mapping[str, ChannelLadder] = field(default_factory=dict)
    others: tuple[LayerSpec, ...] = ()
    refused_groups: Mapping[str, str] = field(default_factory=dict)
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    network_ms: float | None = None
    slowdown: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = field(
        default_factory=dict
    )

    def cost(self, layer: LayerSpec) -> Cost:
        """What a layer costs, with its milliseconds as far as they are known.

        One that lost channels takes time in proportion to its multiply-adds and to the slowdown of
        either side, between the shares that were measured on a line over the share's logarithm.
        """
        ms = self.layer_ms.get(layer.name)
        if ms is not None:
            whole = self._whole[layer.name]
            ms *= layer.cost.macs / whole.cost.macs
            shares = {
                "in": layer.in_channels / whole.in_channels,
                "out": layer.out_channels / whole.out_channels,
            }
            for side, points in self.slowdown.get(layer.name, {}).items():
                known, factors = zip(*points, (1.0, 1.0), strict=True)
                ms *= float(np.interp(math.log(shares[side]), np.log(known), factors))
        return replace(layer.cost, ms=ms)

    @cached_property
    def _whole(self) -> dict[str, LayerSpec]:
        return {layer.name: layer for layer in (*self.layers, *self.others)}

    def to_json(self) -> str:
        """The table as JSON, for the study's folder."""
        rows = {
            name: [
                {**asdict(choice), "transform": transform_to_dict(choice.transform)}
                for choice in choices
            ]
            for name, choices in self.choices.items()
        }
        ladders = {
            name: {
                "group": group_to_dict(ladder.group),
                "order": ladder.order,
                "choices": [asdict(choice) for choice in ladder.choices],
                "params_each": ladder.params_each,
            }
            for name, ladder in self.ladders.items()
        }
        table = {
            "layers": [asdict(layer) for layer in self.layers],
            "choices": rows,
            "refused": self.refused,
            "ladders": ladders,
            "others": [asdict(layer) for layer in self.others],
            "refused_groups": self.refused_groups,
            "layer_ms": dict(self.layer_ms),
            "network_ms": self.network_ms,
            "slowdown": self.slowdown,
        }
        return json.dumps(table, indent=1)

    @classmethod
    def from_json(cls, text: str) -> LayerTable:
        """The inverse of `to_json`."""
        data = json.loads(text)
        layers, others = (tuple(map(_spec_from_dict, data[key])) for key in ("layers", "others"))
        choices = {
            name: tuple(
                Choice(**{**row, "transform": transform_from_dict(row["transform"])})
                for row in rows
            )
            for name, rows in data["choices"].items()
        }
        ladders = {
            name: ChannelLadder(
                group_from_dict(name, row["group"]),
                tuple(row["order"]),
                tuple(ChannelChoice(**choice) for choice in row["choices"]),
                row["params_each"],
            )
            for name, row in data["ladders"].items()
        }
        kept = {key: data[key] for key in ("refused", "refused_groups", "layer_ms", "network_ms")}
        slowdown = {
            name: {side: tuple((a, b) for a, b in points) for side, points in sides.items()}
            for name, sides in data["slowdown"].items()
        }
        return cls(layers, choices, ladders=ladders, others=others, slowdown=slowdown, **kept)


def _spec_from_dict(row: Mapping[str, Any]) -> LayerSpec:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return LayerSpec(**fields)


def build_table(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    cache: FactorCache,
    observations: Observations,
    methods: Sequence[str],
) -> LayerTable:
    """Fill the table: factor each layer once per method, cut to each rank, measure the error.

    Args:
        model: The baseline.
        layers: The layers that may be transformed.
        cache: Holds the factorizations, so that trials find them ready.
        observations: Real inputs and derivatives, from `observe_layers`.
        methods: Names out of `TRANSFORMS`.
    """
    modules = dict(model.named_modules())
    choices: dict[str, tuple[Choice, ...]] = {}
    refused: dict[str, dict[str, str]] = {}
    for layer in layers:
        rows: list[Choice] = []
        refused[layer.name] = {}
        meter = ErrorMeter(modules[layer.name], observations.patches[layer.name])
        slopes, means = observations.slopes.get(layer.name), observations.means.get(layer.name)
        mean_meter = None if means is None else ErrorMeter(modules[layer.name], means.patches)
        for method in methods:
            kind = TRANSFORMS[method]
            reason = kind.refusal(layer)
            if reason is not None:
                refused[layer.name][method] = reason
                continue
            ladder = kind.ladder(layer)
            for index, transform in enumerate(ladder):
                kernels = cache.kernels(layer.name, transform)
                cost = transform.cost(layer)
                outputs = meter.outputs(transform, kernels)
                error = meter.relative_error(outputs)
                impact = error**2
                if slopes is not None:
                    common = None
                    if mean_meter is not None:
                        common = (mean_meter.exact, mean_meter.outputs(transform, kernels))
                    impact = output_change(meter.exact, outputs, slopes, common)
                fraction = (index + 1) / len(ladder)
                rows.append(Choice(transform, fraction, cost.params, cost.macs, error, impact))
        if rows:
            choices[layer.name] = tuple(rows)
    return LayerTable(tuple(layers), choices, refused)
