"""What a trial is expected to lose in the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from autocompress.longfits import LongFit
from autocompress.outlook import (
    EPOCHS,
    LEAST_KEPT,
    Outlook,
    Step,
    annealing_epochs,
    outlook_of,
)
from autocompress.training import Recipe
from autocompress.trials import PARENT, WEIGHTS

RECIPE = Recipe(1.0, 16.0, 0.01, 0.02, 0.5, 75.0)
DELTA = 1.0


def study_with(*trials: Any, **attrs: Any) -> optuna.Study:
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trials(trials)
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    return study


def trial(
    drop: float,
    plan: str = "plan",
    parent: str | None = None,
    margin: float = 0.4,
    state: TrialState = TrialState.COMPLETE,
    weights: bool = True,
) -> optuna.trial.FrozenTrial:
    kept = {WEIGHTS: "somewhere"} if weights else {}
    return create_trial(
        values=[drop, 10.0] if state == TrialState.COMPLETE else None,
        state=state,
        system_attrs={"constraints": [drop + margin - DELTA]},
        user_attrs={"plan_digest": plan, PARENT: parent, **kept},
    )


def test_the_longer_the_winners_fine_tuning_the_more_a_trial_may_lose() -> None:
    kept = [Step(longer).learned(DELTA)[0] for longer in (0.5, 1.0, 2.0, 10.0)]
    assert kept[0] == kept[1] == 1.0 > kept[2] > kept[3] > 0.3


def test_what_was_seen_outweighs_the_prior_the_more_the_larger_the_drops_were() -> None:
    def kept(*pairs: tuple[float, float]) -> float:
        return Step(4.0, pairs).learned(DELTA)[0]

    prior = kept()
    assert kept((0.05, 0.05)) == pytest.approx(prior, abs=0.01)
    assert prior < 0.6 < kept((2.0, 1.8)) < 0.9
    assert kept((2.0, -1.0)) == LEAST_KEPT  # one lucky run is no miracle
    assert kept((2.0, 4.0)) == 1.0


def test_what_every_network_gains_is_told_from_the_share_that_is_left() -> None:
    true = [(drop, 0.5 * drop - 1.0) for drop in (0.0, 0.5, 1.0, 2.0, 4.0)]
    kept, gained = Step(4.0, tuple(true * 20)).learned(DELTA)
    assert (kept, gained) == (pytest.approx(0.5, abs=0.02), pytest.approx(1.0, abs=0.03))
    # One network that rose tells of half as much gain, and nothing of the share.
    kept, gained = Step(4.0, ((-0.1, -1.3),)).learned(DELTA)
    assert (kept, gained) == (Step(4.0).learned(DELTA)[0], pytest.approx(0.6))
    # No network loses by being fine-tuned longer.
    assert Step(4.0, ((0.0, 2.0),)).learned(DELTA)[1] == 0.0


def test_gains_add_up_over_the_steps() -> None:
    pairs = ((0.0, -1.0), (1.0, -0.5))
    outlook = Outlook(DELTA, {"exploration": Step(4.0, pairs), "annealing": Step(3.0, pairs)})
    first, second = (outlook.steps[name].learned(DELTA) for name in outlook.steps)
    by_steps = second[0] * (first[0] * 2.0 - first[1]) - second[1]
    assert outlook.bound("exploration", 2.0, 0.3) == pytest.approx(0.3 + by_steps)
    assert outlook.bound("annealing", -0.2, 0.3) == pytest.approx(0.3 - 0.2 - second[1])
    most = outlook.useful("exploration")
    assert outlook.bound("exploration", most, 0.0) == pytest.approx(1.5 * DELTA)


def test_the_margin_stays_and_only_the_drop_is_won_back() -> None:
    outlook = Outlook(DELTA, {"annealing": Step(4.0)})
    kept, _ = outlook.learned("annealing")
    assert outlook.bound("annealing", 2.0, 0.5) == pytest.approx(0.5 + 2 * kept)
    assert outlook.bound("annealing", -0.2, 0.5) == pytest.approx(0.3)
    # Nothing follows such a trial.
    assert outlook.bound("other", 2.0, 0.5) == 2.5


def test_an_exploration_trial_has_two_steps_before_it() -> None:
    outlook = outlook_of({"exploration": study_with()}, RECIPE, DELTA, annealed=True)
    assert annealing_epochs(RECIPE) == 4.0
    steps = [step.longer for step in outlook.steps.values()]
    assert steps == [4.0, 4.0]
    once, twice = (outlook.learned(stage)[0] for stage in ("annealing", "exploration"))
    assert twice == pytest.approx(once**2)
    alone = outlook_of({"exploration": study_with()}, RECIPE, DELTA, annealed=False)
    assert alone.steps["exploration"].longer == 16.0


def test_a_trial_promises_by_its_drop_and_a_stopped_one_by_its_constraint() -> None:
    outlook = outlook_of({}, RECIPE, DELTA, annealed=True)
    assert outlook.shortfall("exploration", trial(1.5)) < 0 < outlook.shortfall("x", trial(1.5))
    assert outlook.shortfall("exploration", trial(9.0)) > 0
    stopped = trial(1.5, state=TrialState.PRUNED)
    assert outlook.shortfall("exploration", stopped) == pytest.approx(0.9)
    # Some samplers want those complete, too.
    stopped = trial(1.5, weights=False)
    assert outlook.shortfall("exploration", stopped) == pytest.approx(0.9)
    nothing = create_trial(state=TrialState.FAIL)
    assert outlook.shortfall("exploration", nothing) == float("inf")


def test_plans_that_were_only_fine_tuned_further_tell_the_first_step() -> None:
    exploration = study_with(trial(2.0, "a"), trial(1.0, "b"))
    annealing = study_with(
        trial(1.9, "a", "exploration/0"),
        trial(0.0, "c", "exploration/1"),  # another plan tells nothing
        trial(0.0, "a", "annealing/0"),
        trial(9.0, "a", "exploration/0", weights=False),  # it was stopped
        **{EPOCHS: 4.0},
    )
    found = outlook_of({"exploration": exploration, "annealing": annealing}, RECIPE, DELTA, True)
    assert found.steps["exploration"].pairs == ((2.0, 1.9),)
    once, twice = (found.learned(stage)[0] for stage in ("annealing", "exploration"))
    assert twice > 1.3 * once**2


def test_a_long_fine_tuning_that_failed_tells_nothing_of_others() -> None:
    failed = LongFit(
        "annealing/0", 0, 16.0, RECIPE.final_learning_rate, 2.0, 150.0, 150.0, None, 1.0
    )
    annealing = study_with(trial(2.0), trial(2.0), **{EPOCHS: 4.0})
    before = outlook_of({"annealing": annealing}, RECIPE, DELTA, True)
    after = outlook_of({"annealing": annealing}, RECIPE, DELTA, True, [failed])
    assert after.steps == before.steps
    one, other = (after.expected("annealing", t) for t in annealing.trials)
    assert one == 150.0 and other == before.expected("annealing", annealing.trials[1])


def test_a_long_fine_tuning_tells_the_second_step() -> None:
    one = LongFit("annealing/0", 0, 16.0, RECIPE.final_learning_rate, 2.0, 0.1, 0.7, "w", 1.0)
    annealing = study_with(trial(2.0), **{EPOCHS: 4.0})

    def outlook(*fits: LongFit) -> Outlook:
        return outlook_of({"annealing": annealing}, RECIPE, DELTA, True, fits)

    found = outlook(one)
    assert found.steps["annealing"].pairs == ((2.0, 0.1),)
    prior, _ = Step(4.0).learned(DELTA)
    assert found.learned("annealing")[0] < prior
    # What that trial came to is known.
    assert found.expected("annealing", annealing.trials[0]) == 0.7
    assert found.expected("exploration", annealing.trials[0]) != 0.7
    # With a second seed the mean counts.
    both = outlook(one, replace(one, seed=1, after=0.5, bound=1.1))
    assert both.expected("annealing", annealing.trials[0]) == pytest.approx(0.9)
    assert both.steps["annealing"].pairs == ((2.0, 0.1), (2.0, 0.5))
    # An exploration trial would first have lost less by the annealing's length.
    seen = found.having_seen("exploration", 4.0, 1.0)
    assert seen.steps["annealing"].pairs[-1] == (pytest.approx(4.0 * prior), 1.0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # One of another length tells what it would have come to by now: 2 ** -0.4 of it, or more.
        ({"epochs": 8.0}, 0.7579),
        ({"epochs": 32.0}, 1.3195),
        ({"epochs": 8.0, "after": -0.2, "bound": 0.4}, -0.2),
        ({"epochs": 0.01}, LEAST_KEPT),
        # With another learning rate nobody knows; nor do failures tell anything.
        ({"learning_rate": 0.5}, None),
        ({"epochs": 8.0, "weights": None}, None),
    ],
)
def test_a_long_fine_tuning_of_another_length_tells_what_it_would_come_to_now(
    changed: dict[str, Any], expected: float | None
) -> None:
    annealing = study_with(trial(2.0), **{EPOCHS: 4.0})
    one = LongFit("annealing/0", 0, 16.0, RECIPE.final_learning_rate, 2.0, 1.0, 1.6, "w", 1.0)
    found = outlook_of({"annealing": annealing}, RECIPE, DELTA, True, [replace(one, **changed)])
    if expected is None:
        assert found == outlook_of({"annealing": annealing}, RECIPE, DELTA, True)
        return
    [(before, after)] = found.steps["annealing"].pairs
    assert (before, after) == (2.0, pytest.approx(expected, abs=1e-4))
    assert found.ends == {"annealing/0": pytest.approx(expected + 0.6, abs=1e-4)}


def test_where_the_winner_is_fine_tuned_no_more_nothing_is_told_of_its_length() -> None:
    one = LongFit("annealing/0", 0, 16.0, RECIPE.final_learning_rate, 2.0, 1.0, 1.6, "w", 1.0)
    none = replace(RECIPE, final_epochs=0.0)
    assert outlook_of({}, none, DELTA, True, [one]) == outlook_of({}, none, DELTA, True)


def test_a_trial_of_some_use_in_the_end_is_not_stopped() -> None:
    same = outlook_of({}, Recipe(1.0, 1.0, 0.01, 0.01, 0.5, 75.0), DELTA, annealed=False)
    long = outlook_of({}, Recipe(1.0, 400.0, 0.01, 0.01, 0.5, 75.0), DELTA, annealed=False)
    assert same.useful("exploration") == 2.5 < long.useful("exploration")
    most = long.useful("exploration")
    assert long.bound("exploration", most, 0.0) <= 1.5 * DELTA + 1e-9
