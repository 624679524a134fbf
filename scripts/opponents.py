"""The opponents: families of compressed networks with a single dial each.

A family is a function from a dial in (0, 1] to a network, the cheaper the smaller the dial; `arena`
tunes the dial and trains the networks. Uniform ranks and the allocator alone are what a study would
be without its search; the others are other people's methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch_pruning
from arena import Arena, Make
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.allocator import Knobs, decode
from autocompress.config import TransformName
from autocompress.grouping import find_groups, removable
from autocompress.importance import build_ladders
from autocompress.layers import LayerSpec
from autocompress.observation import observe_layers
from autocompress.plan import Plan
from autocompress.sensitivity import build_table
from autocompress.space import SearchSpace
from autocompress.surgery import FactorCache, apply_plan, replace_module
from autocompress.transforms import TRANSFORMS
from autocompress.transforms.base import Transform, balance, finish, like, need_conv, pair
from autocompress.transforms.tucker import Tucker2

PRUNING_STEPS = 5
"""In one step Torch-Pruning spares layers whose channels all fall under the threshold."""
SPLITS = (1, 2, 4, 8)
"""Into how many groups of input channels ALDS may split a layer."""


def uniform(arena: Arena, method: TransformName, weighted: bool = True) -> Make:
    """One transform at one share of full rank, in every layer in which that saves anything.

    Args:
        arena: The network.
        method: Name of the transform.
        weighted: Whether real inputs weight the factorization, as in a study, or not, as usual.
    """
    model = arena.baseline.model
    seen = observe_layers(model, arena.task, arena.layers) if weighted else None
    cache = seen.factor_cache(model) if seen else FactorCache(model)
    kind = TRANSFORMS[method]
    rungs: dict[str, list[tuple[float, Transform]]] = {}
    for layer in arena.layers:
        if kind.refusal(layer) is None:
            full = kind.full(layer)
            ladder = kind.ladder(layer, points=64)
            rungs[layer.name] = [(rank_share(choice, full), choice) for choice in ladder]

    def make(dial: float) -> nn.Module:
        chosen = {
            name: next((choice for share, choice in own if share >= dial), None)
            for name, own in rungs.items()
        }
        plan = Plan({name: choice for name, choice in chosen.items() if choice is not None})
        return apply_plan(model, plan, cache)

    return make


def rank_share(transform: Transform, full: Transform) -> float:
    """The largest of a transform's ranks, each as a share of its full rank."""
    return max(one / most for one, most in zip(_ranks(transform), _ranks(full), strict=True))


def _ranks(transform: Any) -> Iterator[int]:
    for value in astuple(transform):
        yield from value if isinstance(value, tuple) else (value,)


def table_space(arena: Arena, channels: bool = False) -> tuple[SearchSpace, FactorCache]:
    """The study's own search space, with its layer table, and the factors to build its plans.

    Args:
        arena: The network.
        channels: Whether channels may be removed, of layers that may be transformed.
    """
    config, model = arena.config, arena.baseline.model
    seen = observe_layers(model, arena.task, arena.layers)
    cache = seen.factor_cache(model)
    layer_table = build_table(model, arena.layers, cache, seen, config.search.transforms)
    if channels:
        found, _ = find_groups(model, arena.example)
        groups = removable(found, arena.layers, {}, {})
        ladders = build_ladders(model, arena.task, groups, seen, config.search.importance)
        layer_table = replace(layer_table, ladders=ladders)
    full = arena.baseline.profile.cost
    return SearchSpace.from_table(layer_table, config.objective, full), cache


def allocator(arena: Arena, channels: bool = False) -> Make:
    """The study's own knapsack over its layer table, with no knob but the budget.

    Args:
        arena: The network.
        channels: Whether it may remove channels as well.
    """
    space, cache = table_space(arena, channels)

    def make(dial: float) -> nn.Module:
        here, picked = decode(space, Knobs(dial))
        return apply_plan(arena.baseline.model, here.plan(picked), cache)

    return make


