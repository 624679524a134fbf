"""What is known of a running study at a moment: its stage, who does what, the best so far.

A display keeps a tally and draws it. As plain values it goes into the database, where `status`
reads it on another terminal or machine and draws the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autocompress.amounts import clean, format_ratio, format_seconds
from autocompress.scale import ACCURACY, Scale

Clock = Callable[[], float]

WORDS = {"COMPLETE": "", "PRUNED": "stopped", "FAIL": "failed"}
"""Optuna's states as a person reads them."""


@dataclass(frozen=True)
class Facts:
    """What is known of an ended trial besides its drop and the cost that the study makes small.

    Attributes:
        score: On the validation data, in the metric's unit.
        ratios: Baseline / trial, of each cost that was measured: "params", "macs", "latency".
        seconds: How long it took.
        plan: What was done, in a few words.
        worker: Who carried it out, "<host>/<process>".
    """

    score: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    plan: str = ""
    worker: str = ""

    def words(self, scale: Scale, besides: str = "") -> list[str]:
        """The facts in words; `besides`: the cost that is told already."""
        found = [
            f"{name.replace('macs', 'MACs')} {format_ratio(ratio)}"
            for name, ratio in self.ratios.items()
            if name != besides
        ]
        found += [] if self.score is None else [scale.value(self.score)]
        found += [] if self.seconds is None else [format_seconds(self.seconds)]
        return found + ([self.plan] if self.plan else [])


NO_FACTS = Facts()


@dataclass
class Row:
    """What a worker, or this process itself, does at the moment.

    Attributes:
        number: Of its trial; None where it carries out none.
        phase: What it does, how far it is, the length (0: unknown), and a note.
        since: When that began, by the tally's clock.
    """

    number: int | None = None
    phase: tuple[str, float, float, str] | None = None
    since: float = 0.0


