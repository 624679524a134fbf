"""One trial: what it records, and how each way to end is told."""

from __future__ import annotations

import errno
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
import torch
from conftest import tiny_config
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import nn

from autocompress import objective
from autocompress.artifacts import FolderStore, fetch_file
from autocompress.baseline import Baseline
from autocompress.database import open_storage
from autocompress.errors import AutocompressError, DamagedArtifact
from autocompress.evaluation import evaluate
from autocompress.latency import Deployment, LatencyMeter
from autocompress.layers import inspect_layers
from autocompress.longfits import LongFit
from autocompress.objective import (
    LATENCY,
    Bench,
    announce,
    best_so_far,
    find_trial,
    load_trial_model,
    pace,
    run_trial,
    see_through,
)
from autocompress.observation import observe_layers
from autocompress.plan import Plan
from autocompress.profiler import Latency, profile_model
from autocompress.progress import NullDisplay
from autocompress.samplers import KnobSampler
from autocompress.sensitivity import build_table
from autocompress.slots import RETRY, cut_off, running, take, top_up
from autocompress.space import SearchSpace
from autocompress.store import open_study, trials_spent
from autocompress.surgery import apply_plan
from autocompress.task import Task, cross_entropy
from autocompress.training import Recipe
from autocompress.trials import CHECKPOINT, INTERRUPTED, PARENT, TRACEBACK
from autocompress.watch import Watch
from autocompress.weights import save_weights


class Ends(NullDisplay):
    """Keeps how the trials ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[Any, ...]] = []

    def trial_finished(self, *how: Any) -> None:
        self.ends.append(how)


@pytest.fixture
def bench(task: Task, tmp_path: Path) -> Bench:
    return make_bench(task, tmp_path)


def make_bench(task: Task, tmp_path: Path, **settings: Any) -> Bench:
    config = tiny_config(tmp_path, **settings)
    example = task.example()
    baseline = Baseline(
        task.model,
        evaluate(task.model, task, task.val),
        profile_model(task.model, example, latency=False),
        "digest",
    )
    layers, _ = inspect_layers(task.model, example)
    seen = observe_layers(task.model, task, layers, images=64, patches=128)
    cache = seen.factor_cache(task.model)
    table = build_table(task.model, layers, cache, seen, ("svd", "tucker2"))
    space = SearchSpace.from_table(table, "params", baseline.profile.cost)
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    study = open_study(storage, "tiny", "exploration", bound={}, cost_name="parameters")
    study.sampler = KnobSampler(space, 0)
    return Bench(
        task=task,
        baseline=baseline,
        example=example,
        cache=cache,
        observations=seen,
        finetune=Recipe.from_config(config.finetune),
        delta=config.delta,
        confidence=0.5,
        objective="params",
        seed=0,
        store=FolderStore(tmp_path / "artifacts"),
        identity="tiny",
        display=Ends(),
        studies={"exploration": study},
    )


def space_of(bench: Bench) -> SearchSpace:
    sampler = bench.studies["exploration"].sampler
    assert isinstance(sampler, KnobSampler)
    return sampler._space


def run(bench: Bench) -> FrozenTrial:
    """One trial of the exploration."""
    trial = bench.studies["exploration"].ask()
    found = run_trial(bench, "exploration", space_of(bench), trial)
    assert found is not None
    announce(bench, found)
    return found


def test_the_network_of_a_trial_can_be_had_again(bench: Bench) -> None:
    """Its weights, put into the plan's network, score what the trial said."""
    frozen = run(bench)
    model, plan = load_trial_model(bench, "exploration/0")
    found = evaluate(model, bench.task, bench.task.val)
    assert found.score == pytest.approx(frozen.user_attrs["metrics"]["score"], abs=1e-6)
    assert plan.digest == frozen.user_attrs["plan_digest"]
    drop = bench.baseline.val.score - found.score
    assert frozen.values == [pytest.approx(drop), sum(p.numel() for p in model.parameters())]


