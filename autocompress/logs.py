"""The study's log: everything that is said while it runs, on the screen or not.

It begins with what one needs to understand the rest (command, versions, machine, settings), holds
records of all levels, warnings, tracebacks and the lines of workers, and goes on where a study is
continued. It is bounded, for a data loader that prints at each batch would fill the disk.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger("autocompress")

SHOWN = {"shown": True}
"""Marks records that are on the screen as well."""
MOST_BYTES, OLD_FILES = 32 * 2**20, 3
"""A log of this size becomes study.log.1, and so on; of these so many are kept."""
PACKAGES = (
    "autocompress",
    "torch",
    "torchvision",
    "optuna",
    "sqlalchemy",
    "numpy",
    "onnx",
    "onnxruntime",
    "pydantic",
)
"""What the head of a log tells the versions of."""
OTHERS = ("optuna",)
"""Loggers of libraries whose warnings the log has too."""


class _Discreet(logging.Formatter):
    """Time, level and text, in which secrets are replaced.

    Args:
        secrets: What must not be written, and what stands for it.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self._secrets = {long: short for long, short in secrets.items() if long and long != short}

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret, stand_in in self._secrets.items():
            text = text.replace(secret, stand_in)
        return text


@contextmanager
def study_log(
    path: Path,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
    secrets: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Append what is said in the block to a log; nothing changes where it is kept already.

    Args:
        path: The file.
        command: How this was called.
        settings: Of the study, by dotted name.
        secrets: What must not be written, such as a URL with a password, and what stands for it.
    """
    where = os.path.abspath(path)
    if any(getattr(handler, "baseFilename", None) == where for handler in logger.handlers):
        yield
        return
    handler = RotatingFileHandler(
        path, maxBytes=MOST_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors="replace"
    )
    handler.setFormatter(_Discreet(secrets or {}))
    with ExitStack() as stack:
        stack.callback(handler.close)
        stack.enter_context(attached(handler, logger, logging.DEBUG))
        for name in OTHERS:
            stack.enter_context(attached(handler, logging.getLogger(name)))
        stack.enter_context(warnings_in_log())
        for line in head(command, settings or {}):
            logger.debug("%s", line, extra=SHOWN)  # for the log alone
        try:
            yield
        except BaseException as error:
            told = isinstance(error, Exception)
            logger.debug("Ended by %s", type(error).__name__, exc_info=error if told else None)
            raise


@contextmanager
def attached(
    handler: logging.Handler, to: logging.Logger, level: int | None = None
) -> Iterator[None]:
    """A block in which a logger has a handler, and lets records of a level through."""
    before = to.level
    to.addHandler(handler)
    if level is not None:
        to.setLevel(level)
    try:
        yield
    finally:
        to.removeHandler(handler)
        to.setLevel(before)


@contextmanager
def warnings_in_log(elsewhere: bool = True) -> Iterator[None]:
    """A block in which warnings go to the log too.

    Args:
        elsewhere: Whether they also go where they went before.
    """
    before: Callable[..., None] = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        logger.warning("%s", text.rstrip(), extra=SHOWN if elsewhere else None)
        if elsewhere:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def head(command: str, settings: Mapping[str, Any]) -> list[str]:
    """What one needs to know to understand a log."""
    versions = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    return [
        f"Command: {command or 'from Python'}",
        f"In {Path.cwd()} on {platform.node()}, process {os.getpid()}",
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        ", ".join(versions),
        *(f"Setting: {key} = {value!r}" for key, value in settings.items()),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
