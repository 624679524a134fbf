import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from test_channels import Residual, randomized
from test_space import make_space
from test_width import table_of

from autocompress.allocator import ALONE, Knobs, allocate, decode
from autocompress.annealing import (
    CANDIDATES,
    FAR,
    STEPS,
    TOO_MUCH,
    AnnealingSampler,
    Parent,
    _Wish,
    at_the_end,
)
from autocompress.database import open_storage
from autocompress.errors import DamagedArtifact
from autocompress.outlook import Outlook, Step
from autocompress.plan import Plan
from autocompress.samplers import KNOBS, KnobSampler, make_sampler, trial_seed
from autocompress.space import KEEP, SearchSpace
from autocompress.trials import EXCUSED, INTERRUPTED, PARENT, WEIGHTS

SPACE = make_space()
DEEP = make_space((1.0, 4.0, 0.3, 2.0, 0.5, 1.5, 0.2, 3.0, 0.7, 1.0))
optuna.logging.set_verbosity(optuna.logging.WARNING)


def drop_of(space: SearchSpace, plan: Plan) -> float:
    """A made-up accuracy drop: the sum of squared errors, in points."""
    here = space.of_plan(plan)
    return 30 * here.damage(here.pick(plan))


def run(
    study: optuna.Study,
    space: SearchSpace,
    count: int,
    delta: float = 1.0,
    inherited: float = 1.0,
) -> list[tuple[float, float]]:
    """Carry out made-up trials; returns their values.

    Args:
        study: The study.
        space: Its space.
        count: Number of trials.
        delta: The tolerance, in points.
        inherited: Factor of the drop of a trial that has a parent.
    """
    values = []
    for _ in range(count):
        trial = study.ask()
        plan = space.suggest(trial)
        trial.set_user_attr("plan", plan.to_json())
        trial.set_user_attr("plan_digest", plan.digest)
        has_parent = PARENT in study.trials[trial.number].user_attrs
        drop = drop_of(space, plan) * (inherited if has_parent else 1.0)
        here = space.of_plan(plan)
        pair = (drop, float(here.cost(here.pick(plan))))
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [pair[0] - delta])
        trial.set_user_attr(WEIGHTS, "somewhere")
        study.tell(trial, pair)
        values.append(pair)
    return values


def best(values: list[tuple[float, float]], delta: float = 1.0) -> float:
    return min(cost for drop, cost in values if drop <= delta)


def make_study(sampler: optuna.samplers.BaseSampler, url: str | None = None) -> optuna.Study:
    return optuna.create_study(
        study_name="test",
        directions=["minimize", "minimize"],
        sampler=sampler,
        storage=None if url is None else open_storage(url),
        load_if_exists=True,
    )


def test_the_trials_parameters_mean_the_plan() -> None:
    study = make_study(KnobSampler(SPACE, 0))
    run(study, SPACE, 10)
    for trial in study.trials:
        plan = Plan.from_json(trial.user_attrs["plan"])
        assert SPACE.plan(SPACE.nearest(trial.params)) == plan
        assert set(trial.params) == set(SPACE.distributions())


