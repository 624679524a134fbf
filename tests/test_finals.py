"""Which trials are fine-tuned at length, and which network is handed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import Stopping, tiny_config, tiny_task
from optuna.trial import FrozenTrial, create_trial
from torch import nn

from autocompress import finals
from autocompress.evaluation import Evaluation
from autocompress.finals import FINALS, Finalist, choose_finalists, rehearse, standing
from autocompress.objective import Bench
from autocompress.outlook import REHEARSALS, Outlook, Step
from autocompress.plan import Plan
from autocompress.progress import NullDisplay
from autocompress.store import StudyFolder
from autocompress.training import Recipe
from autocompress.watch import Watch

DELTA = 5.0
OUTLOOK = Outlook(DELTA, {"annealing": Step(2.756)})
"""A trial keeps two thirds of what it lost, as far as is known before."""


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


class Fits:
    """Stands for the long fine-tuning: the bound that each trial comes to, by label and seed."""

    def __init__(self, bound: Callable[[str, int], float | None]) -> None:
        self.bound = bound
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self, config: Any, bench: Any, folder: Any, label: str, seed: int, display: Any
    ) -> Finalist | None:
        self.calls.append((label, seed))
        bound = self.bound(label, seed)
        if bound is None:
            return None
        return Finalist(label, nn.Identity(), Plan({}), EMPTY, *3 * (bound,), 2.0, {seed: bound})


EMPTY = Evaluation(torch.ones(8))


def choose(
    found: dict[str, FrozenTrial],
    fits: Fits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    final_epochs: float = 2.0,
    known: dict[str, FrozenTrial] | None = None,
) -> list[Finalist]:
    def before(bench: Any, label: str, display: Any) -> list[Finalist]:
        lost = DELTA + (known or found)[label].system_attrs["constraints"][0]
        return [Finalist(label, nn.Identity(), Plan({}), EMPTY, lost, lost, lost)]

    monkeypatch.setattr(finals, "_final_fit", fits)
    monkeypatch.setattr(finals, "_before", before)
    settings = SimpleNamespace(final_epochs=final_epochs)
    bench = cast(Bench, SimpleNamespace(finetune=settings, studies={}, outlook=OUTLOOK))
    config = tiny_config(tmp_path, delta=DELTA)
    return choose_finalists(config, bench, StudyFolder(tmp_path), found, NullDisplay())


def test_the_cheapest_that_promises_to_come_within_delta_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.0), (60, 7.0), (40, 9.0))
    fits = Fits(lambda label, seed: 4.9)
    winner, second = choose(found, fits, tmp_path, monkeypatch)
    assert fits.calls == [("annealing/1", 0), ("annealing/1", 1)]
    assert winner.label == "annealing/1" and winner.seeds == {0: 4.9, 1: 4.9}
    assert (second.label, second.epochs) == ("annealing/0", 0.0)


def test_after_a_success_with_room_a_cheaper_trial_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.0), (60, 7.0), (40, 9.0))
    # A trial keeps 0.3 of what it lost; so one that lost 9 promises to come within 5.
    fits = Fits(lambda label, seed: {"annealing/1": 2.1, "annealing/2": 3.0}[label])
    winner, second = choose(found, fits, tmp_path, monkeypatch)
    assert winner.label == "annealing/2" and second.label == "annealing/1"
    assert fits.calls == [("annealing/1", 0), ("annealing/2", 0), ("annealing/2", 1)]


def test_after_failures_the_cheapest_within_delta_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.0), (99, 5.1), (98, 5.2), (97, 5.3), (96, 5.4), (95, 7.4))
    fits = Fits(lambda label, seed: 3.0 if label == "annealing/0" else 5.2)
    winner = choose(found, fits, tmp_path, monkeypatch)[0]
    first = [label for label, _ in fits.calls]
    assert len(first) == FINALS and first[0] == "annealing/5"
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = Fits(lambda label, seed: 4.0 if seed == 0 else again)
    found = choose(trials((10, lost)), fits, tmp_path, monkeypatch)
    assert (found[0].drop if found else None) == handed_out
    assert (found[0].expected if found else None) == expected
    assert (found[0].bound if found else None) == expected
    assert fits.calls == [("annealing/0", 0), ("annealing/0", 1)]


def test_a_plan_that_one_seed_favoured_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.5), (60, 6.0), (40, 7.0))
    fits = Fits(lambda label, seed: 4.5 if label == "annealing/1" else 4.0 + 4 * seed)
    winner, second = choose(found, fits, tmp_path, monkeypatch)
    assert fits.calls == [(f"annealing/{n}", seed) for n in (2, 1) for seed in (0, 1)]
    assert winner.label == "annealing/1" and winner.seeds == {0: 4.5, 1: 4.5}
    assert second.label == "annealing/0" and second.seeds == {}


@pytest.mark.parametrize(("bound", "after"), [(3.0, 3.0), (-1.0, -1.0), (6.5, 6.5), (None, 100.0)])
def test_a_rehearsal_tells_what_the_end_wins_back(
    bound: float | None, after: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 7.5 is the most that promises to come within 5 by what is assumed before.
    found = trials((100, 4.0), (60, 6.0), (40, 8.0))
    study = SimpleNamespace(user_attrs={}, get_trials=lambda deepcopy: list(found.values()))
    parts = {"studies": {"annealing": study}, "outlook": OUTLOOK, "store": None}
    parts["finetune"] = SimpleNamespace(gate=50.0)
    bench = cast(Bench, SimpleNamespace(**parts))
    fits = Fits(lambda label, seed: bound)
    monkeypatch.setattr(finals, "save_weights", lambda model, owner, store: "annealing's")
    monkeypatch.setattr(finals, "_final_fit", fits)
    config = tiny_config(tmp_path, delta=DELTA)
    done = rehearse(config, bench, StudyFolder(tmp_path), NullDisplay())
    assert done == {
        "trial": "annealing/1",
        "before": 6.0,
        "after": after,
        "bound": after,
        "weights": "annealing's" if after < 6.0 else None,
    }
    assert fits.calls == [("annealing/1", 0)]


def test_a_rehearsal_is_repeated_with_the_second_seed_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 4.0))
    study = SimpleNamespace(user_attrs={}, get_trials=lambda deepcopy: list(found.values()))
    parts = {"studies": {"annealing": study}, "outlook": OUTLOOK, "store": None}
    bench = cast(Bench, SimpleNamespace(**parts, finetune=SimpleNamespace(gate=50.0)))
    fits = Fits(lambda label, seed: 3.0 + seed)
    monkeypatch.setattr(finals, "save_weights", lambda model, owner, store: "annealing's")
    monkeypatch.setattr(finals, "_final_fit", fits)
    config = tiny_config(tmp_path, delta=DELTA)

    def again(yes: bool) -> float | None:
        done = rehearse(config, bench, StudyFolder(tmp_path), NullDisplay(), yes)
        if done is not None:
            study.user_attrs.setdefault(REHEARSALS, []).append(done)
        return None if done is None else float(done["bound"])

    assert again(True) is None
    assert [again(False), again(False), again(True), again(True)] == [3.0, None, 4.0, None]
    assert fits.calls == [("annealing/0", 0), ("annealing/0", 1)]


@pytest.mark.parametrize(
    ("ends", "cost", "left"),
    [
        ({}, 100, 1.0),  # the cheapest that is within 5 as its trial left it
        ({"annealing/1": 4.5}, 60, 0.5),  # a cheaper one, by its long fine-tuning
        ({"annealing/1": 5.5}, 100, 1.0),
        ({"annealing/0": 4.5}, 100, 1.0),  # that of its trial is better
        ({"annealing/0": 2.0}, 100, 3.0),
        ({"annealing/0": 7.0}, 200, 4.0),  # it was lucky; a dearer one is left
    ],
)
def test_what_stands_is_the_cheapest_within_delta(
    ends: dict[str, float], cost: float, left: float
) -> None:
    found = trials((100, 4.0), (60, 6.0), (40, 8.0), (200, 1.0))
    study = SimpleNamespace(get_trials=lambda deepcopy: list(found.values()))
    outlook = replace(OUTLOOK, ends=ends)
    parts = {"studies": {"annealing": study}, "outlook": outlook, "delta": DELTA}
    assert standing(cast(Bench, SimpleNamespace(**parts))) == (cost, pytest.approx(left))


def test_nothing_stands_where_nothing_is_within_delta() -> None:
    study = SimpleNamespace(get_trials=lambda deepcopy: list(trials((60, 6.0)).values()))
    parts = {"studies": {"annealing": study}, "outlook": OUTLOOK, "delta": DELTA}
    assert standing(cast(Bench, SimpleNamespace(**parts))) is None


def test_a_long_fine_tuning_goes_on_where_it_was_interrupted(
    trained_state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = SimpleNamespace(
        baseline=SimpleNamespace(model=tiny_task(trained_state).model),
        identity="x",
        finetune=Recipe(1.0, 2.0, 0.05, 0.05, 0.5, 50.0),
        watch=Watch(),
        checkpoint_every=1e9,
        judge=lambda model, val: (0.0, 0.0),
        int8=False,
    )
    config = tiny_config(tmp_path)

    def tune(place: str, display: NullDisplay) -> nn.Module:
        bench.task = tiny_task(trained_state)
        monkeypatch.setattr(finals, "load_trial_model", lambda *_: (bench.task.model, Plan({})))
        folder = StudyFolder(tmp_path / place)
        found = finals._final_fit(config, cast(Bench, bench), folder, "annealing/3", 0, display)
        assert found is not None
        return found.model

    first, rest = Stopping(), Stopping(stops=False)
    with pytest.raises(KeyboardInterrupt):
        tune("a", first)
    found = tune("a", rest).state_dict()
    assert rest.done[0] > first.done[0] > 0, "it goes on where it was interrupted"
    assert [path.suffix for path in (tmp_path / "a").rglob("*.*")] == [".safetensors"]
    for key, value in tune("b", NullDisplay()).state_dict().items():
        torch.testing.assert_close(found[key], value)


def test_where_no_trial_promises_anything_nothing_is_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials((100, 7.6))
    study = SimpleNamespace(user_attrs={}, get_trials=lambda deepcopy: list(found.values()))
    bench = cast(Bench, SimpleNamespace(studies={"annealing": study}, outlook=OUTLOOK))
    fits = Fits(lambda label, seed: 1.0)
    monkeypatch.setattr(finals, "_final_fit", fits)
    config = tiny_config(tmp_path, delta=DELTA)
    assert rehearse(config, bench, StudyFolder(tmp_path), NullDisplay()) is None
    assert not fits.calls


def test_no_network_is_scored_beyond_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trials(*((cost, 4.0) for cost in (10, 20, 30, 40)))
    scored = dict(list(found.items())[:2])
    chosen = choose(found, Fits(lambda label, seed: 4.5), tmp_path, monkeypatch, known=scored)
    assert [one.label for one in chosen] == ["annealing/0", "annealing/1"]


def test_without_final_epochs_the_trials_own_weights_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = Fits(lambda label, seed: 0.0)
    found = choose(trials((10, 5.1), (20, 5.0)), fits, tmp_path, monkeypatch, final_epochs=0.0)
    assert [one.label for one in found] == ["annealing/1"] and not fits.calls