def test_children_begin_with_their_parents_long_fine_tuning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(bench).values[0]
    model, plan = load_trial_model(bench, "exploration/0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    annealing = optuna.create_study(directions=["minimize", "minimize"])
    bench.studies["annealing"] = annealing
    kept = save_weights(model, annealing, bench.store)
    began: list[nn.Module] = []
    better = LongFit("exploration/0", 0, 8.0, 0.1, before, before - 2, before - 2, kept, 1.0)
    worse = replace(better, after=before - 1, weights="none")
    for fits in (
        [better, worse],
        [replace(better, after=before + 1)],
        [replace(better, trial="other/1")],
    ):
        monkeypatch.setattr(Bench, "long_fits", fits)
        trial = annealing.ask()
        trial.set_user_attr(PARENT, "exploration/0")
        began.append(objective._build(bench, plan, trial))
    first, *others = [next(one.parameters()) for one in began]
    assert torch.allclose(first, next(model.parameters()))
    assert all(torch.allclose(2.0 * other, first) for other in others)


def test_the_same_seed_gives_the_same_trial(task: Task, tmp_path: Path) -> None:
    ends = []
    for place in ("a", "b"):
        # The tiny data shuffles by a generator of its own, and the layer table is made of it, too.
        task.train.generator.manual_seed(0)  # type: ignore[attr-defined]
        bench = make_bench(task, tmp_path / place)
        task.train.generator.manual_seed(0)  # type: ignore[attr-defined]
        ends.append(run(bench))
    assert ends[0].values == ends[1].values
    assert ends[0].params == ends[1].params


def test_a_trial_stopped_at_the_gate_is_pruned_with_its_constraint(
    task: Task, tmp_path: Path
) -> None:
    bench = make_bench(task, tmp_path, delta=0.0, **{"finetune.gate": 0.0})
    task.metric = lambda output, batch: torch.zeros(len(output))  # after the baseline's score
    frozen = run(bench)
    assert frozen.state == TrialState.PRUNED
    drop = bench.baseline.val.score
    assert list(frozen.constraints.values()) == [pytest.approx(drop - bench.delta)]
    assert "lost before fine-tuning > gate 0" in frozen.user_attrs["reason"]
    assert frozen.user_attrs["metrics"]["drop"] == pytest.approx(drop)
    assert "finetune" not in frozen.user_attrs["seconds"]


def test_for_some_samplers_it_is_complete(task: Task, tmp_path: Path) -> None:
    bench = make_bench(task, tmp_path, delta=0.0, **{"finetune.gate": 0.0})
    bench.rejected_as_complete = True
    task.metric = lambda output, batch: torch.zeros(len(output))
    frozen = run(bench)
    assert frozen.state == TrialState.COMPLETE
    assert next(iter(frozen.constraints.values())) > 0
    assert "weights" not in frozen.user_attrs
    # The annealing has a sampler of its own.
    trial = bench.studies["exploration"].ask()
    child = see_through(bench, trial, "annealing", lambda: ((9.0, 1.0), "9 lost"))
    assert child is not None and child.state == TrialState.PRUNED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("odd labels"), "ValueError: odd labels"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (KeyError("label"), "KeyError: 'label'"),
    ],
)
def test_a_trial_that_fails_says_why(bench: Bench, error: Exception, reason: str) -> None:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        raise error

    bench.task.loss = loss
    frozen = run(bench)
    assert frozen.state == TrialState.FAIL
    assert frozen.user_attrs["reason"] == reason
    assert "in loss" in frozen.system_attrs[TRACEBACK]
    assert bench.display.ends[0][-3:-1] == ("FAIL", reason)  # type: ignore[attr-defined]
    bench.task.loss = cross_entropy
    assert run(bench).state == TrialState.COMPLETE


def test_a_loss_that_is_no_number_is_a_failure(bench: Bench) -> None:
    bench.task.loss = lambda output, batch: output.sum() * float("nan")
    frozen = run(bench)
    assert frozen.state == TrialState.FAIL and frozen.values is None
    assert frozen.user_attrs["reason"].startswith("TrainingDiverged: The loss became nan")


def test_a_metric_that_is_no_number_is_a_failure(bench: Bench) -> None:
    bench.task.metric = lambda output, batch: torch.full((len(output),), float("nan"))
    frozen = run(bench)
    assert frozen.state == TrialState.FAIL
    assert "got nan for sample 0" in frozen.user_attrs["reason"]


