from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autocompress.allocator import RULES, Knobs, allocate, budget_range, next_seed
from autocompress.layers import Cost, LayerSpec
from autocompress.plan import Plan
from autocompress.sensitivity import Choice, LayerTable
from autocompress.space import KEEP, Option, SearchSpace
from autocompress.transforms import SVD, SpatialSVD


def make_space(
    sensitivities: tuple[float, ...] = (1.0, 4.0, 0.3), objective: str = "params"
) -> SearchSpace:
    """The space of `make_table`."""
    table, full = make_table(sensitivities)
    return SearchSpace.from_table(table, objective, full)


def make_table(
    sensitivities: tuple[float, ...] = (1.0, 4.0, 0.3),
) -> tuple[LayerTable, Cost]:
    """Three equal layers whose errors differ by a factor, and the network's cost."""
    layers, choices = [], {}
    for index, factor in enumerate(sensitivities):
        layer = LayerSpec(
            name=f"layer{index}",
            kind="conv2d",
            in_channels=32,
            out_channels=32,
            kernel_size=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
            groups=1,
            padding_mode="zeros",
            bias=False,
            in_size=(8, 8),
            out_size=(8, 8),
        )
        rows = []
        for step in range(1, 9):
            share = step / 8
            for kind, cheaper in ((SVD, 1.0), (SpatialSVD, 0.9)):
                transform = kind(rank=step * 3)
                cost = transform.cost(layer)
                error = factor * (1 - share) ** 2 / cheaper / 4
                rows.append(Choice(transform, share, cost.params, cost.macs, error, error**2))
        layers.append(layer)
        choices[layer.name] = tuple(rows)
    return LayerTable(tuple(layers), choices, {}), sum((s.cost for s in layers), Cost(1000, 0))


@pytest.fixture
def space() -> Iterator[SearchSpace]:
    yield make_space()


def with_ms(table: LayerTable, ms: Callable[[Choice], float]) -> LayerTable:
    """The table with times: 1 ms for each layer as it is, 3.5 ms for the network."""
    choices = {n: tuple(replace(c, ms=ms(c)) for c in own) for n, own in table.choices.items()}
    own = {layer.name: 1.0 for layer in table.layers}
    return replace(table, choices=choices, layer_ms=own, network_ms=3.5)


def test_latency_is_spent_in_time_and_what_saves_none_is_not_offered() -> None:
    """A method whose MACs fall and whose time does not loses against one that is fast in truth."""
    table, full = make_table()
    timed = with_ms(table, lambda c: c.fraction if isinstance(c.transform, SVD) else 1.0)
    space = SearchSpace.from_table(timed, "latency", replace(full, ms=timed.network_ms))
    assert space.baseline_cost == 3_500_000 and space.fixed_cost == 500_000  # nanoseconds
    assert space.methods == ("svd",)
    assert all(o.fraction < 1 for own in space.options.values() for o in own[1:])
    picked = allocate(space, Knobs(0.5))
    assert 0 < space.cost(picked) <= 0.5 * 3_500_000

    # Without times there are only MACs to go by, and SpatialSVD is the better deal there.
    blind = SearchSpace.from_table(table, "latency", full)
    assert blind.baseline_cost == full.macs
    assert "spatial_svd" in {option.method for option in allocate(blind, Knobs(0.5)).values()}


def test_no_layer_is_left_where_nothing_saves_time() -> None:
    table, full = make_table()
    timed = with_ms(table, lambda _: 1.0)
    space = SearchSpace.from_table(timed, "latency", replace(full, ms=timed.network_ms))
    assert not space.options and space.baseline_cost == space.fixed_cost == 3_500_000


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [0.15, 0.3, 0.6])
def test_allocation_keeps_the_budget_and_comes_near_it(
    space: SearchSpace, rule: str, budget: float
) -> None:
    cost = space.cost(allocate(space, Knobs(budget, rule)))
    assert cost <= budget * space.baseline_cost
    assert cost >= 0.6 * budget * space.baseline_cost


