"""The dashboard served on loopback: what its pages are given, while trials end and users write."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore
from recorded import DELTA, TRIALS, add_trial, describe

from autocompress import dashboard
from autocompress.artifacts import save_text
from autocompress.database import open_storage
from autocompress.errors import ConfigError
from autocompress.exhibits import PICTURE
from autocompress.pinboard import HISTORY_PLOT, PARETO_PLOT, annotate, is_ours


@pytest.fixture
def studies(url: str, closed_storages: None, tmp_path: Path) -> dict[str, optuna.Study]:
    """Both stages of "demo", in a database of each kind, with a picture for each trial."""
    storage = open_storage(url)
    store = FileSystemArtifactStore(tmp_path)
    found = {}
    for stage in ("exploration", "annealing"):
        found[stage] = study = optuna.create_study(
            study_name=f"demo-{stage}", storage=storage, directions=["minimize", "minimize"]
        )
        describe(study)
        for drop, params, state in TRIALS:
            add_trial(
                study, stage, drop, params, state,
                before_end=lambda trial: save_text("<svg/>", PICTURE, trial, store),
            )  # fmt: skip
    return found


@contextmanager
def served(url: str, store: FileSystemArtifactStore | None = None) -> Iterator[str]:
    server = dashboard.build_server(url, store)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()
        assert not thread.is_alive()


def fetch(url: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url,
        data,
        {"Content-Type": "application/json"},
        method="GET" if body is None else "PUT",
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: bytes = answer.read()
    return found


def detail_of(address: str, study: optuna.Study) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fetch(f"{address}/api/studies/{study._study_id}"))
    return found


def system_attrs(study: optuna.Study) -> dict[str, Any]:
    return study._storage.get_study_system_attrs(study._study_id)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_pages_have_notes_constraints_artifacts_and_plots(
    url: str, studies: dict[str, optuna.Study], tmp_path: Path
) -> None:
    # The notes of both studies and of five trials in each, and two plots for each.
    assert annotate(studies) == 2 * (1 + 5 + 2)
    with served(url, FileSystemArtifactStore(tmp_path)) as address:
        names = {
            s["study_name"] for s in json.loads(fetch(f"{address}/api/studies"))["study_summaries"]
        }
        assert names == {"demo-exploration", "demo-annealing"}
        for study in studies.values():
            detail = detail_of(address, study)
            trials = detail["trials"]
            assert [t["constraints"] for t in trials] == [[d - DELTA] for d, _, _ in TRIALS]
            # Trial 3 is on the front of all trials, and infeasible.
            assert [trial["number"] for trial in detail["best_trials"]] == [0, 1]
            assert "| parameters | 270 k |" in detail["note"]["body"]
            assert [bool(t["note"]["body"]) for t in trials] == [True] * 5
            assert "| parameters | 270 k | 50.0 k | 5.40x |" in trials[1]["note"]["body"]
            plots = [plot["id"] for plot in detail["plotly_graph_objects"]]
            assert plots == [PARETO_PLOT, HISTORY_PLOT]
            pareto = json.loads(detail["plotly_graph_objects"][0]["graph_object"])
            drawn = {trace["name"] for trace in pareto["data"]}
            assert {
                "exploration: within delta",
                "annealing: within delta",
            } <= drawn
            assert any("allowed drop" in a["text"] for a in pareto["layout"]["annotations"])
            [artifact] = trials[1]["artifacts"]
            path = f"/artifacts/{study._study_id}/{trials[1]['trial_id']}/{artifact['artifact_id']}"
            assert f"]({path})" in trials[1]["note"]["body"]
            assert artifact["mimetype"] == "image/svg+xml"
            assert fetch(address + path) == b"<svg/>"


def test_nothing_is_written_twice_and_plots_are_replaced(
    studies: dict[str, optuna.Study], url: str
) -> None:
    annotate(studies)
    before = system_attrs(studies["annealing"])
    assert annotate(studies) == 0
    assert system_attrs(studies["annealing"]) == before
    add_trial(studies["annealing"], "annealing", 0.9, 30_000.0)
    # Its note, both stages' notes and plots.
    assert annotate(studies) == 1 + 2 + 4
    with served(url) as address:
        plots = detail_of(address, studies["exploration"])["plotly_graph_objects"]
    assert [plot["id"] for plot in plots] == [PARETO_PLOT, HISTORY_PLOT]
    assert all(json.loads(plot["graph_object"])["data"] for plot in plots)


def test_what_a_user_writes_in_a_note_stays(studies: dict[str, optuna.Study], url: str) -> None:
    annotate(studies)
    study = studies["exploration"]
    with served(url) as address:
        note = detail_of(address, study)["note"]
        # Fresh news while the user is writing.
        add_trial(studies["annealing"], "annealing", 0.9, 30_000.0)
        annotate(studies)
        assert detail_of(address, study)["note"]["body"] != note["body"]
        place = f"{address}/api/studies/{study._study_id}"
        fetch(f"{place}/note", {"version": note["version"] + 1, "body": "mine"})
        trial = study.trials[0]._trial_id
        fetch(f"{place}/{trial}/note", {"version": 2, "body": ""})
        add_trial(studies["annealing"], "annealing", 0.9, 20_000.0)
        assert annotate(studies) == 1 + 1 + 4
        detail = detail_of(address, study)
    assert detail["note"]["body"] == "mine"
    assert detail["trials"][0]["note"]["body"] == ""
    assert is_ours(detail["trials"][1]["note"]["body"])


def test_news_are_shown_while_workers_run(studies: dict[str, optuna.Study], url: str) -> None:
    reporter = dashboard.Reporter(url, "demo", every=0.05)
    other = dashboard.Reporter(url, "demo", every=0.05)
    with served(url) as address:
        reporter.start()
        other.start()
        study = studies["annealing"]
        try:
            for number in range(5, 8):
                add_trial(study, "annealing", 0.5, 45_000.0 - number)

                def noted(number: int = number) -> bool:
                    return f"annealing/{number}" in detail_of(address, study)["note"]["body"]

                wait_for(noted)
        finally:
            reporter.stop()
            other.stop()
        assert is_ours(detail_of(address, study)["note"]["body"])


def test_a_reporter_outlives_a_database_without_the_study(
    studies: dict[str, optuna.Study], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = dashboard.Reporter(url, "another", every=0.01)
    reporter.start()
    time.sleep(0.2)
    reporter.stop()
    assert not caplog.records


def test_pages_are_styled(studies: dict[str, optuna.Study], url: str) -> None:
    with served(url) as address:
        page = fetch(f"{address}/dashboard/studies/1")
        assert page.count(b"overflow-wrap: anywhere") == 1 and page.rstrip().endswith(b"</html>")
        assert b"overflow-wrap" not in fetch(f"{address}/api/studies")


def test_serve_reports_its_address_and_ends_on_ctrl_c(
    studies: dict[str, optuna.Study], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    ready: list[str] = []

    def interrupted(self: object, poll_interval: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dashboard._ThreadedServer, "serve_forever", interrupted)
    monkeypatch.setattr("webbrowser.open", opened.append)
    before = threading.active_count()
    dashboard.serve(url, None, open_browser=True, on_ready=ready.append, study="demo")
    assert ready == opened and ready[0].startswith("http://127.0.0.1:")
    wait_for(lambda: threading.active_count() == before)


@pytest.mark.slow
def test_the_command_serves_a_study_of_which_only_the_database_is_here(
    studies: dict[str, optuna.Study], url: str, tmp_path: Path
) -> None:
    study = studies["exploration"]
    study.set_user_attr("artifacts", str(tmp_path / "elsewhere"))
    command = [sys.executable, "-m", "autocompress.study", "dashboard", "demo", "--storage", url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().split()[0].rstrip("/")
        assert address.startswith("http://127.0.0.1:")
        wait_for(lambda: detail_of(address, study)["note"]["body"])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "which is not on this machine" in process.stderr.read()
    assert not (tmp_path / "elsewhere").exists()


def test_artifacts_are_found_or_left_out(tmp_path: Path) -> None:
    here, place = tmp_path / "here", tmp_path / "place"
    assert dashboard.find_artifacts(str(place), here) is None
    assert not place.exists() and not here.exists()
    place.mkdir()
    assert dashboard.find_artifacts(str(place), here) is not None
    assert dashboard.find_artifacts("/nowhere", given=str(place)) is not None
    with pytest.raises(ConfigError, match=r"--artifacts .*missing is no folder.*s3://BUCKET"):
        dashboard.find_artifacts(None, given=str(tmp_path / "missing"))


def test_errors_name_the_cure(tmp_path: Path, closed_storages: None) -> None:
    missing, there = tmp_path / "nothing.db", f"sqlite:///{tmp_path / 'study.db'}"
    open_storage(there)
    with pytest.raises(ConfigError, match="no study database at .*nothing.db"):
        dashboard.build_server(f"sqlite:///{missing}", None)
    assert not missing.exists()
    with pytest.raises(ConfigError, match="'runs/x' is no database URL"):
        dashboard.build_server("runs/x", None)
    with pytest.raises(ConfigError, match="There is no study 'demo' in sqlite"):
        dashboard.artifact_place(there, "demo")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}.*another port"):
            dashboard.build_server(there, None, port=port)
    with pytest.raises(ConfigError, match="can't listen on 127.0.0.1:99999"):
        dashboard.build_server(there, None, port=99999)
