"""Which trials are fine-tuned at length, and which network is handed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from optuna.trial import FrozenTrial, create_trial
from torch import nn

from autocompress import finals
from autocompress.evaluation import Evaluation
from autocompress.finals import ROUND, Finalist, Finals, choose_finalists, standing
from autocompress.longfits import LongFit, by_trial, mean_bound
from autocompress.objective import Bench
from autocompress.outlook import Outlook, Step
from autocompress.plan import Plan
from autocompress.progress import NullDisplay
from autocompress.training import Recipe

DELTA = 5.0
OUTLOOK = Outlook(DELTA, {"annealing": Step(2.756)})
"""A trial keeps two thirds of what it lost, as far as is known before."""
RECIPE = Recipe(0.5, 2.0, 0.05, 0.1, 0.5, 75.0)
"""How the winner is fine-tuned now: for two epochs, at a rate of 0.1."""


def trials(*pairs: tuple[float, float]) -> dict[str, FrozenTrial]:
    """Trials of `(cost, lost)`, by label; their bounds are their drops, as with confidence 0.5."""
    found = {}
    for number, (cost, lost) in enumerate(pairs):
        trial = create_trial(
            values=[lost, cost],
            system_attrs={"constraints": [lost - DELTA]},
            user_attrs={"weights": "w"},
        )
        trial.number = number
        found[f"annealing/{number}"] = trial
    return found


EMPTY = Evaluation(torch.ones(8))


def long_fit(label: str, seed: int, bound: float | None, before: float = 0.0) -> LongFit:
    """A long fine-tuning that came to a drop of `bound`; that failed where it is None."""
    end = 100.0 if bound is None else bound
    return LongFit(label, seed, 2.0, 0.1, before, end, end, None if bound is None else "w", 1.0)


class Fits:
    """Stands for long fine-tunings: the bound that each trial comes to, by label and seed."""

    def __init__(self, bound: Callable[[str, int], float | None]) -> None:
        self.bound = bound
        self.calls: list[tuple[str, int]] = []

    def run(
        self, found: dict[str, FrozenTrial], room: int = 1, again: bool = True
    ) -> list[LongFit]:
        """Carry out what is wanted, as the conductor does."""
        fits: list[LongFit] = []
        spent = 0
        while spent < ROUND:
            outlook = OUTLOOK
            for fit in (one for one in fits if one.weights is not None):
                outlook = outlook.having_seen("annealing", fit.before, fit.after)
            own = {fit.trial: [one for one in fits if one.trial == fit.trial] for fit in fits}
            ends = {label: mean_bound(several) for label, several in own.items()}
            finals = Finals(found, replace(outlook, ends=ends), 0, fits, RECIPE)
            orders = finals.wanted(min(room, ROUND - spent), again, again and spent >= ROUND - 2)
            if not orders:
                break
            self.calls += orders
            spent += len({label for label, _ in orders})
            fits += [
                long_fit(label, seed, self.bound(label, seed), found[label].values[0])
                for label, seed in orders
            ]
        return fits


def choose(
    found: dict[str, FrozenTrial],
    fits: Fits,
    monkeypatch: pytest.MonkeyPatch,
    known: dict[str, FrozenTrial] | None = None,
    done: list[LongFit] | None = None,
) -> list[Finalist]:
    def before(bench: Any, label: str, display: Any) -> list[Finalist]:
        lost = DELTA + (known or found)[label].system_attrs["constraints"][0]
        return [Finalist(label, nn.Identity(), Plan({}), EMPTY, lost, lost, lost)]

    def after(bench: Any, fit: LongFit, display: Any) -> Finalist:
        ends = {fit.seed: fit.bound}
        return Finalist(fit.trial, nn.Identity(), Plan({}), EMPTY, *3 * (fit.bound,), 2.0, ends)

    monkeypatch.setattr(finals, "_after", after)
    monkeypatch.setattr(finals, "_before", before)
    fitted = fits.run(found) if done is None else done
    return choose_finalists(bench_of(found, fitted), found, NullDisplay())


def bench_of(found: dict[str, FrozenTrial], fits: list[LongFit]) -> Bench:
    """A study of these trials and long fine-tunings, as far as the finals look at it."""
    study = SimpleNamespace(get_trials=lambda deepcopy: list(found.values()))
    parts = {"studies": {"annealing": study}, "long_fits": fits, "outlook": OUTLOOK}
    return cast(Bench, SimpleNamespace(finetune=RECIPE, seed=0, delta=DELTA, **parts))


def test_the_cheapest_that_promises_to_come_within_delta_is_tuned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials((100, 4.0), (60, 7.0), (40, 9.0))
    fits = Fits(lambda label, seed: 4.9)
    winner, second = choose(found, fits, monkeypatch)
    assert fits.calls == [("annealing/1", 0), ("annealing/1", 1)]
    assert winner.label == "annealing/1" and winner.seeds == {0: 4.9, 1: 4.9}
    assert (second.label, second.epochs) == ("annealing/0", 0.0)


def test_after_a_success_with_room_a_cheaper_trial_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials((100, 4.0), (60, 7.0), (40, 9.0))
    # A trial keeps 0.3 of what it lost; so one that lost 9 promises to come within 5.
    fits = Fits(lambda label, seed: {"annealing/1": 2.1, "annealing/2": 3.0}[label])
    winner, second = choose(found, fits, monkeypatch)
    assert winner.label == "annealing/2" and second.label == "annealing/1"
    assert fits.calls == [("annealing/1", 0), ("annealing/2", 0), ("annealing/2", 1)]


def test_after_failures_the_cheapest_within_delta_is_tuned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials((100, 4.0), (99, 5.1), (98, 5.2), (97, 5.3), (96, 5.4), (95, 7.4))
    fits = Fits(lambda label, seed: 3.0 if label == "annealing/0" else 5.2)
    winner = choose(found, fits, monkeypatch)[0]
    first = [label for label, _ in fits.calls]
    assert len(first) == ROUND and first[0] == "annealing/5"
    assert first[-2:] == ["annealing/0"] * 2 and winner.bound == 3.0


@pytest.mark.parametrize(
    ("lost", "again", "handed_out", "expected"),
    [
        (6.0, 3.0, 3.0, 3.5),  # the better of two seeds, of which their mean is expected
        (2.0, 3.0, 2.0, 2.75),  # or the trial's own weights, where they are better
        (6.0, 6.0, 4.0, 5.0),  # a mean of exactly delta is within it
        (6.0, 6.1, None, None),  # one seed's luck is no winner
        (4.5, 6.1, 4.5, 4.775),  # then the trial's own weights, if these are within delta
        (4.9, 8.0, None, None),  # unless the two tell that these were lucky, too
        (6.0, None, None, None),  # the fine-tuning diverged
    ],
)
def test_a_winner_is_within_delta_with_two_seeds(
    lost: float,
    again: float | None,
    handed_out: float | None,
    expected: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = Fits(lambda label, seed: 4.0 if seed == 0 else again)
    found = choose(trials((10, lost)), fits, monkeypatch)
    assert (found[0].drop if found else None) == handed_out
    assert (found[0].expected if found else None) == expected
    assert (found[0].bound if found else None) == expected
    assert fits.calls == [("annealing/0", 0), ("annealing/0", 1)]


def test_a_plan_that_one_seed_favoured_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials((100, 4.5), (60, 6.0), (40, 7.0))
    fits = Fits(lambda label, seed: 4.5 if label == "annealing/1" else 4.0 + 4 * seed)
    winner, second = choose(found, fits, monkeypatch)
    assert fits.calls == [(f"annealing/{n}", seed) for n in (2, 1) for seed in (0, 1)]
    assert winner.label == "annealing/1" and winner.seeds == {0: 4.5, 1: 4.5}
    assert second.label == "annealing/0" and second.seeds == {}


def test_before_the_end_of_the_search_none_is_repeated() -> None:
    found = trials((100, 4.0), (60, 6.0), (40, 8.0))
    fits = Fits(lambda label, seed: 3.0)
    [first, second] = fits.run(found, again=False)
    assert fits.calls == [("annealing/1", 0), ("annealing/2", 0)]
    assert (first.before, second.before) == (6.0, 8.0)


def test_several_are_fine_tuned_at_the_same_time() -> None:
    found = trials((100, 4.0), (60, 7.0), (50, 7.1), (40, 9.0))
    fits = Fits(lambda label, seed: 4.9)
    fits.run(found, room=2)
    # The two cheapest that promise it; then, as none is cheaper, the second seeds.
    assert fits.calls == [(f"annealing/{index}", seed) for seed in (0, 1) for index in (2, 1)]


def test_workers_that_would_be_idle_begin_with_the_second_seed() -> None:
    found = trials((100, 7.0), (40, 9.0))
    both = [("annealing/0", 0), ("annealing/0", 1)]
    fits = Fits(lambda label, seed: 4.9)
    assert len(fits.run(found, room=2)) == 2 and fits.calls == both
    fits = Fits(lambda label, seed: 4.9)
    fits.run(found, room=2, again=False)
    assert fits.calls == both[:1], "trials go on first"
    # A trial keeps 0.3 of what it lost; so after a success one that lost 9 promises to come within.
    fits = Fits(lambda label, seed: {"annealing/0": 2.1, "annealing/1": 6.0}[label])
    fits.run(found)
    assert fits.calls == [("annealing/0", 0), ("annealing/1", 0), ("annealing/0", 1)]
    done = [long_fit("annealing/0", 0, 2.1, 7.0)]
    seen = OUTLOOK.having_seen("annealing", 7.0, 2.1)
    orders = Finals(found, seen, 0, done, RECIPE).wanted(room=2, again=True)
    assert orders == [("annealing/1", 0), ("annealing/0", 1)], "beside the cheaper one's first"


def test_should_the_best_fail_its_second_seed_the_next_has_one_already() -> None:
    found = trials((100, 6.0), (99, 7.0))
    done = [long_fit("annealing/0", 0, 4.0, 6.0), long_fit("annealing/1", 0, 4.5, 7.0)]
    seen = OUTLOOK.having_seen("annealing", 6.0, 4.0)
    second = [("annealing/1", 1), ("annealing/0", 1)]
    for room in (1, 2, 3):
        assert Finals(found, seen, 0, done, RECIPE).wanted(room, again=True) == second[:room]
    done.append(long_fit("annealing/1", 1, 4.9, 7.0))
    assert Finals(found, seen, 0, done, RECIPE).wanted(2, again=True) == [], (
        "nothing is left to be told"
    )


@pytest.mark.parametrize(
    ("ends", "cost", "left"),
    [
        ({}, 100, 1.0),  # the cheapest that is within 5 as its trial left it
        ({"annealing/1": 4.5}, 60, 0.5),  # a cheaper one, by its long fine-tuning
        ({"annealing/1": 5.5}, 100, 1.0),
        ({"annealing/0": 4.5}, 100, 0.75),  # its trial's weights are better; both tell of it
        ({"annealing/0": 2.0}, 100, 3.0),
        ({"annealing/0": 7.0}, 200, 4.0),  # it was lucky; a dearer one is left
    ],
)
def test_what_stands_is_the_cheapest_within_delta(
    ends: dict[str, float], cost: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.0), (60, 6.0), (40, 8.0), (200, 1.0))
    fits = [long_fit(label, 0, bound) for label, bound in ends.items()]
    assert standing(bench_of(found, fits)) == (cost, pytest.approx(left))
    # It leaves what the one will leave that is handed out.
    winner = choose(found, Fits(lambda label, seed: None), monkeypatch, done=fits)[0]
    assert found[winner.label].values[1] == cost
    assert winner.bound == pytest.approx(DELTA - left)


def test_nothing_stands_where_nothing_is_within_delta() -> None:
    assert standing(bench_of(trials((60, 6.0)), [])) is None


def test_where_no_trial_promises_anything_none_is_fine_tuned() -> None:
    fits = Fits(lambda label, seed: 1.0)
    assert not fits.run(trials((100, 7.6)))


def test_no_network_is_scored_beyond_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials(*((cost, 4.0) for cost in (10, 20, 30, 40)))
    scored = dict(list(found.items())[:2])
    chosen = choose(found, Fits(lambda label, seed: 4.5), monkeypatch, known=scored)
    assert [one.label for one in chosen] == ["annealing/0", "annealing/1"]


def test_without_long_fine_tunings_the_trials_own_weights_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = Fits(lambda label, seed: 0.0)
    found = choose(trials((10, 5.1), (20, 5.0)), fits, monkeypatch, done=[])
    assert [one.label for one in found] == ["annealing/1"]


LONGER, SHORTER = {"epochs": 4.0}, {"epochs": 1.0}
OTHER_RATE = {"learning_rate": 0.2}


@pytest.mark.parametrize(
    ("done", "judged_by"),
    [
        # What was found before the length was changed is not lost, the longest first,
        ([(0, 4.0, SHORTER), (1, 4.5, SHORTER)], [4.0, 4.5]),
        ([(0, 4.0, LONGER), (1, 4.5, SHORTER)], [4.0]),
        ([(0, 4.0, OTHER_RATE)], [4.0]),
        # nor mixed with what is done today,
        ([(0, 4.0, LONGER), (1, 4.5, {})], [4.5]),
        # which decides, unless it spoils what was within delta.
        ([(0, 4.0, LONGER), (1, 5.5, {})], [4.0]),
        ([(0, 5.2, LONGER), (1, 5.5, {})], [5.5]),
        ([(0, 5.2, LONGER), (1, 5.5, SHORTER)], [5.2]),
        # One that failed tells nothing once the length, or the rate, is another.
        ([(0, None, LONGER)], []),
        ([(0, None, OTHER_RATE), (1, 3.0, SHORTER)], [3.0]),
        ([(0, None, {})], [100.0]),
    ],
)
def test_a_trial_is_judged_by_its_best_long_fine_tunings(
    done: list[tuple[int, float | None, dict[str, float]]], judged_by: list[float]
) -> None:
    fits = [replace(long_fit("annealing/0", s, bound), **changed) for s, bound, changed in done]
    judge = Finals(trials((10, 6.0)), OUTLOOK, 0, fits, RECIPE)
    assert [fit.bound for fit in judge.fits("annealing/0")] == judged_by
    assert judge.met("annealing/0") == (bool(judged_by) and judged_by[0] <= DELTA)


def test_the_long_fine_tunings_of_a_trial_are_sorted_by_their_kind() -> None:
    kinds = [SHORTER, {}, OTHER_RATE, LONGER, {}]
    fits = [replace(long_fit("annealing/0", s, 4.0), **kind) for s, kind in enumerate(kinds)]
    [told] = by_trial(fits, RECIPE).values()
    assert [[fit.seed for fit in own] for own in told] == [[1, 4], [3], [2], [0]]


def test_where_their_length_was_changed_what_promises_is_fine_tuned_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trials((100, 4.0), (60, 7.0), (40, 9.0))
    done = [replace(long_fit("annealing/1", seed, 4.5, 7.0), epochs=1.0) for seed in (0, 1)]
    done += [replace(long_fit("annealing/2", 0, 6.0, 9.0), epochs=1.0)]
    [winner, _] = choose(found, Fits(lambda label, seed: 0.0), monkeypatch, done=done)
    assert winner.label == "annealing/1" and winner.seeds == {0: 4.5, 1: 4.5}
    assert standing(bench_of(found, done)) == (60, 0.5)

    def wanted(end: float, *more: LongFit) -> list[tuple[str, int]]:
        outlook = replace(OUTLOOK, ends={"annealing/1": 4.0, "annealing/2": end})
        return Finals(found, outlook, 0, [*done, *more], RECIPE).wanted(1)

    # By twice the length the cheaper one promises to come within delta, or does not.
    assert wanted(4.8) == [("annealing/2", 0)] and wanted(5.1) == [("annealing/1", 0)]
    # Should the other fail now, a dearer one is of no use beside what it came to before.
    assert wanted(5.1, long_fit("annealing/1", 0, 5.5, 7.0)) == []
