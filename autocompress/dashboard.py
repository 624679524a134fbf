"""Optuna's dashboard on the studies of a folder: notes for people, and a server on loopback."""

from __future__ import annotations

import warnings
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
import optuna_dashboard
from optuna.artifacts import get_all_artifact_meta
from optuna.artifacts._protocol import ArtifactStore
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from autocompress.database import hide_password, open_storage
from autocompress.errors import ConfigError
from autocompress.scale import Scale
from autocompress.trials import lost, violation, within_delta
from autocompress.view import OBJECTIVES, pareto_trials
from autocompress.wording import (
    latency_label,
    plan_channels,
    plan_layers,
    quantity,
    transform_text,
)

_METRICS = {
    "score": "",
    "params": "params",
    "size_bytes": "size",
    "macs": "MACs",
    "latency_ms": "latency",
    "memory_bytes": "memory",
}


def annotate(study: optuna.Study, artifact_store: Any = None) -> int:
    """Write the baseline as the study's note and a note on each trial of the Pareto front.

    Where no trial is within delta, the one with the smallest drop gets the note. A note that is
    there already stays as it is, so that what a user wrote in the dashboard is never lost.

    Args:
        study: "NAME-exploration" or "NAME-annealing", with the attributes that the conductor sets.
        artifact_store: Names the store when given: notes then list the artifacts of the trial,
            which the dashboard offers for download when it is served with the same store.

    Returns:
        Number of notes written.
    """
    attributes = study.user_attrs
    if "delta" not in attributes:
        # The baseline is still being made; a note that is there stays as it is.
        return 0
    delta = float(attributes["delta"])
    metric = OBJECTIVES[str(attributes.get("objective", "params"))][0]
    scale = Scale.from_dict(attributes.get("metric"))
    names = [scale.drop_name, metric]
    if study.metric_names is None:
        with warnings.catch_warnings():
            # Marked experimental since 3.2; without it the axes of the plots have no names.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(names)
    written = _save_once(study, _study_note(study))
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    nearest = sorted(trials, key=violation)[:1]
    for trial in pareto_trials(trials) or nearest:
        files = []
        if artifact_store is not None:
            # FrozenTrial has no storage of its own, so it is passed along.
            metas = get_all_artifact_meta(trial, storage=study._storage)
            files = [meta.filename for meta in metas]
        note = _trial_note(trial, attributes.get("baseline") or {}, delta, scale, files)
        written += _save_once(_TrialHandle(study, trial), note)
    return written


def build_server(
    storage: str, store: ArtifactStore | None, host: str = "127.0.0.1", port: int | None = None
) -> WSGIServer:
    """A bound server that answers once `serve_forever()` runs; stop it with `shutdown()`.

    Args:
        storage: SQLAlchemy URL.
        store: The artifact store; None shows no artifacts.
        host: Address to listen on; the default is reachable from this machine only.
        port: None takes a free one.

    Raises:
        ConfigError: Database or port is missing.
    """
    _check_database(storage)
    app = optuna_dashboard.wsgi(open_storage(storage), artifact_store=store)
    try:
        return make_server(host, port or 0, app, _ThreadedServer, _QuietHandler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"The dashboard can't listen on {host}:{port or 0}: {reason}. "
            "Give another port, or none to take a free one."
        ) from error