def test_same_seed_same_proposals_and_another_seed_others() -> None:
    one, same, other = (run(make_study(KnobSampler(SPACE, seed)), SPACE, 14) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_new_process_goes_on_as_if_there_had_been_none(tmp_path: Path) -> None:
    whole = run(make_study(KnobSampler(SPACE, 0)), SPACE, 14)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = run(make_study(KnobSampler(SPACE, 0), url), SPACE, 9)
    second = run(make_study(KnobSampler(SPACE, 0), url), SPACE, 5)
    assert first + second == whole


def test_seeds_come_first_and_each_once() -> None:
    study = make_study(KnobSampler(SPACE, 0, seed_count=4))
    run(study, SPACE, 6)
    found = [trial.system_attrs[KNOBS].get("seed") for trial in study.trials]
    assert found == [0, 1, 2, 3, None, None]
    assert all(KNOBS in trial.system_attrs for trial in study.trials)


def test_an_interrupted_trial_gives_its_seed_back() -> None:
    study = make_study(KnobSampler(SPACE, 0, seed_count=4))
    lost = study.ask()
    lost.set_user_attr("plan_digest", SPACE.suggest(lost).digest)
    lost.set_user_attr(INTERRUPTED, True)
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    run(study, SPACE, 1)
    assert [trial.system_attrs[KNOBS]["seed"] for trial in study.trials] == [0, 0]
    assert study.trials[0].params == study.trials[1].params


def test_an_excused_trial_gives_its_seed_back() -> None:
    study = make_study(KnobSampler(SPACE, 0, seed_count=4))
    failed = study.ask()
    failed.set_user_attr("plan_digest", SPACE.suggest(failed).digest)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    study.set_user_attr(EXCUSED, [0])
    run(study, SPACE, 1)
    assert study.trials[0].params == study.trials[1].params


def test_plans_are_not_repeated() -> None:
    study = make_study(KnobSampler(SPACE, 0))
    run(study, SPACE, 20)
    digests = [trial.user_attrs["plan_digest"] for trial in study.trials]
    assert len(set(digests)) == 20


def ask_only(study: optuna.Study, space: SearchSpace, count: int) -> list[str]:
    """Digests of the plans of trials that are asked for and not told."""
    return [space.plan(space.nearest(plan_params(study, space))).digest for _ in range(count)]


def plan_params(study: optuna.Study, space: SearchSpace) -> dict[str, Any]:
    trial = study.ask()
    space.suggest(trial)
    return trial.params


@pytest.mark.parametrize("finished", [0, 12])
def test_running_trials_plans_are_not_proposed_again(finished: int) -> None:
    study = make_study(KnobSampler(DEEP, 0))
    run(study, DEEP, finished)
    old = {trial.user_attrs["plan_digest"] for trial in study.trials}
    running = ask_only(study, DEEP, 8)
    assert len(set(running) | old) == 8 + finished


@pytest.mark.parametrize("finished", [0, 9])
def test_workers_that_ask_at_once_get_different_plans(tmp_path: Path, finished: int) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(make_study(KnobSampler(SPACE, 0), url), SPACE, finished)
    studies = [make_study(KnobSampler(SPACE, 0), url) for _ in range(3)]
    start = threading.Barrier(3)

    def work(study: optuna.Study) -> list[str]:
        start.wait()
        return ask_only(study, SPACE, 3)

    with ThreadPoolExecutor(3) as pool:
        plans = [digest for found in pool.map(work, studies) for digest in found]
    assert len(set(plans)) == 9
    claimed = [trial.system_attrs[KNOBS].get("seed") for trial in studies[0].trials]
    seeds = [seed for seed in claimed if seed is not None]
    assert len(seeds) == len(set(seeds)) >= 5


class Crossed(KnobSampler):
    """A sampler in whose first claim another worker's claim of the same plan comes first."""

    def _claim(self, study: Any, trial: Any, proposal: Any, digest: str) -> None:
        if trial.number == 1 and KNOBS not in study.trials[0].system_attrs:
            first = study.trials[0]
            study._storage.set_trial_system_attr(
                first._trial_id, KNOBS, {**proposal.record, "plan": digest}
            )
        super()._claim(study, trial, proposal, digest)


def test_the_later_of_two_equal_claims_gives_way() -> None:
    study = make_study(Crossed(DEEP, 0))
    study.ask()
    plan_params(study, DEEP)
    claims = [trial.system_attrs[KNOBS]["plan"] for trial in study.trials]
    assert claims[0] != claims[1]


def test_single_layers_deviate_more_the_more_trials_are_finished() -> None:
    study = make_study(KnobSampler(DEEP, 0, seed_count=4))
    run(study, DEEP, 40)
    size = [
        max(map(abs, t.system_attrs[KNOBS]["layers"].values()), default=0.0) for t in study.trials
    ]
    assert size[:4] == [0.0] * 4
    assert 0 < sum(size[4:10]) < sum(size[-6:])


def test_some_trials_move_single_layers_of_the_best() -> None:
    study = make_study(KnobSampler(DEEP, 0, seed_count=4))
    run(study, DEEP, 41)
    moved = [t for t in study.trials if t.system_attrs[KNOBS]["rule"] == "scattered"]
    assert [t.number for t in moved] == [20, 40]


def test_feasible_is_what_meets_the_constraint_whatever_the_drop() -> None:
    """The constraint is on a bound of the drop: here two points above it."""
    study = make_study(KnobSampler(DEEP, 0))
    strict = make_study(KnobSampler(DEEP, 0))
    run(study, DEEP, 8, delta=3.0)
    for _ in range(8):
        trial = strict.ask()
        plan = DEEP.suggest(trial)
        drop = drop_of(DEEP, plan)
        strict._storage.set_trial_system_attr(trial._trial_id, "constraints", [drop - 3.0])
        strict.tell(trial, (drop - 2.0, float(DEEP.cost(DEEP.pick(plan)))))
    assert [t.params for t in strict.trials] == [t.params for t in study.trials]


def test_knobs_beat_random_search() -> None:
    knobs = best(run(make_study(KnobSampler(SPACE, 0)), SPACE, 20))
    values = run(make_study(optuna.samplers.RandomSampler(seed=0)), SPACE, 20)
    feasible = [cost for drop, cost in values if drop <= 1.0] or [float(SPACE.baseline_cost)]
    assert knobs < min(feasible)


def test_rejected_trials_teach_the_inner_sampler() -> None:
    study = make_study(KnobSampler(SPACE, 0, seed_count=1))
    for _ in range(8):
        trial = study.ask()
        SPACE.suggest(trial)
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [50.0])
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert best(run(study, SPACE, 12)) < SPACE.baseline_cost


