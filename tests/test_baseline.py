"""The baseline is trained once, and never again by the same recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyNet, make_loader, watch_fits

from autocompress import baseline
from autocompress.baseline import check_better_than_guessing, train_baseline
from autocompress.config import BaselineConfig
from autocompress.errors import ConfigError
from autocompress.evaluation import evaluate
from autocompress.progress import NullDisplay
from autocompress.task import Task, correct

RECIPE = BaselineConfig(learning_rate=0.1)


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
    train_baseline(one, RECIPE, 2.0, 0, NullDisplay())
    train_baseline(two, RECIPE, 2.0, 0, NullDisplay())
    assert len(fits) == 1
    states = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert evaluate(two.model, two, two.val).score > 60


@pytest.mark.parametrize("change", ["epochs", "seed", "learning_rate", "data", "weights"])
def test_another_recipe_is_trained_anew(fits: list[Any], change: str) -> None:
    train_baseline(untrained(), RECIPE, 1.0, 0, NullDisplay())
    task = untrained("other" if change == "data" else "tiny")
    if change == "weights":
        torch.nn.init.zeros_(task.model.get_parameter("fc.bias"))
    recipe = BaselineConfig(learning_rate=0.05) if change == "learning_rate" else RECIPE
    epochs = 2.0 if change == "epochs" else 1.0
    train_baseline(task, recipe, epochs, 1 if change == "seed" else 0, NullDisplay())
    assert len(fits) == 2


def test_what_came_from_python_is_not_looked_up(fits: list[Any]) -> None:
    for _ in range(2):
        task = untrained()
        task.origin = None
        train_baseline(task, RECIPE, 1.0, 0, NullDisplay())
    assert len(fits) == 2


def test_no_epochs_leave_the_network_as_it_is(fits: list[Any]) -> None:
    task = untrained()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    train_baseline(task, RECIPE, 0.0, 0, NullDisplay())
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
