"""What a worker's process tells the one that started it."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from conftest import tiny_config

from autocompress.logs import attached, warnings_in_log
from autocompress.process import EventDisplay, EventHandler
from autocompress.progress import NullDisplay
from autocompress.serving import _log_of
from autocompress.store import StudyFolder
from autocompress.workers import Pool


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_log_records_warnings_and_tracebacks_are_passed_on() -> None:
    stream, logger = io.StringIO(), logging.getLogger("autocompress")
    handler = EventHandler(EventDisplay(stream))
    with (
        warnings.catch_warnings(record=True) as shown,
        attached(handler, logger, logging.DEBUG),
        warnings_in_log(elsewhere=False),
    ):
        warnings.simplefilter("always")
        logger.debug("a small thing")
        try:
            raise LookupError("a bad batch")
        except LookupError as error:
            logger.warning("failed", exc_info=error)
        warnings.warn("mind this", UserWarning, stacklevel=1)
    small, failed, warned = events(stream)
    assert small == {"event": "log", "level": logging.DEBUG, "message": "a small thing"}
    assert "Traceback" in failed["message"] and "LookupError: a bad batch" in failed["message"]
    assert "UserWarning: mind this" in warned["message"] and not shown


def test_a_pool_puts_what_workers_log_into_its_own_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="autocompress")
    pool = Pool([], lambda: [], NullDisplay())
    place: Any = SimpleNamespace(name="worker 3")
    pool._pass_on(place, {"event": "log", "level": logging.WARNING, "message": "odd"})
    assert caplog.records[-1].getMessage() == "worker 3: odd"
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_new_phase_is_told_at_once_and_its_steps_each_second() -> None:
    stream, now = io.StringIO(), [100.0]
    display = EventDisplay(stream, lambda: now[0])
    for phase, done in (("build", 0.0), ("fine-tune", 0.1), ("fine-tune", 0.2), ("evaluate", 0.0)):
        now[0] += 0.1
        display.step(phase, done, 1.0)
    now[0] += 1.0
    display.step("evaluate", 0.5, 1.0)
    told = [(event["phase"], event["done"]) for event in events(stream)]
    assert told == [("build", 0.0), ("fine-tune", 0.1), ("evaluate", 0.0), ("evaluate", 0.5)]


def test_a_worker_elsewhere_logs_in_the_studys_folder_if_it_is_the_same(tmp_path: Path) -> None:
    study, config = optuna.create_study(), tiny_config(tmp_path)
    folder = StudyFolder(tmp_path / "tiny")
    folder.create()
    folder.claim(study, None)
    assert _log_of(config, study).parent == folder.path / "workers"
    folder.identity.write_text("another study")
    assert _log_of(config, study).parent.name == "logs"
    assert "tiny" in _log_of(config, study).name