def test_an_interruption_is_recorded_and_goes_on(bench: Bench) -> None:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    bench.task.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run(bench)
    (trial,) = bench.studies["exploration"].trials
    assert trial.state == TrialState.FAIL and trial.user_attrs[INTERRUPTED]


def test_an_interruption_that_the_database_does_not_take_goes_on_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    def locked(*_: Any) -> None:
        raise StorageInternalError("database is locked")

    bench.task.loss = loss
    monkeypatch.setattr("autocompress.objective.cut_off", locked)
    with pytest.raises(KeyboardInterrupt):
        run(bench)
    # The next start ends it.
    study = bench.studies["exploration"]
    (trial,) = running(study)
    assert cut_off(study, trial)


def test_a_trial_that_runs_out_of_memory_is_a_failure_and_the_next_one_runs(bench: Bench) -> None:
    loss = bench.task.loss

    def full(output: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench.task.loss = full
    frozen = run(bench)
    assert frozen.state == TrialState.FAIL
    assert frozen.user_attrs["reason"] == "OutOfMemoryError: CUDA out of memory"
    bench.task.loss = loss
    assert run(bench).state == TrialState.COMPLETE


def test_a_full_disk_is_no_fault_of_the_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(objective, "save_weights", full)
        with pytest.raises(AutocompressError, match="no room left on the disk .* the same command"):
            run(bench)
    study = bench.studies["exploration"]
    assert study.trials[0].user_attrs[INTERRUPTED] and not trials_spent(study)
    # It comes again with its plan.
    assert top_up(study, 1) == 1
    trial = take(study)
    assert trial is not None
    again = run_trial(bench, "exploration", space_of(bench), trial)
    assert again is not None and again.state == TrialState.COMPLETE
    assert again.params == study.trials[0].params and again.user_attrs[RETRY]["of"] == 0


def test_a_bucket_that_is_away_for_a_while_costs_no_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "UPLOAD_PAUSES", (0.01, 0.01))
    real, calls = objective.save_weights, iter(range(10))

    def away(*arguments: Any) -> str:
        if next(calls) < 2:
            raise OSError(errno.EIO, "Could not connect to the endpoint URL")
        return real(*arguments)

    monkeypatch.setattr(objective, "save_weights", away)
    assert run(bench).state == TrialState.COMPLETE and next(calls) == 3


def test_a_trial_goes_on_from_its_checkpoint_with_another_worker(bench: Bench) -> None:
    """It ends as it would have, rungs and all."""
    bench.finetune = replace(bench.finetune, epochs=3.0)
    calls: list[int] = []

    class Ordered(Watch):
        def step(self) -> None:
            calls.append(1)
            if len(calls) == 4:
                self.orders.ask_to_stop()
            super().step()

    study = bench.studies["exploration"]
    top_up(study, 1)
    bench.watch = Ordered()
    first = take(study)
    assert first is not None
    with pytest.raises(KeyboardInterrupt):
        run_trial(bench, "exploration", space_of(bench), first)
    assert CHECKPOINT in study.trials[0].user_attrs
    bench.watch = Watch()
    top_up(study, 1)
    second = take(study)
    assert second is not None
    steps: list[float] = []

    def step(phase: str, done: float, *_: Any) -> None:
        steps.extend([done] if phase == "fine-tune" else [])

    bench.display.step = step  # type: ignore[method-assign]
    ended = run_trial(bench, "exploration", space_of(bench), second)
    assert ended is not None and ended.state == TrialState.COMPLETE
    assert min(steps) > 0.5, "it didn't begin anew"
    assert len(ended.user_attrs["early_drops"]) == 3
    # The file is of no use any more.
    with pytest.raises(DamagedArtifact):
        fetch_file(ended.user_attrs[CHECKPOINT], Path("unused"), bench.store)


def test_a_trial_that_others_have_ended_is_dropped(bench: Bench) -> None:
    study = bench.studies["exploration"]

    class Taken(Watch):
        def step(self) -> None:
            (trial,) = running(study)
            cut_off(study, trial, "it gave no sign of life")
            self._taken = lambda: True
            self._began = 0.0
            super().step()

    top_up(study, 1)
    trial = take(study)
    assert trial is not None
    bench.watch = Taken()
    assert run_trial(bench, "exploration", space_of(bench), trial) is None
    assert study.trials[0].state == TrialState.FAIL and study.trials[0].values is None


