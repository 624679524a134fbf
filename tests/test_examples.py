"""The example studies of other tasks, each run from end to end on little data, and what is said of
tasks that can't work."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest
import torch
from conftest import TinyNet, make_loader, tiny_config, tiny_task
from rich.console import Console
from torch import Tensor, nn
from torchmetrics import JaccardIndex, MeanMetric, MeanSquaredError, R2Score
from typer.testing import CliRunner, Result

import autocompress
from autocompress import MeanScore, TorchMetric
from autocompress.batch import tensors_in
from autocompress.conductor import Outcome, run_study
from autocompress.config import StudyConfig, load_config, ready_folder
from autocompress.database import open_storage
from autocompress.errors import AutocompressError, ConfigError, TrainingDiverged
from autocompress.pinboard import annotate
from autocompress.progress import NullDisplay, PlainDisplay
from autocompress.scale import Scale
from autocompress.sources import functions_text, task_from_config
from autocompress.store import load_stages, trials_spent
from autocompress.studies import scenes, segmentation
from autocompress.study import app
from autocompress.task import Task

TRIALS = {"exploration": 2, "annealing": 1}
TINY = {
    "delta": 60.0,
    "confidence": 0.5,
    "data.batch_size": 32,
    "baseline.epochs": 2.0,
    "search.transforms": ["svd"],
    "search.trials": TRIALS["exploration"],
    "search.annealing_trials": TRIALS["annealing"],
    "finetune.epochs": 0.5,
    "finetune.final_epochs": 1.0,
    "finetune.gate": 100.0,
    "run.workers": 0,
    "run.device": "cpu",
}
FEW = {"train": 96, "val": 48, "test": 40}


@dataclass(frozen=True)
class Example:
    """What a ready study must come to.

    Attributes:
        scale: Of its metric.
        exports: Whether its network can be written as ONNX and PT2. Of one that can't, int8 is
            asked for, which must cost no result either.
        interrupted: Whether it is interrupted once, and goes on.
    """

    scale: Scale
    exports: bool = True
    interrupted: bool = False


EXAMPLES = {
    "segmentation": Example(Scale("mIoU", "%")),
    "multilabel": Example(Scale("mean average precision", "%")),
    "regression": Example(Scale("RMSE", "px", higher_is_better=False)),
    "own-loop": Example(Scale(), interrupted=True),
    "detection": Example(Scale("mAP", ""), exports=False),
}


AT_NIGHT = ("detection", "multilabel")
"""Examples that are run with the slow tests."""


@dataclass(frozen=True)
class Done:
    """A ready study that has been run."""

    name: str
    example: Example
    config: StudyConfig
    task: Task
    outcome: Outcome
    said: str

    @property
    def folder(self) -> Path:
        return self.outcome.folder


class Interrupting(NullDisplay):
    """Ctrl-C after the first trial."""

    def trial_finished(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def tiny(name: str, out: Path) -> StudyConfig:
    """The settings of a ready study on a smaller network and little data."""
    int8 = not EXAMPLES[name].exports
    config = load_config(name, {**TINY, "int8": int8, "run.out": str(out)})
    arguments = {**config.model.arguments, "width": 8}
    return config.model_copy(
        update={"model": config.model.model_copy(update={"arguments": arguments})}
    )


def run_example(name: str, out: Path) -> Done:
    example, config = EXAMPLES[name], tiny(name, out)
    if example.interrupted:
        with pytest.raises(KeyboardInterrupt):
            run_study(config, task_from_config(config, ready_folder()), Interrupting())
    task = task_from_config(config, ready_folder())
    heard = io.StringIO()
    with PlainDisplay(Console(file=heard, width=200)) as display:
        outcome = run_study(config, task, display)
    return Done(name, example, config, task, outcome, heard.getvalue())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in AT_NIGHT else [])
        for name in EXAMPLES
    ],
)
def done(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Done]:
    """Each of the examples."""
    folder, threads = tmp_path_factory.mktemp(request.param), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_HOME", str(folder / "home"))
        patch.setattr("autocompress.selection.TIMING_SECONDS", 0.02)
        patch.setattr("autocompress.latency.REFERENCE_SECONDS", 0.02)
        for part, count in FEW.items():
            patch.setitem(scenes.COUNTS, part, count)
        yield run_example(request.param, folder)
    torch.set_num_threads(threads)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_an_example_runs_to_its_end_on_its_own_scale(done: Done) -> None:
    summary, scale = done.outcome.summary, done.example.scale
    assert done.outcome.met and done.outcome.model is not None
    assert summary == json.loads((done.folder / "result.json").read_text())
    assert Scale.from_dict(summary["metric"]) == scale
    best, before = summary["best"], summary["baseline"]
    sign = 1 if scale.higher_is_better else -1
    assert best["val_drop"] == pytest.approx(sign * (before["val_score"] - best["val_score"]))
    assert best["test_drop"] == pytest.approx(sign * (before["test_score"] - best["test_score"]))
    low, high = best["test_drop_interval"]
    assert low <= best["test_drop"] <= high and low < high
    assert best["profile"]["params"] < before["profile"]["params"]
    assert summary["test_reads"] == 1


def test_as_many_trials_run_as_were_asked_for(done: Done) -> None:
    assert done.outcome.summary["trials"] == TRIALS
    if done.example.interrupted:
        assert "Going on with the exploration after 1 trials." in done.said
        assert "Trained the baseline" not in done.said


def test_the_network_is_handed_out_and_read_back(done: Done) -> None:
    images = done.task.images(3)
    assert done.outcome.model is not None
    with torch.no_grad():
        expected = [*tensors_in(done.outcome.model(*images))]
        if done.config.model.source.startswith("zoo:"):
            loaded = autocompress.load(done.folder / "best")
        else:
            with pytest.raises(ConfigError, match="trust=True"):
                autocompress.load(done.folder / "best")
            loaded = autocompress.load(done.folder / "best", trust=True)
        found = [*tensors_in(loaded(*images))]
    assert expected and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_exported_is_said_and_costs_no_result(done: Done) -> None:
    written = {path.name for path in (done.folder / "best").iterdir()}
    log = (done.folder / "study.log").read_text()
    for name in ("model.onnx", "model.pt2"):
        assert (name in written) == done.example.exports
        assert (f"best/{name} was not written: " in log) == (not done.example.exports)
    if not done.example.exports:
        assert not done.outcome.summary["int8"]["met"]
        assert "There is no int8 file within delta" in log
        assert "There is no int8 file" in call("run", str(done.folder)).output
    else:
        (images,) = done.task.images(3)
        run = autocompress.open_onnx(done.folder / "best" / "model.onnx")
        assert done.outcome.model is not None
        with torch.no_grad():
            expected = [*tensors_in(done.outcome.model(images))]
        for one, other in zip(run(images), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_report_and_terminal_speak_of_the_metric(done: Done) -> None:
    scale = done.example.scale
    report = (done.folder / "report.html").read_text(encoding="utf-8")
    assert scale.drop_name in report and scale.title in report
    texts = [done.said, re.sub(r"<script.*?</script>", "", report, flags=re.DOTALL)]
    assert scale.value(done.outcome.summary["baseline"]["val_score"]) in done.said
    for text in texts:
        assert scale.value(done.outcome.summary["best"]["test_score"]) in text
        assert "points of accuracy" not in text
        if scale.name != "accuracy":
            assert "accuracy" not in text.lower()
        if scale.unit != "%":
            assert "points" not in text


def test_the_dashboards_notes_speak_of_the_metric(done: Done) -> None:
    scale = done.example.scale
    storage = open_storage(f"sqlite:///{done.folder / 'study.db'}")
    studies = load_stages(storage, done.config.name)
    # The study itself has written them.
    assert annotate(studies) == 0
    for study in studies.values():
        note = optuna_dashboard.get_note(study)
        assert f"with a drop in {scale.name} of at most {scale.difference(60.0)}" in note
        assert f"| {scale.name} |" in note
        assert scale.name == "accuracy" or "accuracy" not in note
        assert study.metric_names is not None and study.metric_names[0] == scale.drop_name


def test_the_commands_know_the_task(done: Done, tmp_path: Path) -> None:
    scale, place = done.example.scale, str(done.folder)
    best = done.outcome.summary["best"]
    said = " ".join(call("status", place).output.split())
    assert "2/2" in said and "1/1" in said and "Finished" in said
    assert re.search(rf"x params, drop -?[\d.e-]+ ?{scale.difference_unit}", said)
    if done.name not in ("segmentation", "detection"):
        return
    label = f"{best['stage']}/{best['trial']}"
    ended = call("export", place, "--trial", label, "--to", str(tmp_path / "it"))
    assert ended.exit_code == 0, ended.output
    assert ("model.onnx was not written" in ended.output) == (not done.example.exports)
    loaded = autocompress.load(tmp_path / "it", trust=True)
    with torch.no_grad():
        assert [*tensors_in(loaded(*done.task.images(2)))]


@pytest.mark.parametrize("done", ["regression"], indirect=True, scope="module")
def test_the_same_command_again_has_nothing_to_do(done: Done) -> None:
    best, scale = done.outcome.summary["best"], done.example.scale
    said = " ".join(call("run", str(done.folder)).output.split())
    assert "Nothing to do" in said and "RMSE" in said
    assert f"Drop on validation data {scale.difference(best['val_drop'])}; on new images" in said
    profiled = call("profile", str(done.folder)).output
    assert "conv1" in profiled and "channels of" in profiled


def test_a_library_call_takes_the_same_functions(tmp_path: Path) -> None:
    """Segmentation from Python: a trained network, loaders, and functions in hand."""
    torch.manual_seed(0)
    network = segmentation.network(width=4)
    with pytest.MonkeyPatch.context() as patch:
        for part, count in FEW.items():
            patch.setitem(scenes.COUNTS, part, count)
        loaders = segmentation.data(32, 0)
    outcome = autocompress.compress(
        network,
        loaders["train"],
        loaders["test"],
        val=loaders["val"],
        forward=lambda model, batch: model(batch[0]),
        loss=segmentation.loss,
        metric=TorchMetric(
            JaccardIndex("multiclass", num_classes=segmentation.CLASSES),
            pairs=lambda output, batch: (output["out"].argmax(1), batch[1]),
            name="mIoU",
        ),
        trials=1,
        annealing_trials=0,
        out=tmp_path,
        display=False,
        delta=0.6,
        settings={
            "confidence": 0.5,
            "search.transforms": ["svd"],
            "finetune.epochs": 0.5,
            "finetune.learning_rate": 0.01,
            "finetune.final_epochs": 0.5,
            "finetune.gate": 1.0,
        },
    )
    summary = outcome.summary
    assert outcome.met and summary["metric"]["name"] == "mIoU" and summary["metric"]["unit"] == ""
    drop = summary["baseline"]["val_score"] - summary["best"]["val_score"]
    assert summary["best"]["val_drop"] == pytest.approx(drop, abs=1e-6)
    loaded = autocompress.load(outcome.folder / "best", model=segmentation.network(width=4))
    images = next(iter(loaders["test"]))[0]
    assert outcome.model is not None
    with torch.no_grad():
        torch.testing.assert_close(loaded(images)["out"], outcome.model(images)["out"])


WORKER = """
from autocompress.studies import multilabel, scenes

