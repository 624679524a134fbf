"""optuna-dashboard on a study: where the study is, a server, and news while it serves."""

from __future__ import annotations

import logging
import threading
import webbrowser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard
import optuna_dashboard._app
from optuna.artifacts._protocol import ArtifactStore
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from autocompress.artifacts import open_artifacts
from autocompress.database import PatientStorage, hide_password, open_storage
from autocompress.errors import ConfigError
from autocompress.notes import OUTCOME
from autocompress.pinboard import annotate
from autocompress.process import SEARCHING
from autocompress.store import PLACE, STAGES, load_stages, nearest

logger = logging.getLogger("autocompress")

REFRESH = 5.0
"""Seconds between two looks for trials that have ended."""
PATIENCE = 20.0
"""Seconds for which a page waits for a database that is away."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that no other machine reaches."""

_STYLE = b"""<style>
/* A plan is one long line, and would make a trial's page as wide as itself. */
p.MuiTypography-root { white-space: normal; overflow-wrap: anywhere; }
/* Or a row of a table as high as a page. */
.MuiTableBody-root .MuiTableCell-root {
  max-width: min(36em, 45vw); white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
}
/* Tables of notes. */
.MuiCardContent-root > table { border-collapse: collapse; }
.MuiCardContent-root > table :is(td, th) {
  padding: 3px 18px 3px 0; border-bottom: 1px solid #8884; text-align: start;
}
.MuiCardContent-root > table [style*="right"] { text-align: end !important; }
/* Plots of a study's own come first, and in line with the other cards. */
.MuiGrid-root:has(> .MuiPaper-root [id^="user-defined-plot:"]) {
  order: -1; padding: 16px 0 0 16px;
}
</style></head>"""


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
    check_database(storage)
    _mend_pages()
    app = optuna_dashboard.wsgi(open_storage(storage, PATIENCE), artifact_store=store)
    try:
        return make_server(host, port or 0, _styled(app), _ThreadedServer, _QuietHandler)
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
    study: str | None = None,
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        storage: SQLAlchemy URL.
        store: The artifact store; None shows no artifacts.
        host: Address to listen on; the default is reachable from this machine only.
        port: None takes a free one.
        open_browser: Open the address in the user's browser.
        on_ready: Called once with the address, when connections are accepted.
        study: Name of the study whose notes and plots are kept up to date meanwhile.
    """
    with build_server(storage, store, host, port) as server:
        url = f"http://{_in_url(host)}:{server.server_port}/"
        if on_ready is not None:
            on_ready(url)
        if open_browser:
            webbrowser.open(url)
        reporter = None if study is None else Reporter(storage, study)
        if reporter is not None:
            reporter.start()
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            if reporter is not None:
                reporter.stop()


class Reporter:
    """Keeps notes and plots of a study up to date in the background, so that no worker has to.

    Args:
        storage: SQLAlchemy URL.
        study: The study's name, without a stage.
        every: Seconds between two looks.
    """

    def __init__(self, storage: str, study: str, every: float = REFRESH) -> None:
        self._url, self._study, self._every = storage, study, every
        self._stages: dict[str, Study] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is being written is written, unless the database is away."""
        self._over.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        storage: PatientStorage | None = None
        seen: object = None
        while not self._over.is_set():
            try:
                storage = storage or open_storage(self._url, PATIENCE)
                seen = self._look(storage, seen)
            except Exception as error:
                # Pages are served without fresh notes too; the next look may find the cause gone.
                logger.warning("Notes and plots are not up to date: %s", error)
            self._over.wait(self._every)
        if storage is not None:
            storage.close()

    def _look(self, storage: PatientStorage, seen: object) -> object:
        """Write what is new, if trials have ended since the last look; returns what was seen."""
        if len(self._stages) < len(STAGES):
            # Kept, for they remember the trials that have ended.
            self._stages = {**load_stages(storage, self._study), **self._stages}
        if not self._stages:
            return seen
        facts = next(iter(self._stages.values())).user_attrs
        found = (
            [[t.state for t in s.get_trials(deepcopy=False)] for s in self._stages.values()],
            [facts.get(key) for key in ("delta", SEARCHING, OUTCOME)],
        )
        if found != seen:
            annotate(self._stages)
        return found


def find_artifacts(
    place: str | None, here: Path | None = None, given: str | None = None
) -> ArtifactStore | None:
    """A study's artifacts as far as they can be seen from this machine; nothing is written.

    Args:
        place: Where the study keeps them.
        here: The folder of artifacts in the study's own folder, which may have been moved.
        given: Where they are seen from here, as the user says.

    Returns:
        The store; None where they are out of reach.

    Raises:
        ConfigError: If they are not where the user says.
    """
    if given is not None and "://" not in given and not Path(given).expanduser().is_dir():
        raise ConfigError(
            f"--artifacts {given} is no folder. Give where the study's artifacts are seen from "
            "here: a folder, or s3://BUCKET."
        )
    if given is not None:
        return open_artifacts(given, writes=False)
    found = nearest(place, here)
    return None if found is None else open_artifacts(str(found), writes=False)


def artifact_place(storage: str, study: str) -> str | None:
    """Where a study that has begun keeps its artifacts, as its database says.

    Raises:
        ConfigError: If there is no such study, or no database.
    """
    check_database(storage)
    found = load_stages(open_storage(storage), study)
    if not found:
        raise ConfigError(f"There is no study '{study}' in {hide_password(storage)}.")
    place: str | None = next(iter(found.values())).user_attrs.get(PLACE)
    return place


def check_database(storage: str) -> None:
    """Refuse a database that is not there; SQLite would make an empty file in its place.

    Raises:
        ConfigError: If so.
    """
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise ConfigError(
            f"Storage '{hide_password(storage)}' is no database URL. Use one such as "
            "sqlite:///runs/x/study.db."
        ) from error
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise ConfigError(
            f"There is no study database at '{url.database}'. Run the study first, or give the "
            "folder in which it lies."
        )


def _mend_pages() -> None:
    """Mend two things that pages show wrongly; where a newer dashboard has them, nothing is done.

    Trials that are not feasible are called the best, though plots and Optuna's own
    `Study.best_trials` know better; and the plots of a study come in any order.
    """
    app: Any = optuna_dashboard._app
    front = getattr(app, "get_pareto_front_trials", None)
    plots = getattr(app, "get_plotly_graph_objects", None)
    if front is None or plots is None or hasattr(front, "mended"):
        return

    def feasible_front(trials: Sequence[FrozenTrial], directions: Any) -> Any:
        kept = [t for t in trials if all(c <= 0 for c in t.constraints.values())]
        return front(trials=kept, directions=directions)

    feasible_front.mended = True  # type: ignore[attr-defined]
    app.get_pareto_front_trials = feasible_front
    app.get_plotly_graph_objects = lambda attrs: dict(sorted(plots(attrs).items()))


def _styled(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The same pages with a few lines of style."""

    def styled(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not environ.get("PATH_INFO", "").startswith("/dashboard"):
            return app(environ, start_response)
        # Whether the page was changed since the browser's last visit, this server can't say.
        environ.pop("HTTP_IF_MODIFIED_SINCE", None)
        begun: list[Any] = []
        body = app(environ, lambda *arguments: begun.extend(arguments))
        page = b"".join(body).replace(b"</head>", _STYLE, 1)
        getattr(body, "close", lambda: None)()
        kept = [(k, v) for k, v in begun[1] if k.lower() not in ("content-length", "last-modified")]
        length = ("Content-Length", str(len(page)))
        start_response(begun[0], [*kept, length], *begun[2:])
        return [page]

    return styled


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


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