def test_layers_of_almost_no_impact_are_not_cut_for_nothing() -> None:
    """As behind ConvNeXt's layer scale, which begins at 1e-6: the budget is used all the same."""
    space = make_space((1.0, 1e-13, 1e-13))
    assert space.cost(allocate(space, Knobs(0.45))) >= 0.4 * space.baseline_cost


def test_parameters_and_macs_together_count_as_the_mean_of_their_shares() -> None:
    space = make_space(objective="params+macs")
    # 9216 parameters at 64 places in each of the three layers, and 1000 parameters besides.
    full = Cost(3 * 9216 + 1000, 3 * 9216 * 64)
    picked = allocate(space, Knobs(0.4))
    left = [layer.choice for layer in picked.values() if layer.choice]
    assert len(left) == 3
    params = sum(c.params for c in left) + 1000
    macs = sum(c.macs for c in left)
    share = (params / full.params + macs / full.macs) / 2
    assert 0.3 < share <= 0.4
    assert space.cost(picked) / space.baseline_cost == pytest.approx(share, abs=1e-8)


def test_sensitive_layers_keep_more(space: SearchSpace) -> None:
    picked = allocate(space, Knobs(0.4))
    assert picked["layer1"].cost > picked["layer0"].cost > picked["layer2"].cost


def test_minmax_evens_the_errors_out(space: SearchSpace) -> None:
    def worst(rule: str) -> float:
        return max(option.error for option in allocate(space, Knobs(0.4, rule)).values())

    assert worst("minmax") <= worst("knapsack")


def test_stage_and_method_weights_steer(space: SearchSpace) -> None:
    plain = allocate(space, Knobs(0.4))
    spared = allocate(space, Knobs(0.4, stages=(2.0, 0.0, 0.0, 0.0)))
    assert spared["layer0"].cost > plain["layer0"].cost
    biased = allocate(space, Knobs(0.4, methods={"svd": 2.0, "spatial_svd": 0.0}))
    assert all(o.method in ("spatial_svd", KEEP) for o in biased.values())


def test_a_single_layers_weight_steers(space: SearchSpace) -> None:
    plain, spared = allocate(space, Knobs(0.4)), allocate(space, Knobs(0.4, layers={"layer2": 3.0}))
    assert spared["layer2"].cost > plain["layer2"].cost
    assert spared["layer0"].cost <= plain["layer0"].cost


def test_the_knapsack_makes_no_larger_error_than_any_plan_of_its_cost() -> None:
    space = make_space((1.0, 4.0))

    def damage(picked: Mapping[str, Option]) -> float:
        return sum(option.error**2 for option in picked.values())

    plans = [dict(zip(space.options, row, strict=True)) for row in product(*space.options.values())]
    for budget in (0.2, 0.4, 0.7):
        found = allocate(space, Knobs(budget))
        rivals = [p for p in plans if space.cost(p) <= space.cost(found)]
        assert damage(found) == pytest.approx(min(map(damage, rivals)))


def test_a_scattered_plan_may_be_any_plan() -> None:
    space = make_space((1.0, 4.0))
    rng = np.random.default_rng(0)
    start = allocate(space, Knobs(0.4))
    found = {space.plan(space.scatter(start, rng)).digest for _ in range(6000)}
    plans = product(*space.options.values())
    assert found == {space.plan(dict(zip(space.options, row, strict=True))).digest for row in plans}


