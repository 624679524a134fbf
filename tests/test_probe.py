"""The probe: what it chooses from its runs, and that a study makes it once."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, count_reads, tiny_config, watch_fits
from torch import nn

from autocompress import latency, longtrial, objective, probe, selection
from autocompress.conductor import run_study
from autocompress.database import open_storage
from autocompress.errors import ConfigError, TrainingDiverged
from autocompress.evaluation import evaluate, metric_drop
from autocompress.export import save_model
from autocompress.probe import Probe, ProbeRun, _best_rate, _gains
from autocompress.progress import NullDisplay
from autocompress.store import load_study
from autocompress.task import Task


class Says(NullDisplay):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' network is trained in a few steps, and handed out as weights and plan only."""
    monkeypatch.setattr(probe, "FIRST_STEPS", 4)
    monkeypatch.setattr(selection, "save_model", partial(save_model, formats=()))
    monkeypatch.setattr(selection, "TIMING_SECONDS", 0.02)
    monkeypatch.setattr(latency, "REFERENCE_SECONDS", 0.02)


def ladder(*ends: tuple[float, float]) -> list[ProbeRun]:
    """Runs at doubling lengths that end with these losses and drops."""
    return [ProbeRun(2.0**index, 0.01, loss, drop) for index, (loss, drop) in enumerate(ends)]


def search(task: Task, model: nn.Module | None = None, **settings: Any) -> Probe:
    """A probe of a network that knows nothing yet."""
    if model is None:
        torch.manual_seed(1)
        model = TinyNet()
    known: dict[str, Any] = {"distillation": 0.5, "delta": 1.0, "seed": 0, **settings}
    return probe.probe(model, task, teacher=task.model, **known)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.03, [0.03, 0.09]),
        (0.27, [0.03, 0.09, 0.27, 0.81]),
        (0.01, [0.03, 0.01 / 3]),
        (0.01 / 9, [0.03, 0.01 / 3, 0.01 / 9, 0.01 / 27]),
        (1e-9, [0.03, *(0.01 / 3**power for power in range(1, 7))]),
    ],
)
def test_the_search_for_the_rate_goes_up_or_else_down(best: float, tried: list[float]) -> None:
    asked: list[float] = []

    def run(rate: float) -> ProbeRun:
        asked.append(rate)
        return ProbeRun(1.0, rate, abs(math.log(rate / best)), 0.0)

    found = _best_rate(run(0.01), run)
    assert asked[1:] == pytest.approx(tried)
    assert found.loss == min(abs(math.log(rate / best)) for rate in asked)


def test_a_gain_is_told_by_the_loss_in_points() -> None:
    # 20 points for a unit of loss; the gain in loss halves with every doubling.
    before = ProbeRun(0.0, 0.0, 1.0, 20.0)
    found = _gains(before, ladder((0.5, 10.0), (0.4, 8.0), (0.35, 7.0)))
    assert found == pytest.approx((1.0, 0.5))
    # One doubling tells nothing about the next but that it gives no more.
    assert _gains(before, ladder((0.5, 10.0), (0.4, 8.0))) == pytest.approx((2.0, 2.0))
    # Gains that grow are not trusted to go on so.
    found = _gains(before, ladder((0.5, 10.0), (0.4, 8.0), (0.2, 4.0)))
    assert found == pytest.approx((4.0, 4.0))
    # A few images' accuracy that stands still doesn't hide what the loss tells.
    assert _gains(before, ladder((0.5, 10.0), (0.4, 10.0)))[0] > 1


@pytest.mark.parametrize(
    "ends",
    [
        [(1.0, 20.0), (0.5, 10.0), (0.5, 9.0)],
        [(0.1, 20.0), (0.5, 10.0), (0.4, 9.0)],
        [(1.0, 20.0), (0.5, 10.0), (0.6, 12.0)],
        [(1.0, 20.0), (0.5, 10.0), (math.inf, 100.0)],
        [(math.inf, 20.0), (0.5, 10.0), (0.4, 9.0)],
        [(0.5, 0.0), (0.5, 0.0), (0.5, 0.0)],
    ],
)
def test_no_gain_ends_the_search_for_the_length(ends: list[tuple[float, float]]) -> None:
    before, *runs = ladder(*ends)
    assert max(_gains(before, runs)) <= 0


def test_the_best_rate_and_the_shortest_length_that_is_worth_it_are_chosen(task: Task) -> None:
    found = search(task)
    first = [run for run in found.runs if run.epochs == 4 / len(task.train)]
    assert len(first) >= 3
    assert found.learning_rate == min(first, key=lambda run: run.loss).learning_rate
    rungs = [run for run in found.runs if run.learning_rate == found.learning_rate]
    assert [run.epochs for run in rungs] == [rungs[0].epochs * 2**n for n in range(len(rungs))]
    assert 2 <= len(rungs) <= 4 and found.seconds > 0
    chosen = [run.epochs for run in rungs].index(found.epochs)
    gains = [_gains(found.runs[0], rungs[:count])[0] for count in range(2, len(rungs) + 1)]
    assert min(gains[:chosen], default=1.0) > 0.25 >= max(gains[chosen:], default=0.0)


