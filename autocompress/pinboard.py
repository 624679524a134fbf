"""What a study shows in optuna-dashboard beyond its trials: notes and plots, kept up to date.

They are attributes of the Optuna studies, in the form in which optuna-dashboard stores its own, so
that any dashboard on the database shows them. All of a stage's are written in one transaction, and
only what differs. A note that somebody changed, or emptied, is theirs from then on.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.study import Study

from autocompress.database import write_study_attrs
from autocompress.figures import history_figure, pareto_figure
from autocompress.notes import Board, study_note, trial_note
from autocompress.trials import violation

MOST_NOTES = 200
"""Trials of a stage that have a note. The dashboard goes through all notes for each trial whenever
a page asks for news: 1,000 notes on 1,000 trials double the seconds that a page takes."""
LARGEST_PLOT = 200_000
"""Characters from which on a plot does without the texts that appear under the mouse; that is some
900 trials on the Pareto plot."""
CHUNK = 2045
"""Characters of a note or plot in one attribute, as optuna-dashboard has it."""
PARETO_PLOT = "1-pareto-front"
HISTORY_PLOT = "2-history"
"""Names of the plots, by which they are sorted."""

_SHORTER = {"within the allowed drop": "within delta", "not surely within it": "not surely"}
"""In the legend, of which a card has room for two columns."""

_SIGNED = "written by autocompress, and anew when there is news, until you change this note"
_SIGNATURE = re.compile(rf'\n\n\[note\]: # "{_SIGNED}; ([0-9a-f]{{12}})"\n$')


def annotate(studies: Mapping[str, Study]) -> int:
    """Write notes and plots of a study's stages where they are missing or out of date.

    Args:
        studies: The Optuna studies by stage, the exploration first.

    Returns:
        Number of notes and plots that were written.
    """
    board = Board.read(studies)
    if board is None:
        return 0
    plots = dict(_plots(board))
    return sum(_write(study, _notes(board, stage), plots) for stage, study in studies.items())


def _notes(board: Board, stage: str) -> dict[int | None, str]:
    """The notes of a stage, by the trial's id; None is the study's own."""
    notes: dict[int | None, str] = {None: study_note(board, stage)}
    views = {view.number: view for view in board.trials if view.stage == stage}
    ended = [t for t in board.records[stage] if t.state.is_finished()]
    # Where there are too many: those of the front, then those that came nearest to delta.
    ended.sort(key=lambda t: (not views[t.number].on_front, violation(t), t.number))
    for trial in ended[:MOST_NOTES]:
        notes[trial._trial_id] = trial_note(board, views[trial.number], trial)
    return notes


def _plots(board: Board) -> Iterator[tuple[str, str]]:
    """Plots for the card of a study's page, by name, as JSON."""
    pareto = pareto_figure(
        board.trials, board.delta, board.objective, board.baseline_cost, board.scale
    )
    history = history_figure(board.trials, board.objective, board.scale)
    for name, title, figure in (
        (PARETO_PLOT, "Pareto front of both stages", pareto),
        (HISTORY_PLOT, "History of both stages", history),
    ):
        if figure is not None:
            yield name, _light(_in_card(figure, title))


def _in_card(figure: Any, title: str) -> Any:
    """A figure as it fits into a card of half a page's width, its legend in two columns below."""
    rows = math.ceil(sum(trace.showlegend is not False for trace in figure.data) / 2)
    for trace in figure.data:
        for long, short in _SHORTER.items():
            trace.name = (trace.name or "").replace(long, short) or None
    figure.update_layout(
        title={"text": f"<b>{title}</b>", "x": 0.01, "y": 0.98, "font": {"size": 17}},
        height=450,
        margin={"l": 10, "r": 10, "t": 50, "b": 60 + 19 * rows},
        # A dashboard may be dark.
        paper_bgcolor="#ffffff",
        font={"color": "#222222"},
        legend={
            "xref": "container",
            "x": 0.02,
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
            "entrywidth": 165,
            "font": {"size": 11},
        },
    )
    return figure


def _light(figure: Any) -> str:
    """A figure as JSON, which each page loads again and again."""
    text: str = figure.to_json()
    if len(text) > LARGEST_PLOT:
        figure.update_traces(text=None, hovertemplate=None)
        text = figure.to_json()
    return text


def _write(study: Study, notes: Mapping[int | None, str], plots: Mapping[str, str]) -> int:
    known = study._storage.get_study_system_attrs(study._study_id)
    attrs: dict[str, Any] = {}
    written = 0
    for trial_id, body in notes.items():
        fresh = _note_attrs(known, trial_id, body)
        attrs |= fresh
        written += bool(fresh)
    for name, text in plots.items():
        fresh = _changed(known, f"dashboard:plot_data:{name}:", text)
        attrs |= fresh
        written += bool(fresh)
    return written if attrs and write_study_attrs(study, attrs, known) else 0


def _note_attrs(known: Mapping[str, Any], trial_id: int | None, body: str) -> dict[str, Any]:
    """What to write for a note; nothing where it is as it should be, or somebody else's."""
    owner = "dashboard:" if trial_id is None else f"dashboard:{trial_id}:"
    version, prefix = f"{owner}note_ver", f"{owner}note_str:"
    if version in known and not is_ours(_joined(known, prefix)):
        return {}
    changed = _changed(known, prefix, signed(body))
    # A version that stays lets somebody who is just editing the note save it.
    return {version: known.get(version, 1), **changed} if changed else {}


def signed(body: str) -> str:
    """A note with a mark that Markdown doesn't show, by which it is known as it was written."""
    return f'{body}\n\n[note]: # "{_SIGNED}; {_digest(body)}"\n'


def is_ours(note: str) -> bool:
    """Whether a note is as `signed` made it."""
    found = _SIGNATURE.search(note)
    return found is not None and found.group(1) == _digest(note[: found.start()])


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]


def _changed(known: Mapping[str, Any], prefix: str, text: str) -> dict[str, Any]:
    """The pieces of a text as attributes; nothing where they are there already.

    All pieces are given, so that they are written together or not at all. What an older, longer
    text leaves over is emptied.
    """
    if _joined(known, prefix) == text:
        return {}
    count = max(math.ceil(len(text) / CHUNK), _pieces(known, prefix))
    return {f"{prefix}{i}": text[i * CHUNK : (i + 1) * CHUNK] for i in range(count)}


def _joined(known: Mapping[str, Any], prefix: str) -> str:
    return "".join(str(known.get(f"{prefix}{i}", "")) for i in range(_pieces(known, prefix)))


def _pieces(known: Mapping[str, Any], prefix: str) -> int:
    count = 0
    while f"{prefix}{count}" in known:
        count += 1
    return count
