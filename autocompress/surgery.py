"""Removing channels and replacing layers: a plan and a network in, a smaller network out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autocompress.channels import KeptChannels, kept_positions, remove_channels
from autocompress.compensation import InputStatistics, compensate
from autocompress.errors import ConfigError, UnsupportedLayer, did_you_mean
from autocompress.plan import Plan
from autocompress.transforms.base import Factors, Transform

T = TypeVar("T")

SLOW_TO_CUT = ("cp", "tt")
"""Methods whose kernels are kept for each rank; the others' are cut anew in no time."""
OUTPUT_AWARE = ("svd", "tucker2")
"""Methods whose cut loses less of the network's outputs where a layer's outputs are weighted by
what these make of them: on three networks 5 to 13 % (svd) and 3 to 9 % (tucker2) less squared
change; spatial_svd and cp lost up to 2 % more."""
KEPT_BYTES = 4 * 2**30
"""Memory that may be taken by what is known of a network's layers: all of their factors up to some
100 million parameters. Of larger networks what was used last is kept."""
IMPULSES = 1024
"""Unit impulses that go through a replacement at once: bounds memory for wide Linear layers."""


class Latest:
    """What can be made again: tuples of tensors and such, of which those used last are kept.

    Args:
        limit: Bytes that they may take; what was used last is kept in any case.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[Hashable, Any] = {}
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under `key`, or what `make` gives, which is kept then."""
        found: T | None = self._kept.pop(key, None)
        if found is None:
            found = make()
            self._bytes += _bytes_of(found)
        # Those at the front have not been used for longest.
        self._kept[key] = found
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= _bytes_of(self._kept.pop(next(iter(self._kept))))
        return found


def _bytes_of(found: Any) -> int:
    if isinstance(found, InputStatistics):
        return found.nbytes
    return sum(tensor.untyped_storage().nbytes() for tensor in found or ())


class FactorCache:
    """Factorizations of a network's layers, made at full rank and cut to any rank.

    Args:
        model: The network; its weights must not change while the cache is used.
        patches: Real inputs of the layers, which weight the errors; None for plain weights.
        output_weights: How much the network's outputs make of each output channel of a layer,
            `out` positive numbers; None for all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        patches: Mapping[str, Tensor] | None = None,
        output_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._patches = patches or {}
        self._output_weights = output_weights or {}
        self._made = Latest(KEPT_BYTES)

    def kernels(self, name: str, transform: Transform) -> tuple[Tensor, ...]:
        """The weights of the replacement's layers, on the CPU."""
        if transform.name in SLOW_TO_CUT:
            return self._made.get((name, transform), lambda: self._cut(name, transform))
        return self._cut(name, transform)

    def _cut(self, name: str, transform: Transform) -> tuple[Tensor, ...]:
        found = transform.kernels(self._full(name, transform))
        importance = self._importance(name, transform)
        if importance is not None:
            found = (*found[:-1], found[-1] / _by_output(importance, found[-1]))
        return found

    def without_channels(self, plan: Plan) -> FactorCache:
        """The cache of the network without the channels that a plan removes.

        Where real inputs are known, the layers that read them make up for them as well as they can.
        """
        if not plan.channels:
            return self
        kept = list(plan.channels.values())
        small = remove_channels(self.model, kept)
        self._compensate(small, kept)
        patches, weights = {}, {}
        for name in plan.layers:
            if name in self._patches:
                width = self._patches[name].shape[1]
                patches[name] = self._patches[name][:, kept_positions(kept, name, "in", width)]
            if name in self._output_weights:
                width = len(self._output_weights[name])
                rows = kept_positions(kept, name, "out", width)
                weights[name] = self._output_weights[name][rows]
        return FactorCache(small, patches, weights)

    def _compensate(self, small: nn.Module, kept: Sequence[KeptChannels]) -> None:
        for name in dict.fromkeys(m.layer for part in kept for m in part.group.of_side("in")):
            layer, fewer = self._modules[name], small.get_submodule(name)
            statistics = self._statistics(name)
            if statistics is None:
                continue
            weight = layer.get_parameter("weight").detach().cpu().float()
            inputs = kept_positions(kept, name, "in", weight.shape[1])
            outputs = kept_positions(kept, name, "out", weight.shape[0])
            new, shift = compensate(weight[outputs], statistics, inputs)
            with torch.no_grad():
                fewer.get_parameter("weight").copy_(new)
                if isinstance(fewer.bias, Tensor):
                    fewer.bias.add_(shift.to(fewer.bias))

    def _statistics(self, name: str) -> InputStatistics | None:
        """How a layer's inputs go together; None where that isn't known or of no use."""
        patches = self._patches.get(name)
        if patches is None:
            return None
        return self._made.get(
            (name, InputStatistics), lambda: InputStatistics.of_layer(self._modules[name], patches)
        )

    def _full(self, name: str, transform: Transform) -> Factors:
        return self._made.get((name, transform.name), lambda: self._factorize(name, transform))

    def _factorize(self, name: str, transform: Transform) -> Factors:
        module = self._modules[name]
        weight = module.get_parameter("weight").detach().cpu().float()
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        patches = self._patches.get(name)
        if patches is not None:
            patches = patches.detach().cpu().float()
        importance = self._importance(name, transform)
        if importance is not None:
            weight = weight * _by_output(importance, weight)
        return transform.factorize(weight, groups, patches)

    def _importance(self, name: str, transform: Transform) -> Tensor | None:
        return self._output_weights.get(name) if transform.name in OUTPUT_AWARE else None