task = multilabel.task


def data(batch_size, seed):
    scenes.COUNTS.update(train=96, val=48, test=40)
    return multilabel.data(batch_size, seed)
"""


@pytest.mark.slow
def test_a_worker_makes_the_same_task_by_its_names(tmp_path: Path) -> None:
    (tmp_path / "few_scenes.py").write_text(WORKER)
    config = tiny("multilabel", tmp_path)
    run = config.run.model_copy(update={"workers": 1})
    data = config.data.model_copy(update={"source": "few_scenes:data"})
    named = config.task.model_copy(update={"source": "few_scenes:task"})
    config = config.model_copy(update={"run": run, "data": data, "task": named})
    task = task_from_config(config, tmp_path)
    outcome = run_study(config, task, NullDisplay(), modules=tmp_path)
    assert outcome.met and outcome.summary["trials"] == TRIALS
    scale = Scale.from_dict(outcome.summary["metric"])
    assert scale == EXAMPLES["multilabel"].scale
    storage = open_storage(f"sqlite:///{outcome.folder / 'study.db'}")
    stages = load_stages(storage, config.name)
    # Their processes scored them on the same images: drops are those of the scores.
    for study in stages.values():
        for trial in trials_spent(study):
            drop = outcome.summary["baseline"]["val_score"] - trial.user_attrs["metrics"]["score"]
            assert trial.values[0] == pytest.approx(drop, abs=1e-6)


def compress_tiny(state: Mapping[str, Tensor], out: Path, **functions: Any) -> Outcome:
    model = TinyNet()
    model.load_state_dict(state)
    return autocompress.compress(
        model,
        make_loader(512, 1),
        make_loader(256, 3),
        val=make_loader(256, 2),
        trials=2,
        annealing_trials=0,
        out=out,
        display=False,
        settings={
            "confidence": 0.5,
            "finetune.epochs": 0.1,
            "finetune.learning_rate": 0.01,
            **functions.pop("settings", {}),
        },
        **functions,
    )


def trials_in(out: Path) -> int:
    """All trials in the database of a study, if there is one."""
    database = out / "study" / "study.db"
    if not database.exists():
        return 0
    stages = load_stages(open_storage(f"sqlite:///{database}"), "study")
    return sum(len(study.trials) for study in stages.values())


def own_loop(model: nn.Module, **_: Any) -> None:
    """Trains nothing."""


def hidden_mean(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


NAN = float("nan")
LABELS = TorchMetric(MeanSquaredError(), lambda output, batch: (output.argmax(1), batch[1]))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (
            {
                "metric": TorchMetric(
                    MeanSquaredError(), lambda o, b: (NAN * o.argmax(1), b[1].float()), name="error"
                )
            },
            r"The metric \(error\) of the baseline on validation data is nan",
        ),
        ({"metric": 0.5}, r"compress\(\): metric must be a function or a metric, got a float"),
        (
            {"metric": MeanSquaredError()},
            r"MeanSquaredError is a metric of torchmetrics; give autocompress.TorchMetric",
        ),
        (
            {"metric": TorchMetric(JaccardIndex("multiclass", num_classes=4, average=None))},
            "must come to one number",
        ),
        (
            {"loss": lambda output, batch: (output - 1).square().mean(1)},
            "The first training step failed with RuntimeError: grad can be implicitly created only "
            "for scalar outputs",
        ),
        ({"loss": lambda output, batch: NAN * output.mean()}, "the loss of a first batch is nan"),
        ({"loss": lambda output, batch: 0.5}, "The first training step failed"),
        ({"training": own_loop, "settings": {"finetune.epochs": "auto"}}, "give finetune.epochs"),
        (
            {"training": own_loop, "settings": {"finetune.learning_rate": "auto"}},
            "give finetune.learning_rate",
        ),
        (
            {"forward": lambda model, batch: model(batch[0])[:1], "loss": hidden_mean},
            "The forward pass gave 1 outputs for 2 labels",
        ),
        (
            {
                "forward": lambda model, batch: model(batch[0]).repeat(2, 1),
                "loss": hidden_mean,
                "metric": LABELS,
            },
            r"predictions must have a place for each of the 2 samples, .* of shape \(4,\)",
        ),
        (
            {"metric": TorchMetric(MeanMetric(), lambda o, b: ([{}], b[1]), higher_is_better=True)},
            "predictions must have a place for each of the 2 samples, got a list of 1",
        ),
    ],
)
def test_a_task_that_can_not_work_is_told_before_any_trial(
    trained_state: dict[str, Tensor], tmp_path: Path, functions: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress_tiny(trained_state, tmp_path, **functions)
    assert trials_in(tmp_path) == 0


def test_a_list_of_images_is_refused_before_the_baseline_is_trained(
    trained_state: dict[str, Tensor], tmp_path: Path
) -> None:
    class Listed(TinyNet):
        def forward(self, x: Any) -> Tensor:
            return super().forward(torch.stack(list(x)))

    task = tiny_task(trained_state)
    task.model = Listed()
    task.forward = lambda model, batch: model(list(batch[0]))
    config = tiny_config(tmp_path, **{"baseline.epochs": 100.0, "name": "study", "run.workers": 0})
    with pytest.raises(ConfigError, match="positional tensors only, got \\['list'\\]"):
        run_study(config, task, NullDisplay())
    assert trials_in(tmp_path) == 0


def test_a_training_loop_that_leaves_nan_is_told(
    trained_state: dict[str, Tensor], tmp_path: Path
) -> None:
    def broken(model: nn.Module, **_: Any) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(NAN)

    # Where it trains the baseline there is no trial yet.
    task = tiny_task(trained_state)
    task.training, task.origin = broken, {"source": "python:TinyNet", "arguments": {}}
    config = tiny_config(tmp_path, **{"baseline.epochs": 1.0, "name": "study", "run.workers": 0})
    message = "After the training loop 'stem.weight' holds values that are not finite"
    with pytest.raises(TrainingDiverged, match=message):
        run_study(config, task, NullDisplay())
    assert trials_in(tmp_path) == 0
    # Else the first trials fail, which don't count.
    with pytest.raises(AutocompressError, match=f"{message}.*They don't count") as told:
        compress_tiny(trained_state, tmp_path / "other", training=broken)
    assert ".." not in str(told.value)


@pytest.mark.parametrize(
    ("source", "body", "message"),
    [
        ("no_such_module:task", "", "task.source = 'no_such_module:task': there is no module"),
        ("{0}:tusk", "def task():\n    return {}", "no function 'tusk'. Did you mean 'task'"),
        ("{0}:task", "def task():\n    return 1", "must return a dict of functions.*got a int"),
        ("{0}:task", "def task(name):\n    return {}", r"can't be called with task.arguments = {}"),
        (
            "{0}:task",
            "def task():\n    return {'metrics': len}",
            "task.source = '.*:task' takes no 'metrics'. Did you mean 'metric'",
        ),
    ],
)
def test_a_task_source_that_is_not_there_is_told(
    tmp_path: Path, source: str, body: str, message: str
) -> None:
    # A module of one name is imported once.
    name = f"module_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(body)
    config = load_config(None, {"task.source": source.format(name), "run.device": "cpu"})
    with pytest.raises(ConfigError, match=message):
        task_from_config(config, tmp_path)


def pixels(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return 32 * output, 32 * batch[1]


def shares(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return output, batch[1]


@pytest.mark.parametrize(
    "other",
    [
        TorchMetric(MeanSquaredError(squared=False), shares, name="error"),
        TorchMetric(MeanSquaredError(), pixels, name="error"),
        TorchMetric(R2Score(), pixels, name="error", higher_is_better=False),
        TorchMetric(MeanSquaredError(squared=False), pixels, name="error", unit="px"),
        MeanScore(lambda output, batch: output.mean(1)),
    ],
)
def test_another_metric_makes_another_study(other: Any) -> None:
    def told(metric: Any) -> str:
        return functions_text({"metric": metric})

    one, again = (
        TorchMetric(MeanSquaredError(squared=False), pixels, name="error") for _ in range(2)
    )
    assert told(one) == told(again) and " at 0x" not in told(one)
    assert told(one) != told(other)
    assert told(MeanScore(pixels)) != told(MeanScore(shares))  # type: ignore[arg-type]
