"""The whole study on the tiny network: what is written, how it goes on, and what stops it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnxruntime
import optuna
import pytest
import torch
from conftest import EXPORTED, TinyNet, count_reads, make_loader, tiny_config, tiny_task, watch_fits
from optuna.trial import TrialState

import autocompress
from autocompress import conductor, formats, latency, longtrial, objective, preparation, runner
from autocompress.annealing import AnnealingSampler
from autocompress.conductor import Outcome, check_places, run_study
from autocompress.database import open_storage, sole
from autocompress.errors import (
    AutocompressError,
    ConfigError,
    StudyMismatch,
    TrainingDiverged,
)
from autocompress.objective import Bench
from autocompress.plan import Plan
from autocompress.progress import NullDisplay
from autocompress.runner import Runner
from autocompress.samplers import KNOBS
from autocompress.scale import ACCURACY
from autocompress.sensitivity import LayerTable
from autocompress.situation import read_situation
from autocompress.space import SearchSpace
from autocompress.stages import Stage
from autocompress.store import StudyFolder, load_study, trials_spent
from autocompress.surgery import build_plan
from autocompress.task import Task, correct, cross_entropy
from autocompress.trials import CHECKPOINT, EXTRA, INTERRUPTED, PARENT


class Recorder(NullDisplay):
    """Keeps what the study says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def studies_of(folder: Path) -> dict[str, Any]:
    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    found = {s: load_study(storage, "tiny", s) for s in ("exploration", "annealing")}
    return {stage: study for stage, study in found.items() if study is not None}


def ended(folder: Path) -> dict[str, int]:
    return {stage: len(trials_spent(study)) for stage, study in studies_of(folder).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, trained_state: dict[str, Any]) -> Outcome:
    """A whole study that was run once and is only looked at."""
    out = tmp_path_factory.mktemp("out")
    return run_study(
        tiny_config(out, **EXPORTED), tiny_task(trained_state), NullDisplay(), "the command"
    )


def test_a_study_writes_what_it_promises(finished: Outcome) -> None:
    folder = finished.folder
    for name in ("best", "second"):
        found = {path.name for path in (folder / name).iterdir()}
        wanted = {"model.safetensors", "plan.json", "model.onnx", "model.pt2", "profile.json"}
        assert wanted <= found
    assert (folder / "report.html").stat().st_size > 10_000

    summary = json.loads((folder / "result.json").read_text())
    best, before = summary["best"], summary["baseline"]
    assert summary["trials"] == {"exploration": 6, "annealing": 3} == ended(folder)
    assert best["val_drop"] <= summary["delta"]
    assert best["profile"]["params"] < before["profile"]["params"]
    low, high = best["test_drop_interval"]
    assert low <= best["test_drop"] <= high
    assert best["test_drop"] == pytest.approx(before["test_score"] - best["test_score"])
    assert summary["command"] == "the command" and summary["test_reads"] == 1
    for profile in (before["profile"], best["profile"]):
        latency = profile["latency"]
        assert latency["runtime"].startswith("ONNX Runtime ") and latency["median_ms"] > 0
        assert latency["batch_size"] == 1
        assert latency["threads"] == before["profile"]["latency"]["threads"] >= 1


