"""What the layers that read removed channels can make up for with the channels that remain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

RIDGE = 1e-3
"""Added to the channels' covariance, as a share of its mean variance."""
WIDEST = 4096
"""With more input channels, as behind a flattened feature map, nothing is made up for: their
covariance would need gigabytes."""


@dataclass(frozen=True)
class InputStatistics:
    """How the input channels of a layer go together.

    Attributes:
        mean: `in`, over real inputs and all places of the kernel.
        covariance: `in x in`.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_layer(cls, module: nn.Module, patches: Tensor) -> InputStatistics | None:
        """Of a layer's real inputs; None where nothing can be made up for in it."""
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        return None if grouped or patches.shape[1] > WIDEST else cls.of(patches)

    @classmethod
    def of(cls, patches: Tensor) -> InputStatistics:
        """Of real inputs, `n x in x kh x kw` or `n x in`."""
        values = _by_channel(patches)
        mean = values.mean(dim=1, keepdim=True)
        centred = values - mean
        covariance = centred @ centred.T / values.shape[1]
        return cls(mean.flatten().double(), covariance.double())

    @property
    def nbytes(self) -> int:
        """Memory that it takes with its precision matrix."""
        return 2 * self.covariance.untyped_storage().nbytes()

    def _with_ridge(self) -> Tensor:
        ridge = RIDGE * self.covariance.diagonal().mean().clamp_min(1e-12)
        return self.covariance + ridge * torch.eye(len(self.covariance), dtype=torch.float64)

    @cached_property
    def precision(self) -> Tensor:
        """The inverse of the covariance with its ridge, `in x in`."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self._with_ridge()))

    def mixing(self, removed: Tensor, remaining: Tensor) -> Tensor:
        """How removed channels are predicted from those that remain, `removed x remaining`.

        By the rows of the precision matrix that are removed, or, where fewer remain, by the rows of
        the covariance that do: the same, from the smaller system of equations.
        """
        if len(removed) < len(remaining):
            rows = self.precision[removed]
            found: Tensor = -torch.linalg.solve(rows[:, removed], rows[:, remaining])
        else:
            rows = self._with_ridge()[remaining]
            found = torch.linalg.solve(rows[:, remaining], rows[:, removed]).T
        return found


class Unexplained:
    """What of a layer's input channels those that remain don't tell, when some are removed.

    The same as the inputs minus what `compensate` predicts of them, without a pass over all
    channels for each choice of them.

    Args:
        statistics: Of the layer's inputs.
        patches: Real inputs, `n x in x kh x kw` or `n x in`.
    """

    def __init__(self, statistics: InputStatistics, patches: Tensor) -> None:
        self._statistics = statistics
        self._shape = (len(patches), *patches.shape[2:])
        self._centred = _by_channel(patches).double() - statistics.mean[:, None]
        self._told = statistics.precision @ self._centred

    def __call__(self, removed: Tensor, remaining: Tensor) -> Tensor:
        """Of the removed channels, `n x removed x kh x kw` or `n x removed`."""
        statistics = self._statistics
        if len(removed) < len(remaining):
            own = statistics.precision[removed][:, removed]
            rest: Tensor = torch.linalg.solve(own, self._told[removed])
        else:
            predicted = statistics.mixing(removed, remaining) @ self._centred[remaining]
            rest = self._centred[removed] - predicted
        count, *taps = self._shape
        return rest.float().reshape(len(removed), count, *taps).transpose(0, 1)


def split_channels(kept: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Which of a layer's `width` input channels are removed, and which remain."""
    own = set(kept)
    removed = [channel for channel in range(width) if channel not in own]
    return torch.tensor(removed, dtype=torch.long), torch.tensor(list(kept))


def _by_channel(patches: Tensor) -> Tensor:
    """Real inputs as `in x (n x places of the kernel)`."""
    values = patches.detach().cpu().float().reshape(len(patches), patches.shape[1], -1)
    return values.transpose(0, 1).flatten(1)


def compensate(
    weight: Tensor, statistics: InputStatistics, kept: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A kernel that reads fewer input channels and answers as much alike as they allow.

    Each removed channel is predicted from those that remain, by least squares over real inputs, and
    its weights are added to theirs (in the manner of He et al. 2017, arXiv 1707.06168, with one
    matrix for all places of the kernel).

    Args:
        weight: `out x in x kh x kw`, or `out x in` of a Linear.
        statistics: Of the layer's inputs.
        kept: Input channels that remain, ascending.

    Returns:
        The kernel, `out x kept x ...`, and what to add to the layer's bias, `out`.
    """
    removed, remaining = split_channels(kept, weight.shape[1])
    if not len(removed):
        return weight, torch.zeros(len(weight), dtype=weight.dtype)
    mixing = statistics.mixing(removed, remaining)
    shift = statistics.mean[removed] - mixing @ statistics.mean[remaining]
    lost = weight[:, removed].double().reshape(len(weight), len(removed), -1)
    gained = torch.einsum("ort,rk->okt", lost, mixing)
    gained = gained.reshape(len(weight), len(remaining), *weight.shape[2:])
    return weight[:, remaining] + gained.to(weight), (lost.sum(dim=2) @ shift).to(weight)
