"""The study's log: everything, but no secret and no flood."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from autocompress import logs
from autocompress.logs import study_log

logger = logging.getLogger("autocompress")


def test_it_says_how_it_was_made_and_has_all_levels(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    with study_log(path, "run my.toml", {"delta": 2.0}):
        logger.debug("a small thing")
        logger.info("a message")
        logging.getLogger("optuna").warning("of the library")
    logger.error("afterwards")
    text = path.read_text()
    for words in ("Command: run my.toml", "delta = 2.0", "torch 2.", "Python 3.", "process "):
        assert words in text
    assert "DEBUG   a small thing" in text and "INFO    a message" in text
    assert "WARNING of the library" in text and "afterwards" not in text


def test_it_goes_on_where_a_study_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    for word in ("first", "second"):
        with study_log(path), study_log(path):  # the command line's, and that of the study
            logger.info(word)
    text = path.read_text()
    assert text.count("first") == text.count("second") == 1 and text.count("Command:") == 2


def test_warnings_and_what_ended_it_are_in_it(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    with (
        warnings.catch_warnings(record=True) as shown,
        pytest.raises(LookupError),
        study_log(path),
    ):
        warnings.simplefilter("always")
        warnings.warn("mind this", UserWarning, stacklevel=1)
        raise LookupError("gone wrong")
    text = path.read_text()
    assert "UserWarning: mind this" in text
    assert "Traceback" in text and "LookupError: gone wrong" in text
    assert not logger.handlers or path.name not in str(logger.handlers)
    assert len(shown) == 1


def test_secrets_are_replaced_wherever_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    url = "postgresql://me:s3cret@host/db"
    with study_log(path, f"run --storage {url}", secrets={url: "postgresql://me:***@host/db"}):
        try:
            raise OSError(f"no way to {url}")
        except OSError:
            logger.exception("failed")
    text = path.read_text()
    assert "s3cret" not in text and text.count("me:***@host") >= 2


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 20_000)
    path = tmp_path / "study.log"
    with study_log(path):
        for number in range(3000):
            logger.debug("line %d of a data loader that prints at each batch", number)
    kept = sorted(tmp_path.iterdir())
    assert [one.name for one in kept] == ["study.log", *(f"study.log.{n}" for n in (1, 2, 3))]
    assert sum(one.stat().st_size for one in kept) <= 4 * 20_000
    assert "line 2999" in path.read_text()
