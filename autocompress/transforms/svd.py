"""Truncated SVD over channels, and spatial SVD of a kernel into a column and a row."""

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
    balance,
    climb,
    finish,
    fix_signs,
    like,
    need_conv,
    need_rank,
    pair,
    patches_of_group,
    per_group,
    principal_outputs,
    round_rank,
    split_padding,
)

TALL = 1024
"""Output channels from which on a matrix with half as many inputs is factored in their space."""


@dataclass(frozen=True)
class SVD:
    """Channel SVD: a k x k convolution to `rank` channels, then 1 x 1; or two Linear layers.

    With patches the cut loses least of the layer's real outputs; without, of its weights
    (Denton et al. 2014, arXiv 1404.0736).

    Attributes:
        rank: Channels between the two layers, per group.
    """

    rank: int
    name: ClassVar[str] = "svd"

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why channel SVD can't act on `layer`; None if it can."""
        if _most_channel_rank(layer) < 2:
            return "channel SVD has nothing to cut: a group has one output channel"
        return None if cls.ladder(layer) else NO_SAVING

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Ranks that save, smallest first."""
        most = _most_channel_rank(layer)
        return climb(layer, lambda share: cls(round_rank(share * most, most)), points)

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """Full rank."""
        return cls(_most_channel_rank(layer))

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """Directions of the outputs, `groups x out/g x out/g`, and the kernels seen along them.

        Of tall matrices there are as many directions as inputs, which is full rank, too.
        """
        blocks = per_group(weight.detach().double(), groups)
        directions, seen = [], []
        for group, block in enumerate(blocks):
            own = patches_of_group(patches, groups, group)
            flat = None if own is None else own.flatten(1)
            vectors = _directions(block.flatten(1), flat)
            directions.append(vectors)
            seen.append((vectors.T @ block.flatten(1)).reshape(-1, *block.shape[1:]))
        return torch.stack(directions).to(weight.dtype), torch.stack(seen).to(weight.dtype)

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs of the two layers."""
        kh, kw = layer.kernel_size
        inner = layer.groups * self.rank
        weights = inner * (layer.in_channels // layer.groups) * kh * kw
        weights += layer.out_channels * self.rank
        positions = layer.out_size[0] * layer.out_size[1]
        return Cost(weights + layer.out_channels * layer.bias, weights * positions)

    def build(self, module: nn.Module) -> nn.Sequential:
        """The two layers, untrained."""
        if type(module) is nn.Linear:
            need_rank("SVD", "rank", self.rank, min(module.in_features, module.out_features))
            options = {"device": module.weight.device, "dtype": module.weight.dtype}
            bias = module.bias is not None
            first = nn.Linear(module.in_features, self.rank, bias=False, **options)
            second = nn.Linear(self.rank, module.out_features, bias=bias, **options)
            return finish(module, [first, second])
        conv = need_conv(module, "SVD")
        most = min(conv.out_channels // conv.groups, conv.weight[0].numel())
        need_rank("SVD", "rank", self.rank, most)
        inner = conv.groups * self.rank
        return finish(
            conv,
            [
                like(
                    conv,
                    conv.in_channels,
                    inner,
                    kernel=(conv.kernel_size[0], conv.kernel_size[1]),
                    stride=(conv.stride[0], conv.stride[1]),
                    padding=pair(conv.padding),
                    dilation=(conv.dilation[0], conv.dilation[1]),
                    groups=conv.groups,
                    padded=True,
                ),
                like(
                    conv, inner, conv.out_channels, groups=conv.groups, bias=conv.bias is not None
                ),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """Both layers' weights."""
        directions, seen = factors
        cut = zip(seen[:, : self.rank], directions[:, :, : self.rank], strict=True)
        balanced = [balance(block, vectors) for block, vectors in cut]
        first, second = (torch.cat(parts) for parts in zip(*balanced, strict=True))
        return first, second if first.ndim == 2 else second[:, :, None, None]


def _directions(matrix: Tensor, patches: Tensor | None) -> Tensor:
    """Directions of the outputs of an `out x in` matrix, the most important first.

    Returns:
        `out x out`; `out x in` for a matrix so tall that the eigenvectors of its outputs'
        covariance take long (in MLPs of transformers): its outputs lie in as many dimensions.
    """
    out, width = matrix.shape
    if out < TALL or out < 2 * width:
        return principal_outputs(matrix, patches)
    basis, inside = torch.linalg.qr(matrix)
    return fix_signs(basis @ principal_outputs(inside, patches))


@dataclass(frozen=True)
class SpatialSVD:
    """Spatial SVD: a kh x 1 convolution to `rank` channels, then 1 x kw.

    Jaderberg et al. 2014, arXiv 1405.3866; the factors are the SVD of the kernel as a
    `(in * kh) x (out * kw)` matrix.

    Attributes:
        rank: Channels between the two layers, per group.
    """

    rank: int
    name: ClassVar[str] = "spatial_svd"

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why spatial SVD can't act on `layer`; None if it can."""
        if layer.kind == "linear" or min(layer.kernel_size) == 1:
            return "spatial SVD needs a kernel higher and wider than 1"
        return None if cls.ladder(layer) else NO_SAVING

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Ranks that save, smallest first."""
        most = _most_spatial_rank(layer)
        return climb(layer, lambda share: cls(round_rank(share * most, most)), points, 1 / 32)

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """Full rank."""
        return cls(_most_spatial_rank(layer))

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """Columns `groups x in/g*kh x in/g x kh x 1` and rows `groups x out/g x in/g*kh x 1 x kw`.

        They are the left singular vectors, and the kernels seen along them.
        """
        columns, rows = [], []
        for block in per_group(weight.detach().double(), groups):
            _, width_in, kh, kw = block.shape
            matrix = block.permute(1, 2, 0, 3).reshape(width_in * kh, -1)
            vectors = principal_outputs(matrix, None)
            columns.append(vectors.T.reshape(-1, width_in, kh, 1))
            rows.append((vectors.T @ matrix).reshape(len(vectors), -1, 1, kw).transpose(0, 1))
        return torch.stack(columns).to(weight.dtype), torch.stack(rows).to(weight.dtype)

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs; the column keeps the input's width."""
        kh, kw = layer.kernel_size
        inner = layer.groups * self.rank
        column = inner * (layer.in_channels // layer.groups) * kh
        row = layer.out_channels * self.rank * kw
        macs = column * layer.out_size[0] * layer.in_size[1]
        macs += row * layer.out_size[0] * layer.out_size[1]
        return Cost(column + row + layer.out_channels * layer.bias, macs)

    def build(self, module: nn.Module) -> nn.Sequential:
        """The two layers, untrained."""
        conv = need_conv(module, "Spatial SVD")
        kh, kw = conv.kernel_size
        width_in, width_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        need_rank("SpatialSVD", "rank", self.rank, min(width_in * kh, width_out * kw))
        inner = conv.groups * self.rank
        padding_column, padding_row = split_padding(conv.padding)
        return finish(
            conv,
            [
                like(
                    conv,
                    conv.in_channels,
                    inner,
                    kernel=(kh, 1),
                    stride=(conv.stride[0], 1),
                    padding=padding_column,
                    dilation=(conv.dilation[0], 1),
                    groups=conv.groups,
                    padded=True,
                ),
                like(
                    conv,
                    inner,
                    conv.out_channels,
                    kernel=(1, kw),
                    stride=(1, conv.stride[1]),
                    padding=padding_row,
                    dilation=(1, conv.dilation[1]),
                    groups=conv.groups,
                    bias=conv.bias is not None,
                    padded=True,
                ),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """Both layers' weights."""
        columns, rows = factors
        cut = zip(columns[:, : self.rank], rows[:, :, : self.rank], strict=True)
        balanced = [balance(column, row) for column, row in cut]
        return tuple(torch.cat(parts) for parts in zip(*balanced, strict=True))


def _most_channel_rank(layer: LayerSpec) -> int:
    kh, kw = layer.kernel_size
    return min(layer.out_channels // layer.groups, layer.in_channels // layer.groups * kh * kw)


def _most_spatial_rank(layer: LayerSpec) -> int:
    kh, kw = layer.kernel_size
    return min(layer.in_channels // layer.groups * kh, layer.out_channels // layer.groups * kw)


_FITS: tuple[type[Transform], ...] = (SVD, SpatialSVD)