@pytest.mark.parametrize("name", ["knobs", "tpe", "gp", "nsga2", "random"])
def test_every_sampler_of_the_study_file_works(name: str) -> None:
    values = run(make_study(make_sampler(name, SPACE, 0, 0, 6)), SPACE, 6)
    assert len(values) == 6


def test_a_resumed_random_search_does_not_repeat_itself() -> None:
    first = run(make_study(make_sampler("random", SPACE, 0, 0, 8)), SPACE, 4)
    second = run(make_study(make_sampler("random", SPACE, 0, 4, 8)), SPACE, 4)
    assert not set(first) & set(second)


def test_trial_seeds_differ_and_are_stable() -> None:
    assert len({trial_seed(0, number) for number in range(100)}) == 100
    assert trial_seed(3, 4) == trial_seed(3, 4) != trial_seed(4, 3)


def test_annealing_improves_on_its_parents() -> None:
    exploration = make_study(KnobSampler(DEEP, 0))
    values = run(exploration, DEEP, 10, 4.0)
    number = min((i for i, v in enumerate(values) if v[0] <= 4.0), key=lambda i: values[i][1])
    plan = Plan.from_json(exploration.trials[number].user_attrs["plan"])
    narrowed = DEEP.narrow([plan], 0.5)
    sampler = AnnealingSampler(
        narrowed,
        0,
        outlook=Outlook(4.0, {}),
        parents=[Parent(f"exploration/{number}", plan.to_json(), *values[number])],
        trials=12,
    )
    annealing = make_study(sampler)
    found = run(annealing, narrowed, 12, 4.0, inherited=0.6)
    assert best(found, 4.0) < 0.9 * values[number][1]
    parents = {trial.user_attrs[PARENT] for trial in annealing.trials}
    assert f"exploration/{number}" in parents
    assert any(parent.startswith("annealing/") for parent in parents)


