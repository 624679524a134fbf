"""What is known of a study at a moment, and its way through the database."""

from __future__ import annotations

import json

import pytest

from autocompress.scale import Scale
from autocompress.tally import Facts, Tally


class HandClock:
    """A clock that the test turns."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


def tally(clock: HandClock) -> Tally:
    found = Tally(clock)
    scale = Scale("RMSE", "px", higher_is_better=False)
    found.stage("exploration", 8, 1, 0.5, "macs", None, 3.0, scale)
    found.trial_started(1, "worker 0")
    clock.now += 10
    found.trial_finished(1, 0.2, 3.5, True)
    found.trial_started(2, "worker 0")
    found.step("fine-tune", 0.5, 2.0, "loss 0.1", "worker 0")
    return found


def test_it_is_the_same_after_its_way_through_json() -> None:
    clock = HandClock()
    before = tally(clock)
    after = Tally.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.counter() == before.counter() == "exploration 2/8"
    assert after.best == (3.5, 0.2) and after.scale == before.scale
    assert after.rows["worker 0"].number == 2
    assert after.rows["worker 0"].phase == ("fine-tune", 0.5, 2.0, "loss 0.1")
    assert after.elapsed() == pytest.approx(before.elapsed(), abs=5)
    assert after.eta() == pytest.approx(before.eta(), abs=5)
    assert before.eta() == pytest.approx(10 * (6 + 3))


def test_the_best_after_each_trial_begins_with_the_first_within_delta() -> None:
    clock = HandClock()
    found = Tally(clock)
    found.stage("exploration", 8, 0, 0.5, "macs", None, 3.0, Scale())
    for drop, ratio in ((0.9, 9.0), (0.2, 2.0), (0.7, 8.0), (0.3, 4.0)):
        found.trial_finished(0, drop, ratio, drop <= 0.5)
    assert found.history == [2.0, 2.0, 4.0]


def test_facts_leave_out_what_is_told_already() -> None:
    facts = Facts(0.5, {"params": 2.0, "macs": 3.0}, 61.0, "1 layer: 1 svd")
    words = facts.words(Scale("mIoU", "", True), "params")
    assert words == ["MACs 3.00x", "0.5", "1m01s", "1 layer: 1 svd"]