def test_a_baseline_that_the_runtime_refuses_costs_no_result(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bytes:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(latency, "quick_onnx", refuse)
    display = Recorder()
    outcome = run_study(tiny_config(tmp_path, trials=2, annealing_trials=0), task, display)
    assert outcome.met and outcome.summary["best"]["profile"]["latency"] is None
    assert any("No latency is measured. The network can't" in line for line in display.lines)
    assert "no such kernel" in "".join(display.lines)
    with pytest.raises(ConfigError, match="Name another runtime"):
        run_study(tiny_config(tmp_path, name="other", objective="latency"), task, NullDisplay())


def test_a_study_stays_with_its_artifacts(task: Task, tmp_path: Path) -> None:
    def go(**changes: Any) -> Outcome:
        config = tiny_config(tmp_path, trials=1, annealing_trials=0, **changes)
        return run_study(config, task, NullDisplay())

    place = tmp_path / "place"
    folder = go().folder
    with pytest.raises(StudyMismatch, match="keeps its artifacts in .*/tiny/artifacts, not in"):
        go(**{"run.artifacts": str(place)})
    (folder / "artifacts").rename(place)
    assert go(**{"run.artifacts": str(place)}).met


def test_the_networks_handed_out_are_one(finished: Outcome, task: Task) -> None:
    """What `load` builds, what the Python API returns and the ONNX file give the same outputs."""
    best = finished.folder / "best"
    loaded = autocompress.load(best, model=TinyNet())
    (images,) = task.images(16)
    assert finished.model is not None
    with torch.inference_mode():
        expected = finished.model(images)
        torch.testing.assert_close(loaded(images), expected)
    session = onnxruntime.InferenceSession(str(best / "model.onnx"))
    (found,) = session.run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_every_trial_carries_its_whole_story(finished: Outcome) -> None:
    for stage, study in studies_of(finished.folder).items():
        for trial in study.trials:
            attrs = trial.user_attrs
            assert autocompress.Plan.from_json(attrs["plan"]).digest == attrs["plan_digest"]
            assert {"seed", "weights", "layer_errors", PARENT} <= set(attrs)
            assert {"build", "recalibrate", "gate", "finetune"} <= set(attrs["seconds"])
            drop, cost = trial.values
            metrics = attrs["metrics"]
            assert metrics["drop"] == drop and metrics["params"] == cost
            assert {"score", "macs", "size_bytes", "memory_bytes", "latency_ms"} < set(metrics)
            assert trial.system_attrs["constraints"] == [pytest.approx(metrics["drop_bound"] - 5)]
            assert metrics["drop_bound"] > drop
            kinds = {key.rpartition(".")[2] for key in trial.params}
            assert kinds == {"transform", "rank_fraction", "channels"}
            assert (attrs[PARENT] is None) == (stage == "exploration")


def test_a_study_that_removes_channels(
    tmp_path: Path, trained_state: dict[str, Any], task: Task
) -> None:
    """Its winner is loaded, exported and resumed like any other; trials name their channels."""
    config = tiny_config(tmp_path, **{"search.channels": True, "objective": "params+macs"})
    outcome = run_study(config, tiny_task(trained_state), NullDisplay())
    plans = [
        autocompress.Plan.from_json(trial.user_attrs["plan"])
        for study in studies_of(outcome.folder).values()
        for trial in study.trials
    ]
    assert sum(bool(plan.channels) for plan in plans) >= 3
    for study in studies_of(outcome.folder).values():
        for trial in study.trials:
            assert {"stem.channels", "conv.channels"} <= set(trial.params)
    assert outcome.model is not None and outcome.plan is not None
    (images,) = task.images(16)
    loaded = autocompress.load(outcome.folder / "best", model=TinyNet())
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), outcome.model(images))
    table = json.loads((outcome.folder / "table.json").read_text())["table"]
    assert set(json.loads(table)["ladders"]) == {"stem", "conv"}
    again = run_study(config, tiny_task(trained_state), NullDisplay())
    assert ended(outcome.folder) == {"exploration": 6, "annealing": 3}
    assert again.plan == outcome.plan
    other = tiny_config(tmp_path, **{"search.channels": False, "objective": "params+macs"})
    with pytest.raises(StudyMismatch, match="search.channels"):
        run_study(other, tiny_task(trained_state), NullDisplay())


def test_a_finished_study_does_nothing_more(task: Task, tmp_path: Path) -> None:
    first = run_study(tiny_config(tmp_path), task, NullDisplay())
    task.test, reads = count_reads(task.test)
    display = Recorder()
    again = run_study(tiny_config(tmp_path), task, display)
    assert reads == [] and any("Nothing to do" in line for line in display.lines)
    assert again.summary == first.summary
    assert not any("run.formats" in line for line in display.lines)
    run_study(tiny_config(tmp_path, **{"run.formats": ["onnx", "pt2"]}), task, display)
    [said] = [line for line in display.lines if line.startswith("run.formats has onnx, pt2 by now")]
    assert f"study export {tmp_path / 'tiny'} --format onnx,pt2" in said


def test_more_trials_are_added_to_the_old_ones(task: Task, tmp_path: Path) -> None:
    run_study(tiny_config(tmp_path, annealing_trials=0, trials=3), task, NullDisplay())
    assert ended(tmp_path / "tiny") == {"exploration": 3}
    more = run_study(tiny_config(tmp_path, annealing_trials=2, trials=5), task, NullDisplay())
    assert ended(tmp_path / "tiny") == {"exploration": 5, "annealing": 2}
    assert more.summary["test_reads"] == 2


@pytest.mark.parametrize(
    ("setting", "text"),
    [("delta", "delta: 5.0 -> 4.0"), ("search.transforms", "search.transforms")],
)
def test_other_settings_under_an_old_name_are_refused(
    task: Task, tmp_path: Path, setting: str, text: str
) -> None:
    config = tiny_config(tmp_path, trials=1, annealing_trials=0)
    run_study(config, task, NullDisplay())
    other = {"delta": 4.0, "search.transforms": ["svd"]}[setting]
    changed = tiny_config(tmp_path, trials=2, annealing_trials=0, **{setting: other})
    stored = (tmp_path / "tiny" / "study.json").read_text()
    with pytest.raises(StudyMismatch, match=text):
        run_study(changed, task, NullDisplay())
    assert (tmp_path / "tiny" / "study.json").read_text() == stored


def test_other_weights_under_an_old_name_are_refused(task: Task, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trials=1, annealing_trials=0)
    run_study(config, task, NullDisplay())
    with torch.no_grad():
        task.model.get_parameter("fc.bias").add_(1.0)
    with pytest.raises(StudyMismatch, match="weights fingerprint"):
        run_study(config, task, NullDisplay())


