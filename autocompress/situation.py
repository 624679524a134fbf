"""How far a study is, read from its database: from another terminal or machine, while it runs.

The same tally and the same lines as on the screen of the process that runs it; see `news.py` for
what that process and its workers write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autocompress.amounts import format_ratio, format_seconds
from autocompress.config import StudyConfig
from autocompress.database import hide_password
from autocompress.facts import Costs, cost_ratio, costs_of, facts_of
from autocompress.news import NEWS, SILENT, doing_of
from autocompress.progress import STEP_INTERVAL, can_redraw, plain_trial_line
from autocompress.scale import Scale
from autocompress.screen import Panel, phase_words, trial_line
from autocompress.slots import WORKER, is_gone
from autocompress.store import STAGES, trials_spent
from autocompress.tally import NO_FACTS, Facts, Row, Tally
from autocompress.trials import EXTRA, TRACEBACK, within_delta

REFRESH = 2.0
"""Seconds between two looks at a study that is watched."""


@dataclass(frozen=True)
class StageCount:
    """A stage's trials, by what became of them."""

    name: str
    total: int
    ended: int = 0
    stopped: int = 0
    failed: int = 0
    running: int = 0
    within_delta: int = 0


@dataclass(frozen=True)
class Ended:
    """An ended trial, as displays show it."""

    stage: str
    trial: FrozenTrial
    drop: float | None
    ratio: float | None
    within: bool