def test_a_child_of_damaged_weights_is_built_from_the_baseline(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = run(bench)
    study = bench.studies["exploration"]
    plan = Plan.from_json(frozen.user_attrs["plan"])
    bench.store.write(frozen.user_attrs["weights"], io.BytesIO(b"cut"))
    child = study.ask()
    child.set_user_attr(PARENT, "exploration/0")
    model = objective._build(bench, plan, child)
    expected = apply_plan(bench.baseline.model, plan, bench.cache)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )
    assert child.user_attrs[PARENT] is None and "can't be a parent" in caplog.text


def test_a_trial_has_the_seconds_of_its_phases(bench: Bench) -> None:
    frozen = run(bench)
    seconds = frozen.user_attrs["seconds"]
    assert frozen.duration is not None
    assert sum(seconds.values()) == pytest.approx(frozen.duration.total_seconds(), abs=0.5)


def test_the_pace_of_a_study(bench: Bench) -> None:
    assert pace(bench.studies) == {"overhead": None, "images_per_second": None}
    work = {"recalibrate": 1.0, "gate": 1.0, "finetune": 7.0, "evaluate": 1.0}
    other = {"suggest": 0.5, "build": 0.5, "profile": 0.5, "store": 0.5}
    study = bench.studies["exploration"]
    for speed, seconds in ((100.0, work), (300.0, work), (200.0, work | other)):
        attrs = {"weights": "w", "images_per_second": speed, "seconds": seconds}
        study.add_trial(create_trial(values=[0.0, 1.0], user_attrs=attrs))
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"seconds": other}))
    assert pace(bench.studies) == {"overhead": 0.0625, "images_per_second": 200.0}


class Meter:
    """Gives 2.5 ms and keeps how it was asked, or fails."""

    deployment = Deployment()

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.asked: list[tuple[float, int]] = []

    def measure(self, model: nn.Module, seconds: float, min_runs: int) -> Latency:
        if self.error:
            raise RuntimeError(self.error)
        self.asked.append((seconds, min_runs))
        return Latency(2.5, 0.1, 1, 20, "cpu", 1)


def test_latency_is_measured_with_care_where_it_is_the_objective(bench: Bench) -> None:
    meter = Meter()
    bench.meter = cast(LatencyMeter, meter)
    for name in ("latency", "params"):
        bench.objective = name
        trial = run(bench)
        assert trial.user_attrs["metrics"]["latency_ms"] == 2.5
        assert trial.user_attrs[LATENCY]["iqr_ms"] == 0.1
        assert (trial.values[1] == 2.5) == (name == "latency")
        assert "latency" in trial.user_attrs["seconds"]
    careful, glance = meter.asked
    assert careful[0] > glance[0] and careful[1] > glance[1]


def test_a_network_that_the_runtime_refuses_fails_where_latency_is_the_objective(
    bench: Bench,
) -> None:
    bench.meter = cast(LatencyMeter, Meter("no such kernel"))
    trial = run(bench)
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs["metrics"]["latency_ms"] is None and LATENCY not in trial.user_attrs
    bench.objective = "latency"
    trial = run(bench)
    assert trial.state == TrialState.FAIL
    assert (
        "latency.runtime = 'onnxruntime' can't run it: RuntimeError: no such kernel"
        in (trial.user_attrs["reason"])
    )


def test_the_best_so_far_is_the_cheapest_within_delta(bench: Bench) -> None:
    assert best_so_far(bench) is None
    bench.delta = 100.0
    ends = [run(bench) for _ in range(3)]
    cheapest = min(ends, key=lambda trial: trial.values[1])
    ratio = bench.baseline.profile.params / cheapest.values[1]
    assert best_so_far(bench) == (ratio, cheapest.values[0])


def test_a_trial_is_found_by_its_label(bench: Bench) -> None:
    run(bench)
    assert find_trial(bench.studies, "exploration/0").number == 0
    with pytest.raises(IndexError):
        find_trial(bench.studies, "exploration/1")