def test_nothing_within_delta_gives_the_nearest(task: Task, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, trials=3, annealing_trials=1, delta=0.0, confidence=0.5, **{"finetune.epochs": 0}
    )
    task.metric = lambda output, batch: _spoilt(task, output, batch)
    display = Recorder()
    outcome = run_study(config, task, display)
    assert outcome.model is None and not outcome.met
    nearest = outcome.summary["nearest"]
    assert nearest["val_drop"] > 0
    assert nearest["plan"]["layers"] or nearest["plan"]["channels"]
    assert "test_score" not in outcome.summary["baseline"]
    assert outcome.summary["test_reads"] == 0
    assert any("No trial kept the drop within 0.00 points" in line for line in display.lines)
    assert not (outcome.folder / "best").exists()


def _spoilt(task: Task, output: torch.Tensor, batch: Any) -> torch.Tensor:
    """The baseline scores 1 everywhere, any other network 0 on the first image."""
    with torch.inference_mode():
        same = torch.equal(task.model(batch[0]), output)
    scores = torch.ones(len(output))
    if not same:
        scores[0] = 0.0
    return scores


class Interruption:
    """A loss that is interrupted, as by Ctrl-C, at its n-th call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return cross_entropy(output, batch)


@pytest.mark.parametrize(
    "at",
    [12, pytest.param(45, marks=pytest.mark.slow), 100, pytest.param(130, marks=pytest.mark.slow)],
)
def test_an_interrupted_study_goes_on_to_the_same_total(
    task: Task, tmp_path: Path, at: int
) -> None:
    task.loss = Interruption(at)
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny_config(tmp_path), task, NullDisplay())
    kept = ended(tmp_path / "tiny")
    assert sum(kept.values()) < 9
    outcome = run_study(tiny_config(tmp_path), task, NullDisplay())
    assert ended(tmp_path / "tiny") == {"exploration": 6, "annealing": 3}
    assert outcome.met
    for study in studies_of(tmp_path / "tiny").values():
        lost = [t for t in study.trials if INTERRUPTED in t.user_attrs]
        assert all(t.state == TrialState.FAIL for t in lost) and len(lost) <= 1


@pytest.mark.parametrize(("trials", "early"), [(5, False), (7, True)])
def test_in_a_long_annealing_one_is_fine_tuned_at_length_early(
    trials: int, early: bool, task: Task, tmp_path: Path
) -> None:
    longer: dict[str, Any] = {"trials": 2, "finetune.final_epochs": 2.0}
    longer |= {"search.extra_trials": 0}
    display = Recorder()
    outcome = run_study(tiny_config(tmp_path, annealing_trials=trials, **longer), task, display)
    [found, *_] = outcome.summary["long_fits"]
    assert found["epochs"] == 2.0 and found["seed"] == 0 and found["seconds"] > 0
    assert outcome.summary["seconds"]["finals"] > 0
    assert any(f"Fine-tuned {found['trial']} for 2 epochs, seed 0" in s for s in display.lines)
    finals = load_study(open_storage(f"sqlite:///{outcome.folder / 'study.db'}"), "tiny", "finals")
    assert finals is not None
    annealing = studies_of(tmp_path / "tiny")["annealing"].trials
    first, last = finals.trials[0].datetime_complete, annealing[-1].datetime_start
    assert first is not None and last is not None and (first < last) == early


def test_a_shorter_final_fine_tuning_takes_the_place_of_one_that_waits(
    task: Task, tmp_path: Path
) -> None:
    display = Recorder()
    brief: dict[str, Any] = {"trials": 2, "annealing_trials": 2, "search.extra_trials": 0}

    class Stopping(Recorder):
        def step(self, phase: str, *args: Any, **more: Any) -> None:
            if "at length" in phase:
                raise KeyboardInterrupt
            super().step(phase, *args, **more)

    long = tiny_config(tmp_path, **brief, **{"finetune.final_epochs": 40.0})
    with pytest.raises(KeyboardInterrupt):
        run_study(long, task, Stopping())
    short = tiny_config(tmp_path, **brief, **{"finetune.final_epochs": 0.5})
    outcome = run_study(short, task, display)
    said = "1 long fine-tuning(s) of another length or learning rate are withdrawn."
    assert said in display.lines
    assert {fit["epochs"] for fit in outcome.summary["long_fits"]} == {0.5}
    assert outcome.met
    finals = load_study(open_storage(f"sqlite:///{outcome.folder / 'study.db'}"), "tiny", "finals")
    assert finals is not None
    [checkpoint] = {t.user_attrs[CHECKPOINT] for t in finals.trials if CHECKPOINT in t.user_attrs}
    assert not (outcome.folder / "artifacts" / checkpoint).exists()


@pytest.mark.parametrize("epochs", [0.0, 0.5, 3.0])
def test_what_long_fine_tunings_found_stays_where_their_length_is_changed(
    epochs: float, task: Task, tmp_path: Path
) -> None:
    brief: dict[str, Any] = {"trials": 3, "annealing_trials": 2, "delta": 20.0}
    found = []
    for length in (2.0, epochs):
        config = tiny_config(tmp_path, **brief, **{"finetune.final_epochs": length})
        found.append(run_study(config, task, NullDisplay()).summary)
    first, second = found
    fits = first["long_fits"]
    assert fits and [fit for fit in second["long_fits"] if fit["epochs"] == 2.0] == fits
    costs = [one["best"]["profile"]["params"] for one in found]
    assert costs[1] <= costs[0]
    if not epochs:  # nothing new was fine-tuned, and nothing is lost
        facts = ("trial", "final_epochs", "final_bounds", "val_score", "val_drop_bound")
        assert [second["best"][key] for key in facts] == [first["best"][key] for key in facts]


def test_a_long_annealing_goes_on_while_much_of_delta_is_left(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stand(bench: Bench) -> tuple[float, float]:
        asked.append(len(trials_spent(bench.studies["annealing"])))
        return 100.0, 0.3 * config.delta if asked[-1] < 9 else 0.05 * config.delta

    monkeypatch.setattr(conductor, "standing", stand)
    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    config = tiny_config(tmp_path, **plan, **{"search.extra_trials": 3})
    display = Recorder()
    first = run_study(config, task, display)
    # Two, then what remains of three; none where enough is spent.
    # After the last ones the second seed comes with the first.
    assert asked == [6, 8, 9]
    assert ended(tmp_path / "tiny") == {"exploration": 2, "annealing": 9}
    assert any("of the allowed drop would be left unused: 2 more" in line for line in display.lines)
    extra = studies_of(tmp_path / "tiny")["annealing"].trials[6:]
    assert len(extra) == 3
    assert {t.system_attrs[KNOBS]["kind"] for t in extra} <= {"greedy", "sample"}
    # Children were compared, as far as this small space has any that are new.
    children = studies_of(tmp_path / "tiny")["annealing"].trials
    assert any("audition" in t.user_attrs["seconds"] for t in children)
    studies = studies_of(tmp_path / "tiny")
    assert read_situation(config, studies, "tiny", True).stages[1].total == 9
    # A study that is finished stays as it is.
    again = run_study(config, task, display)
    assert display.lines.count("Nothing to do: the study is finished.") == 1
    assert again.summary["best"] == first.summary["best"] and len(asked) == 3
    # Unless more is allowed than before.
    run_study(tiny_config(tmp_path, **plan, **{"search.extra_trials": 4}), task, display)
    assert asked[:5] == [6, 8, 9, 9, 10] and ended(tmp_path / "tiny")["annealing"] == 10


def test_where_nothing_is_within_delta_the_annealing_goes_on(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "standing", lambda bench: None)
    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    display = Recorder()
    run_study(tiny_config(tmp_path, **plan, **{"search.extra_trials": 2}), task, display)
    assert ended(tmp_path / "tiny")["annealing"] == 8
    assert any("No network is within delta yet: 2 more" in line for line in display.lines)


def test_with_more_workers_more_trials_come_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "standing", lambda bench: None)
    study = optuna.create_study(directions=["minimize", "minimize"])
    bench = SimpleNamespace(display=NullDisplay(), task=SimpleNamespace(scale=ACCURACY))
    totals: list[int] = []
    asked: list[bool] = []

    def fit_long(again: bool = False) -> bool:
        asked.append(again)
        return False

    told = SimpleNamespace(
        bench=bench,
        crew=SimpleNamespace(alive=4),
        fit_long=fit_long,
        run=lambda stage: totals.append(stage.total),
    )
    config = tiny_config(tmp_path, **{"search.extra_trials": 10})
    stage = Stage("annealing", study, cast(SearchSpace, object()), 15)
    conductor._go_on(config, stage, cast(Runner, told), math.inf)
    assert totals == [19, 23, 25] and study.user_attrs[EXTRA] == 10
    assert asked == [False, False, False, True], "second seeds for the idle, after the last trials"


def test_enough_is_spent_only_if_the_second_seed_says_so_too(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stand(bench: Bench) -> tuple[float, float]:
        fits = bench.long_fits
        asked.append(len(fits))
        twice = len({fit.trial for fit in fits}) < len(fits)
        return 100.0, (0.3 if twice and len(asked) < 4 else 0.05) * bench.delta

    monkeypatch.setattr(conductor, "standing", stand)
    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    outcome = run_study(tiny_config(tmp_path, **plan), task, NullDisplay())
    tuned = [one["trial"] for one in outcome.summary["long_fits"]]
    assert len(tuned) > len(set(tuned)), "one was fine-tuned with both seeds"
    assert asked[2] == asked[1] + 1 and ended(tmp_path / "tiny")["annealing"] > 8


def test_the_annealing_goes_on_while_that_pays(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at least, and again after trials that made the winner cheaper."""
    costs = iter([100.0, 90.0, *[89.0] * 10])
    monkeypatch.setattr(conductor, "standing", lambda bench: (next(costs), 0.0))
    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    run_study(tiny_config(tmp_path, **plan), task, NullDisplay())
    assert ended(tmp_path / "tiny")["annealing"] == 10


