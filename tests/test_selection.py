"""Which network is handed out: sure enough within delta, with one seed and another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import tiny_config
from torch import nn

from autocompress import selection
from autocompress.evaluation import Evaluation
from autocompress.objective import Bench
from autocompress.plan import Plan
from autocompress.progress import NullDisplay
from autocompress.selection import Finalist
from autocompress.store import StudyFolder


@pytest.mark.parametrize(
    ("before", "tuned", "handed_out"),
    [
        (6.0, [4.0, 3.0], 3.0),  # the better of two seeds
        (2.0, [4.0, 3.0], 2.0),  # or the trial's own weights, where they are better
        (6.0, [4.0, 5.1], None),  # one seed's luck is no winner
        (4.5, [4.0, 5.1], 4.5),  # then the trial's own weights, if these are within delta
        (6.0, [None], None),  # the fine-tuning diverged
        (5.0, [5.1], 5.0),  # a bound of exactly delta is within it
    ],
)
def test_a_finalist_is_within_delta_with_two_seeds(
    before: float,
    tuned: list[float | None],
    handed_out: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    answers = iter(tuned)

    def final_fit(
        config: Any, bench: Any, folder: Any, first: Finalist, epochs: float, seed: int, *_: Any
    ) -> Finalist | None:
        seeds.append(seed)
        bound = next(answers)
        return None if bound is None else replace(first, bound=bound, epochs=epochs)

    scores = Evaluation(torch.ones(8))
    monkeypatch.setattr(selection, "_final_fit", final_fit)
    monkeypatch.setattr(selection, "_bound", lambda bench, val: before)
    monkeypatch.setattr(selection, "evaluate", lambda *_: scores)
    monkeypatch.setattr(selection, "load_trial_model", lambda *_: (nn.Identity(), Plan({})))
    bench = cast(Bench, SimpleNamespace(task=SimpleNamespace(val=None)))
    config = tiny_config(tmp_path, delta=5.0)
    found = selection._finalist(
        config, bench, StudyFolder(tmp_path), "annealing/1", 2.0, NullDisplay()
    )
    assert seeds == [config.seed, config.seed + 1][: len(tuned)]
    assert (None if found is None else found.bound) == handed_out
    if handed_out == 3.0:
        assert found is not None and found.epochs == 2.0
        assert found.seeds == {config.seed: 4.0, config.seed + 1: 3.0}


def test_without_final_epochs_the_trials_own_weights_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "evaluate", lambda *_: Evaluation(torch.ones(8)))
    monkeypatch.setattr(selection, "load_trial_model", lambda *_: (nn.Identity(), Plan({})))
    bench = cast(Bench, SimpleNamespace(task=SimpleNamespace(val=None)))
    for bound, within in ((5.0, True), (5.1, False)):
        monkeypatch.setattr(selection, "_bound", lambda *_, bound=bound: bound)
        found = selection._finalist(
            tiny_config(tmp_path), bench, StudyFolder(tmp_path), "exploration/0", 0.0, NullDisplay()
        )
        assert (found is not None) == within
