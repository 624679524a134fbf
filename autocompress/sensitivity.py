"""The layer table: for every layer, transform and rank what it costs and what it breaks.

It is built once from one pass over real training images and makes the search small: an allocator
can turn a single budget into a plan for all layers by looking things up here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.layers import LayerSpec
from autocompress.plan import transform_from_dict, transform_to_dict
from autocompress.surgery import ErrorMeter, FactorCache
from autocompress.task import Task, batches, samples_in
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
    """

    transform: Transform
    fraction: float
    params: int
    macs: int
    error: float


@dataclass(frozen=True)
class LayerTable:
    """All choices for all layers that can be transformed.

    Attributes:
        layers: The layers, in execution order.
        choices: Layer name to its choices; no entry stands for a layer without any.
        refused: Layer name to `{method: reason}`.
    """

    layers: tuple[LayerSpec, ...]
    choices: Mapping[str, tuple[Choice, ...]]
    refused: Mapping[str, Mapping[str, str]]

    def to_json(self) -> str:
        """The table as JSON, for the study's folder."""
        rows = {
            name: [
                {**asdict(choice), "transform": transform_to_dict(choice.transform)}
                for choice in choices
            ]
            for name, choices in self.choices.items()
        }
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps({"layers": layers, "choices": rows, "refused": self.refused}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> LayerTable:
        """The inverse of `to_json`."""
        data = json.loads(text)
        layers = tuple(_spec_from_dict(layer) for layer in data["layers"])
        choices = {
            name: tuple(
                Choice(**{**row, "transform": transform_from_dict(row["transform"])})
                for row in rows
            )
            for name, rows in data["choices"].items()
        }
        return cls(layers, choices, data["refused"])


def _spec_from_dict(row: Mapping[str, Any]) -> LayerSpec:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return LayerSpec(**fields)


def collect_patches(
    model: nn.Module,
    task: Task,
    layers: Sequence[LayerSpec],
    *,
    images: int = 1024,
    patches: int = 1024,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Sample real inputs of each layer in one pass over unaugmented training images.

    Args:
        model: The baseline, on the task's device.
        task: Gives the data and the forward pass.
        layers: Which layers to listen to.
        images: About how many training images to read.
        patches: How many patches to keep of each layer.
        seed: Fixes the places.

    Returns:
        Layer name to `patches x in x kh x kw` (conv2d) or `patches x in` (linear), on the CPU.
    """
    loader = task.calibration or task.train
    generator = torch.Generator().manual_seed(seed)
    per_batch = max(1, samples_in(next(iter(loader))))
    batch_count = max(1, min(len(loader), -(-images // per_batch)))
    share = -(-patches // batch_count)
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    hooks = []
    modules = dict(model.named_modules())

    def listen(layer: LayerSpec) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            found[layer.name].append(_sample(module, layer, x, share, generator).cpu())

        hooks.append(modules[layer.name].register_forward_pre_hook(hook, with_kwargs=True))

    for layer in layers:
        listen(layer)
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches(loader, task.device, batch_count):
                task.forward(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: torch.cat(parts)[:patches].clone() for name, parts in found.items()}


def build_table(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    cache: FactorCache,
    patches: Mapping[str, Tensor],
    methods: Sequence[str],
) -> LayerTable:
    """Fill the table: factor each layer once per method, cut to each rank, measure the error.

    Args:
        model: The baseline.
        layers: The layers that may be transformed.
        cache: Holds the factorizations, so that trials find them ready.
        patches: Real inputs, from `collect_patches`.
        methods: Names out of `TRANSFORMS`.
    """
    modules = dict(model.named_modules())
    choices: dict[str, tuple[Choice, ...]] = {}
    refused: dict[str, dict[str, str]] = {}
    for layer in layers:
        rows: list[Choice] = []
        refused[layer.name] = {}
        meter = ErrorMeter(modules[layer.name], patches[layer.name])
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
                error = meter.relative_error(transform, kernels)
                fraction = (index + 1) / len(ladder)
                rows.append(Choice(transform, fraction, cost.params, cost.macs, error))
        if rows:
            choices[layer.name] = tuple(rows)
    return LayerTable(tuple(layers), choices, refused)


def _sample(
    module: nn.Module, layer: LayerSpec, x: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """`count` inputs of `module` at random places: `count x in x kh x kw` or `count x in`."""
    if layer.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.randint(len(rows), (count,), generator=generator).to(x.device)].float()
    assert isinstance(module, nn.Conv2d)
    # nn.Conv2d keeps its padding in the order that F.pad takes.
    before = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, before, mode=mode) if any(before) else x
    # From what is really there: training images may be smaller than the example.
    extents = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, stride, kernel, dilation in zip(
            padded.shape[-2:], layer.stride, layer.kernel_size, layer.dilation, strict=True
        )
    ]

    def places(limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator).to(x.device)

    image = places(len(x))
    offsets = [
        places(size)[:, None] * stride + torch.arange(kernel, device=x.device)[None] * dilation
        for size, stride, kernel, dilation in zip(
            extents, layer.stride, layer.kernel_size, layer.dilation, strict=True
        )
    ]
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    # Advanced indices around the channel slice put the channels last.
    return padded[image[:, None, None], :, rows, columns].permute(0, 3, 1, 2).float()