def test_annealing_starts_from_the_nearest_where_nothing_is_within_delta() -> None:
    plan = SPACE.plan(SPACE.pick(Plan({})))
    sampler = AnnealingSampler(
        SPACE,
        0,
        outlook=Outlook(0.0, {}),
        parents=[Parent("exploration/3", plan.to_json(), 5.0, 100.0)],
        trials=3,
    )
    study = make_study(sampler)
    run(study, SPACE, 1, delta=0.0)
    assert study.trials[0].user_attrs[PARENT] == "exploration/3"


def test_every_second_trial_fine_tunes_a_near_miss_further() -> None:
    narrow_miss, plan = (
        SPACE.plan(allocate(SPACE, Knobs(0.2))),
        SPACE.plan(allocate(SPACE, Knobs(0.5))),
    )
    sampler = AnnealingSampler(
        SPACE,
        0,
        outlook=Outlook(1.0, {}),
        parents=[
            Parent("exploration/1", plan.to_json(), 0.5, 500.0),
            Parent("exploration/2", narrow_miss.to_json(), 0.8, 200.0, margin=0.4),
            Parent("exploration/3", plan.to_json(), 9.0, 100.0),
            Parent("exploration/4", narrow_miss.to_json(), 1.0, 150.0, margin=0.4),
        ],
        trials=8,
    )
    study = make_study(sampler)
    for _ in range(8):
        trial = study.ask()
        SPACE.suggest(trial)
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [2.0])
        study.tell(trial, (3.0, 100.0))
    parents = [trial.user_attrs[PARENT] for trial in study.trials]
    assert parents == [f"exploration/{number}" for number in (2, 1, 4, 1, 1, 1, 1, 1)]
    ripe = study.trials[0]
    assert SPACE.plan(SPACE.nearest(ripe.params)) == narrow_miss


def next_child(lost: float, longer: float = 1.0) -> float:
    """Cost of the third trial, a child of a parent or of its children, of which the first two lost
    so many points more, as a share of the parent's."""
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    cost = DEEP.cost(DEEP.pick(plan))
    parent = Parent("exploration/0", plan.to_json(), 0.4, cost)
    outlook = Outlook(1.0, {"annealing": Step(longer)})
    study = make_study(AnnealingSampler(DEEP, 0, outlook=outlook, parents=[parent]))
    for _ in range(2):
        trial = study.ask()
        child = DEEP.suggest(trial)
        drop = parent.drop + lost
        trial.set_user_attr("plan", child.to_json())
        trial.set_user_attr(WEIGHTS, "somewhere")
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [drop - 1.0])
        study.tell(trial, (drop, float(DEEP.cost(DEEP.pick(child)))))
    return float(DEEP.cost(DEEP.pick(DEEP.suggest(study.ask())))) / cost


def test_children_save_more_where_others_lost_little() -> None:
    assert STEPS[0] ** 3 < next_child(0.1) < next_child(0.6) < next_child(5.0) < 1.0


def test_the_last_child_tells_most_of_what_the_next_may_save() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    parent = Parent("exploration/0", plan.to_json(), 0.0, 100.0)
    sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[parent])

    def slope(*drops: float | None) -> float:
        children = [
            stopped()
            if drop is None
            else stopped(TrialState.COMPLETE)
            if math.isnan(drop)
            else optuna.create_trial(
                values=[drop, 80.0],
                user_attrs={PARENT: "exploration/0", WEIGHTS: "somewhere"},
                system_attrs={KNOBS: {"kind": "sample"}, "constraints": [drop - 1.0]},
            )
            for drop in drops
        ]
        return sampler._slope([parent], children)

    def stopped(state: TrialState = TrialState.PRUNED) -> FrozenTrial:
        return optuna.create_trial(
            state=state,
            values=[60.0, 80.0] if state == TrialState.COMPLETE else None,
            user_attrs={PARENT: "exploration/0"},
            system_attrs={KNOBS: {"kind": "greedy", "step": 0.8}, "constraints": [60.0]},
        )

    assert slope(0.2, 0.2, 0.8) > 1.2 * slope(0.8, 0.2, 0.2)
    # One that was stopped at a gate tells that the step was too large, and not by how much.
    assert slope(0.2, None) == pytest.approx(slope(0.2, 2.5))
    assert slope(0.2, None) > 2 * slope(0.2, 0.8)
    assert slope(0.2, math.nan) == slope(0.2, None)
    assert slope(0.5, 0.5, 0.5) == pytest.approx(slope(0.5, 0.5, 0.5, 0.5), rel=0.1)


