"""How a command of the command line speaks: text for people, or one JSON document for programs.

Results go to standard output; errors and, with `--json`, everything but the document go to standard
error. Each command takes the options that it has a use for.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from autocompress.progress import Display

EXIT_BUG = 1
EXIT_ERROR = 2
EXIT_NOT_MET = 3
EXIT_INTERRUPTED = 130

QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the final result only.")
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Print what the log has too: libraries' warnings, tracebacks, lines of workers.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document on standard output at the end, all else on standard error.",
    ),
]


@dataclass(frozen=True)
class Voice:
    """What a command was told about its output.

    Attributes:
        quiet: Only errors and the result.
        verbose: What the log has, too.
        json: A document in place of text.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def say(self, what: Any) -> None:
        """Print a part of the result, for people."""
        if not self.json:
            from rich.console import Console

            # Brackets in names and paths are no markup.
            Console().print(what, markup=False, soft_wrap=True)

    def note(self, what: Any) -> None:
        """Print what is good to know besides the result."""
        if not self.quiet:
            self.say(what)

    def complain(self, text: str) -> None:
        """Print on standard error."""
        complain(text)

    def document(self, content: Mapping[str, Any]) -> None:
        """Print the result for programs."""
        if self.json:
            print_document(content)

    def display(self) -> Display:
        """What shows the progress."""
        from rich.console import Console

        from autocompress.progress import NullDisplay, make_display

        return NullDisplay() if self.quiet else make_display(Console(stderr=self.json))

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """A block in which libraries' warnings, which mean nothing to most people, are in the log
        alone, or with `--verbose` on the terminal together with all other records."""
        from autocompress.logs import attached

        with ExitStack() as stack:
            if self.verbose:
                logger = logging.getLogger("autocompress")
                stack.enter_context(attached(_Terminal(), logger, logging.DEBUG))
            else:
                stack.enter_context(_silent_warnings())
            yield


class _Terminal(logging.Handler):
    """Prints the records that are not on the screen otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "shown", False):
            complain(self.format(record))


@contextmanager
def _silent_warnings() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = lambda *_, **__: None
    try:
        yield
    finally:
        warnings.showwarning = before


def complain(text: str) -> None:
    """Print on standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


_documents: ContextVar[TextIO | None] = ContextVar("documents", default=None)


def print_document(content: Mapping[str, Any]) -> None:
    """Print JSON on standard output; numbers that JSON has no word for become null."""
    output = _documents.get() or sys.stdout
    output.write(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")
    output.flush()


@contextmanager
def documents_alone() -> Iterator[None]:
    """A block in which standard output has documents alone: what the user's own functions print
    goes to standard error."""
    token = _documents.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.reset(token)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def wants_json(arguments: list[str]) -> bool:
    """Whether a command line asks for JSON, even where it is wrong otherwise."""
    before, _, _ = " ".join(arguments).partition(" -- ")
    return "--json" in before.split()


def end_in_error(text: str, code: int, as_json: bool) -> SystemExit:
    """Print an error, on both outputs if JSON is asked for; the exit to raise."""
    complain(f"Error: {text}")
    if as_json:
        print_document({"error": text, "exit_code": code})
    return SystemExit(code)
