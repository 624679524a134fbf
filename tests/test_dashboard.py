"""Notes in the database, and the dashboard served on loopback."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import TrialState

from autocompress import dashboard
from autocompress.errors import ConfigError
from autocompress.scale import ACCURACY

DELTA = 1.0
# drop, params, state
TRIALS = [
    (0.2, 100_000.0, TrialState.COMPLETE),
    (0.7, 50_000.0, TrialState.COMPLETE),
    (0.8, 60_000.0, TrialState.COMPLETE),  # beaten by the one before
    (3.0, 20_000.0, TrialState.COMPLETE),  # infeasible
    (30.0, 10_000.0, TrialState.PRUNED),
]


def fill(
    study: optuna.Study, store: FileSystemArtifactStore | None = None, delta: float = DELTA
) -> None:
    """Five trials as the conductor records them, with weights if there is a store."""
    plan = {"version": 1, "layers": {"layer1.0|x": {"transform": "svd", "rank": 12}}}
    for drop, params, state in TRIALS:
        trial = study.ask()
        trial.set_user_attr("plan", json.dumps(plan))
        trial.set_user_attr("metrics", {"score": 92.3 - drop, "drop": drop, "params": params})
        trial.set_user_attr("layer_errors", {"layer1.0|x": 0.125})
        trial.set_user_attr("parent", "exploration/3")
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [drop - delta])
        if store is not None:
            with TemporaryDirectory() as folder:
                weights = Path(folder, "weights.safetensors")
                weights.write_bytes(f"weights of trial {trial.number}".encode())
                upload_artifact(artifact_store=store, file_path=str(weights), study_or_trial=trial)
        complete = state == TrialState.COMPLETE
        study.tell(trial, [drop, params] if complete else None, state=state)
    how = {"runtime": "ONNX Runtime 1.32.0", "batch_size": 1, "threads": 2}
    latency = {"median_ms": 2.5, **how}
    profile = {"params": 270_000, "macs": 41_000_000, "latency": latency}
    study.set_user_attr("baseline", {"score": 92.3, **profile})
    study.set_user_attr("left_alone", {"conv1": "3 input channels <b>"})
    study.set_user_attr("delta", DELTA)
    study.set_user_attr("objective", "params")


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, Path, optuna.Study]:
    """URL of the database, folder of the artifacts, study."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(
        study_name="demo-exploration", storage=url, directions=["minimize", "minimize"]
    )
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    fill(study, FileSystemArtifactStore(artifacts))
    return url, artifacts, study


@pytest.fixture
def address(run: tuple[str, Path, optuna.Study]) -> Iterator[str]:
    url, artifacts, study = run
    dashboard.annotate(study, FileSystemArtifactStore(artifacts))
    server = dashboard.build_server(url, FileSystemArtifactStore(artifacts))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()
    assert not thread.is_alive()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


def test_server_shows_study_constraints_notes_and_artifacts(address: str) -> None:
    [summary] = json.loads(fetch(f"{address}/api/studies"))["study_summaries"]
    assert summary["study_name"] == "demo-exploration"
    detail: dict[str, Any] = json.loads(fetch(f"{address}/api/studies/{summary['study_id']}"))
    trials = detail["trials"]
    assert [trial["constraints"] for trial in trials] == [[d - DELTA] for d, _, _ in TRIALS]
    assert detail["objective_names"] == ["accuracy drop (points)", "params"]
    assert "| params | 270 k |" in detail["note"]["body"]
    label = "latency, ONNX Runtime 1.32.0, batch 1, 2 threads"
    assert f"| {label} | 2.50 ms |" in detail["note"]["body"]
    noted = [trial["number"] for trial in trials if trial["note"]["body"]]
    assert noted == [0, 1]
    note = trials[1]["note"]["body"]
    assert "Drop 0.70 points, at most 0.70 at the study's confidence: within the allowed" in note
    assert "| params | 270 k | 50.0 k | 5.40x |" in note
    assert "| `layer1.0\\|x` | svd (rank 12) | 0.125 |" in note
    assert "Artifacts: `weights.safetensors`" in note
    [artifact] = trials[1]["artifacts"]
    path = f"artifacts/{summary['study_id']}/{trials[1]['trial_id']}/{artifact['artifact_id']}"
    assert fetch(f"{address}/{path}") == b"weights of trial 1"
    assert b"<html" in fetch(f"{address}/dashboard").lower()


def test_notes_of_users_stay(run: tuple[str, Path, optuna.Study]) -> None:
    import optuna_dashboard

    _, _, study = run
    optuna_dashboard.save_note(study, "mine")
    assert dashboard.annotate(study) == 2
    assert dashboard.annotate(study) == 0
    assert optuna_dashboard.get_note(study) == "mine"


def test_without_feasible_trials_the_nearest_gets_the_note() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    fill(study, delta=0.1)
    study.set_user_attr("delta", 0.1)
    assert dashboard.annotate(study) == 2
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.set_user_attr("delta", 1.0)
    assert dashboard.annotate(study) == 1


def test_nothing_is_noted_before_the_baseline_is_known() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    assert dashboard.annotate(study) == 0
    import optuna_dashboard

    assert not optuna_dashboard.get_note(study)


def test_study_note_escapes_what_the_study_says() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    fill(study)
    assert "3 input channels &lt;b>" in dashboard._study_note(study)


def test_notes_tell_of_channels_and_int8() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    fill(study)
    assert "### Channels" not in dashboard._trial_note(study.trials[0], {}, DELTA, ACCURACY, [])
    assert "int8" not in dashboard._study_note(study)
    group = {"kept": "0-4,8", "of": 16, "chunks": 1, "members": []}
    trial = study.ask()
    trial.set_user_attr("plan", json.dumps({"version": 2, "layers": {}, "channels": {"a": group}}))
    study._storage.set_trial_system_attr(trial._trial_id, "constraints", [-1.0])
    note = dashboard._trial_note(study.tell(trial, [0.0, 1.0]), {}, DELTA, ACCURACY, [])
    assert "No layer." in note and "| `a` | 6 | 16 |" in note
    study.set_user_attr("config", {"search.int8": True})
    assert "on validation data, of the int8 file." in dashboard._study_note(study)


def test_serve_reports_its_address_and_ends_on_ctrl_c(
    run: tuple[str, Path, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    ready: list[str] = []

    def interrupted(self: object, poll_interval: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dashboard._ThreadedServer, "serve_forever", interrupted)
    monkeypatch.setattr("webbrowser.open", opened.append)
    dashboard.serve(run[0], None, open_browser=True, on_ready=ready.append)
    assert ready == opened and ready[0].startswith("http://127.0.0.1:")


def test_errors_name_the_cure(run: tuple[str, Path, optuna.Study], tmp_path: Path) -> None:
    missing = tmp_path / "nothing.db"
    with pytest.raises(ConfigError, match="no study database at .*nothing.db"):
        dashboard.build_server(f"sqlite:///{missing}", None)
    assert not missing.exists()
    with pytest.raises(ConfigError, match="'runs/x' is no database URL"):
        dashboard.build_server("runs/x", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}.*another port"):
            dashboard.build_server(run[0], None, port=port)
    with pytest.raises(ConfigError, match="can't listen on 127.0.0.1:99999"):
        dashboard.build_server(run[0], None, port=99999)