@dataclass(frozen=True)
class Situation:
    """A study at a moment.

    Attributes:
        config: Its settings, as it was run last.
        place: Its folder, or where its database is.
        state: "running", "silent" (it seems to run, but gives no sign of life), "interrupted",
            "failed", "finished", or "unknown" (no process has told of it).
        heard: Seconds since the process that conducts it told something; None if it never did.
        where: That process: host and process number.
        tally: What displays show.
        stages: Their trials.
        ended: The ended trials, in order.
        baseline: The baseline's costs; None before they are known.
    """

    config: StudyConfig
    place: str
    state: str
    heard: float | None
    where: str
    tally: Tally
    stages: Sequence[StageCount]
    ended: Sequence[Ended] = field(default=())
    baseline: Costs | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ("finished", "interrupted", "failed", "unknown")

    def best_of(self, stage: str | None = None) -> Ended | None:
        """The cheapest trial within delta, of a stage or of all."""
        found = [e for e in self.ended if e.within and e.ratio and stage in (None, e.stage)]
        return max(found, key=lambda e: e.ratio or 0.0, default=None)

    def tracebacks(self) -> list[tuple[str, str]]:
        """The failed trials whose traceback was kept, and it."""
        return [
            (f"{e.stage}/{e.trial.number}", str(e.trial.system_attrs[TRACEBACK]))
            for e in self.ended
            if TRACEBACK in e.trial.system_attrs
        ]

    def state_words(self) -> str:
        """ "Running on host (process 12), heard of 3s ago"."""
        ago = "" if self.heard is None else format_seconds(self.heard)
        return {
            "finished": "Finished",
            "running": f"Not finished: running on {self.where}, heard of {ago} ago",
            "silent": f"Not finished: no sign of life of {self.where} for {ago}",
            "interrupted": f"Not finished: interrupted {ago} ago",
            "failed": f"Not finished: ended by an error {ago} ago",
            "unknown": "Not finished",
        }[self.state]

    def to_dict(self) -> dict[str, Any]:
        """All of it for programs; the page on commands describes the fields."""
        tally, eta = self.tally, self.tally.eta()
        best = self.best_of()
        active = self.state in ("running", "silent")
        return {
            "study": self.config.name,
            "place": self.place,
            "state": self.state,
            "heard_seconds_ago": self.heard,
            "conducted_by": self.where or None,
            "objective": self.config.objective,
            "delta": self.config.delta,
            "confidence": self.config.confidence,
            "metric": tally.scale.to_dict(),
            "stage": tally.name or None,
            "elapsed_seconds": round(tally.elapsed_in_all(), 1) if tally.began else None,
            "left_seconds": None if eta is None or not active else round(eta, 1),
            "stages": {
                one.name: {
                    "trials": one.total,
                    "ended": one.ended,
                    "stopped": one.stopped,
                    "failed": one.failed,
                    "running": one.running,
                    "within_delta": one.within_delta,
                    "best": self._trial(self.best_of(one.name)),
                }
                for one in self.stages
            },
            "best": self._trial(best),
            "workers": [_worker(name, row, tally) for name, row in sorted(tally.rows.items())],
        }

    def _trial(self, ended: Ended | None) -> dict[str, Any] | None:
        if ended is None:
            return None
        metrics = ended.trial.user_attrs.get("metrics", {})
        found = {
            "trial": f"{ended.stage}/{ended.trial.number}",
            "drop": ended.drop,
            "drop_bound": metrics.get("drop_bound"),
            "ratio": ended.ratio,
        }
        if self.baseline is not None:
            facts = facts_of(ended.trial, self.baseline)
            found |= {"score": facts.score, "ratios": facts.ratios, "plan": facts.plan}
        return found

    def render(self) -> RenderableType:
        """Everything for a terminal."""
        config, scale = self.config, self.tally.scale
        title = f"{config.name}: {config.objective} as low as can be, allowed drop "
        title += f"{scale.difference(config.delta)} at confidence {config.confidence:g}"
        parts: list[RenderableType] = [Text(title), self._table()]
        if self.state in ("running", "silent"):
            parts += [Text(), Panel(self.tally), Text()]
        else:
            lines = [line for stage in STAGES if (line := self._best_line(stage))]
            parts += [Text(line) for line in lines]
        words = f"{self.state_words()}: {self.place}"
        return Group(*parts, Text(words))

    def _table(self) -> Table:
        heads = ("stage", "trials", "stopped", "failed", "running", "within delta")
        table = Table(*heads, box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for one in self.stages:
            counts = (one.stopped, one.failed, one.running, one.within_delta)
            table.add_row(one.name, f"{one.ended}/{one.total}", *map(str, counts))
        return table

    def _best_line(self, stage: str) -> str:
        best = self.best_of(stage)
        if best is None or best.ratio is None or best.drop is None or self.baseline is None:
            return ""
        scale, objective = self.tally.scale, self.config.objective
        facts = facts_of(best.trial, self.baseline)
        words = [
            f"best of {stage}: {format_ratio(best.ratio)} {objective}, drop "
            f"{scale.difference(best.drop)} (trial {best.trial.number})",
            *facts.words(scale, objective),
        ]
        return "; ".join(words)


def read_situation(
    config: StudyConfig, studies: Mapping[str, Study], place: str, has_result: bool
) -> Situation:
    """Read how far a study is.

    Args:
        config: Its settings, as it was run last.
        studies: Its stages, as far as they have begun.
        place: Shown as where it is.
        has_result: Whether its folder, if it can be seen from here, holds the result.
    """
    exploration = studies["exploration"]
    facts = exploration.user_attrs
    news = exploration._storage.get_study_system_attrs(exploration._study_id).get(NEWS)
    stages = _counts(config, studies)
    heard = None if news is None else max(0.0, time.time() - news["at"])
    state = _state(config, stages, news, heard, has_result)
    baseline = costs_of(facts["baseline"]) if "baseline" in facts else None
    ended = _ended(config, studies, baseline)
    tally = _tally(config, studies, stages, news, state)
    _add_best(tally, ended, baseline)
    where = "" if news is None else f"{news['host']} (process {news['process']})"
    return Situation(config, place, state, heard, where, tally, stages, ended, baseline)


def _counts(config: StudyConfig, studies: Mapping[str, Study]) -> list[StageCount]:
    totals = {"exploration": config.search.trials, "annealing": config.search.annealing_trials}
    wanted = STAGES if config.search.stage == "both" else (config.search.stage,)
    found = []
    for stage in STAGES:
        study = studies.get(stage)
        if study is None:
            if stage in wanted:
                found.append(StageCount(stage, totals[stage]))
            continue
        spent = trials_spent(study)
        planned = totals[stage] + study.user_attrs.get(EXTRA, 0)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        found.append(
            StageCount(
                stage,
                planned,
                len(spent),
                sum(t.state == TrialState.PRUNED for t in spent),
                sum(t.state == TrialState.FAIL for t in spent),
                len(running),
                sum(map(within_delta, spent)),
            )
        )
    return found


def _state(
    config: StudyConfig,
    stages: Sequence[StageCount],
    news: Mapping[str, Any] | None,
    heard: float | None,
    has_result: bool,
) -> str:
    wanted = STAGES if config.search.stage == "both" else (config.search.stage,)
    complete = all(one.ended >= one.total for one in stages if one.name in wanted)
    told = "unknown" if news is None else str(news["state"])
    if told == "running" and heard is not None:
        return "running" if heard <= SILENT else "silent"
    if told in ("finished", "unknown"):
        done = complete and (has_result or told == "finished")
        return "finished" if done else "unknown"
    # A result of an earlier run stays true until more is asked for.
    return "finished" if complete and has_result else told


def _ended(
    config: StudyConfig, studies: Mapping[str, Study], baseline: Costs | None
) -> list[Ended]:
    found = []
    for stage, study in studies.items():
        for trial in trials_spent(study):
            drop = trial.user_attrs.get("metrics", {}).get("drop")
            ratio = None if baseline is None else cost_ratio(trial, config.objective, baseline)
            found.append(Ended(stage, trial, drop, ratio, within_delta(trial)))
    return sorted(found, key=lambda e: e.trial.datetime_complete or datetime.min)


def _tally(
    config: StudyConfig,
    studies: Mapping[str, Study],
    stages: Sequence[StageCount],
    news: Mapping[str, Any] | None,
    state: str,
) -> Tally:
    scale = Scale.from_dict(studies["exploration"].user_attrs.get("metric"))
    begun = [one for one in stages if one.ended or one.running] or list(stages)
    if news is None:
        tally = Tally(time.time, name=begun[-1].name, total=begun[-1].total)
    else:
        # What is over took as long as it took.
        at = float(news["at"])
        tally = Tally.from_dict(news, time.time if state == "running" else lambda: at)
    tally.delta, tally.objective, tally.scale = config.delta, config.objective, scale
    counts = {one.name: one for one in stages}
    if tally.name in counts:
        tally.done, tally.total = counts[tally.name].ended, counts[tally.name].total
    if state not in ("running", "silent"):
        tally.rows = {}
    _add_running(tally, studies)
    return tally


def _add_running(tally: Tally, studies: Mapping[str, Study]) -> None:
    """Rows of the trials that run and that the process that conducts the study doesn't know of."""
    shown = {row.number for row in tally.rows.values()}
    for study in studies.values():
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in shown or is_gone(trial):
                continue
            start = trial.datetime_start
            since = time.time() if start is None else start.timestamp()
            worker = str(trial.user_attrs.get(WORKER, ""))
            tally.rows[worker] = Row(trial.number, doing_of(trial), since)


def _add_best(tally: Tally, ended: Sequence[Ended], baseline: Costs | None) -> None:
    tally.best, tally.best_trial, tally.history = None, "", []
    for one in ended:
        if one.within and one.ratio is not None and one.drop is not None and baseline is not None:
            if tally.best is None or one.ratio > tally.best[0]:
                tally.best = (one.ratio, one.drop)
                tally.best_trial = f"{one.stage} {one.trial.number}"
                tally.best_facts = facts_of(one.trial, baseline)
        tally.history += [] if tally.best is None else [tally.best[0]]


def _worker(name: str, row: Row, tally: Tally) -> dict[str, Any]:
    phase, done, total, note = row.phase or ("", 0.0, 0.0, "")
    return {
        "worker": name or None,
        "trial": row.number,
        "phase": phase or None,
        "done": done,
        "total": total or None,
        "note": note or None,
        "seconds": round(max(0.0, tally.clock() - row.since), 1),
    }


def watch_study(
    read: Callable[[], Situation], console: Console, pause: Callable[[float], None] = time.sleep
) -> Situation:
    """Show a study until it is over: redrawn on a terminal, line after line elsewhere.

    Args:
        read: Reads how far it is.
        console: Where it is shown.
        pause: Waits for so many seconds.

    Returns:
        How it is in the end.
    """
    now = read()
    watch = _watch_live if can_redraw(console) else _watch_plain
    return watch(now, read, console, pause)


def _watch_live(
    now: Situation, read: Callable[[], Situation], console: Console, pause: Callable[[float], None]
) -> Situation:
    shown = {(e.stage, e.trial.number) for e in now.ended}
    with Live(now.render(), console=console, refresh_per_second=2, transient=True) as live:
        while not now.over:
            pause(REFRESH)
            now = read()
            live.update(now.render())
            for ended in _new(now, shown):
                facts = _facts(now, ended)
                words = _words(now, ended)
                best = ended is now.best_of()
                tally = Tally(time.time, name=ended.stage, objective=now.config.objective)
                tally.scale = now.tally.scale
                number = ended.trial.number
                line = trial_line(tally, number, words, best, ended.within, facts, console.width)
                console.print(line, no_wrap=True, overflow="ellipsis")
    return now


def _watch_plain(
    now: Situation, read: Callable[[], Situation], console: Console, pause: Callable[[float], None]
) -> Situation:
    shown = {(e.stage, e.trial.number) for e in now.ended}
    last, stage = -STEP_INTERVAL, ""
    while True:
        for ended in _new(now, shown):
            tally, words = now.tally, _words(now, ended)
            _plain(console, plain_trial_line(tally, ended.trial.number, words))
        if now.over:
            return now
        if now.tally.name != stage or time.monotonic() - last >= STEP_INTERVAL:
            last, stage = time.monotonic(), now.tally.name
            _plain(console, _now_line(now))
        pause(REFRESH)
        now = read()


def _now_line(now: Situation) -> str:
    """What is done at the moment, on one line."""
    tally, eta = now.tally, now.tally.eta()
    words = [f"[{tally.counter()}] {format_seconds(tally.elapsed())} elapsed"]
    for name, row in sorted(tally.rows.items()):
        trial = "" if row.number is None else f"trial {row.number} "
        doing = "begins" if row.phase is None else phase_words(*row.phase)
        words.append(" ".join(part for part in (name, f"{trial}{doing}") if part))
    words += [] if tally.best is None else [f"best {format_ratio(tally.best[0])}"]
    words += [] if eta is None else [f"eta {format_seconds(eta)}"]
    words += [now.state_words()] if now.state == "silent" else []
    return "  ".join(words)


def _new(now: Situation, shown: set[tuple[str, int]]) -> list[Ended]:
    found = [e for e in now.ended if (e.stage, e.trial.number) not in shown]
    shown.update((e.stage, e.trial.number) for e in found)
    return found


def _words(now: Situation, ended: Ended) -> list[str]:
    trial = ended.trial
    reason = trial.user_attrs.get("reason")
    return now.tally.outcome(ended.drop, ended.ratio, ended.within, trial.state.name, reason)


def _facts(now: Situation, ended: Ended) -> Facts:
    return NO_FACTS if now.baseline is None else facts_of(ended.trial, now.baseline)


def _plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def place_of(folder: Path, url: str | None) -> str:
    """What is shown as a study's place: its folder, or where that isn't here its database."""
    return str(folder) if url is None or folder.exists() else hide_password(url)
