"""Canonical polyadic (CP) decomposition of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from autocompress.layers import Cost, LayerSpec
from autocompress.transforms.base import (
    NO_SAVING,
    Factors,
    Transform,
    climb,
    finish,
    like,
    need_conv,
    need_rank,
    pair,
    per_group,
    principal_outputs,
    round_rank,
)

Components = tuple[Tensor, Tensor, Tensor]
"""Factors of the outputs, the inputs and the places of the kernel, `size x rank` each."""

SWEEPS = 10
"""Sweeps of alternating least squares; fine-tuning does the rest."""
PENALTIES = (1e-6, 1e-3, 1e-2, 1e-1)
"""Regularisations to try in turn; the first only keeps the normal equations solvable."""
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


def _fit(block: Tensor, rank: int) -> Components:
    """Factors `out x rank`, `in x rank`, `places x rank` of one group, of equal norms.

    Of alternating least squares with growing regularisation the first whose components don't
    diverge.
    """
    if rank >= _exact_rank(*block.shape):
        return _exact(block, rank)
    norm = block.norm().clamp_min(1e-12)
    start = _start(block / norm, rank)
    found = start
    for penalty in PENALTIES:
        candidate = _least_squares(block / norm, start, penalty)
        sizes = torch.stack([factor.norm(dim=0) for factor in candidate]).prod(dim=0)
        if bool(sizes.isfinite().all()):
            found = candidate
            if float(sizes.max()) < DIVERGED:
                break
    outputs, inputs, places = _even_components(*found)
    third = norm ** (1 / 3)
    return outputs * third, inputs * third, places * third


def _least_squares(block: Tensor, start: Components, penalty: float) -> Components:
    """Alternating least squares from a fixed start.

    The same steps as `tensorly.decomposition.parafac`, against which it is tested, but with no
    Khatri-Rao products in memory, and one product with the kernel serving two modes: eight times
    faster for 512 x 512 x 9 and rank 512.

    Args:
        block: `out x in x places`.
        start: Factors of the three modes; those of the outputs are not read.
        penalty: Weight of the factors' squares, as a share of the mean diagonal of the normal
            equations.
    """
    outputs, inputs, places = start
    size_out, size_in, size_places = block.shape
    by_inputs = block.transpose(1, 2).reshape(size_out * size_places, size_in)
    by_outputs = block.permute(2, 1, 0).reshape(size_places * size_in, size_out)
    for _ in range(SWEEPS):
        product = (by_inputs @ inputs).reshape(size_out, size_places, -1)
        outputs = _solve((product * places).sum(1), inputs, places, penalty)
        product = (by_outputs @ outputs).reshape(size_places, size_in, -1)
        inputs = _solve((product * places[:, None]).sum(0), outputs, places, penalty)
        places = _solve((product * inputs).sum(1), outputs, inputs, penalty)
        outputs, inputs, places = _even_components(outputs, inputs, places)
    return outputs, inputs, places


def _solve(right: Tensor, one: Tensor, other: Tensor, penalty: float) -> Tensor:
    """The factor of one mode that fits best, given those of the two others."""
    normal = (one.T @ one) * (other.T @ other)
    normal.diagonal().add_(penalty * normal.diagonal().mean())
    # A singular system yields no finite numbers, on which the caller tries a larger penalty.
    solution, _ = torch.linalg.solve_ex(normal, right.T)
    return torch.as_tensor(solution).T


def _even_components(outputs: Tensor, inputs: Tensor, places: Tensor) -> Components:
    """Scale each component so that its three vectors have equal norms."""
    factors = (outputs, inputs, places)
    norms = torch.stack([factor.norm(dim=0).clamp_min(1e-12) for factor in factors])
    target = norms.log().mean(dim=0).exp()
    outputs, inputs, places = (f * (target / n) for f, n in zip(factors, norms, strict=True))
    return outputs, inputs, places


def _start(block: Tensor, rank: int) -> Components:
    """Factors to start from, the same for the same kernel and rank.

    They are the leading singular vectors of each mode, then seeded noise.
    """
    generator = torch.Generator().manual_seed(rank)
    factors = []
    for mode in range(3):
        flat = block.movedim(mode, 0).flatten(1)
        leading = principal_outputs(flat.double(), None)[:, :rank].float()
        noise = torch.randn(len(flat), rank - leading.shape[1], generator=generator)
        noise = noise / noise.norm(dim=0).clamp_min(1e-12)
        factors.append(torch.cat([leading, noise], dim=1))
    return factors[0], factors[1], factors[2]


def _exact(block: Tensor, rank: int) -> Components:
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
