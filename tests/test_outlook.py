"""What a trial is expected to lose in the end."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from autocompress.outlook import (
    EPOCHS,
    LEAST_KEPT,
    REHEARSAL,
    Outlook,
    Step,
    annealing_epochs,
    outlook_of,
)
from autocompress.training import Recipe
from autocompress.trials import PARENT

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
) -> optuna.trial.FrozenTrial:
    return create_trial(
        values=[drop, 10.0] if state == TrialState.COMPLETE else None,
        state=state,
        system_attrs={"constraints": [drop + margin - DELTA]},
        user_attrs={"plan_digest": plan, PARENT: parent},
    )


def test_the_longer_the_winners_fine_tuning_the_more_a_trial_may_lose() -> None:
    kept = [Step(longer).kept(DELTA) for longer in (0.5, 1.0, 2.0, 10.0)]
    assert kept[0] == kept[1] == 1.0 > kept[2] > kept[3] > 0.3


def test_what_was_seen_outweighs_the_prior_the_more_the_larger_the_drops_were() -> None:
    prior = Step(4.0).kept(DELTA)
    assert Step(4.0, ((0.05, 0.05),)).kept(DELTA) == pytest.approx(prior, abs=0.01)
    assert prior < 0.6 < Step(4.0, ((2.0, 1.8),)).kept(DELTA) < 0.9
    assert Step(4.0, ((2.0, -1.0),)).kept(DELTA) == LEAST_KEPT  # one lucky run is no miracle
    assert Step(4.0, ((2.0, 4.0),)).kept(DELTA) == 1.0


def test_the_margin_stays_and_only_the_drop_is_won_back() -> None:
    outlook = Outlook(DELTA, {"annealing": Step(4.0)})
    kept = outlook.kept("annealing")
    assert outlook.bound("annealing", 2.0, 0.5) == pytest.approx(0.5 + 2 * kept)
    assert outlook.bound("annealing", -0.2, 0.5) == pytest.approx(0.3)
    # Nothing follows such a trial.
    assert outlook.bound("other", 2.0, 0.5) == 2.5


def test_an_exploration_trial_has_two_steps_before_it() -> None:
    outlook = outlook_of({"exploration": study_with()}, RECIPE, DELTA, annealed=True)
    assert annealing_epochs(RECIPE) == 4.0
    steps = [step.longer for step in outlook.steps.values()]
    assert steps == [4.0, 4.0]
    assert outlook.kept("exploration") == pytest.approx(outlook.kept("annealing") ** 2)
    alone = outlook_of({"exploration": study_with()}, RECIPE, DELTA, annealed=False)
    assert alone.steps["exploration"].longer == 16.0


def test_a_trial_promises_by_its_drop_and_a_stopped_one_by_its_constraint() -> None:
    outlook = outlook_of({}, RECIPE, DELTA, annealed=True)
    assert outlook.shortfall("exploration", trial(1.5)) < 0 < outlook.shortfall("x", trial(1.5))
    assert outlook.shortfall("exploration", trial(9.0)) > 0
    stopped = trial(1.5, state=TrialState.PRUNED)
    assert outlook.shortfall("exploration", stopped) == pytest.approx(0.9)
    nothing = create_trial(state=TrialState.FAIL)
    assert outlook.shortfall("exploration", nothing) == float("inf")


def test_plans_that_were_only_fine_tuned_further_tell_the_first_step() -> None:
    exploration = study_with(trial(2.0, "a"), trial(1.0, "b"))
    annealing = study_with(
        trial(1.9, "a", "exploration/0"),
        trial(0.0, "c", "exploration/1"),  # another plan tells nothing
        trial(0.0, "a", "annealing/0"),
        **{EPOCHS: 4.0},
    )
    found = outlook_of({"exploration": exploration, "annealing": annealing}, RECIPE, DELTA, True)
    assert found.steps["exploration"].pairs == ((2.0, 1.9),)
    assert found.kept("exploration") > 1.3 * found.kept("annealing") ** 2


def test_the_rehearsal_tells_the_second_step() -> None:
    rehearsal = {"trial": "annealing/0", "before": 2.0, "after": 0.1, "bound": 0.7}
    annealing = study_with(trial(2.0), **{EPOCHS: 4.0, REHEARSAL: rehearsal})
    found = outlook_of({"annealing": annealing}, RECIPE, DELTA, True)
    assert found.steps["annealing"].pairs == ((2.0, 0.1),)
    assert found.kept("annealing") < Step(4.0).kept(DELTA)
    # What that trial came to is known.
    assert found.expected("annealing", annealing.trials[0]) == 0.7
    assert found.expected("exploration", annealing.trials[0]) != 0.7
    # An exploration trial would first have lost less by the annealing's length.
    seen = found.having_seen("exploration", 4.0, 1.0)
    assert seen.steps["annealing"].pairs[-1] == (pytest.approx(4.0 * Step(4.0).kept(DELTA)), 1.0)


def test_a_trial_of_some_use_in_the_end_is_not_stopped() -> None:
    same = outlook_of({}, Recipe(1.0, 1.0, 0.01, 0.01, 0.5, 75.0), DELTA, annealed=False)
    long = outlook_of({}, Recipe(1.0, 400.0, 0.01, 0.01, 0.5, 75.0), DELTA, annealed=False)
    assert same.useful("exploration") == 2.5 < long.useful("exploration")
    most = long.useful("exploration")
    assert long.bound("exploration", most, 0.0) <= 1.5 * DELTA + 1e-9