def test_children_save_more_where_the_end_wins_more_back() -> None:
    assert next_child(0.6, longer=10.0) < next_child(0.6)


def test_a_parent_whose_end_is_known_is_judged_by_that() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    cost = DEEP.cost(DEEP.pick(plan))
    parent = Parent("annealing/7", plan.to_json(), 0.8, cost)
    costs = []
    for ends in ({}, {"annealing/7": 0.1}):
        sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}, ends), parents=[parent])
        costs.append(DEEP.cost(DEEP.pick(DEEP.suggest(make_study(sampler).ask()))))
    assert costs[1] < 0.8 * costs[0] < costs[0] < cost


def test_children_go_on_with_the_exponent_that_their_parent_was_chosen_by() -> None:
    exploration = make_study(KnobSampler(DEEP, 0))
    run(exploration, DEEP, 9, 4.0)
    chosen = exploration.trials[-1]
    impact = chosen.system_attrs[KNOBS]["impact"]
    parent = Parent.of("exploration", chosen, 4.0)
    sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(4.0, {}), parents=[parent])
    annealing = make_study(sampler)
    run(annealing, DEEP, 4, 4.0)
    assert {t.system_attrs[KNOBS]["impact"] for t in annealing.trials} == {impact} != {0.5}


def test_seeds_go_by_what_trials_promise_and_not_by_what_they_lost() -> None:
    """The first seed misses delta, which a long fine-tuning would make good."""
    studies = []
    for kept in (1.0, 0.3):
        outlook = Outlook(0.5, {"exploration": Step(1.0 / kept**2.5)})
        shortfall = partial(outlook.shortfall, "exploration")
        study = make_study(KnobSampler(SPACE, 0, 4, shortfall))
        run(study, SPACE, 2, delta=0.5)
        studies.append(study)
    strict, hopeful = ([t.system_attrs[KNOBS]["budget"] for t in s.trials] for s in studies)
    assert 0.5 < studies[0].trials[0].values[0] < 1.5
    assert strict[0] == hopeful[0] and hopeful[1] < hopeful[0] < strict[1]


def test_the_parent_is_the_one_whose_child_promises_to_be_cheapest() -> None:
    plans = [DEEP.plan(allocate(DEEP, Knobs(budget))) for budget in (0.5, 0.45, 0.2)]
    costs = [DEEP.cost(DEEP.pick(plan)) for plan in plans]
    parents = [
        Parent(
            "exploration/0", plans[0].to_json(), -2.0, costs[0]
        ),  # dearer, but with much left to lose
        Parent("exploration/1", plans[1].to_json(), 0.89, costs[1]),
        Parent("exploration/2", plans[2].to_json(), 9.0, costs[2]),  # beyond delta
    ]
    study = make_study(AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=parents))
    DEEP.suggest(study.ask())
    assert study.trials[0].user_attrs[PARENT] == "exploration/0"


