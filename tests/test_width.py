"""Keep-counts of channel groups: what they cost, and budgets shared out among them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import optuna
import pytest
from test_channels import Dense, Depthwise, Residual, randomized
from test_importance import task_of
from torch import nn

from autocompress.allocator import ALONE, RULES, Knobs, allocate, decode
from autocompress.costs import spend
from autocompress.grouping import find_groups
from autocompress.importance import build_ladders
from autocompress.layers import Cost, inspect_layers
from autocompress.observation import observe_layers
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.sensitivity import Choice, LayerTable, build_table
from autocompress.space import KEEP, SearchSpace
from autocompress.surgery import apply_plan, build_plan
from autocompress.transforms.svd import SVD
from autocompress.width import ChannelSpace


def table_of(model: nn.Module) -> tuple[LayerTable, Cost]:
    task = task_of(model)
    example = task.example()
    layers, _ = inspect_layers(model, example)
    seen = observe_layers(model, task, layers, images=128, patches=1024)
    table = build_table(model, layers, seen.factor_cache(model), seen, ("svd", "tucker2"))
    groups, _ = find_groups(model, example)
    table = replace(table, ladders=build_ladders(model, task, groups, seen, "outputs"))
    return table, profile_model(model, example, latency=False).cost


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomized(Residual())


@pytest.fixture(scope="module")
def space(model: nn.Module) -> SearchSpace:
    table, full = table_of(model)
    return SearchSpace.from_table(table, "params", full)


@pytest.fixture
def width(space: SearchSpace) -> ChannelSpace:
    assert space.width is not None
    return space.width


@pytest.mark.parametrize("objective", ["params", "macs", "params+macs"])
@pytest.mark.parametrize(
    "net", [Residual(), Dense(), Depthwise(), Depthwise(groups=4)], ids=lambda m: type(m).__name__
)
def test_costs_are_those_of_the_network_that_is_built(net: nn.Module, objective: str) -> None:
    net = randomized(net)
    table, full = table_of(net)
    space = SearchSpace.from_table(table, objective, full)
    example = task_of(net).example()
    for budget, weight in ((0.7, ALONE), (0.7, 0.0), (0.5, -ALONE), (0.4, -0.3)):
        here, picked = decode(space, Knobs(budget, channels=weight))
        small = apply_plan(net, here.plan(picked))
        cost = spend(objective, profile_model(small, example, latency=False).cost, full)
        # A share is rounded for each layer.
        assert cost == pytest.approx(here.cost(picked), abs=9 if "+" in objective else 0)


def test_a_table_with_channels_round_trips(model: nn.Module) -> None:
    table, _ = table_of(model)
    assert table.ladders and LayerTable.from_json(table.to_json()) == table


def test_channels_alone_and_ranks_alone(space: SearchSpace) -> None:
    ranks, picked = decode(space, Knobs(0.6, channels=ALONE))
    assert ranks is space and not ranks.plan(picked).channels
    channels, picked = decode(space, Knobs(0.6, channels=-ALONE))
    plan = channels.plan(picked)
    assert plan.channels and not plan.layers
    between = [decode(space, Knobs(0.6, channels=weight)) for weight in (0.25, 0.5, 0.75)]
    plans = [both.plan(picked) for both, picked in between]
    assert any(plan.channels and plan.layers for plan in plans)


@pytest.mark.parametrize("objective", ["params", "params+macs"])
def test_channels_and_ranks_are_weighed_against_each_other(
    model: nn.Module, objective: str
) -> None:
    """Of all keep-counts, with the best ranks for each, hardly any plan breaks less."""
    table, full = table_of(model)
    space = SearchSpace.from_table(table, objective, full)
    assert space.width is not None
    every = [
        dict(zip(space.width.options, counts, strict=True))
        for counts in product(*([o.keep for o in own] for own in space.width.options.values()))
    ]
    for budget in (0.7, 0.5, 0.3):
        knobs = Knobs(budget)
        least = math.inf
        for counts in every:
            there = space.at(
                {n: k for n, k in counts.items() if k < space.width.options[n][0].keep}
            )
            ranks = allocate(there, knobs)
            if there.cost(ranks) <= budget * space.baseline_cost:
                least = min(least, there.damage(ranks))
        here, picked = decode(space, knobs)
        assert here.cost(picked) <= budget * space.baseline_cost
        alone = [decode(space, Knobs(budget, channels=weight)) for weight in (ALONE, -ALONE)]
        assert least <= here.damage(picked) <= 1.15 * least
        # Descent may end beside the best plan, as keep-counts of so few channels save much each.
        assert here.damage(picked) <= 1.1 * min(one.damage(ranks) for one, ranks in alone)


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_is_kept_as_far_as_the_ladders_allow(space: SearchSpace, rule: str) -> None:
    for budget in (0.95, 0.6, 0.3, 0.01):
        here, picked = decode(space, Knobs(budget, rule))
        cost = here.cost(picked) / space.baseline_cost
        assert cost <= budget or cost == pytest.approx(space.least_cost / space.baseline_cost)
    here, picked = decode(space, Knobs(1.0, rule))
    assert not here.kept and not here.plan(picked).layers


def test_the_weight_of_channels_steers(space: SearchSpace) -> None:
    def removed(weight: float) -> int:
        here, _ = decode(space, Knobs(0.5, channels=weight))
        assert space.width is not None
        return sum(space.width.options[name][0].keep - keep for name, keep in here.kept.items())

    counts = [removed(weight) for weight in (ALONE, 0.7, 0.0, -0.7, -ALONE)]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]


def test_parameters_mean_the_plan_and_the_plan_the_parameters(space: SearchSpace) -> None:
    for budget, weight in ((0.8, 0.3), (0.5, 0.0), (0.5, -ALONE)):
        here, picked = decode(space, Knobs(budget, channels=weight))
        params = here.params(picked)
        assert set(params) == set(space.distributions()) == set(here.distributions())
        study = optuna.create_study()
        study.enqueue_trial(params)
        plan = space.suggest(study.ask())
        assert plan == here.plan(picked)
        assert Plan.from_json(plan.to_json()) == plan
        assert space.of_plan(plan).pick(plan) == picked
        assert set(space.errors(plan)) == set(plan.layers)


def test_a_plan_with_channels_is_another_plan(space: SearchSpace, model: nn.Module) -> None:
    here, picked = decode(space, Knobs(0.6, channels=-ALONE))
    plan = here.plan(picked)
    assert plan.digest != Plan().digest
    again = build_plan(model, plan)
    again.load_state_dict(apply_plan(model, plan).state_dict())


def test_a_narrower_layer_has_only_ranks_that_save_there(
    space: SearchSpace, width: ChannelSpace
) -> None:
    here = space.at({"inner": 4})
    layers = width.remaining({"inner": 4})
    assert layers["inner"].out_channels == 4 and layers["back"].in_channels == 4
    for name, own in here.options.items():
        assert own[0].method == KEEP
        full = layers[name].cost
        for option in own[1:]:
            assert option.choice is not None
            assert option.choice.params < full.params and option.choice.macs < full.macs
            assert option.error > 0


def test_a_narrower_layer_has_no_method_that_the_whole_one_lacks(model: nn.Module) -> None:
    """With times a method may save nothing at the whole width, and so be no value to choose."""
    table, full = table_of(model)

    def ms(choice: Choice) -> float:
        return 1.01 if isinstance(choice.transform, SVD) else choice.fraction

    table = replace(
        table,
        choices={n: tuple(replace(c, ms=ms(c)) for c in own) for n, own in table.choices.items()},
        layer_ms={layer.name: 1.0 for layer in table.layers},
        network_ms=10.0,
        # A narrow layer takes as long as the whole one.
        slowdown={
            layer.name: {"in": ((0.25, 4.0),), "out": ((0.25, 4.0),)} for layer in table.layers
        },
    )
    space = SearchSpace.from_table(table, "latency", replace(full, ms=10.0))
    assert space.width is not None
    fewest = {name: own[-1].keep for name, own in space.width.options.items()}
    narrow = space.at(fewest)
    for name, own in space.options.items():
        assert {o.method for o in narrow.options[name]} <= {o.method for o in own}


def test_fractions_mean_the_next_count_at_or_above(width: ChannelSpace) -> None:
    counts = [option.keep for option in width.options["inner"]]
    assert counts[0] == 12 and counts[1:] == sorted(counts[1:])
    assert width.nearest({"inner": 5 / 12}) == {"inner": 6}
    assert width.nearest({"inner": 6 / 12}) == {"inner": 6}
    assert width.nearest({"inner": 1.0}) == width.nearest({}) == {}


def test_a_group_with_more_weight_keeps_more(space: SearchSpace) -> None:
    plain, _ = decode(space, Knobs(0.6, channels=-ALONE))
    spared, _ = decode(space, Knobs(0.6, channels=-ALONE, layers={"inner.channels": 3.0}))
    assert spared.kept.get("inner", 12) > plain.kept.get("inner", 12)


def test_lighten_makes_groups_narrower_until_the_target(width: ChannelSpace) -> None:
    rng = np.random.default_rng(0)
    start = {"inner": 10}
    target = 0.7 * width.cost(start).params
    moved = width.lighten(start, target, rng)
    assert width.cost(moved).params <= target
    assert all(moved[name] <= keep for name, keep in start.items())
    assert width.lighten(start, 10 * target, rng) == start
    # Beyond the space's end it stops there.
    end = width.lighten(start, 0, rng)
    assert end == {name: min(o.keep for o in own) for name, own in width.options.items()}


def test_scatter_moves_one_group_anywhere(width: ChannelSpace) -> None:
    rng = np.random.default_rng(0)
    seen = {tuple(sorted(width.scatter({"inner": 6}, rng).items())) for _ in range(100)}
    assert (("inner", 6), ("stem", 2)) in seen or (("inner", 6), ("stem", 4)) in seen
    assert () in seen  # the group keeps all again
    assert all(dict(moved).get("inner") == 6 or "stem" not in dict(moved) for moved in seen)
