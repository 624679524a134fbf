"""The settings table of the conformance suite: a new method is one more row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.layers import LayerSpec, inspect_layers
from autocompress.transforms import TRANSFORMS, Transform

METHODS = tuple(TRANSFORMS.values())

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1, "bias": False},
    "strides": {"stride": (2, 1), "padding": (0, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": (2, 1), "padding": (2, 1)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "bias": False},
    "same_reflect": {"padding": "same", "padding_mode": "reflect", "kernel": (2, 3)},
    "groups": {"groups": 2, "padding": 1},
    "groups_stride": {"groups": 4, "padding": 1, "stride": 2, "bias": False},
    "wide_kernel": {"kernel": (3, 5), "padding": (1, 2)},
    "even_kernel": {"kernel": (4, 2), "padding": 1, "stride": 2},
    "row": {"kernel": (1, 3), "padding": (0, 1)},
    "expand": {"out": 24, "width": 8, "padding": 1},
    "depthwise": {"groups": 16, "padding": 1},
    "depthwise_double": {"groups": 16, "out": 32, "padding": 1},
    "one_by_one": {"kernel": 1},
    "one_by_one_stride": {"kernel": 1, "stride": 2, "bias": False},
    "linear": {"linear": True, "width": 24, "out": 18},
    "linear_no_bias": {"linear": True, "width": 16, "out": 10, "bias": False},
    "linear_tokens": {"linear": True, "width": 24, "out": 18, "tokens": 5},
}
"""Settings by name; what is not named is a 3x3 convolution of 16 to 16 channels with bias."""


def make(name: str) -> tuple[nn.Module, Tensor, LayerSpec]:
    """A layer of the table with seeded weights, inputs of two images and its description."""
    settings = dict(LAYERS[name])
    torch.manual_seed(0)
    width, out = settings.pop("width", 16), settings.pop("out", 16)
    module: nn.Module
    if settings.pop("linear", False):
        tokens = settings.pop("tokens", None)
        module = nn.Linear(width, out, **settings)
        x = torch.randn(2, width) if tokens is None else torch.randn(2, tokens, width)
    else:
        module = nn.Conv2d(width, out, settings.pop("kernel", 3), **settings)
        x = torch.randn(2, width, 9, 8)
    (spec,), _ = inspect_layers(module, (x[:1],))
    return module, x, spec


def accepted() -> Iterator[object]:
    """All pairs of method and layer that the method doesn't refuse."""
    for method in METHODS:
        for name in LAYERS:
            if method.refusal(make(name)[2]) is None:
                yield pytest.param(method, name, id=f"{method.name}-{name}")


def refused() -> Iterator[object]:
    """All other pairs."""
    for method in METHODS:
        for name in LAYERS:
            if method.refusal(make(name)[2]) is not None:
                yield pytest.param(method, name, id=f"{method.name}-{name}")


def filled(module: nn.Module, transform: Transform, patches: Tensor | None = None) -> nn.Module:
    """The replacement of `module` with its weights."""
    from autocompress.surgery import FactorCache, load_kernels

    cache = FactorCache(module, None if patches is None else {"": patches})
    replacement = transform.build(module)
    load_kernels(replacement, cache.kernels("", transform))
    return replacement
