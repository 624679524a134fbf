"""The int8 step of a study: what it writes, whom it turns to next, and what a failure costs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import Stopping, TinyNet, count_reads, tiny_config, tiny_task
from torch import nn

import autocompress
from autocompress import int8
from autocompress.answers import Answers
from autocompress.baseline import Baseline
from autocompress.conductor import run_study
from autocompress.config import StudyConfig
from autocompress.database import open_storage
from autocompress.errors import AutocompressError, ConfigError, TrainingDiverged
from autocompress.evaluation import Evaluation
from autocompress.finals import Finalist
from autocompress.int8 import make_int8, rounded_epochs
from autocompress.objective import Bench
from autocompress.plan import Plan
from autocompress.progress import NullDisplay
from autocompress.quantization import Attempt, Quantizer
from autocompress.scale import ACCURACY
from autocompress.store import StudyFolder, load_study
from autocompress.task import Task
from autocompress.training import Recipe

DELTA = 5.0
EXPLORED = "exploration"
EMPTY = Evaluation(torch.ones(8))


class Recorder(NullDisplay):
    """Keeps what the study says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


class Rounds:
    """Stands for `Quantizer.best`: the bound for each network, before and after fine-tuning."""

    def __init__(self, **bounds: tuple[float | Exception, float | Exception]) -> None:
        self.bounds = bounds
        self.calls: list[str] = []

    def __call__(
        self, quantizer: Any, model: nn.Module, target: Path, say: Any, epochs: float = 0.0
    ) -> tuple[Attempt, list[Attempt]]:
        name = str(model.get_parameter("name").item())
        self.calls.append(f"{name[0]}{'+' if epochs else ''}")
        bound = self.bounds["abc"[int(name[0])]][epochs > 0]
        if isinstance(bound, Exception):
            raise bound
        target.write_bytes(self.calls[-1].encode())
        attempt = Attempt("minmax", epochs, EMPTY, bound - 1, bound)
        return attempt, [attempt]


