"""Tucker-2: a kernel factored along its two channel modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

from autocompress.layers import Cost, LayerSpec
from autocompress.transforms.base import (
    NO_SAVING,
    Factors,
    Transform,
    climb,
    even_norms,
    finish,
    like,
    need_conv,
    need_rank,
    pair,
    patches_of_group,
    per_group,
    principal_outputs,
    round_rank,
)


@dataclass(frozen=True)
class Tucker2:
    """Tucker-2: 1 x 1 to `rank_in`, k x k to `rank_out`, 1 x 1 to the output channels.

    Kim et al. 2016, arXiv 1511.06530, by the higher-order SVD, whose bases are computed once and
    cut to any rank. With patches the input mode is whitened by the channels' covariance and the
    output mode is that of the real outputs.

    Attributes:
        rank_in: Channels after the first layer, per group.
        rank_out: Channels after the core, per group.
    """

    rank_in: int
    rank_out: int
    name: ClassVar[str] = "tucker2"

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why Tucker-2 can't act on `layer`; None if it can."""
        if layer.kind == "linear" or layer.kernel_size == (1, 1):
            return "Tucker-2 of a 1x1 kernel is channel SVD with one layer more"
        if min(layer.in_channels, layer.out_channels) // layer.groups < 2:
            return "Tucker-2 needs two or more channels in each group"
        return None if cls.ladder(layer) else NO_SAVING

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Rank pairs that save, smallest first; both at the same share of their channels."""
        width_in, width_out = _widths(layer)
        return climb(
            layer,
            lambda share: cls(
                round_rank(share * width_in, width_in), round_rank(share * width_out, width_out)
            ),
            points,
        )

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """Full rank."""
        return cls(*_widths(layer))

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """Full cores, first and last layers by group, each cut from the front to any rank."""
        parts: list[tuple[Tensor, ...]] = []
        for group, block in enumerate(per_group(weight.detach().double(), groups)):
            own = patches_of_group(patches, groups, group)
            root, inverse = _root_of_inputs(own, block.shape[1])
            white = torch.einsum("oikl,ij->ojkl", block, root)
            inputs = principal_outputs(white.transpose(0, 1).flatten(1), None)
            flat = None if own is None else own.flatten(1)
            outputs = principal_outputs(block.flatten(1), flat)
            with tensorly.backend_context("pytorch", local_threadsafe=True):
                core = multi_mode_dot(white, [outputs.T, inputs.T], modes=[0, 1])
            parts.append(((inputs.T @ inverse)[:, :, None, None], core, outputs[:, :, None, None]))
        stacked = (torch.stack(column) for column in zip(*parts, strict=True))
        return tuple(part.to(weight.dtype) for part in stacked)

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs; the first layer works at the input's resolution."""
        kh, kw = layer.kernel_size
        width_in, width_out = _widths(layer)
        first = layer.groups * self.rank_in * width_in
        core = layer.groups * self.rank_out * self.rank_in * kh * kw
        last = layer.groups * width_out * self.rank_out
        before = layer.in_size[0] * layer.in_size[1]
        after = layer.out_size[0] * layer.out_size[1]
        params = first + core + last + layer.out_channels * layer.bias
        return Cost(params, first * before + (core + last) * after)

    def build(self, module: nn.Module) -> nn.Sequential:
        """The three layers, untrained."""
        conv = need_conv(module, "Tucker-2")
        groups = conv.groups
        need_rank("Tucker2", "rank_in", self.rank_in, conv.in_channels // groups)
        need_rank("Tucker2", "rank_out", self.rank_out, conv.out_channels // groups)
        return finish(
            conv,
            [
                like(conv, conv.in_channels, groups * self.rank_in, groups=groups),
                like(
                    conv,
                    groups * self.rank_in,
                    groups * self.rank_out,
                    kernel=(conv.kernel_size[0], conv.kernel_size[1]),
                    stride=(conv.stride[0], conv.stride[1]),
                    padding=pair(conv.padding),
                    dilation=(conv.dilation[0], conv.dilation[1]),
                    groups=groups,
                    padded=True,
                ),
                like(
                    conv,
                    groups * self.rank_out,
                    conv.out_channels,
                    groups=groups,
                    bias=conv.bias is not None,
                ),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """The three layers' weights."""
        firsts, cores, lasts = factors
        cut = zip(
            firsts[:, : self.rank_in],
            cores[:, : self.rank_out, : self.rank_in],
            lasts[:, :, : self.rank_out],
            strict=True,
        )
        even = [even_norms(parts) for parts in cut]
        return tuple(torch.cat(parts) for parts in zip(*even, strict=True))


def _widths(layer: LayerSpec) -> tuple[int, int]:
    return layer.in_channels // layer.groups, layer.out_channels // layer.groups


def _root_of_inputs(patches: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """A square root of the input channels' covariance and its inverse, `width x width` each."""
    if patches is None:
        eye = torch.eye(width, dtype=torch.double)
        return eye, eye
    rows = patches.transpose(0, 1).flatten(1)
    covariance = rows @ rows.T
    # Channels that are nearly always off must not be divided by nearly zero.
    covariance = covariance / covariance.trace().clamp_min(1e-30) * width
    values, vectors = torch.linalg.eigh(covariance)
    root = (values.clamp_min(0.0) + 0.01).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


_FITS: type[Transform] = Tucker2
