"""Which channels of a group go first, and what that breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.batch import samples_in, split_batch
from autocompress.channels import ChannelGroup, KeptChannels, Member, kept_positions
from autocompress.compensation import InputStatistics, Unexplained, split_channels
from autocompress.damage import damage
from autocompress.observation import CHUNK, Observations, output_change
from autocompress.task import Task

Importance = Literal["outputs", "norm", "bn", "taylor"]
LEAST = 1 / 8
"""The smallest share of a group's channels that is offered."""
POINTS = 16
"""Most keep-counts of a group."""


@dataclass(frozen=True)
class ChannelChoice:
    """One row of the layer table: a group with fewer channels.

    Attributes:
        keep: How many channels remain.
        fraction: Their share, in (0, 1).
        error: Relative error of the outputs of the layers that read the group, on real inputs.
        impact: Predicted mean squared change of the network's outputs, in the unit of
            `sensitivity.Choice.impact`: the sum over the layers that read the group.
    """

    keep: int
    fraction: float
    error: float
    impact: float

    @property
    def damage(self) -> float:
        """What choices are compared by, as `sensitivity.Choice.damage`."""
        return damage(self)


@dataclass(frozen=True)
class ChannelLadder:
    """The keep-counts of one group.

    Attributes:
        group: The group.
        order: Its channels, the most important first.
        choices: The keep-counts, fewest first; empty where the group is too narrow.
        params_each: Parameters of each channel in layers that pass it, such as batch norm.
    """

    group: ChannelGroup
    order: tuple[int, ...]
    choices: tuple[ChannelChoice, ...]
    params_each: int = 0

    def kept(self, keep: int) -> KeptChannels:
        """The `keep` most important channels, as many in each chunk."""
        size, each = self.group.channels // self.group.chunks, keep // self.group.chunks
        taken: list[int] = []
        for chunk in range(self.group.chunks):
            own = [channel for channel in self.order if channel // size == chunk]
            taken += own[:each]
        return KeptChannels(self.group, tuple(sorted(taken)))


def keep_counts(group: ChannelGroup) -> list[int]:
    """Keep-counts that hardware likes, fewest first: multiples of 16 where the group is wide.

    Unrounded widths made a MobileNetV2 of half the size slower than the whole one on ONNX Runtime,
    and multiples of 16 three times as fast.
    """
    width = group.channels
    multiple = 16 if width >= 128 else 8 if width >= 64 else 4 if width >= 32 else 2
    multiple = (
        lcm(multiple, group.chunks) if width >= 2 * lcm(multiple, group.chunks) else group.chunks
    )
    first = max(multiple, -(-int(width * LEAST) // multiple) * multiple)
    counts = list(range(first, width, multiple))
    if len(counts) <= POINTS:
        return counts
    step = (len(counts) - 1) / (POINTS - 1)
    return [counts[round(index * step)] for index in range(POINTS)]


def build_ladders(
    model: nn.Module,
    task: Task,
    groups: Sequence[ChannelGroup],
    observations: Observations,
    importance: Importance,
) -> dict[str, ChannelLadder]:
    """Order the channels of each group and measure what its keep-counts break.

    Args:
        model: The baseline.
        task: Gives data and loss, for "taylor".
        groups: From `find_groups`.
        observations: Of all layers that read the groups.
        importance: "outputs": what the network's outputs are predicted to make of the channel's
            absence; "norm": the L2 norm of all weights of the channel (Fang et al. 2023); "bn": the
            scale of its batch norm (Liu et al. 2017, arXiv 1708.06519), the norm where there is
            none; "taylor": the squared derivative of the loss by a gate on the channel (Molchanov
            et al. 2019, arXiv 1906.10771).
    """
    modules = dict(model.named_modules())
    by_loss = _gate_derivatives(model, task, groups) if importance == "taylor" else {}
    orders = {}
    for group in groups:
        if importance == "taylor":
            scores = by_loss[group.name]
        elif importance == "outputs":
            scores = _output_scores(modules, group, observations)
        else:
            scores = _weight_scores(modules, group, importance)
        order = torch.argsort(scores, descending=True, stable=True).tolist()
        each = _params_each(modules, group)
        orders[group.name] = ChannelLadder(group, tuple(order), (), each)
    return _measured(modules, orders, observations)


def _params_each(modules: Mapping[str, nn.Module], group: ChannelGroup) -> int:
    passing = [(modules[member.layer], member.repeat) for member in group.of_side("both")]
    return sum(
        repeat * len(list(module.parameters()))
        for module, repeat in passing
        if not isinstance(module, nn.Conv2d)
    )


def _measured(
    modules: Mapping[str, nn.Module],
    ladders: Mapping[str, ChannelLadder],
    observations: Observations,
) -> dict[str, ChannelLadder]:
    """The ladders with what their keep-counts break, where the readers make up for it as well as
    they can. Layer by layer, for one may read many groups."""
    lost: dict[str, dict[int, list[tuple[float, float]]]] = {
        name: {keep: [] for keep in keep_counts(ladder.group)} for name, ladder in ladders.items()
    }
    read: dict[str, list[str]] = {}
    for name, ladder in ladders.items():
        for member in ladder.group.of_side("in"):
            read.setdefault(member.layer, []).append(name)
    for layer, names in read.items():
        reader = _Reader(layer, modules[layer], observations)
        for name in names:
            for keep, found in lost[name].items():
                found.append(reader.without(ladders[name].kept(keep)))
    return {
        name: replace(
            ladder,
            choices=tuple(
                ChannelChoice(
                    keep,
                    keep / ladder.group.channels,
                    (sum(error**2 for error, _ in found) / len(found)) ** 0.5,
                    sum(impact for _, impact in found),
                )
                for keep, found in lost[name].items()
            ),
        )
        for name, ladder in ladders.items()
    }


class _Reader:
    """A layer that reads channel groups, and what it answers without some channels."""

    def __init__(self, name: str, module: nn.Module, observations: Observations) -> None:
        self._weight = module.get_parameter("weight").detach().cpu().float()
        self._groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self._name = name
        self._slopes = observations.slopes.get(name)
        statistics = InputStatistics.of_layer(module, observations.patches[name])
        self._seen = _Seen(observations.patches[name], statistics, self._answer)
        means = observations.means.get(name)
        self._common = None if means is None else _Seen(means.patches, statistics, self._answer)

    def without(self, kept: KeptChannels) -> tuple[float, float]:
        """Relative error of its outputs, and the predicted change of the network's."""
        exact = self._seen.exact
        inputs = kept_positions([kept], self._name, "in", self._seen.width)
        left = self._left(self._seen, inputs)
        error = float((exact - left).norm() / exact.norm().clamp_min(1e-12))
        if self._slopes is None:
            return error, error**2
        means = None
        if self._common is not None:
            means = (self._common.exact, self._left(self._common, inputs))
        return error, output_change(exact, left, self._slopes, means)

    def _left(self, seen: _Seen, inputs: Sequence[int]) -> Tensor:
        """The outputs, `n x out`, that are left without some input channels."""
        if seen.unexplained is None:
            return self._answer(seen.patches, inputs)
        removed, remaining = split_channels(inputs, seen.width)
        rest = seen.unexplained(removed, remaining)
        return seen.exact - rest.flatten(1) @ self._weight[:, removed].flatten(1).T

    def _answer(self, patches: Tensor, places: Sequence[int]) -> Tensor:
        """The outputs, `n x out`, where only some input channels are read."""
        each_in = patches.shape[1] // self._groups
        each_out = len(self._weight) // self._groups
        parts = []
        for number in range(self._groups):
            own = [place for place in places if place // each_in == number]
            rows = self._weight[number * each_out : (number + 1) * each_out]
            columns = rows[:, [place - number * each_in for place in own]].flatten(1)
            parts.append(patches[:, own].flatten(1) @ columns.T)
        return torch.cat(parts, dim=1)


class _Seen:
    """Inputs of a layer, and its answers to them.

    Args:
        patches: The inputs.
        statistics: How their channels go together; None where nothing can be made up for.
        answer: The layer's outputs for some of the channels of some inputs.
    """

    def __init__(
        self,
        patches: Tensor,
        statistics: InputStatistics | None,
        answer: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> None:
        self.patches, self.width = patches, patches.shape[1]
        self.exact = answer(patches, range(self.width))
        self.unexplained = None if statistics is None else Unexplained(statistics, patches)


def _output_scores(
    modules: Mapping[str, nn.Module], group: ChannelGroup, observations: Observations
) -> Tensor:
    """Predicted squared change of the network's outputs without each channel by itself."""
    scores = torch.zeros(group.channels)
    for member in group.of_side("in"):
        module = modules[member.layer]
        weight = module.get_parameter("weight").detach().cpu().float()
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        spread = partial(_spread, weight, _covariance(observations.patches[member.layer], groups))
        slopes, means = observations.slopes.get(member.layer), observations.means.get(member.layer)
        if slopes is None:
            change = spread(torch.eye(len(weight)))
        else:
            common = None
            if means is not None:
                common = partial(_spread, weight, _covariance(means.patches, groups))
            change = slopes.change(spread, common)
        scores += _own(change, member, group)
    return scores


def _spread(weight: Tensor, covariance: Tensor, root: Tensor) -> Tensor:
    """Mean square of what each input channel adds to a layer's outputs, in the metric of a root.

    Args:
        weight: `out x in x kh x kw`, `out x in`, or of a grouped convolution.
        covariance: From `_covariance`.
        root: `r x out`.
    """
    groups, each = covariance.shape[:2]
    kernels = weight.reshape(groups, -1, each, covariance.shape[2])
    seen = torch.einsum("rgo,goci->rgci", root.reshape(len(root), groups, -1), kernels)
    return torch.einsum("rgci,gcij,rgcj->gc", seen, covariance, seen).flatten()


def _covariance(patches: Tensor, groups: int) -> Tensor:
    """How the places of the kernel go together in each input channel: `groups x in x k x k`."""
    patches = patches.reshape(len(patches), groups, patches.shape[1] // groups, -1)
    centred = patches - patches.mean(dim=0)
    return torch.einsum("ngci,ngcj->gcij", centred, centred) / len(patches)


def _own(values: Tensor, member: Member, group: ChannelGroup) -> Tensor:
    """Sums of a layer's values, one for each of its positions, by the group's channels."""
    end = member.offset + group.channels * member.repeat
    return values[member.offset : end].reshape(group.channels, member.repeat).sum(dim=1)


def _weight_scores(
    modules: Mapping[str, nn.Module], group: ChannelGroup, importance: Importance
) -> Tensor:
    norms = [m for m in group.of_side("both") if isinstance(modules[m.layer], _BatchNorm)]
    scales = [modules[m.layer].weight for m in norms]
    if importance == "bn" and any(scale is not None for scale in scales):
        parts = [
            _own(scale.detach().cpu().float().abs(), member, group)
            for scale, member in zip(scales, norms, strict=True)
            if isinstance(scale, Tensor)
        ]
        return torch.stack(parts).mean(dim=0)
    squares = torch.zeros(group.channels)
    for member in group.members:
        module = modules[member.layer]
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.get_parameter("weight").detach().cpu().float().square()
            squares += _own(_by_position(weight, module, member), member, group)
    return squares.sqrt()


def _by_position(values: Tensor, module: nn.Module, member: Member) -> Tensor:
    """Sums of values in the shape of a kernel, by the input or output channel of a member."""
    if member.side != "in":
        return values.flatten(1).sum(dim=1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    split = values.reshape(groups, len(values) // groups, values.shape[1], -1)
    return split.sum(dim=(1, 3)).flatten()


def _gate_derivatives(
    model: nn.Module, task: Task, groups: Sequence[ChannelGroup], batches: int = 8
) -> dict[str, Tensor]:
    """Mean squared derivative of the loss by a gate on each channel.

    A gate multiplies what the readers of a channel see of it, so its derivative is the sum, over
    all weights that read the channel, of weight times derivative.
    """
    net = deepcopy(model).eval().requires_grad_(True)
    modules = dict(net.named_modules())
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    scores = {group.name: torch.zeros(group.channels) for group in groups}

    def gate(member: Member) -> Tensor:
        module = modules[member.layer]
        weight = module.get_parameter("weight")
        # None where the loss doesn't ask for what the layer makes.
        slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
        product = (weight.detach() * slope).float().cpu()
        return _by_position(product, module, member)

    with torch.enable_grad():
        for batch in task.calibration_batches(batches):
            for part in split_batch(batch, CHUNK):
                for norm in norms:
                    norm.train(samples_in(part) > 1)
                net.zero_grad(set_to_none=True)
                task.loss(task.forward(net, part), part).backward()  # type: ignore[no-untyped-call]
                for group in groups:
                    total = sum(
                        (_own(gate(m), m, group) for m in group.of_side("in")),
                        torch.zeros(group.channels),
                    )
                    scores[group.name] += total.square()
    return scores
