"""Tensor train (TT): a kernel, or the matrix of a Linear layer, as a chain of small cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Self

import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

from autocompress.errors import UnsupportedLayer
from autocompress.layers import Cost, LayerSpec
from autocompress.transforms.base import (
    NO_SAVING,
    Factors,
    StandIn,
    Transform,
    balance,
    climb,
    even_norms,
    finish,
    like,
    need_conv,
    need_rank,
    per_group,
    principal_outputs,
    round_rank,
    split_padding,
)


class TTLinear(StandIn):
    """A Linear layer whose matrix is a chain of two TT-matrix cores.

    Novikov et al. 2015, arXiv 1509.06569, with two modes: `in = in1 * in2`, `out = out1 * out2`,
    and `W[(o1 o2), (i1 i2)] = sum_r first[r, o1, i1] * second[o2, r, i2]`.

    Args:
        in_features: Length of the inputs.
        out_features: Length of the outputs.
        rank: Length of the index that the cores share.
        bias: Whether to add a bias.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_modes, self.out_modes = near_square(in_features), near_square(out_features)
        (in1, in2), (out1, out2) = self.in_modes, self.out_modes
        self.first = nn.Linear(in1, rank * out1, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank * in2, out2, bias=False, device=device, dtype=dtype)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map `... x in_features` to `... x out_features`."""
        (in1, in2), (out1, out2) = self.in_modes, self.out_modes
        lead = input.shape[:-1]
        rows = input.reshape(-1, in1, in2).transpose(1, 2)
        # n x in2 x (rank out1) -> n x out1 x (rank in2)
        mixed = self.first(rows).reshape(-1, in2, self.first.out_features // out1, out1)
        mixed = mixed.permute(0, 3, 2, 1).flatten(2)
        y: Tensor = self.second(mixed).reshape(*lead, out1 * out2)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class TensorTrain:
    """TT: 1 x 1, k x 1, 1 x k and 1 x 1 convolutions in a row; or a `TTLinear`.

    The cores are those of TT-SVD (Oseledets 2011, SIAM J. Sci. Comput. 33:2295) of the kernel as
    `in x kh x kw x out`.

    Attributes:
        ranks: Channels between the four convolutions, per group; one number for a Linear.
    """

    ranks: tuple[int, ...]
    name: ClassVar[str] = "tt"

    @classmethod
    def refusal(cls, layer: LayerSpec) -> str | None:
        """Why TT can't act on `layer`; None if it can."""
        if layer.kind == "conv2d":
            if min(layer.kernel_size) == 1:
                return "TT needs a kernel higher and wider than 1"
            if min(layer.in_channels, layer.out_channels) // layer.groups < 2:
                return "TT needs two or more channels in each group"
        elif 1 in near_square(layer.in_channels) or 1 in near_square(layer.out_channels):
            return "TT of a Linear needs input and output features that are no primes"
        return None if cls.ladder(layer) else NO_SAVING

    @classmethod
    def ladder(cls, layer: LayerSpec, points: int = 16) -> Sequence[Self]:
        """Ranks that save, smallest first."""
        return climb(layer, lambda share: cls(_ranks_at(layer, share)), min(points, 8))

    @classmethod
    def full(cls, layer: LayerSpec) -> Self:
        """Full rank."""
        return cls(_most(layer))

    @classmethod
    def factorize(cls, weight: Tensor, groups: int, patches: Tensor | None) -> Factors:
        """Bases of both channel modes and the kernel in them; or the cores of a matrix.

        The outer ranks are cut from the bases and the middle one by an SVD of the small core: the
        error of TT-SVD at a tenth of its time, as the bases are made once for all ranks.
        """
        if weight.ndim == 2:
            matrix = _matrix_of_modes(weight.detach().double())
            left = principal_outputs(matrix, None)
            return left, left.T @ matrix, weight.detach()
        parts: list[tuple[Tensor, ...]] = []
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            for block in per_group(weight.detach().double(), groups):
                inputs = principal_outputs(block.transpose(0, 1).flatten(1), None)
                outputs = principal_outputs(block.flatten(1), None)
                core = multi_mode_dot(block, [outputs.T, inputs.T], modes=[0, 1])
                parts.append((inputs, outputs, core))
        inputs, outputs, core = (torch.stack(column) for column in zip(*parts, strict=True))
        return inputs, outputs, core, weight.detach()

    def cost(self, layer: LayerSpec) -> Cost:
        """Params and MACs."""
        if layer.kind == "linear":
            (in1, in2), (out1, out2) = (
                near_square(layer.in_channels),
                near_square(layer.out_channels),
            )
            rank = self.ranks[0]
            first, second = in1 * rank * out1, rank * in2 * out2
            positions = layer.out_size[0] * layer.out_size[1]
            params = first + second + layer.out_channels * layer.bias
            return Cost(params, (first * in2 + second * out1) * positions)
        kh, kw = layer.kernel_size
        (one, two, three), groups = self.ranks, layer.groups
        cores = (
            layer.in_channels * one,
            groups * one * kh * two,
            groups * two * kw * three,
            three * layer.out_channels,
        )
        (height_in, width_in), (height, width) = layer.in_size, layer.out_size
        sizes = (height_in * width_in, height * width_in, height * width, height * width)
        macs = sum(core * size for core, size in zip(cores, sizes, strict=True))
        return Cost(sum(cores) + layer.out_channels * layer.bias, macs)

    def build(self, module: nn.Module) -> nn.Module:
        """The chain, untrained."""
        wanted = 1 if type(module) is nn.Linear else 3
        if len(self.ranks) != wanted:
            raise UnsupportedLayer(
                f"TensorTrain needs {wanted} ranks for {type(module).__name__}, got {self.ranks}."
            )
        if type(module) is nn.Linear:
            (in1, in2), (out1, out2) = (
                near_square(module.in_features),
                near_square(module.out_features),
            )
            need_rank("TensorTrain", "rank", self.ranks[0], min(in1 * out1, in2 * out2))
            built = TTLinear(
                module.in_features,
                module.out_features,
                self.ranks[0],
                module.bias is not None,
                module.weight.device,
                module.weight.dtype,
            )
            if built.bias is not None:
                with torch.no_grad():
                    built.bias.copy_(module.bias)
            built.answer_for(module)
            return built.train(module.training)
        conv = need_conv(module, "TT")
        groups, (kh, kw) = conv.groups, conv.kernel_size
        width_in, width_out = conv.in_channels // groups, conv.out_channels // groups
        bounds = _bounds(width_in, kh, kw, width_out)
        for rank, bound in zip(self.ranks, bounds, strict=True):
            need_rank("TensorTrain", "rank", rank, bound)
        one, two, three = (groups * rank for rank in self.ranks)
        padding_column, padding_row = split_padding(conv.padding)
        return finish(
            conv,
            [
                like(conv, conv.in_channels, one, groups=groups),
                like(
                    conv,
                    one,
                    two,
                    kernel=(kh, 1),
                    stride=(conv.stride[0], 1),
                    padding=padding_column,
                    dilation=(conv.dilation[0], 1),
                    groups=groups,
                    padded=True,
                ),
                like(
                    conv,
                    two,
                    three,
                    kernel=(1, kw),
                    stride=(1, conv.stride[1]),
                    padding=padding_row,
                    dilation=(1, conv.dilation[1]),
                    groups=groups,
                    padded=True,
                ),
                like(conv, three, conv.out_channels, groups=groups, bias=conv.bias is not None),
            ],
        )

    def kernels(self, factors: Factors) -> tuple[Tensor, ...]:
        """The cores as the layers' weights, of equal norms."""
        weight = factors[-1]
        if weight.ndim == 2:
            return self._matrix_cores(*factors)
        one, two, three = self.ranks
        kh, kw = weight.shape[2:]
        parts: list[list[Tensor]] = [[], [], [], []]
        for inputs, outputs, core in zip(*factors[:-1], strict=True):
            middle = core[:three, :one].permute(1, 2, 3, 0).reshape(one * kh, kw * three)
            left = principal_outputs(middle, None)[:, :two]
            left = nn.functional.pad(left, (0, two - left.shape[1]))
            shaped = (
                inputs[:, :one].T[:, :, None, None],
                left.T.reshape(two, one, kh, 1),
                (left.T @ middle).reshape(two, kw, three).permute(2, 0, 1)[:, :, None],
                outputs[:, :three, None, None],
            )
            for part, factor in zip(parts, even_norms(shaped), strict=True):
                part.append(factor)
        return tuple(torch.cat(part).to(weight.dtype) for part in parts)

    def _matrix_cores(self, left: Tensor, right: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        (out1, out2), (in1, in2) = near_square(weight.shape[0]), near_square(weight.shape[1])
        rank = self.ranks[0]
        first = left[:, :rank].reshape(out1, in1, rank).permute(2, 0, 1)
        second = right[:rank].reshape(rank, out2, in2).transpose(0, 1)
        first, second = balance(first, second)
        cores = first.reshape(rank * out1, in1), second.reshape(out2, rank * in2)
        return tuple(core.to(weight.dtype) for core in cores)


def near_square(number: int) -> tuple[int, int]:
    """The two factors of `number` that are nearest to each other, the smaller first."""
    for factor in range(isqrt(number), 0, -1):
        if number % factor == 0:
            return factor, number // factor
    return 1, number


def _matrix_of_modes(weight: Tensor) -> Tensor:
    """A Linear's matrix `(out1 out2) x (in1 in2)` as `(out1 in1) x (out2 in2)`."""
    (out1, out2), (in1, in2) = near_square(weight.shape[0]), near_square(weight.shape[1])
    modes = weight.reshape(out1, out2, in1, in2).permute(0, 2, 1, 3)
    return modes.reshape(out1 * in1, out2 * in2)


def _ranks_at(layer: LayerSpec, share: float) -> tuple[int, ...]:
    ranks = [round_rank(share * most, most) for most in _most(layer)]
    if layer.kind == "conv2d":
        # Rounding must not leave the middle more channels than its neighbours can fill.
        kh, kw = layer.kernel_size
        ranks[1] = min(ranks[1], ranks[0] * kh, ranks[2] * kw)
    return tuple(ranks)


def _bounds(width_in: int, kh: int, kw: int, width_out: int) -> tuple[int, int, int]:
    one = min(width_in, kh * kw * width_out)
    three = min(width_out, width_in * kh * kw)
    return one, min(width_in * kh, kw * width_out), three


def _most(layer: LayerSpec) -> tuple[int, ...]:
    if layer.kind == "linear":
        (in1, in2), (out1, out2) = near_square(layer.in_channels), near_square(layer.out_channels)
        return (min(in1 * out1, in2 * out2),)
    kh, kw = layer.kernel_size
    groups = layer.groups
    return _bounds(layer.in_channels // groups, kh, kw, layer.out_channels // groups)


_FITS: type[Transform] = TensorTrain
