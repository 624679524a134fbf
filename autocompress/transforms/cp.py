"""Canonical polyadic (CP) decomposition of a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn

from autocompress.layers import Cost, LayerSpec
from autocompress.transforms.base import (
    NO_SAVING,
    Factors,
    Transform,
    climb,
    finish,
    fix_signs,
    like,
    need_conv,
    need_rank,
    pair,
    per_group,
    round_rank,
)

SWEEPS = 5
"""Sweeps of alternating least squares; fine-tuning does the rest."""
DIVERGED = 30.0
"""Components whose norms exceed the kernel's by this factor cancel each other: degeneracy
(Phan et al. 2020, arXiv 2008.05441)."""


@dataclass(frozen=True)
class CP:
    """CP: 1 x 1 to `rank` channels, a depthwise k x k, 1 x 1 to the output channels.

    Lebedev et al. 2015, arXiv 1412.6553, with both spatial modes taken as one.

    Attributes:
        rank: Number of components, per group.
    """

    rank: int
    name: ClassVar[str] = "cp"

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why CP can't act on `layer`; None if it can."""
        if layer.kind == "linear" or layer.kernel_size == (1, 1):
            return "CP of a 1x1 kernel is channel SVD with one layer more"
        if min(layer.in_channels, layer.out_channels) // layer.groups < 2:
            return "CP needs two or more channels in each group"
        return None if cls.ladder(layer) else NO_SAVING

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Ranks that save, smallest first; few, as each is a decomposition of its own."""
        most = max(layer.in_channels, layer.out_channels) // layer.groups
        return climb(
            layer, lambda share: cls(round_rank(share * most, most)), min(points, 5), 1 / 8
        )

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """A rank at which every kernel has an exact decomposition."""
        kh, kw = layer.kernel_size
        width_in = layer.in_channels // layer.groups
        width_out = layer.out_channels // layer.groups
        return cls(_exact_rank(width_out, width_in, kh * kw))

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """The kernel as `groups x out/g x in/g x kh*kw`; each rank is fitted anew."""
        return per_group(weight.detach(), groups).flatten(3), weight.detach()

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs; the first layer works at the input's resolution."""
        kh, kw = layer.kernel_size
        inner = layer.groups * self.rank
        first = inner * layer.in_channels // layer.groups
        rest = inner * kh * kw + inner * layer.out_channels // layer.groups
        before = layer.in_size[0] * layer.in_size[1]
        after = layer.out_size[0] * layer.out_size[1]
        return Cost(first + rest + layer.out_channels * layer.bias, first * before + rest * after)

    def build(self, module: nn.Module) -> nn.Sequential:
        """The three layers, untrained."""
        conv = need_conv(module, "CP")
        kh, kw = conv.kernel_size
        groups = conv.groups
        most = _exact_rank(conv.out_channels // groups, conv.in_channels // groups, kh * kw)
        need_rank("CP", "rank", self.rank, most)
        inner = groups * self.rank
        return finish(
            conv,
            [
                like(conv, conv.in_channels, inner, groups=groups),
                like(
                    conv,
                    inner,
                    inner,
                    kernel=(kh, kw),
                    stride=(conv.stride[0], conv.stride[1]),
                    padding=pair(conv.padding),
                    dilation=(conv.dilation[0], conv.dilation[1]),
                    groups=inner,
                    padded=True,
                ),
                like(conv, inner, conv.out_channels, groups=groups, bias=conv.bias is not None),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """The three layers' weights."""
        blocks, weight = factors
        fits = [_fit(block.float(), self.rank) for block in blocks]
        firsts = torch.cat([inputs.T for _, inputs, _ in fits])
        middles = torch.cat([places.T for _, _, places in fits])
        lasts = torch.cat([outputs for outputs, _, _ in fits])
        kh, kw = weight.shape[2:]
        return (
            firsts[:, :, None, None].to(weight.dtype),
            middles.reshape(-1, 1, kh, kw).to(weight.dtype),
            lasts[:, :, None, None].to(weight.dtype),
        )


def _exact_rank(width_out: int, width_in: int, places: int) -> int:
    return min(width_out * width_in, width_out * places, width_in * places)


def _fit(block: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors `out x rank`, `in x rank`, `places x rank` of one group, of equal norms.

    Of plain and regularised alternating least squares the first whose components don't diverge.
    """
    if rank >= _exact_rank(*block.shape):
        return _exact(block, rank)
    # Factors of rank r lie in subspaces of r dimensions; the leading ones make the problem small.
    bases = [_leading(block, mode)[:, :rank] for mode in (0, 1)]
    whole, block = block, torch.einsum("oip,or,is->rsp", block, *bases)
    found: tuple[Tensor, ...] | None = None
    norm = whole.norm().clamp_min(1e-12)
    for penalty in (0.0, 1e-3, 1e-2, 1e-1):
        candidate = _least_squares(block, rank, penalty * float(norm) / rank)
        sizes = torch.stack([factor.norm(dim=0) for factor in candidate]).prod(dim=0)
        found = candidate
        if bool(sizes.isfinite().all()) and float(sizes.max() / norm) < DIVERGED:
            break
    assert found is not None
    sizes = torch.stack([factor.norm(dim=0).clamp_min(1e-12) for factor in found])
    target = sizes.log().mean(dim=0).exp()
    outputs, inputs, places = (f * (target / s) for f, s in zip(found, sizes, strict=True))
    return bases[0] @ outputs, bases[1] @ inputs, places


def _least_squares(block: Tensor, rank: int, penalty: float) -> tuple[Tensor, ...]:
    """tensorly's ALS from a fixed start: leading singular vectors, then seeded noise."""
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        # It warns that a rank above a mode's size is filled up with random columns: intended.
        warnings.simplefilter("ignore")
        try:
            _, factors = parafac(
                block,
                rank,
                n_iter_max=SWEEPS,
                init=_start(block, rank),
                tol=0,
                l2_reg=penalty,
                normalize_factors=False,
            )
        except RuntimeError:  # singular normal equations
            return tuple(torch.full((size, rank), float("nan")) for size in block.shape)
    return tuple(factors)


def _start(block: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """Weights and factors to start from; the same for the same kernel and rank."""
    generator = torch.Generator().manual_seed(rank)
    factors = []
    for mode in range(3):
        leading = _leading(block, mode)[:, :rank]
        missing = rank - leading.shape[1]
        noise = torch.randn(block.shape[mode], max(missing, 0), generator=generator)
        noise = noise / noise.norm(dim=0).clamp_min(1e-12)
        factors.append(torch.cat([leading, noise], dim=1))
    return torch.ones(rank), factors


def _leading(block: Tensor, mode: int) -> Tensor:
    """Singular vectors of one mode, the most important first."""
    flat = block.movedim(mode, 0).flatten(1)
    _, vectors = torch.linalg.eigh((flat @ flat.T).double())
    return fix_signs(vectors.flip(1)).float()


def _exact(block: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The decomposition with one component for each pair of indices of two modes."""
    sizes = list(block.shape)
    long = sizes.index(max(sizes))
    first, second = (mode for mode in range(3) if mode != long)
    factors: list[Tensor] = [torch.empty(0)] * 3
    pairs = torch.cartesian_prod(torch.arange(sizes[first]), torch.arange(sizes[second]))
    factors[first] = nn.functional.one_hot(pairs[:, 0], sizes[first]).T.float()
    factors[second] = nn.functional.one_hot(pairs[:, 1], sizes[second]).T.float()
    factors[long] = block.movedim(long, 0)[:, pairs[:, 0], pairs[:, 1]]
    padded = [nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in factors]
    return padded[0], padded[1], padded[2]


_FITS: type[Transform] = CP