def _by_output(importance: Tensor, weight: Tensor) -> Tensor:
    """`importance` in the shape that multiplies the output channels of `weight`."""
    return importance.reshape(-1, *[1] * (weight.ndim - 1)).to(weight)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    factors: FactorCache | None = None,
    known: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A copy of `model` with channels removed and layers replaced and filled from the old weights.

    Args:
        model: The network.
        plan: What to do to it.
        factors: Factorizations of the whole network's layers; None to make them anew.
        known: Replacements of the plan that exist already, by their layers' names: their weights
            are taken over, and nothing is cut.

    Raises:
        ConfigError: If the plan names a layer that the network doesn't have.
        UnsupportedLayer: If a transform can't act on its layer.
    """
    factors = (factors or FactorCache(model)).without_channels(plan)
    built = _replaced(factors.model, plan)
    for name, transform in plan.layers.items():
        replacement = built.get_submodule(name)
        if known is not None and name in known:
            replacement.load_state_dict(known[name].state_dict())
        else:
            load_kernels(replacement, factors.kernels(name, transform))
    return built


def build_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with channels removed and layers replaced by untrained ones.

    Raises:
        ConfigError: If the plan names a layer that the network doesn't have, or removes channels
            that it doesn't have.
        UnsupportedLayer: If a transform can't act on its layer.
    """
    if plan.channels:
        model = remove_channels(model, list(plan.channels.values()))
    return _replaced(model, plan)


def _replaced(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with the plan's layers replaced by untrained ones of the right shapes."""
    built = deepcopy(model)
    modules = dict(built.named_modules())
    for name, transform in plan.layers.items():
        if name not in modules:
            raise ConfigError(
                f"The plan names layer {name!r}, which the network doesn't have."
                f"{did_you_mean(name, [n for n, m in modules.items() if hasattr(m, 'weight')])}"
            )
        try:
            new = transform.build(modules[name])
        except UnsupportedLayer as error:
            raise UnsupportedLayer(f"Layer {name!r}: {error}") from error
        if name:
            replace_module(built, name, new)
        else:  # the network is this one layer
            built = new
    return built


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Else, in evaluation, its fused kernel reads the weight of the layer that is no more.
        parent.activation_relu_or_gelu = 0
    setattr(parent, last, new)


def load_kernels(replacement: nn.Module, kernels: Sequence[Tensor]) -> None:
    """Fill the weights of a replacement's layers, in order."""
    weights = [p for key, p in replacement.named_parameters() if key.split(".")[-1] == "weight"]
    with torch.no_grad():
        for weight, kernel in zip(weights, kernels, strict=True):
            weight.copy_(kernel)


def dense_weight(replacement: nn.Module, module: nn.Module) -> Tensor:
    """Multiply a replacement out to a kernel of the shape of `module.weight`.

    It is what the replacement answers to unit impulses, one for each place of a group's kernel;
    on the CPU, where no TF32 rounds it.

    Returns:
        The kernel, on the CPU.
    """
    weight = module.get_parameter("weight").detach().cpu()
    count = weight[0].numel()
    probe = _probe(replacement).cpu()
    answers = []
    for begin in range(0, count, IMPULSES):
        places = torch.arange(begin, min(begin + IMPULSES, count), device=weight.device)
        impulses = nn.functional.one_hot(places, count).to(weight.dtype)
        impulses = impulses.reshape(len(places), *weight.shape[1:])
        if isinstance(module, nn.Conv2d):
            impulses = impulses.repeat(1, module.groups, 1, 1)
        with torch.no_grad():
            answers.append(probe(impulses).reshape(len(places), -1))
    return torch.cat(answers).T.reshape(weight.shape)


class ErrorMeter:
    """Measures what replacements of one layer break, on real inputs, the bias left out.

    Args:
        module: The layer.
        patches: `n x in x kh x kw` or `n x in`.

    Attributes:
        exact: The layer's own outputs, `n x out`, without the bias.
    """

    def __init__(self, module: nn.Module, patches: Tensor) -> None:
        self._module = deepcopy(module).cpu().float()
        self._patches = patches.detach().cpu().float()
        self.exact = self._answer(self._module)

    def outputs(self, transform: Transform, kernels: Sequence[Tensor]) -> Tensor:
        """The outputs of a replacement with these kernels, `n x out`, without the bias."""
        replacement = transform.build(self._module)
        load_kernels(replacement, kernels)
        return self._answer(replacement)

    def relative_error(self, outputs: Tensor) -> float:
        """Norm of the difference to the exact outputs, divided by the norm of these."""
        return float((self.exact - outputs).norm() / self.exact.norm().clamp_min(1e-12))

    def _answer(self, module: nn.Module) -> Tensor:
        with torch.no_grad():
            answers: Tensor = _probe(module)(self._patches)
        return answers.flatten(1)


def _probe(module: nn.Module) -> nn.Module:
    """A copy that maps a patch of the kernel's size to one position: no stride, padding, bias."""
    copy = deepcopy(module)
    with torch.no_grad():
        for key, parameter in copy.named_parameters():
            if key.split(".")[-1] == "bias":
                parameter.zero_()
    for part in copy.modules():
        if isinstance(part, nn.Conv2d):
            part.stride, part.dilation, part.padding = (1, 1), (1, 1), (0, 0)
            part.padding_mode = "zeros"
    return copy