@dataclass
class Tally:
    """What is known about the stage, and its arithmetic."""

    clock: Clock
    name: str = ""
    total: int = 0
    done: int = 0
    later: float = 0.0
    delta: float | None = None
    objective: str = "params"
    scale: Scale = ACCURACY
    best: tuple[float, float] | None = None
    best_trial: str = ""
    best_facts: Facts = NO_FACTS
    history: list[float] = field(default_factory=list)
    """The best ratio after each trial, from the first within delta on."""
    began: float | None = None
    stage_start: float | None = None
    first_trial: float | None = None
    last_end: float | None = None
    finished: int = 0
    rows: dict[str, Row] = field(default_factory=dict)

    def stage(
        self,
        name: str,
        total: int,
        done: int,
        delta: float | None,
        objective: str,
        best: tuple[float, float] | None,
        later: float,
        scale: Scale,
    ) -> None:
        """Begin a stage, as `Display.stage` has it."""
        if (delta, objective) != (self.delta, self.objective) and delta is not None:
            # What was best under another tolerance or objective says nothing here.
            self.best, self.best_trial, self.best_facts = None, "", NO_FACTS
            self.history = []
            self.delta, self.objective, self.scale = delta, objective, scale
        if best is not None and (self.best is None or best[0] > self.best[0]):
            self.best, self.best_trial, self.best_facts = best, "", NO_FACTS
        self.name, self.total, self.done, self.later = name, total, done, later
        self.stage_start = self.clock()
        self.began = self.stage_start if self.began is None else self.began
        self.first_trial = self.last_end = None
        self.finished = 0
        # The workers go on.
        self.rows.pop("", None)

    def trial_started(self, number: int, worker: str) -> None:
        """Trial `number` has begun."""
        if self.first_trial is None:
            self.first_trial = self.clock()
        self.rows[worker] = Row(number, since=self.clock())

    def step(self, phase: str, done: float, total: float, note: str, worker: str) -> None:
        """A phase is at `done` of `total`; an empty one: the worker does nothing any more."""
        if not phase:
            self.rows.pop(worker, None)
            return
        row = self.rows.setdefault(worker, Row())
        if row.phase is None or row.phase[0] != phase or done < row.phase[1]:
            row.since = self.clock()
        row.phase = (phase, done, total, note)

    def trial_finished(
        self,
        number: int,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        facts: Facts = NO_FACTS,
    ) -> bool:
        """Count the trial; True if it is the best so far."""
        self.rows = {worker: row for worker, row in self.rows.items() if row.number != number}
        self.done += 1
        self.finished += 1
        self.last_end = self.clock()
        better = False
        if feasible and drop is not None and cost_ratio is not None:
            better = self.best is None or cost_ratio > self.best[0]
            if better:
                self.best, self.best_trial = (cost_ratio, drop), f"{self.name} {number}"
                self.best_facts = facts
        self.history += [] if self.best is None else [self.best[0]]
        return better

    def long_fit_ended(self) -> None:
        """Count a long fine-tuning, in the stage that has no other trials."""
        if self.name == "finals":
            self.rows.pop("", None)
            self.done += 1
            self.finished += 1
            self.first_trial, self.last_end = self.stage_start, self.clock()

    def elapsed(self) -> float:
        """Seconds of the stage."""
        return 0.0 if self.stage_start is None else self.clock() - self.stage_start

    def elapsed_in_all(self) -> float:
        """Seconds since the first stage of this run began."""
        return 0.0 if self.began is None else self.clock() - self.began

    def eta(self) -> float | None:
        """Seconds left to the end of the study; None while nothing is known.

        The mean counts from the first start to the last end, so that trials of several workers
        that overlap are counted right.
        """
        if self.finished and self.first_trial is not None and self.last_end is not None:
            mean = (self.last_end - self.first_trial) / self.finished
            spent = self.clock() - self.last_end
            left = max(0, self.total - self.done) + self.later
            return max(0.0, mean * left - min(spent, mean))
        row = self.rows.get("")
        if not self.has_trials and row is not None and row.phase is not None and row.phase[1] > 0:
            _, done, total, _ = row.phase
            return max(0.0, (self.clock() - row.since) / done * (total - done))
        return None

    @property
    def has_trials(self) -> bool:
        """Whether the stage counts trials; a "baseline" is one long phase."""
        return self.total > 1 or self.first_trial is not None or self.finished > 0

    def counter(self) -> str:
        """ "exploration 3/24", or the name of a stage without trials."""
        return f"{self.name} {self.done}/{self.total}" if self.has_trials else self.name

    def outcome(
        self,
        drop: float | None,
        cost_ratio: float | None,
        feasible: bool,
        state: str,
        reason: str | None,
    ) -> list[str]:
        """The words about one ended trial."""
        words = []
        if drop is not None:
            words.append(f"drop {self.scale.number(drop)}{self._verdict(drop, feasible)}")
        if cost_ratio is not None:
            words.append(f"{self.objective} {format_ratio(cost_ratio)}")
        if state != "COMPLETE" or reason:
            word = WORDS.get(state, state.lower())
            words.append(": ".join(part for part in (word, clean(reason or "")) if part))
        return words

    def _verdict(self, drop: float, feasible: bool) -> str:
        if self.delta is None:
            return ""
        allowed = self.scale.number(self.delta)
        if drop > self.delta:
            return f" > {allowed}"
        return f" <= {allowed}" if feasible else f", not surely within {allowed}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold; times are seconds since 1970."""
        shift = time.time() - self.clock()

        def wall(moment: float | None) -> float | None:
            return None if moment is None else round(moment + shift, 2)

        return {
            "stage": self.name,
            "total": self.total,
            "done": self.done,
            "later": self.later,
            "delta": self.delta,
            "objective": self.objective,
            "metric": self.scale.to_dict(),
            "best": self.best,
            "best_trial": self.best_trial,
            "began": wall(self.began),
            "stage_start": wall(self.stage_start),
            "first_trial": wall(self.first_trial),
            "last_end": wall(self.last_end),
            "finished": self.finished,
            "rows": {
                worker: {"trial": row.number, "phase": row.phase, "since": wall(row.since)}
                for worker, row in list(self.rows.items())
            },
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], clock: Clock = time.time) -> Tally:
        """The inverse of `to_dict`, for a clock that gives seconds since 1970."""
        best: Sequence[float] | None = kept["best"]
        return cls(
            clock,
            name=kept["stage"],
            total=kept["total"],
            done=kept["done"],
            later=kept["later"],
            delta=kept["delta"],
            objective=kept["objective"],
            scale=Scale.from_dict(kept["metric"]),
            best=None if best is None else (best[0], best[1]),
            best_trial=kept["best_trial"],
            began=kept["began"],
            stage_start=kept["stage_start"],
            first_trial=kept["first_trial"],
            last_end=kept["last_end"],
            finished=kept["finished"],
            rows={
                worker: Row(
                    row["trial"],
                    None if row["phase"] is None else tuple(row["phase"]),
                    row["since"] or 0.0,
                )
                for worker, row in kept["rows"].items()
            },
        )