class Named(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.name = nn.Parameter(torch.tensor(float(number)))


def step(
    rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int = 2
) -> tuple[int8.Int8, Recorder]:
    monkeypatch.setattr(Quantizer, "best", lambda self, *args: rounds(self, *args))
    monkeypatch.setattr(int8, "_fit_rounded", lambda bench, folder, one, *_: one.model)
    finalists = [
        Finalist(f"annealing/{number}", Named(number), Plan({}), EMPTY, 4.0, 4.0, 4.0)
        for number in range(count)
    ]
    bench = SimpleNamespace(
        task=SimpleNamespace(scale=ACCURACY),
        quantizer=Quantizer(cast(Any, None), EMPTY, (), DELTA, 0.95),
        delta=DELTA,
        identity="x",
        finetune=Recipe(1.0, 8.0, 0.1, 0.1, 0.5, 50.0),
    )
    display = Recorder()
    return make_int8(cast(Bench, bench), StudyFolder(tmp_path), finalists, display), display


@pytest.mark.parametrize(
    ("bounds", "calls", "label"),
    [
        ({"a": (4.0, 9.0), "b": (1.0, 1.0)}, ["0"], "annealing/0"),
        ({"a": (6.0, 5.0), "b": (1.0, 1.0)}, ["0", "0+"], "annealing/0"),
        ({"a": (6.0, 5.5), "b": (4.0, 1.0)}, ["0", "0+", "1"], "annealing/1"),
        (
            {"a": (6.0, TrainingDiverged("nan")), "b": (6.0, 2.0)},
            ["0", "0+", "1", "1+"],
            "annealing/1",
        ),
        ({"a": (OSError("full"), 1.0), "b": (2.0, 2.0)}, ["0", "1"], "annealing/1"),
    ],
)
def test_the_first_within_delta_is_taken(
    bounds: dict[str, Any],
    calls: list[str],
    label: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = Rounds(**bounds)
    found, _ = step(rounds, tmp_path, monkeypatch)
    assert rounds.calls == calls and found.label == label
    assert found.record["met"] and found.record["reason"] is None
    assert found.path is not None and found.path.read_text() == calls[-1]
    # Every attempt that gave a file is told of.
    failed = sum(isinstance(value, Exception) for pair in bounds.values() for value in pair)
    assert len(found.record["attempts"]) == len(calls) - failed


def test_a_miss_says_by_how_much_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(a=(6.0, 5.5), b=(AutocompressError("no kernel"), 0.0))
    found, display = step(rounds, tmp_path, monkeypatch)
    assert (found.label, found.path, found.record["met"]) == (None, None, False)
    assert found.record["reason"] == (
        "annealing/0 lost at most 5.50 points, where 5 are allowed; annealing/1 failed with "
        "AutocompressError: no kernel."
    )
    assert [attempt["val_drop_bound"] for attempt in found.record["attempts"]] == [6.0, 5.5]
    assert found.record["reason"] in display.lines[-1]


def test_fine_tuning_with_rounding_is_a_part_of_the_winners() -> None:
    assert rounded_epochs(Recipe(1.0, 8.0, 0.1, 0.1, 0.5, 50.0)) == 2
    assert rounded_epochs(Recipe(3.0, 8.0, 0.1, 0.1, 0.5, 50.0)) == 3


def test_rounded_weights_are_kept_and_the_winners_are_not_touched(
    trained_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    bench = SimpleNamespace(
        baseline=Baseline(TinyNet(), EMPTY, cast(Any, None), ""),
        identity="x",
        seed=0,
        finetune=Recipe(1.0, 1.0, 0.01, 0.01, 0.0, 50.0),
        checkpoint_every=1e9,
        answers=Answers(),
    )

    def fit(place: str, display: NullDisplay | None = None) -> dict[str, torch.Tensor]:
        bench.task = task = tiny_task(trained_state)
        finalist = Finalist("annealing/3", task.model, Plan({}), EMPTY, 4.0, 4.0, 4.0)
        arguments = cast(Bench, bench), StudyFolder(tmp_path / place), finalist, 1.0
        tuned = int8._fit_rounded(*arguments, display or NullDisplay())
        for key, value in task.model.state_dict().items():
            assert torch.equal(value, trained_state[key])
        return tuned.state_dict()

    first, rest = Stopping(), Stopping(stops=False)
    with pytest.raises(KeyboardInterrupt):
        fit("a", first)
    tuned = fit("a", rest)
    assert rest.done[0] > first.done[0] > 0, "it goes on where it was interrupted"
    assert [path.suffix for path in (tmp_path / "a").rglob("*.*")] == [".safetensors"]
    whole, unused = fit("b"), Stopping()
    again = fit("a", unused)
    assert not unused.done, "nothing is trained again"
    for key, value in tuned.items():
        torch.testing.assert_close(again[key], value)
        torch.testing.assert_close(whole[key], value)
    assert not torch.equal(tuned["conv.weight"], trained_state["conv.weight"])


def int8_config(out: Path, **settings: Any) -> StudyConfig:
    """A study without an annealing that writes ONNX only."""
    return tiny_config(out, annealing_trials=0, **{"run.formats": ["onnx"], **settings})


def test_a_study_hands_out_an_int8_winner(task: Task, tmp_path: Path) -> None:
    plain = run_study(int8_config(tmp_path, trials=3), task, NullDisplay())
    assert plain.summary["int8"] is None
    assert not (plain.folder / "best" / "model.int8.onnx").exists()
    # Asked for later: nothing is searched again, and test data is read for all three at once.
    task.test, reads = count_reads(task.test)
    config = int8_config(tmp_path, trials=3, int8=True)
    summary = run_study(config, task, NullDisplay()).summary
    assert len(reads) == 3 and summary["test_reads"] == 2
    found, best = summary["int8"], summary["best"]
    assert found["met"] and found["file"] == "best/model.int8.onnx"
    assert (found["stage"], found["trial"]) == (best["stage"], best["trial"])
    assert found["val_drop"] < found["val_drop_bound"] <= summary["delta"]
    file = plain.folder / found["file"]
    assert found["size_bytes"]["int8"] == file.stat().st_size == best["files"][file.name]
    assert found["size_bytes"]["float32"] == best["files"]["model.onnx"]
    assert set(found["onnx_latency"]) == {"baseline", "float32", "int8"}
    low, high = found["test_drop_interval"]
    assert low <= found["test_drop"] <= high
    # The file is what was measured, and opens without a study.
    run = autocompress.open_onnx(file)
    hits = [run(images)[0].argmax(1) == labels for images, labels in task.val]
    assert 100 * float(torch.cat(hits).double().mean()) == pytest.approx(found["val_score"])
    assert "model.int8.onnx holds" in (plain.folder / "report.html").read_text()
    # The float32 winner is what it was.
    assert best["val_score"] == plain.summary["best"]["val_score"]
    again = run_study(config, task, NullDisplay())
    assert len(reads) == 3 and again.summary["int8"] == json.loads(json.dumps(found))


def test_trials_can_be_judged_by_their_int8_files(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[nn.Module] = []

    def score(quantizer: Quantizer, model: nn.Module) -> Evaluation:
        judged.append(model)
        scores = quantizer.before.records.clone()
        scores[torch.nonzero(scores)[:5]] = 0.0  # rounding costs five answers, whatever the network
        return Evaluation(scores)

    monkeypatch.setattr(Quantizer, "score", score)
    settings: dict[str, Any] = {"search.int8": True, "delta": 5.0, "confidence": 0.5}
    config = int8_config(tmp_path, trials=3, int8=True, **settings)
    display = Recorder()
    outcome = run_study(config, task, display)
    lost = pytest.approx(100 * 5 / 256)
    assert judged[0] is task.model
    assert any("The baseline in int8 loses 1.95 points" in line for line in display.lines)
    study = load_study(open_storage(f"sqlite:///{outcome.folder / 'study.db'}"), "tiny", EXPLORED)
    assert study is not None and [trial.values[0] for trial in study.trials] == [lost] * 3
    best = outcome.summary["best"]
    assert best["val_drop_bound"] == lost != pytest.approx(best["val_drop"])
    assert len(judged) > 4  # the finalist, too


@pytest.fixture
def unquantizable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network has an int8 file."""

    def refuse(*_: Any) -> None:
        raise AutocompressError("no such kernel")

    monkeypatch.setattr("autocompress.quantization.quantize_onnx", refuse)


@pytest.mark.usefixtures("unquantizable")
def test_a_network_that_cannot_be_quantized_is_refused_before_the_search(
    task: Task, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"search.int8": True}
    config = int8_config(tmp_path, trials=2, int8=True, **settings)
    with pytest.raises(ConfigError, match="no such kernel.*Leave search.int8 out"):
        run_study(config, task, NullDisplay())


@pytest.mark.usefixtures("unquantizable")
def test_a_failure_costs_no_result(task: Task, tmp_path: Path) -> None:
    config = int8_config(tmp_path, trials=2, int8=True)
    display = Recorder()
    outcome = run_study(config, task, display)
    assert outcome.met and (outcome.folder / "best" / "model.onnx").exists()
    assert not outcome.summary["int8"]["met"]
    assert "no such kernel" in outcome.summary["int8"]["reason"]
    assert any("There is no int8 file within delta" in line for line in display.lines)
    assert "There is no int8 file within delta" in (outcome.folder / "report.html").read_text()