def pruning(arena: Arena) -> Make:
    """Torch-Pruning: whole channels by their groups' magnitude, ranked over the whole network.

    DepGraph (Fang et al. 2023, arXiv 2301.12900) with `GroupMagnitudeImportance`; the last layer
    keeps its outputs.
    """
    last = [n for n, m in arena.baseline.model.named_modules() if isinstance(m, nn.Linear)][-1:]
    last = last or [arena.layers[-1].name]

    def make(dial: float) -> nn.Module:
        model = deepcopy(arena.baseline.model).requires_grad_(True)
        device = next(model.parameters()).device
        pruner = torch_pruning.pruner.BasePruner(
            model,
            tuple(value.to(device) for value in arena.example),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0 - dial,
            ignored_layers=[model.get_submodule(name) for name in last],
            iterative_steps=PRUNING_STEPS,
        )
        for _ in range(PRUNING_STEPS):
            pruner.step()
        return model.eval()

    return make


def tucker_vbmf(arena: Arena, factor: float | None = None) -> Make:
    """Tucker-2 with the ranks that variational Bayes finds, all scaled by one factor.

    Kim et al. 2016, arXiv 1511.06530. Layers in which the ranks save nothing stay.

    Args:
        arena: The network.
        factor: Of all ranks, whatever the dial; None: 1 at dial 0.5, and every layer is at full
            rank at dial 1.
    """
    model = arena.baseline.model
    cache = FactorCache(model)
    ranks = vbmf_ranks(model, arena.layers)
    layers = {layer.name: layer for layer in arena.layers}
    widths = {name: (layers[name].in_channels, layers[name].out_channels) for name in ranks}
    most = max((max(w) / min(ranks[name]) for name, w in widths.items()), default=1.0)

    def make(dial: float) -> nn.Module:
        scale = most ** (2 * dial - 1) if factor is None else factor
        chosen = {name: _scaled(layers[name], own, scale) for name, own in ranks.items()}
        return apply_plan(model, Plan({n: t for n, t in chosen.items() if t is not None}), cache)

    return make


def vbmf_ranks(model: nn.Module, layers: Sequence[LayerSpec]) -> dict[str, tuple[int, int]]:
    """Ranks of the input and output mode of every kernel that Tucker-2 can act on."""
    found = {}
    for layer in layers:
        if layer.groups == 1 and Tucker2.refusal(layer) is None:
            kernel = model.get_submodule(layer.name).get_parameter("weight").detach().cpu().double()
            found[layer.name] = (
                max(1, evbmf_rank(kernel.transpose(0, 1).flatten(1))),
                max(1, evbmf_rank(kernel.flatten(1))),
            )
    return found


def _scaled(layer: LayerSpec, ranks: tuple[int, int], factor: float) -> Tucker2 | None:
    """Tucker-2 at a multiple of `ranks`; None where that saves no parameters."""
    scaled = [
        max(1, min(most, round(factor * rank)))
        for rank, most in zip(ranks, (layer.in_channels, layer.out_channels), strict=True)
    ]
    choice = Tucker2(*scaled)
    return choice if choice.cost(layer).params < layer.cost.params else None


def evbmf_rank(matrix: Tensor) -> int:
    """Rank of a noisy matrix by global analytic variational Bayesian matrix factorization.

    Empirical VBMF with unknown noise (Nakajima, Sugiyama, Babacan and Tomioka 2013, JMLR 14:1):
    the noise variance that minimizes the free energy is sought on a line, and the singular values
    above the threshold that follows from it are signal.

    Args:
        matrix: `L x M`; the longer side may be either.
    """
    rows, columns = sorted(matrix.shape)
    alpha = rows / columns
    squares = torch.linalg.svdvals(matrix.double()).numpy() ** 2
    total = float(squares.sum())
    if total == 0.0:
        return 0
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    # Bounds of the variance, from the same paper.
    most = min(rows - 1, max(0, math.ceil(rows / (1 + alpha)) - 1))
    low = max(squares[most] / (columns * edge), float(squares[most:].mean()) / columns)
    high = total / (rows * columns)
    variances = np.geomspace(max(low, 1e-12 * high), max(high, low), 2000)
    energies = [_free_energy(v, squares, columns, alpha, edge) for v in variances]
    best = variances[int(np.argmin(energies))]
    return int((squares > columns * best * edge).sum())


