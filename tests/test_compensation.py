"""What remaining channels make up for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autocompress.compensation import RIDGE, InputStatistics, Unexplained, compensate


def mixed_inputs(taps: int) -> Tensor:
    """Five channels of which the last two follow from the first three, with a mean."""
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(512, 3, taps, taps, generator=generator) + 2.0
    first = 0.5 * free[:, 0] - free[:, 2] + 1.0
    second = free[:, 1] + 0.25 * free[:, 0]
    return torch.cat([free, first[:, None], second[:, None]], dim=1)


@pytest.mark.parametrize("taps", [1, 3])
def test_channels_that_follow_from_the_others_cost_nothing(taps: int) -> None:
    torch.manual_seed(0)
    patches = mixed_inputs(taps)
    weight = torch.randn(4, 5, taps, taps)
    new, shift = compensate(weight, InputStatistics.of(patches), [0, 1, 2])
    assert new.shape == (4, 3, taps, taps)
    exact = F.conv2d(patches, weight).flatten(1)
    fewer = F.conv2d(patches[:, :3], new).flatten(1) + shift
    torch.testing.assert_close(fewer, exact, rtol=0.02, atol=0.05)
    plain = F.conv2d(patches[:, :3], weight[:, :3]).flatten(1)
    assert (exact - fewer).norm() < 0.02 * (exact - plain).norm()


def test_a_linear_layer() -> None:
    torch.manual_seed(0)
    inputs = mixed_inputs(1).flatten(1)
    weight = torch.randn(4, 5)
    new, shift = compensate(weight, InputStatistics.of(inputs), [0, 1, 2])
    torch.testing.assert_close(
        inputs[:, :3] @ new.T + shift, inputs @ weight.T, rtol=0.02, atol=0.05
    )


def test_with_all_channels_nothing_changes() -> None:
    weight = torch.randn(4, 5, 3, 3)
    new, shift = compensate(weight, InputStatistics.of(mixed_inputs(3)), range(5))
    torch.testing.assert_close(new, weight)
    assert not shift.any()


def test_independent_channels_leave_their_mean_behind() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4096, 3) + torch.tensor([0.0, 0.0, 5.0])
    weight = torch.ones(2, 3)
    new, shift = compensate(weight, InputStatistics.of(inputs), [0, 1])
    torch.testing.assert_close(new, weight[:, :2], atol=0.1, rtol=0.0)
    torch.testing.assert_close(shift, torch.full((2,), 5.0), atol=0.2, rtol=0.0)


def test_channels_that_never_vary_are_no_trouble() -> None:
    inputs = torch.zeros(64, 4)
    new, shift = compensate(torch.ones(2, 4), InputStatistics.of(inputs), [0])
    assert new.isfinite().all() and not shift.any()


@pytest.mark.parametrize("left", [1, 3, 4, 6])
def test_it_is_least_squares_however_many_remain(left: int) -> None:
    """Both ways of solving it give what the normal equations of the remaining channels do."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 7) @ torch.randn(7, 7) + torch.randn(7)
    weight = torch.randn(3, 7)
    statistics = InputStatistics.of(inputs)
    kept, gone = list(range(left)), list(range(left, 7))
    new, shift = compensate(weight, statistics, kept)
    ridge = RIDGE * statistics.covariance.diagonal().mean() * torch.eye(left)
    known = statistics.covariance[:left, :left] + ridge
    mixing = statistics.covariance[gone][:, kept] @ known.inverse()
    lost = weight[:, gone].double()
    torch.testing.assert_close(new, (weight[:, kept] + lost @ mixing).float())
    rest = statistics.mean[gone] - mixing @ statistics.mean[kept]
    torch.testing.assert_close(shift, (lost @ rest).float())


@pytest.mark.parametrize("left", [1, 3, 4, 6])
@pytest.mark.parametrize("taps", [(), (3, 3)])
def test_what_remaining_channels_do_not_tell(left: int, taps: tuple[int, ...]) -> None:
    """The answers that a compensated layer misses, whichever way is shorter."""
    torch.manual_seed(0)
    patches = torch.einsum("nc...,cd->nd...", torch.randn(64, 7, *taps), torch.randn(7, 7)) + 1.0
    weight = torch.randn(3, 7, *taps)
    statistics = InputStatistics.of(patches)
    kept, gone = list(range(left)), torch.arange(left, 7)
    new, shift = compensate(weight, statistics, kept)
    fewer = patches[:, kept].flatten(1) @ new.flatten(1).T + shift
    rest = Unexplained(statistics, patches)(gone, torch.tensor(kept))
    assert rest.shape == (64, 7 - left, *taps)
    missed = rest.flatten(1) @ weight[:, gone].flatten(1).T
    exact = patches.flatten(1) @ weight.flatten(1).T
    torch.testing.assert_close(exact - missed, fewer, rtol=1e-4, atol=1e-3)