def test_a_child_promises_no_more_than_the_largest_step() -> None:
    plans = [DEEP.plan(allocate(DEEP, Knobs(budget))) for budget in (0.5, 0.4)]
    costs = [DEEP.cost(DEEP.pick(plan)) for plan in plans]
    parents = [
        Parent(f"exploration/{n}", plan.to_json(), drop, cost)
        for n, (plan, drop, cost) in enumerate(zip(plans, (-9.0, 0.0), costs, strict=True))
    ]
    # However much the first has left, its child would cost more than one of the second.
    study = make_study(AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=parents))
    DEEP.suggest(study.ask())
    assert study.trials[0].user_attrs[PARENT] == "exploration/1"


def test_kinds_of_children_take_turns() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    parent = Parent("exploration/0", plan.to_json(), 0.4, DEEP.cost(DEEP.pick(plan)))
    study = make_study(
        AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[parent], trials=8)
    )
    run(study, DEEP, 8, inherited=0.2)
    kinds = [trial.system_attrs[KNOBS]["kind"] for trial in study.trials]
    assert kinds == ["sample", "sample", "greedy", "greedy"] * 2


def test_trials_beyond_those_planned_are_children_of_what_is_known_best() -> None:
    plans = [DEEP.plan(allocate(DEEP, Knobs(budget))) for budget in (0.5, 0.45)]
    costs = [DEEP.cost(DEEP.pick(plan)) for plan in plans]
    known = Parent("exploration/0", plans[0].to_json(), 0.4, costs[0])
    hoped = Parent("exploration/1", plans[1].to_json(), 0.1, costs[1])
    outlook = Outlook(1.0, {}, {"exploration/0": 0.2})
    parents = [known, hoped]
    study = make_study(AnnealingSampler(DEEP, 0, outlook=outlook, parents=parents, trials=4))
    run(study, DEEP, 8, inherited=0.2)
    kinds = [trial.system_attrs[KNOBS]["kind"] for trial in study.trials]
    assert set(kinds[4:]) == {"greedy", "sample"} and kinds[4:6] == ["greedy", "sample"]
    elders = [trial.user_attrs[PARENT] for trial in study.trials]
    assert elders[0] == "exploration/1" and set(elders[4:]) == {"exploration/0"}


def test_the_child_is_proposed_that_strays_least_for_what_it_saves() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    cost = DEEP.cost(DEEP.pick(plan))
    parent = Parent("exploration/0", plan.to_json(), 0.4, cost)
    heard: list[Sequence[Plan]] = []

    def cost_of(plan: Plan) -> float:
        return DEEP.cost(DEEP.pick(plan))

    def strays(label: str, plans: Sequence[Plan]) -> list[float]:
        assert label == "exploration/0"
        heard.append(plans)
        # Of the first one it can't be told; the cheapest, which is not too dear, is the best.
        best = min(plans, key=cost_of)
        return [0.0 if p == best else 1.0 if p != plans[0] else math.nan for p in plans]

    outlook = Outlook(1.0, {})
    sampler = AnnealingSampler(DEEP, 0, outlook=outlook, parents=[parent], strays=strays)
    study = make_study(sampler)
    chosen = [DEEP.suggest(study.ask()) for _ in range(3)]
    assert chosen == [min(plans, key=cost_of) for plans in heard]
    assert [len(set(plans)) for plans in heard] == [CANDIDATES] * 3
    # None that an earlier trial claimed is compared again.
    assert not set(chosen[:2]) & set(heard[2]) and len(set(chosen)) == 3


def test_a_child_that_costs_too_much_is_the_last_choice() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    wish = _Wish(Parent("a/0", plan.to_json(), 0.4, 1.0), 0.5, 0.5, DEEP)
    useless, dear, good, bad, better = (
        wish.score(cost * wish.cost, stray)
        for cost, stray in ((2.0, -1.0), (1.1, 0.0), (1.0, 1.0), (1.0, math.nan), (0.5, 1.5))
    )
    # One that costs no less than its parent is of no use, however near it stays.
    assert better < good < bad < dear < useless


