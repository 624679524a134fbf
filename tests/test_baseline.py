"""The baseline is trained once, and never again by the same recipe."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyNet, make_loader, watch_fits

from autocompress import baseline, training
from autocompress.baseline import (
    check_better_than_guessing,
    kept_baseline,
    train_baseline,
)
from autocompress.config import cache_folder
from autocompress.errors import ConfigError
from autocompress.evaluation import evaluate
from autocompress.progress import NullDisplay
from autocompress.recipes import BaselineRecipe
from autocompress.task import Task, correct
from autocompress.weights import state_digest

RECIPE = BaselineRecipe(epochs=1.0, learning_rate=0.1)


def untrained(fingerprint: str = "tiny") -> Task:
    torch.manual_seed(0)
    task = Task(TinyNet(), make_loader(256, 1), make_loader(128, 2), make_loader(128, 3))
    task.fingerprint = fingerprint
    task.origin = {"source": "tests:TinyNet", "arguments": {}}
    return task


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One entry for each time that something is trained."""
    return watch_fits(monkeypatch, baseline)


def test_the_same_recipe_is_trained_once(fits: list[Any]) -> None:
    one, two = untrained(), untrained()
    recipe = replace(RECIPE, epochs=2.0)
    assert train_baseline(one, recipe, 0, NullDisplay()) is not None
    assert train_baseline(two, recipe, 0, NullDisplay()) is None
    assert len(fits) == 1
    states = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert evaluate(two.model, two, two.val).score > 60


CHANGES: dict[str, dict[str, float]] = {
    "epochs": {"epochs": 2.0},
    "learning_rate": {"learning_rate": 0.05},
    "label_smoothing": {"label_smoothing": 0.1},
    "weight_decay": {"weight_decay": 0.0},
    "warm_up": {"warm_up": 0.3},
}


@pytest.mark.parametrize("change", [*CHANGES, "seed", "data", "weights"])
def test_another_recipe_is_trained_anew(fits: list[Any], change: str) -> None:
    train_baseline(untrained(), RECIPE, 0, NullDisplay())
    task = untrained("other" if change == "data" else "tiny")
    if change == "weights":
        torch.nn.init.zeros_(task.model.get_parameter("fc.bias"))
    recipe = replace(RECIPE, **CHANGES.get(change, {}))  # type: ignore[arg-type]
    train_baseline(task, recipe, 1 if change == "seed" else 0, NullDisplay())
    assert len(fits) == 2


def test_what_only_describes_a_recipe_is_no_reason_to_train_anew(fits: list[Any]) -> None:
    train_baseline(untrained(), RECIPE, 0, NullDisplay())
    other = replace(RECIPE, accuracy=90.0, source="a book", batch_size=7, short_epochs=0.5)
    train_baseline(untrained(), other, 0, NullDisplay())
    assert len(fits) == 1


def test_baselines_that_were_kept_before_there_were_recipes_are_found() -> None:
    task = untrained()
    facts = {
        "origin": task.origin,
        "weights": state_digest(task.model.state_dict()),
        "data": task.fingerprint,
        "epochs": 10.0,
        "learning_rate": 0.1,
        "seed": 0,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "baselines" / f"{digest}.safetensors"
    assert kept_baseline(task, BaselineRecipe(), 0) == path


def test_an_interrupted_training_goes_on(monkeypatch: pytest.MonkeyPatch, fits: list[Any]) -> None:
    monkeypatch.setattr(training, "LOOK_STEPS", 1)
    recipe = replace(RECIPE, epochs=3.0)
    whole = untrained()
    train_baseline(whole, recipe, 0, NullDisplay())
    kept = kept_baseline(untrained(), recipe, 0)
    assert kept is not None
    kept.unlink()

    class Interrupting(NullDisplay):
        steps = 0

        def step(self, phase: str, done: float, total: float, note: str = "", worker: str = ""):  # type: ignore[no-untyped-def]
            self.steps += 1
            if self.steps == 10:
                raise KeyboardInterrupt

    first, second = Interrupting(), Interrupting()
    second.steps = 100
    with pytest.raises(KeyboardInterrupt):
        train_baseline(untrained(), recipe, 0, first)
    assert kept.with_suffix(".checkpoint").exists() and not kept.exists()
    task = untrained()
    train_baseline(task, recipe, 0, second)
    assert second.steps - 100 < 24 - 9 + 1
    states = whole.model.state_dict(), task.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_what_came_from_python_is_not_looked_up(fits: list[Any]) -> None:
    for _ in range(2):
        task = untrained()
        task.origin = None
        train_baseline(task, RECIPE, 0, NullDisplay())
    assert len(fits) == 2


def test_no_epochs_leave_the_network_as_it_is(fits: list[Any]) -> None:
    task = untrained()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    train_baseline(task, replace(RECIPE, epochs=0.0), 0, NullDisplay())
    assert fits == []
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())


def test_a_network_that_guesses_is_refused(task: Task) -> None:
    check_better_than_guessing(task, evaluate(task.model, task, task.val))
    with torch.no_grad():
        task.model.get_parameter("fc.weight").zero_()
    scores = evaluate(task.model, task, task.val)
    with pytest.raises(ConfigError, match=r"25.00 % of 256 .* most frequent class \(25.00 %\)"):
        check_better_than_guessing(task, scores)
    task.metric = lambda output, batch: correct(output, batch)
    check_better_than_guessing(task, scores)