def test_what_was_interrupted_after_its_search_gets_no_more_trials(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    monkeypatch.setattr(conductor, "standing", lambda bench: (100.0, 0.0))
    for _ in range(3):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(conductor, "conclude", interrupted)
            run_study(tiny_config(tmp_path, **plan), task, NullDisplay())
    run_study(tiny_config(tmp_path, **plan), task, NullDisplay())
    assert ended(tmp_path / "tiny")["annealing"] == 8


@pytest.mark.parametrize("at_the_end", [True, False])
def test_the_annealing_ends_where_the_search_space_ends(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_the_end: bool
) -> None:
    monkeypatch.setattr(conductor, "standing", lambda bench: (100.0, 0.5 * bench.delta))
    monkeypatch.setattr(AnnealingSampler, "_is_out_of_reach", lambda *_: at_the_end)
    plan: dict[str, Any] = {"trials": 2, "annealing_trials": 6, "finetune.final_epochs": 2.0}
    config, display = tiny_config(tmp_path, **plan, **{"search.extra_trials": 4}), Recorder()
    run_study(config, task, display)
    # Without more to find one round of two is enough.
    assert ended(tmp_path / "tiny")["annealing"] == (8 if at_the_end else 10)
    said = [line for line in display.lines if "search space holds nothing much cheaper" in line]
    assert len(said) == at_the_end


def test_a_finalist_of_damaged_weights_is_passed_over(task: Task, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trials": 4, "annealing_trials": 0, "search.stage": "exploration"}
    brief = {**settings, "finetune.final_epochs": 0.0}
    first = run_study(tiny_config(tmp_path, **brief), task, NullDisplay())
    assert first.met and not first.summary["long_fits"]
    best = first.summary["best"]["trial"]
    study = studies_of(tmp_path / "tiny")["exploration"]
    artifact = tmp_path / "tiny" / "artifacts" / study.trials[best].user_attrs["weights"]
    artifact.write_bytes(artifact.read_bytes()[:1000])
    second = run_study(tiny_config(tmp_path, **settings), task, NullDisplay())
    assert second.met and second.summary["best"]["trial"] != best
    log = (tmp_path / "tiny" / "study.log").read_text()
    assert f"The long fine-tuning of exploration/{best} failed: DamagedArtifact" in log
    assert f"exploration/{best} is passed over: The weights in artifact" in log


def test_a_second_conductor_is_refused(task: Task, tmp_path: Path) -> None:
    """In the same folder, and with another folder on the same database."""
    config = tiny_config(tmp_path, trials=1, annealing_trials=0)
    folder = StudyFolder(tmp_path / "tiny")
    folder.create()
    with folder.lock():
        with pytest.raises(ConfigError, match="is being run by another process"):
            run_study(config, task, NullDisplay())
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    storage = open_storage(url)
    with sole(storage, "tiny"), pytest.raises(ConfigError, match="--study tiny"):
        run_study(tiny_config(tmp_path, **{"run.storage": url}), task, NullDisplay())


def test_a_failing_trial_is_recorded_and_the_study_goes_on(task: Task, tmp_path: Path) -> None:
    calls: Iterator[int] = iter(range(10**6))

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        if next(calls) == 30:
            raise LookupError("a bad batch")
        return cross_entropy(output, batch)

    task.loss = loss
    run_study(tiny_config(tmp_path), task, NullDisplay())
    trials = studies_of(tmp_path / "tiny")["exploration"].trials
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert [t.user_attrs["reason"] for t in failed] == ["LookupError: a bad batch"]
    assert len(trials) == 6
    assert "a bad batch" in (tmp_path / "tiny" / "study.log").read_text()


def test_a_study_whose_trials_all_fail_stops_and_says_why(task: Task, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trials=9, **{"finetune.learning_rate": 1e30})
    with pytest.raises(AutocompressError, match="5 trials .* lower the learning rate"):
        run_study(config, task, NullDisplay())
    assert ended(tmp_path / "tiny") == {"exploration": 0}


def test_trials_that_failed_for_an_outer_fault_are_made_up_for(task: Task, tmp_path: Path) -> None:
    def broken(output: torch.Tensor, batch: Any) -> torch.Tensor:
        raise OSError("the disk is gone")

    config = tiny_config(tmp_path, trials=3, annealing_trials=1)
    good = task.metric
    calls: Iterator[int] = iter(range(10**6))
    # The first calls are those before the trials: they must work.
    task.metric = lambda output, batch: (
        good(output, batch) if next(calls) < 9 else broken(output, batch)
    )
    with pytest.raises(AutocompressError, match="3 trials .* the disk is gone"):
        run_study(config, task, NullDisplay())
    task.metric = good
    outcome = run_study(config, task, NullDisplay())
    assert outcome.met and ended(tmp_path / "tiny") == {"exploration": 3, "annealing": 1}


def test_training_that_can_not_begin_is_said_at_once(task: Task, tmp_path: Path) -> None:
    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        raise KeyError("label")

    task.loss = loss
    with pytest.raises(ConfigError, match="first training step failed with KeyError: 'label'"):
        run_study(tiny_config(tmp_path), task, NullDisplay())


def test_a_frozen_network_is_compressed_too(task: Task, tmp_path: Path) -> None:
    task.model.requires_grad_(False)
    display = Recorder()
    assert run_study(tiny_config(tmp_path, trials=2, annealing_trials=1), task, display).met
    assert any("frozen" in line for line in display.lines)


def test_a_folder_does_not_answer_for_another_study(task: Task, tmp_path: Path) -> None:
    """A new database in an old folder begins anew, though the trials have the same names."""
    config = tiny_config(tmp_path, trials=2, annealing_trials=0)
    run_study(config, task, NullDisplay())
    for path in (tmp_path / "tiny").glob("study.db*"):
        path.unlink()
    display = Recorder()
    again = run_study(tiny_config(tmp_path, trials=2, annealing_trials=0, delta=4.0), task, display)
    assert not any("Nothing to do" in line for line in display.lines)
    assert again.summary["delta"] == 4.0 and again.summary["test_reads"] == 1


def test_trials_that_are_added_in_vain_are_counted(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_study(tiny_config(tmp_path), task, NullDisplay())
    task.test, reads = count_reads(task.test)
    display = Recorder()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(objective, "recalibrate", fail)
    again = run_study(tiny_config(tmp_path, trials=8), task, display)
    assert ended(tmp_path / "tiny") == {"exploration": 8, "annealing": 3} == again.summary["trials"]
    assert json.loads((tmp_path / "tiny" / "result.json").read_text()) == again.summary
    assert again.summary["config"]["search"]["trials"] == 8
    assert again.summary["best"] == first.summary["best"] and reads == []
    assert again.summary["seconds"]["test"] == first.summary["seconds"]["test"]
    assert again.summary["finished"] >= first.summary["finished"]
    [said] = [line for line in display.lines if "the result stands" in line]
    assert said.startswith("2 more trials left no network") and "Nothing to do" not in str(
        display.lines
    )
    assert "no luck" in (tmp_path / "tiny" / "report.html").read_text()
    display = Recorder()
    run_study(tiny_config(tmp_path, trials=8), task, display)
    assert any("Nothing to do" in line for line in display.lines)


def test_the_baseline_of_a_study_is_kept_with_it(task: Task, tmp_path: Path) -> None:
    settings = {"trials": 1, "annealing_trials": 0, "baseline.epochs": 1.0}
    state = {key: value.clone() for key, value in task.model.state_dict().items()}
    first = run_study(tiny_config(tmp_path, **settings), task, NullDisplay())
    kept = first.summary["baseline"]["val_score"]
    task.model.load_state_dict(state)
    again = run_study(tiny_config(tmp_path, **{**settings, "trials": 2}), task, NullDisplay())
    assert again.summary["baseline"]["val_score"] == kept
    (tmp_path / "tiny" / "baseline.safetensors").unlink()
    task.model.load_state_dict(state)
    # The tiny loader's order goes on where it was, so training again gives other weights.
    with pytest.raises(StudyMismatch, match=r"Put .*baseline.safetensors back"):
        run_study(tiny_config(tmp_path, **{**settings, "trials": 3}), task, NullDisplay())


def test_hopeless_trials_stop_at_the_gate(task: Task, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trials=4, annealing_trials=2, **{"finetune.gate": 5.0})
    run_study(config, task, NullDisplay())
    trials = [t for study in studies_of(tmp_path / "tiny").values() for t in study.trials]
    stopped = [t for t in trials if t.state == TrialState.PRUNED]
    assert stopped
    for trial in stopped:
        assert "gate" in trial.user_attrs["reason"] and "weights" not in trial.user_attrs
        assert trial.system_attrs["constraints"][0] > 0.0


def test_two_processes_can_not_run_one_study(task: Task, tmp_path: Path) -> None:
    from autocompress.store import StudyFolder

    folder = StudyFolder(tmp_path / "tiny")
    folder.create()
    with folder.lock(), pytest.raises(ConfigError, match="another process"):
        run_study(tiny_config(tmp_path), task, NullDisplay())


def test_a_network_without_layers_to_change_is_refused(task: Task, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{"search.exclude": ["*"]})
    with pytest.raises(ConfigError, match="search.exclude names it"):
        run_study(config, task, NullDisplay())


def times_like_macs(table: LayerTable, *_: Any) -> LayerTable:
    """A layer table on a machine that takes a millisecond for 1,000 multiply-adds."""
    choices = {
        name: tuple(replace(choice, ms=choice.macs / 1e3) for choice in own)
        for name, own in table.choices.items()
    }
    own = {layer.name: layer.cost.macs / 1e3 for layer in table.layers}
    return replace(table, choices=choices, layer_ms=own, network_ms=sum(own.values()))


def test_latency_is_spent_in_milliseconds_and_bound_to_its_runtime(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "with_times", times_like_macs)
    spaces = []
    real = SearchSpace.from_table

    def watched(*args: Any) -> SearchSpace:
        spaces.append(real(*args))
        return spaces[-1]

    monkeypatch.setattr(SearchSpace, "from_table", watched)
    settings = {"trials": 2, "annealing_trials": 0, "objective": "latency"}
    run_study(tiny_config(tmp_path, **settings), task, NullDisplay())
    facts = studies_of(tmp_path / "tiny")["exploration"].user_attrs
    macs = sum(layer["macs"] for layer in facts["baseline"]["layers"])
    assert spaces[0].baseline_cost == pytest.approx(1e3 * macs)  # nanoseconds

    monkeypatch.setattr(preparation, "with_times", None)  # the stored table has the times
    run_study(tiny_config(tmp_path, **settings | {"trials": 3}), task, NullDisplay())
    assert spaces[1] == spaces[0]
    for change in ({"latency.runtime": "torch"}, {"latency.threads": 2}, {"latency.batch_size": 2}):
        with pytest.raises(StudyMismatch, match=f"{list(change)[0]}: "):
            run_study(tiny_config(tmp_path, **settings, **change), task, NullDisplay())
    monkeypatch.setattr(latency, "processor", lambda: "another machine")
    with pytest.raises(StudyMismatch, match="this is .* on another machine: such latencies"):
        run_study(tiny_config(tmp_path, **settings | {"trials": 4}), task, NullDisplay())


def test_latencies_of_two_machines_may_meet_where_they_are_no_objective(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(tiny_config(tmp_path, trials=1, annealing_trials=0), task, NullDisplay())
    monkeypatch.setattr(latency, "processor", lambda: "another machine")
    display = Recorder()
    run_study(tiny_config(tmp_path, trials=2, annealing_trials=0), task, display)
    assert any("latencies of the trials so far are from" in line for line in display.lines)
    first, second = studies_of(tmp_path / "tiny")["exploration"].trials
    assert first.user_attrs["latency"]["device"] != "another machine"
    assert second.user_attrs["latency"]["device"] == "another machine"


def test_without_a_word_the_first_layer_and_the_classifier_stay(task: Task, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trials=2, annealing_trials=0, **{"search.include": None})
    outcome = run_study(config, task, NullDisplay())
    best = outcome.summary["best"] or outcome.summary["nearest"]
    rows = {row["name"]: row for row in best["layers"]}
    assert set(rows) == {"stem", "conv", "fc"} and set(best["plan"]["layers"]) <= {"conv"}
    assert rows["stem"]["why"].startswith("excluded by default: the first layer")
    assert rows["fc"]["why"].startswith("excluded by default: the classifier")
    stored = json.loads((tmp_path / "tiny" / "result.json").read_text(encoding="utf-8"))
    assert (stored["best"] or stored["nearest"])["layers"] == best["layers"]


def test_no_trial_goes_beyond_a_bound(task: Task, tmp_path: Path) -> None:
    bounds = [{"layers": "conv", "compression": 2.0}, {"layers": "stem", "error": 1e-9}]
    config = tiny_config(tmp_path, trials=4, annealing_trials=2, **{"search.bounds": bounds})
    outcome = run_study(config, task, NullDisplay())
    full = task.model.get_parameter("conv.weight").numel()
    for study in studies_of(tmp_path / "tiny").values():
        for trial in study.trials:
            plan = Plan.from_json(trial.user_attrs["plan"])
            assert "stem" not in plan.layers
            small = build_plan(task.model, plan).get_submodule("conv")
            assert 2 * sum(p.numel() for p in small.parameters()) >= full
    best = outcome.summary["best"] or outcome.summary["nearest"]
    rows = {row["name"]: row for row in best["layers"]}
    assert rows["conv"]["bound"] == "compression <= 2x"
    assert "search.bounds leaves it no choice (error <= 1e-09" in rows["stem"]["why"]


def test_nothing_left_by_default_names_the_cure(task: Task, tmp_path: Path) -> None:
    none = {"search.include": None, "search.exclude": ["conv"]}
    with pytest.raises(ConfigError, match=r"search.include = \['\*'\] lets all layers change"):
        run_study(tiny_config(tmp_path, **none), task, NullDisplay())


@pytest.mark.parametrize("objective", ["size", "latency", "params+macs+latency"])
def test_every_objective_is_the_second_value(
    task: Task, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "with_times", times_like_macs)
    config = tiny_config(tmp_path, trials=1, annealing_trials=1, objective=objective)
    run_study(config, task, NullDisplay())
    keys = {"size": "size_bytes", "latency": "latency_ms", "params+macs": "share"}
    key = keys.get(objective.removesuffix("+latency"), objective)
    for study in studies_of(tmp_path / "tiny").values():
        assert all(t.values[1] == t.user_attrs["metrics"][key] for t in study.trials)


def test_batches_may_be_dictionaries(task: Task, tmp_path: Path) -> None:
    def as_dicts(loader: Any) -> list[dict[str, torch.Tensor]]:
        return [{"label": y, "image": x} for x, y in loader]

    task.train, task.val, task.test = map(as_dicts, (task.train, task.val, task.test))
    task.forward = lambda model, batch: model(batch["image"])
    task.loss = lambda output, batch: cross_entropy(output, (None, batch["label"]))
    task.metric = lambda output, batch: correct(output, (None, batch["label"]))
    outcome = run_study(tiny_config(tmp_path, trials=2, annealing_trials=1), task, NullDisplay())
    assert outcome.met


def test_test_data_is_read_once_for_both_networks(task: Task, tmp_path: Path) -> None:
    task.test, reads = count_reads(task.test)
    run_study(tiny_config(tmp_path), task, NullDisplay())
    assert reads == ["start", "start"]


def test_the_table_is_built_once(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(tiny_config(tmp_path, trials=1, annealing_trials=0), task, NullDisplay())

    def build(*args: Any) -> None:
        raise AssertionError("the table was built again")

    monkeypatch.setattr("autocompress.preparation.build_table", build)
    run_study(tiny_config(tmp_path, trials=2, annealing_trials=0), task, NullDisplay())


def test_a_final_fit_that_diverges_leaves_the_trials_weights(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: Any, **__: Any) -> None:
        raise TrainingDiverged("the loss became nan")

    monkeypatch.setattr(longtrial, "fit", diverges)
    # As many as make a study give up where trials of the search fail.
    monkeypatch.setattr(runner, "MAX_FAILURES", 1)
    said = Recorder()
    outcome = run_study(tiny_config(tmp_path, trials=2, annealing_trials=1), task, said)
    assert outcome.met and outcome.summary["best"]["final_epochs"] == 0
    assert any("the loss became nan" in line for line in said.lines)


def test_a_stored_study_of_other_settings_is_refused_before_data_is_read(
    finished: Outcome,
) -> None:
    out = finished.folder.parent
    check_places(tiny_config(out, trials=9))
    with pytest.raises(StudyMismatch, match="delta: 5.0 -> 6.0"):
        check_places(tiny_config(out, delta=6.0))


def test_a_study_writes_the_formats_that_it_names(task: Task, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, trials=1, annealing_trials=0, delta=100.0, **{"run.formats": ["torchscript"]}
    )
    check_places(config)
    best = run_study(config, task, NullDisplay()).folder / "best"
    assert (best / "model.ts.pt").exists()
    assert not (best / "model.onnx").exists() and not (best / "model.pt2").exists()


def test_a_format_without_its_package_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = replace(formats.FORMATS["openvino"], package="no_such_package")
    monkeypatch.setitem(formats.FORMATS, "openvino", lacking)
    with pytest.raises(ConfigError, match=r"'openvino': .*pip install 'autocompress\[openvino\]'"):
        check_places(tiny_config(tmp_path, **{"run.formats": ["onnx", "openvino"]}))


def test_annealing_needs_an_exploration(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this study has none yet"):
        run_study(tiny_config(tmp_path, **{"search.stage": "annealing"}), task, NullDisplay())


def test_a_network_that_guesses_is_not_compressed(task: Task, tmp_path: Path) -> None:
    task.model.get_parameter("fc.weight").data.zero_()
    with pytest.raises(ConfigError, match="no better than always naming"):
        run_study(tiny_config(tmp_path), task, NullDisplay())
    assert ended(tmp_path / "tiny") == {"exploration": 0}


def test_the_winner_may_have_a_learning_rate_of_its_own(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = watch_fits(monkeypatch, longtrial)
    settings = {"finetune.learning_rate": 0.01, "finetune.final_epochs": 0.5}
    for rate in (None, 0.02, 0.02):
        more = {**settings, "finetune.final_learning_rate": rate}
        config = tiny_config(tmp_path, trials=1, annealing_trials=0, delta=100, **more)
        run_study(config, task, NullDisplay())
    # Each with two seeds; the third run has nothing to do.
    assert [fit["learning_rate"] for fit in fits] == [0.01, 0.01, 0.02, 0.02]


def test_trials_of_the_annealing_are_longer(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = watch_fits(monkeypatch, objective)
    settings: dict[str, Any] = {"trials": 2, "finetune.epochs": 0.5}
    config = tiny_config(tmp_path, annealing_trials=1, **settings, **{"finetune.final_epochs": 2.0})
    run_study(config, task, NullDisplay())
    # Budgets may change later, but the trials of one study stay alike.
    more = tiny_config(tmp_path, annealing_trials=2, **settings, **{"finetune.final_epochs": 0.0})
    run_study(more, task, NullDisplay())
    assert [fit["epochs"] for fit in fits] == [0.5, 0.5, 1.0, 1.0]


def test_too_few_validation_images_for_delta_are_refused(task: Task, tmp_path: Path) -> None:
    task.val = make_loader(32, 2)
    with pytest.raises(ConfigError, match="32 validation images are too few for delta = 2 at conf"):
        run_study(tiny_config(tmp_path, delta=2.0), task, NullDisplay())
    trusting = tiny_config(tmp_path, name="trusting", delta=2.0, confidence=0.5, trials=1)
    run_study(trusting, task, NullDisplay())