def test_a_band_that_is_too_narrow_for_what_a_child_should_save_is_widened() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    cost = DEEP.cost(DEEP.pick(plan))
    parent = Parent("exploration/0", plan.to_json(), -2.0, cost)
    sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[parent], trials=3)
    done = optuna.create_trial(values=[9.0, cost], system_attrs={"constraints": [8.0]})
    # With the last round the band is at its narrowest.
    narrow = DEEP.around([DEEP.pick(plan)], 0.125)
    least = narrow.cost({name: min(x, key=lambda o: o.cost) for name, x in narrow.options.items()})
    assert least > TOO_MUCH * STEPS[0] * cost
    for number in (2, 3):
        proposal = sampler.propose([done] * 3, number, 0, np.random.default_rng(0))
        assert proposal.record["step"] == STEPS[0] and 0.125 < proposal.record["band"] <= 1
        assert not proposal.record[FAR]
        assert proposal.space.cost(proposal.picked) <= TOO_MUCH * STEPS[0] * cost
    first = sampler.propose([], 2, 0, np.random.default_rng(0))
    assert first.record["band"] == 0.5
    # Of the cheapest network of all no child can save anything, and the trial says so.
    least = {name: min(x, key=lambda o: o.cost) for name, x in DEEP.options.items()}
    last = Parent("exploration/1", DEEP.plan(least).to_json(), -2.0, DEEP.cost(least))
    sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[last])
    record = sampler.propose([], 2, 0, np.random.default_rng(0)).record
    trial = optuna.create_trial(values=[0.5, 1.0], system_attrs={KNOBS: record})
    assert record["band"] == 1 and at_the_end([trial]) and not at_the_end([trial, done])
    assert not at_the_end([])


def test_where_the_parents_weights_are_gone_nothing_is_compared() -> None:
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    parent = Parent("exploration/0", plan.to_json(), 0.4, DEEP.cost(DEEP.pick(plan)))

    def strays(label: str, plans: Sequence[Plan]) -> list[float]:
        raise DamagedArtifact("gone")

    children = [
        DEEP.suggest(
            make_study(
                AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[parent], strays=how)
            ).ask()
        )
        for how in (strays, None)
    ]
    assert children[0] == children[1]


def test_a_trial_that_turned_out_well_becomes_a_parent() -> None:
    plans = [DEEP.plan(allocate(DEEP, Knobs(budget))) for budget in (0.5, 0.2)]
    costs = [DEEP.cost(DEEP.pick(plan)) for plan in plans]
    first, late = (
        Parent(f"exploration/{n}", plans[n].to_json(), 0.4, costs[n]) for n in range(len(plans))
    )
    sampler = AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[first])
    study = make_study(sampler)
    run(study, DEEP, 2, inherited=0.5)
    sampler.adopt([first, late])
    sampler.adopt([late])
    run(study, DEEP, 2, inherited=0.5)
    elders = [trial.user_attrs[PARENT] for trial in study.trials]
    assert elders[0] == "exploration/0" and elders[2:] == ["exploration/1"] * 2


def test_of_ranks_alone_only_what_the_space_holds_becomes_a_parent() -> None:
    """The annealing's space lies around other plans, so a child would be one of theirs."""
    plans = []
    for method in ("svd", "spatial_svd"):
        own = {
            name: tuple(o for o in rows if o.method in (KEEP, method))
            for name, rows in DEEP.options.items()
        }
        plans.append(DEEP.plan(allocate(replace(DEEP, options=own), Knobs(0.3))))
    first, other = (
        Parent(f"exploration/{n}", plan.to_json(), 0.4, DEEP.cost(DEEP.pick(plan)))
        for n, plan in enumerate(plans)
    )
    narrowed = DEEP.narrow([first.plan], 0.2)
    sampler = AnnealingSampler(narrowed, 0, outlook=Outlook(1.0, {}), parents=[first])
    sampler.adopt([other])
    assert sampler._parents == [first]
    sampler.adopt([replace(first, label="exploration/2")])
    assert len(sampler._parents) == 2


