"""The costs that a study can make small."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from autocompress.config import StudyConfig
from autocompress.costs import OBJECTIVES, cost_of, is_timed, mean_share, spend
from autocompress.latency import Latency
from autocompress.layers import Cost
from autocompress.profiler import Profile

FULL = Cost(params=40, macs=1000, ms=8.0)
SMALL = Cost(params=10, macs=500, ms=6.0)


def profile(cost: Cost) -> Profile:
    latency = None if cost.ms is None else Latency(cost.ms, 0.0, 1, 9, "cpu", 1)
    return Profile(cost.params, 4 * cost.params + 32, cost.macs, 100, latency=latency)


@pytest.mark.parametrize(
    ("objective", "cost"),
    [
        ("params", 10.0),
        ("size", 72.0),
        ("macs", 500.0),
        ("latency", 6.0),
        ("params+macs", (25.0 + 50.0) / 2),
        ("params+latency", (25.0 + 75.0) / 2),
        ("params+macs+latency", (25.0 + 50.0 + 75.0) / 3),
    ],
)
def test_costs_are_in_their_own_units(objective: str, cost: float) -> None:
    assert cost_of(objective, profile(SMALL), 6.0, profile(FULL)) == pytest.approx(cost)


def test_the_study_file_takes_all_of_them_and_no_other() -> None:
    assert set(get_args(StudyConfig.model_fields["objective"].annotation)) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_time_that_is_not_known_is_missed_only_where_it_counts(objective: str) -> None:
    bare = profile(Cost(10, 500))
    assert math.isnan(cost_of(objective, bare, None, profile(FULL))) == is_timed(objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_are_spent_as_they_sum_up(objective: str) -> None:
    parts = [Cost(8, 200, 2.0), Cost(2, 300, 4.0)]
    whole = spend(objective, SMALL, FULL)
    assert sum(spend(objective, part, FULL) for part in parts) == pytest.approx(whole, abs=2)
    assert 0 < whole < spend(objective, FULL, FULL)


def test_macs_stand_for_times_that_nobody_took() -> None:
    untimed = Cost(10, 500)
    assert spend("latency", untimed, Cost(40, 1000)) == 500
    assert mean_share("params+latency", untimed, FULL) == pytest.approx((0.25 + 0.5) / 2)
    assert mean_share("params+macs+latency", untimed, FULL) == pytest.approx((0.25 + 0.5 * 2) / 3)
