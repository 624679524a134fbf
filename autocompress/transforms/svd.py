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
        """Directions of the outputs and the kernels seen along them, stacked by group."""
        blocks = per_group(weight.detach().double(), groups).flatten(2)
        directions = []
        for group, block in enumerate(blocks):
            own = patches_of_group(patches, groups, group)
            directions.append(principal_outputs(block, None if own is None else own.flatten(1)))
        vectors = torch.stack(directions)
        return vectors, vectors.transpose(1, 2) @ blocks, weight.detach()

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
        if isinstance(module, nn.Linear):
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
        directions, along, weight = factors
        pairs = [
            balance(rows[: self.rank], vectors[:, : self.rank])
            for vectors, rows in zip(directions, along, strict=True)
        ]
        first = torch.cat([pair[0] for pair in pairs]).reshape(-1, *weight.shape[1:])
        second = torch.cat([pair[1] for pair in pairs])
        if weight.ndim == 4:
            second = second[:, :, None, None]
        return first.to(weight.dtype), second.to(weight.dtype)


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
        """Left vectors, singular values, right vectors, one row a group, and the weight."""
        blocks = per_group(weight.detach().float(), groups)
        matrices = blocks.permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        return left, values, right, weight.detach()

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
        padding = pair(conv.padding)
        return finish(
            conv,
            [
                like(
                    conv,
                    conv.in_channels,
                    inner,
                    kernel=(kh, 1),
                    stride=(conv.stride[0], 1),
                    padding=padding if isinstance(padding, str) else (padding[0], 0),
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
                    padding=padding if isinstance(padding, str) else (0, padding[1]),
                    dilation=(1, conv.dilation[1]),
                    groups=conv.groups,
                    bias=conv.bias is not None,
                    padded=True,
                ),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """Both layers' weights."""
        left, values, right, weight = factors
        _, width_in, kh, kw = weight.shape
        root = values[:, : self.rank].sqrt()
        columns = (left[:, :, : self.rank] * root[:, None]).transpose(1, 2)
        rows = (
            (right[:, : self.rank] * root[:, :, None])
            .reshape(*right[:, : self.rank].shape[:2], -1, kw)
            .transpose(1, 2)
        )
        first = columns.reshape(-1, width_in, kh, 1)
        second = rows.reshape(-1, self.rank, 1, kw)
        return first.to(weight.dtype), second.to(weight.dtype)


def _most_channel_rank(layer: LayerSpec) -> int:
    kh, kw = layer.kernel_size
    return min(layer.out_channels // layer.groups, layer.in_channels // layer.groups * kh * kw)


def _most_spatial_rank(layer: LayerSpec) -> int:
    kh, kw = layer.kernel_size
    return min(layer.in_channels // layer.groups * kh, layer.out_channels // layer.groups * kw)


_FITS: tuple[type[Transform], ...] = (SVD, SpatialSVD)
