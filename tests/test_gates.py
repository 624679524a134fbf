"""Stopping trials that can't come near delta any more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from autocompress.evaluation import Evaluation, evaluate
from autocompress.gates import GATE_IMAGES, Gate, Record, gate_batches, least_loss, usual_gate
from autocompress.scale import Scale
from autocompress.task import Task
from autocompress.training import Recipe

KEPT_A_TENTH = [Record((40.0, 8.0), 4.0), Record((30.0, 6.0), 3.6), Record((20.0, 5.0), 3.0)]


def test_the_least_loss_is_half_of_what_the_luckiest_kept() -> None:
    assert least_loss(KEPT_A_TENTH, 0, 40.0) == pytest.approx(0.5 * 0.1 * 40)
    assert least_loss(KEPT_A_TENTH, 1, 10.0) == pytest.approx(0.5 * 0.5 * 10)


def test_too_few_trials_like_it_tell_nothing() -> None:
    assert least_loss(KEPT_A_TENTH[:2], 0, 40.0) is None
    assert least_loss(KEPT_A_TENTH, 0, 41.0) is None  # only two had lost half as much
    assert least_loss(KEPT_A_TENTH, 2, 10.0) is None  # none got there
    assert least_loss(KEPT_A_TENTH, 0, -1.0) is None


def test_a_trial_that_recovered_wholly_keeps_the_gate_open() -> None:
    assert (least_loss([*KEPT_A_TENTH, Record((35.0,), 0.0)], 0, 40.0) or 0.0) <= 0.0


def test_no_trial_that_became_useful_is_stopped_on_replay() -> None:
    """Whatever the order, a trial within the limit that recovers like the others passes."""
    records = [Record((drop,), 0.1 * drop) for drop in (5.0, 10.0, 20.0, 24.0, 30.0, 40.0)]
    for index, record in enumerate(records):
        others = records[:index] + records[index + 1 :]
        least = least_loss(others, 0, record.early[0])
        assert least is None or least <= record.lost


@pytest.fixture
def spoilt(task: Task) -> nn.Module:
    """A network that guesses: it loses about 75 points."""
    torch.manual_seed(0)
    return type(task.model)().eval()


def test_the_first_gate_is_that_of_the_study_file(task: Task, spoilt: nn.Module) -> None:
    base = evaluate(task.model, task, task.val)
    gate = Gate(task, base, [], most=30.0, useful=5.0)
    assert not gate.closes(task.model, 0) and gate.drops == [0.0]
    assert gate.closes(spoilt, 0)
    assert gate.lost == gate.drops[0] > 30 and "before fine-tuning > gate 30" in str(gate.reason)
    # At a rung it doesn't count.
    assert not Gate(task, base, [], most=30.0, useful=5.0).closes(spoilt, 1)


def test_a_rung_closes_by_what_earlier_trials_came_to(task: Task, spoilt: nn.Module) -> None:
    base = evaluate(task.model, task, task.val)
    hopeless = [Record((80.0, 70.0), 40.0)] * 3
    gate = Gate(task, base, hopeless, most=100.0, useful=5.0)
    assert gate.closes(spoilt, 1) and "after 33 % of the fine-tuning" in str(gate.reason)
    assert not Gate(task, base, hopeless, most=100.0, useful=5.0).closes(task.model, 1)
    lucky = [*hopeless, Record((80.0, 70.0), 2.0)]
    assert not Gate(task, base, lucky, most=100.0, useful=5.0).closes(spoilt, 1)


def test_a_gate_looks_at_about_a_thousand_images() -> None:
    images = (torch.zeros(300, 1), torch.zeros(300))
    task = Task(nn.Linear(1, 1), [images], [images] * 10, [images])
    assert gate_batches(task) == 4 == -(-GATE_IMAGES // 300)
    assert gate_batches(Task(nn.Linear(1, 1), [images], [images] * 2, [images])) == 2


def test_scores_beyond_the_gates_are_not_compared(task: Task) -> None:
    base = evaluate(task.model, task, task.val)
    longer = Evaluation(torch.cat([base.records, torch.ones(500)]))
    assert not Gate(task, longer, [], most=0.0, useful=1.0).closes(task.model, 0)


def test_the_usual_gate_is_on_the_scale_of_the_metric(tmp_path: Path) -> None:
    assert usual_gate(Scale(), 91.0, 1.0) == 50.0
    assert usual_gate(Scale("mIoU", ""), 0.8, 0.02) == pytest.approx(0.4)
    assert usual_gate(Scale("RMSE", "px", higher_is_better=False), 2.0, 0.1) == pytest.approx(18.0)
    likelihood = Scale("log-likelihood", "")
    assert usual_gate(likelihood, -0.56, 1.0) == 10.0, "half of the score would be within delta"
    config = tiny_config(tmp_path)
    assert Recipe.from_config(config.finetune, gate=0.4).gate == config.finetune.gate
    left_open = config.finetune.model_copy(update={"gate": None})
    assert Recipe.from_config(left_open, gate=0.4).gate == 0.4