def serve(
    storage: str,
    store: ArtifactStore | None,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        storage: SQLAlchemy URL.
        store: The artifact store; None shows no artifacts.
        host: Address to listen on; the default is reachable from this machine only.
        port: None takes a free one.
        open_browser: Open the address in the user's browser.
        on_ready: Called once with the address, when connections are accepted.
    """
    with build_server(storage, store, host, port) as server:
        url = f"http://{_in_url(host)}:{server.server_port}/"
        if on_ready is not None:
            on_ready(url)
        if open_browser:
            webbrowser.open(url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass


class _ThreadedServer(ThreadingMixIn, WSGIServer):
    """A page loads a dozen files at once, so one thread a request; none outlives the server."""

    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer looks up the host's full name here, which can hang for seconds without a
        # name server; the address as given is enough.
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()


class _QuietHandler(WSGIRequestHandler):
    """One line per request would bury what the command has to say."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _TrialHandle:
    """A finished trial as `optuna_dashboard.save_note` wants it: with its study and storage."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.study = study
        self.storage = study._storage
        self._trial_id = trial._trial_id


def _save_once(target: Any, body: str) -> int:
    if optuna_dashboard.get_note(target):
        return 0
    optuna_dashboard.save_note(target, body)
    return 1


def _study_note(study: optuna.Study) -> str:
    attributes = study.user_attrs
    baseline = attributes.get("baseline") or {}
    objective = str(attributes.get("objective", "params"))
    scale = Scale.from_dict(attributes.get("metric"))
    left_alone: Mapping[str, str] = attributes.get("left_alone") or {}
    lines = [
        f"## {_cell(study.study_name)}",
        "",
        f"Goal: the lowest {objective} with a drop in {_cell(scale.name)} of at most "
        f"{scale.difference(attributes.get('delta', 0.0))} on validation data"
        f"{', of the int8 file' if _in_int8(attributes) else ''}.",
        "",
        "### Baseline",
        "",
        *_table(("metric", "value"), _metric_rows(_baseline_metrics(baseline), {}, scale)),
    ]
    if left_alone:
        rows = [(f"`{_cell(name)}`", _cell(reason)) for name, reason in left_alone.items()]
        lines += ["", "### Layers left alone", "", *_table(("layer", "reason"), rows)]
    return "\n".join(lines) + "\n"


def _in_int8(attributes: Mapping[str, Any]) -> bool:
    """Whether the study's trials are judged by their int8 files."""
    return bool((attributes.get("config") or {}).get("search.int8"))


def _trial_note(
    trial: FrozenTrial,
    baseline: Mapping[str, Any],
    delta: float,
    scale: Scale,
    files: Sequence[str],
) -> str:
    attributes = trial.user_attrs
    errors = attributes.get("layer_errors") or {}
    drop = trial.values[0]
    verdict = "within" if within_delta(trial) else "above"
    lines = [
        f"## Trial {trial.number}",
        "",
        f"Drop {scale.difference(drop)}, at most {scale.number(lost(trial, delta))} at the "
        f"study's confidence: {verdict} the allowed {scale.number(delta)}.",
    ]
    if attributes.get("parent"):
        lines += ["", f"Parent: {_cell(attributes['parent'])}"]
    metrics = attributes.get("metrics") or {}
    rows = _metric_rows(_baseline_metrics(baseline), metrics, scale)
    lines += ["", *_table(("metric", "baseline", "trial", "ratio"), rows)]
    layers = plan_layers(attributes.get("plan"))
    plan_rows = [
        (
            f"`{_cell(name)}`",
            _cell(transform_text(transform)),
            f"{errors[name]:.3f}" if name in errors else "–",
        )
        for name, transform in layers.items()
    ]
    lines += ["", "### Plan", ""]
    lines += _table(("layer", "transform", "error"), plan_rows) if plan_rows else ["No layer."]
    groups = plan_channels(attributes.get("plan"))
    if groups:
        kept = [(f"`{_cell(name)}`", str(left), str(of)) for name, (left, of) in groups.items()]
        lines += ["", "### Channels", "", *_table(("group", "left", "of"), kept)]
    if files:
        lines += ["", "Artifacts: " + ", ".join(f"`{_cell(name)}`" for name in files)]
    return "\n".join(lines) + "\n"


def _baseline_metrics(baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline under the names of a trial's metrics; a profile may lie flat or nested."""
    found = {**baseline, **(baseline.get("profile") or {})}
    if baseline.get("score") is not None:
        found["score"] = baseline["score"]
    latency = found.get("latency")
    if isinstance(latency, Mapping):
        found["latency_ms"] = latency.get("median_ms")
    return found


def _metric_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], scale: Scale
) -> list[tuple[str, ...]]:
    """Rows (metric, baseline), with (trial, ratio) too if `after` holds anything."""
    rows: list[tuple[str, ...]] = []
    for key, label in _METRICS.items():
        was, now = before.get(key), after.get(key)
        if was is None and now is None:
            continue
        if key == "latency_ms" and isinstance(before.get("latency"), Mapping):
            label = latency_label(before["latency"]).replace("Latency", "latency")
        if key == "score":
            label = _cell(scale.name)
        row: tuple[str, ...] = (label, quantity(was, key, scale))
        if after:
            ratio = f"{was / now:.2f}x" if was and now and key != "score" else ""
            row += (quantity(now, key, scale), ratio)
        rows.append(row)
    return rows


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(text: object) -> str:
    """Text that can't end its cell, open a tag or become a link."""
    plain = " ".join(str(text).split())
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _check_database(storage: str) -> None:
    """SQLite would make an empty file where the path is wrong; that is no dashboard to look at."""
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise ConfigError(
            f"Storage '{hide_password(storage)}' is no database URL. Use one such as sqlite:///runs/x/study.db."
        ) from error
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise ConfigError(
            f"There is no study database at '{url.database}'. Run the study first, or give the "
            "folder in which it lies."
        )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