def test_only_copies_are_trained_and_only_validation_images_judge(task: Task) -> None:
    task.test, reads = count_reads(task.test)
    model = deepcopy(task.model)
    before = deepcopy(model.state_dict())
    search(task, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not reads


def test_a_tolerance_that_nothing_exceeds_makes_trials_short(task: Task) -> None:
    found = search(task, delta=1000.0)
    assert found.epochs == 4 / len(task.train) and len({run.epochs for run in found.runs}) == 3
    assert search(task, delta=0.0).epochs > found.epochs


def test_what_is_given_is_not_sought(task: Task) -> None:
    found = search(task, epochs=4.0)
    assert found.epochs == 4.0 and len(found.runs) >= 3
    assert {run.epochs for run in found.runs[1:]} == {4 / len(task.train)}
    assert {run.epochs for run in search(task, epochs=0.125).runs[1:]} == {0.125}
    # The winner needs a learning rate, even if trials are not fine-tuned.
    assert {run.epochs for run in search(task, epochs=0.0).runs[1:]} == {4 / len(task.train)}
    found = search(task, learning_rate=0.02)
    assert {run.learning_rate for run in found.runs[1:]} == {0.02}


def test_rates_that_diverge_are_avoided(task: Task) -> None:
    rates = [0.0]
    make = task.optimizer

    def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        rates.append(rate)
        return make(model, rate)

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        fast = rates[-1] > 0.002
        return nn.functional.cross_entropy(output, batch[1]) * (float("inf") if fast else 1.0)

    task.optimizer, task.loss = optimizer, loss
    found = search(task)
    # Nothing is sought above a rate that was too high, and not the first finite loss is taken.
    assert [run.diverged for run in found.runs[1:5]] == [True, True, False, False]
    assert found.learning_rate < 0.002
    assert [run["loss"] for run in found.to_json()["runs"][1:3]] == [None, None]


def test_a_network_that_diverges_at_every_rate_is_an_error_with_a_cure(task: Task) -> None:
    task.loss = lambda output, batch: output.sum() * float("inf")
    with pytest.raises(TrainingDiverged, match="set finetune.learning_rate"):
        search(task)


def test_a_loss_for_training_only_is_an_error_with_a_cure(task: Task) -> None:
    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise KeyError("boxes")
        return nn.functional.cross_entropy(output, batch[1])

    task.loss = loss
    with pytest.raises(ConfigError, match="KeyError: 'boxes'. Give finetune.epochs"):
        search(task)


def test_a_probe_says_what_it_measured(task: Task) -> None:
    found = search(task, epochs=0.5)
    assert str(found).count(" at ") == len(found.runs) - 1 and " before, " in str(found)
    assert f"learning rate {found.learning_rate:g} and 0.5 epochs" in str(found)


def test_a_study_probes_once_and_follows_it(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = watch_fits(monkeypatch, probe)
    trials = watch_fits(monkeypatch, objective)
    final = watch_fits(monkeypatch, longtrial)
    display = Says()

    def run(trials: int) -> Any:
        settings = {
            "finetune.epochs": "auto",
            "finetune.learning_rate": "auto",
            "finetune.final_epochs": "auto",
        }
        return run_study(
            tiny_config(tmp_path, trials=trials, annealing_trials=0, delta=50.0, **settings),
            task,
            display,
        )

    outcome = run(1)
    count = len(probed)
    assert count >= 3
    run(2)
    assert len(probed) == count
    study = load_study(open_storage(f"sqlite:///{tmp_path}/tiny/study.db"), "tiny", "exploration")
    assert study is not None
    found = study.user_attrs[probe.PROBE]
    assert len(found["runs"]) == count + 1
    assert len([line for line in display.lines if line.startswith("Probe: ")]) == 1
    assert [fit["epochs"] for fit in trials] == [found["epochs"]] * 2
    assert [fit["learning_rate"] for fit in trials] == [found["learning_rate"]] * 2
    assert final[0]["epochs"] == outcome.summary["final_epochs"] == 10 * found["epochs"]
    assert final[0]["learning_rate"] == 2 * found["learning_rate"]


def test_the_candidate_has_lost_about_eight_times_delta(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    drops: list[float] = []

    def look(model: nn.Module, task: Task, *, teacher: nn.Module, **_: Any) -> Probe:
        before, after = (evaluate(one, task, task.val) for one in (teacher, model))
        drops.append(metric_drop(before, after))
        raise Seen

    monkeypatch.setattr(probe, "probe", look)
    for delta in (0.5, 5.0):
        open_ = {"finetune.epochs": None, "confidence": 0.5}
        config = tiny_config(tmp_path / str(delta), delta=delta, **open_)
        with pytest.raises(Seen):
            run_study(config, task, NullDisplay())
    # This small network has few plans, so none need be nearer to 4 and 40 points.
    assert drops[0] < 12 < 20 < drops[1] < 60