def _free_energy(
    variance: float, squares: NDArray[np.float64], columns: int, alpha: float, edge: float
) -> float:
    """The free energy, up to a constant and a factor."""
    x = squares / (columns * variance)
    signal = x[x > edge]
    noise = np.maximum(x[x <= edge], 1e-300)
    tau = 0.5 * (signal - (1 + alpha) + np.sqrt((signal - (1 + alpha)) ** 2 - 4 * alpha))
    energy = float((noise - np.log(noise)).sum() + (signal - tau).sum())
    energy += float(np.log((tau + 1) / signal).sum())
    return energy + alpha * float(np.log(tau / alpha + 1).sum())


@dataclass(frozen=True)
class Split:
    """One choice of ALDS for one layer.

    Attributes:
        groups: Groups of input channels, each with an SVD of its own.
        rank: Rank of each.
        params: Parameters of the replacement, without the bias.
        error: Bound of the relative error in the operator norm.
    """

    groups: int
    rank: int
    params: int
    error: float


def alds(arena: Arena) -> Make:
    """ALDS: the cheapest sub-space splits whose relative errors all stay below one bound.

    Liebenwein et al. 2021, arXiv 2107.11442. A folded kernel `out x (in * kh * kw)` is split over
    its input channels into groups with a truncated SVD each, which is a grouped convolution and a
    1 x 1 one. The dial stands for the bound, from 1 (everything may be lost) down to 0; for each
    bound every layer takes its cheapest split, which solves ALDS's min-max exactly.
    """
    model = arena.baseline.model
    splits = {layer.name: alds_splits(model, layer) for layer in arena.layers}

    def make(dial: float) -> nn.Module:
        built = deepcopy(model)
        for layer in arena.layers:
            fit = [split for split in splits[layer.name] if split.error <= 1.0 - dial]
            if fit:
                best = min(fit, key=lambda split: (split.params, split.error))
                module = model.get_submodule(layer.name)
                replace_module(built, layer.name, build_split(module, best))
        return built

    return make


def alds_splits(model: nn.Module, layer: LayerSpec) -> list[Split]:
    """All splits of a layer that save parameters."""
    weight = model.get_submodule(layer.name).get_parameter("weight").detach().cpu().double()
    if layer.groups > 1:
        return []
    largest = float(torch.linalg.matrix_norm(weight.flatten(1), 2)) or 1.0
    found = []
    for groups in SPLITS if layer.kind == "conv2d" else SPLITS[:1]:
        if layer.in_channels % groups:
            continue
        parts = [part.flatten(1) for part in weight.chunk(groups, dim=1)]
        values = torch.stack([torch.linalg.svdvals(part) for part in parts])
        rest = math.sqrt(groups) * values.amax(dim=0) / largest
        for rank in range(1, values.shape[1]):
            params = groups * rank * (parts[0].shape[1] + weight.shape[0])
            if params < weight.numel():
                found.append(Split(groups, rank, params, float(rest[rank])))
    return found


def build_split(module: nn.Module, split: Split) -> nn.Sequential:
    """The replacement of a layer, filled from its weights."""
    weight = module.get_parameter("weight").detach()
    firsts, seconds = [], []
    for part in weight.chunk(split.groups, dim=1):
        left, values, right = torch.linalg.svd(part.flatten(1), full_matrices=False)
        first, second = balance(right[: split.rank], left[:, : split.rank] * values[: split.rank])
        firsts.append(first.reshape(split.rank, *part.shape[1:]))
        seconds.append(second)
    first, second = torch.cat(firsts), torch.cat(seconds, dim=1)
    layers: list[nn.Module]
    if isinstance(module, nn.Linear):
        inner, outer = (
            nn.Linear(w.shape[1], w.shape[0], bias=b, device=weight.device, dtype=weight.dtype)
            for w, b in ((first, False), (second, module.bias is not None))
        )
        layers = [inner, outer]
    else:
        conv = need_conv(module, "ALDS")
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        layers = [
            like(
                conv,
                conv.in_channels,
                len(first),
                kernel=kernel,
                stride=(conv.stride[0], conv.stride[1]),
                padding=pair(conv.padding),
                dilation=(conv.dilation[0], conv.dilation[1]),
                groups=split.groups,
                padded=True,
            ),
            like(conv, len(first), conv.out_channels, bias=conv.bias is not None),
        ]
        second = second[:, :, None, None]
    with torch.no_grad():
        for layer, value in zip(layers, (first, second), strict=True):
            layer.get_parameter("weight").copy_(value)
    return finish(module, layers)