def test_most_scattered_plans_move_one_layer(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    start = allocate(space, Knobs(0.4))
    moved = [changed(start, space.scatter(start, rng)) for _ in range(200)]
    assert sum(count <= 1 for count in moved) > 100 and max(moved) == 3


def changed(one: Mapping[str, Option], other: Mapping[str, Option]) -> int:
    return sum(one[name] != other[name] for name in one)


def test_a_small_step_moves_the_one_layer_that_pays_most(space: SearchSpace) -> None:
    start = allocate(space, Knobs(0.5))
    target = 0.97 * space.cost(start)
    found = space.lighten(start, target, np.random.default_rng(0))
    assert space.cost(found) <= target and changed(start, found) == 1

    def ratio(picked: Mapping[str, Option]) -> float:
        saved = min(space.cost(start) - space.cost(picked), space.cost(start) - target)
        added = sum(o.error**2 - start[n].error ** 2 for n, o in picked.items())
        return saved / max(added, 1e-9)

    moves = [{**start, name: option} for name, own in space.options.items() for option in own]
    assert ratio(found) == max(
        ratio(move) for move in moves if space.cost(move) < space.cost(start)
    )


def test_a_step_beyond_the_ladders_ends_at_their_ends(space: SearchSpace) -> None:
    found = space.lighten(allocate(space, Knobs(0.5)), 0.0, np.random.default_rng(0))
    assert space.cost(found) == space.least_cost


def test_noise_makes_other_steps(space: SearchSpace) -> None:
    start = allocate(space, Knobs(0.5))
    target = 0.97 * space.cost(start)
    steps = [space.lighten(start, target, np.random.default_rng(i), 1.0) for i in range(20)]
    assert len({space.plan(step).digest for step in steps}) > 1


def test_params_and_options_are_inverse(space: SearchSpace) -> None:
    picked = allocate(space, Knobs(0.35))
    assert space.nearest(space.params(picked)) == picked
    assert space.pick(space.plan(picked)) == picked


def test_every_option_is_reachable_by_parameters(space: SearchSpace) -> None:
    distributions = space.distributions()
    for name, own in space.options.items():
        for option in own:
            params = space.params({**allocate(space, Knobs(0.5)), name: option})
            assert space.nearest(params)[name] == option
            assert distributions[f"{name}.transform"]._contains(
                list(distributions[f"{name}.transform"].choices).index(option.method)  # type: ignore[attr-defined]
            )
            assert distributions[f"{name}.rank_fraction"]._contains(option.fraction)


def test_a_fraction_between_two_ranks_means_the_upper(space: SearchSpace) -> None:
    params = space.params(allocate(space, Knobs(0.5)))
    params |= {"layer0.transform": "svd", "layer0.rank_fraction": 0.3}
    assert space.nearest(params)["layer0"].fraction == pytest.approx(3 / 8)


def test_narrowing_keeps_the_parent_and_drops_the_far(space: SearchSpace) -> None:
    plan = space.plan(allocate(space, Knobs(0.3)))
    narrowed = space.narrow([plan], band=0.2)
    assert narrowed.plan(narrowed.pick(plan)) == plan
    assert sum(map(len, narrowed.options.values())) < sum(map(len, space.options.values())) / 2
    assert narrowed.baseline_cost == space.baseline_cost


def test_narrowing_offers_a_factored_layer_no_other_transform(space: SearchSpace) -> None:
    picked = allocate(space, Knobs(0.3))
    narrowed = space.around([picked], band=0.5)
    assert any(option.method != KEEP for option in picked.values())
    for name, option in picked.items():
        methods = {other.method for other in narrowed.options[name]} - {KEEP}
        assert option.method == KEEP or methods == {option.method}


def test_narrowing_around_an_untouched_layer_offers_mild_cuts(space: SearchSpace) -> None:
    narrowed = space.narrow([Plan({})], band=0.2)
    for own in narrowed.options.values():
        assert own[0].method == KEEP
        assert all(option.fraction > 0.75 for option in own[1:]) and len(own) > 1


def test_few_seeds_are_all_for_the_budget(space: SearchSpace) -> None:
    tried = [(0.25, False)]
    plain = [next_seed(space, 3, 4, tried), next_seed(space, 3, 5, tried)]
    assert all(knobs.rule == "knapsack" and not any(knobs.stages) for knobs in plain)
    assert next_seed(space, 4, 5, tried).impact == 1.0


def test_budgets_span_what_can_be_saved_however_little_that_is() -> None:
    """Where most of the cost can't change, budgets still lie between the least and all of it."""
    full = make_space()
    space = SearchSpace(full.options, fixed_cost=40 * full.baseline_cost)
    least = space.least_cost / space.baseline_cost
    low, high = budget_range(space)
    assert least > 0.95 and least < low < high < 1.0
    cut = [space.cost(allocate(space, Knobs(budget))) for budget in (low, (low + high) / 2, high)]
    assert cut[0] < cut[1] < cut[2] < space.baseline_cost


def test_knobs_round_trip(space: SearchSpace) -> None:
    methods, layers = {"svd": 0.5, "spatial_svd": -0.5}, {"layer1": 0.2}
    knobs = Knobs(0.4, "minmax", 1.5, (0.1, -0.2, 0.3, 0.0), methods, layers)
    params = knobs.to_params(space)
    assert params.keys() == Knobs.distributions(space).keys() | {"rule", "layers"}
    assert Knobs.from_params(params) == knobs


def test_seeds_halve_the_gap_between_too_much_and_too_little(space: SearchSpace) -> None:
    first = next_seed(space, 0, 8, [])
    assert first.budget == pytest.approx(0.25)
    assert next_seed(space, 1, 8, [(0.25, True)]).budget < 0.25
    assert next_seed(space, 1, 8, [(0.25, False)]).budget > 0.25
    third = next_seed(space, 2, 8, [(0.25, False), (0.5, True)])
    assert third.budget == pytest.approx((0.25 * 0.5) ** 0.5)


def test_seeds_of_several_workers_share_the_gap(space: SearchSpace) -> None:
    low, high = budget_range(space)
    second = next_seed(space, 1, 8, [], pending=[0.25]).budget
    third = next_seed(space, 2, 8, [], pending=[0.25, second]).budget
    assert len({0.25, second, third}) == 3 and all(low < b < high for b in (second, third))
    between = next_seed(space, 2, 8, [(0.25, False), (0.5, True)], pending=[0.35]).budget
    assert 0.25 < between < 0.5 and between != pytest.approx(0.35, abs=0.02)


def test_the_last_seeds_share_the_least_budget_out_in_other_ways(space: SearchSpace) -> None:
    tried = [(0.25, False), (0.5, True)]
    assert next_seed(space, 4, 8, tried).impact == 1.0
    last = [next_seed(space, index, 8, tried) for index in range(5, 8)]
    assert [knobs.rule for knobs in last] == ["knapsack", "knapsack", "minmax"]
    assert last[0].stages == last[1].stages[::-1] and last[0].stages != last[1].stages
    assert {knobs.budget for knobs in last} == {0.5}


def test_the_exponent_of_the_impact_steers(space: SearchSpace) -> None:
    """A layer whose impact is far less than its error suggests is cut the more, the more the impact
    counts."""
    table, full = make_table()
    choices = {
        name: tuple(replace(c, impact=c.impact * (1e-4 if name == "layer1" else 1.0)) for c in own)
        for name, own in table.choices.items()
    }
    space = SearchSpace.from_table(replace(table, choices=choices), "params", full)
    fractions, damages = [], []
    for impact in (0.0, 0.5, 1.0):
        picked = allocate(space, Knobs(0.4, impact=impact))
        fractions.append(picked["layer1"].fraction)
        plans = [allocate(space, Knobs(0.4, impact=other)) for other in (0.0, 0.5, 1.0)]
        damages.append([space.damage(plan, impact) for plan in plans])
    assert fractions[0] > fractions[1] > fractions[2]
    # Each is the least damage by its own measure.
    assert [row.index(min(row)) for row in damages] == [0, 1, 2]


def test_plans_do_not_depend_on_the_scale_of_the_networks_outputs() -> None:
    """A segmentation network's impacts are sums over all of its pixels."""
    plans = []
    for scale in (1e-6, 1.0, 1e9):
        space = make_space(tuple(scale**0.5 * factor for factor in (1.0, 4.0, 0.3)))
        plans.append(
            [
                space.plan(allocate(space, Knobs(b, rule=r, impact=i)))
                for b, r, i in product((0.2, 0.5), RULES, (0.5, 1.0))
            ]
        )
    assert plans[0] == plans[1] == plans[2]