def test_annealing_judges_its_children_by_the_constraint() -> None:
    """A child whose drop is small but whose bound is beyond delta is no parent."""
    plan = DEEP.plan(allocate(DEEP, Knobs(0.5)))
    parent = Parent("exploration/0", plan.to_json(), 0.4, DEEP.cost(DEEP.pick(plan)))
    study = make_study(
        AnnealingSampler(DEEP, 0, outlook=Outlook(1.0, {}), parents=[parent], trials=8)
    )
    for _ in range(4):
        trial = study.ask()
        child = DEEP.suggest(trial)
        trial.set_user_attr("plan", child.to_json())
        trial.set_user_attr(WEIGHTS, "somewhere")
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [0.5])
        study.tell(trial, (0.1, float(DEEP.cost(DEEP.pick(child)))))
    assert {trial.user_attrs[PARENT] for trial in study.trials} == {"exploration/0"}


def test_seeds_bisect_for_the_least_budget_within_delta() -> None:
    study = make_study(KnobSampler(DEEP, 0, seed_count=8))
    run(study, DEEP, 8)
    seeds = [t for t in study.trials if t.system_attrs[KNOBS].get("stage_0") == 0.0]
    within = {t.system_attrs[KNOBS]["budget"]: t.values[0] <= 1.0 for t in seeds}
    least = min(budget for budget, ok in within.items() if ok)
    most = max(budget for budget, ok in within.items() if not ok)
    assert len(seeds) >= 5 and most < least < 1.3 * most


@pytest.fixture(scope="module")
def wide() -> SearchSpace:
    """A space with channels to remove."""
    table, full = table_of(randomized(Residual()))
    return SearchSpace.from_table(table, "params", full)


def run_wide(study: optuna.Study, space: SearchSpace, count: int) -> list[tuple[float, Plan]]:
    """As `run`; returns the costs and plans."""
    values = run(study, space, count)
    plans = [Plan.from_json(trial.user_attrs["plan"]) for trial in study.trials]
    return [(cost, plan) for (_, cost), plan in zip(values, plans, strict=True)]


def test_the_exploration_tries_channels_ranks_and_both(wide: SearchSpace) -> None:
    study = make_study(KnobSampler(wide, 0))
    found = run_wide(study, wide, 30)
    kinds = {(bool(plan.channels), bool(plan.layers)) for _, plan in found}
    assert {(True, False), (False, True), (True, True)} <= kinds
    assert len({plan.digest for _, plan in found}) == len(found)
    for trial, (_, plan) in zip(study.trials, found, strict=True):
        here = wide.of_params(trial.params)
        assert here.plan(here.nearest(trial.params)) == plan
        assert abs(trial.system_attrs[KNOBS]["channel_weight"]) <= ALONE
    again = run_wide(make_study(KnobSampler(wide, 0)), wide, 8)
    assert [plan for _, plan in again] == [plan for _, plan in found[:8]]


def test_children_lose_channels_and_ranks_and_cost_less(wide: SearchSpace) -> None:
    here, picked = decode(wide, Knobs(0.8))
    plan, cost = here.plan(picked), here.cost(picked)
    parent = Parent("exploration/0", plan.to_json(), 0.2, float(cost))
    sampler = AnnealingSampler(wide, 0, outlook=Outlook(1.0, {}), parents=[parent], trials=8)
    found = run_wide(make_study(sampler), wide, 8)
    # In so small a space a proposal that is known may end as the parent's own plan, fine-tuned on.
    assert sum(child_cost < cost for child_cost, _ in found) >= 7
    fewer = [
        child
        for _, child in found
        if sum(len(p.kept) for p in child.channels.values())
        < sum(len(p.kept) for p in plan.channels.values())
    ]
    assert fewer
    for child in fewer:
        for name, part in plan.channels.items():
            # A child's channels are among its parent's, whose weights they have.
            assert set(child.channels[name].kept) <= set(part.kept)
