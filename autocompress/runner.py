"""Lets the trials of a stage run, to exactly as many as were planned, whoever carries them out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile

from optuna.trial import FrozenTrial, TrialState

from autocompress.crew import Crew
from autocompress.errors import AutocompressError
from autocompress.finals import ROUND, Finals
from autocompress.heartbeat import StaleWatch
from autocompress.longfits import Order, order
from autocompress.longtrial import announce_long
from autocompress.news import doing_of
from autocompress.objective import Bench, announce, best_so_far
from autocompress.slots import WORKER, bring_back, host_name, running, top_up
from autocompress.stages import Stage, finals_stage
from autocompress.store import excuse, trials_spent
from autocompress.trials import TRACEBACK, counted

logger = logging.getLogger("autocompress")

LOOK = 5.0
"""Seconds between two looks at what happens on other machines."""
MAX_FAILURES = 5
"""A study in which this many trials in a row fail has a fault that no further trial will cure."""


@dataclass(frozen=True)
class Runner:
    """Sees to the trials while the crew carries them out. Only in the process that conducts.

    Attributes:
        bench: All that is known.
        crew: Those who carry them out.
        hold: Sees to it that this process is still the one that conducts the study.
    """

    bench: Bench
    crew: Crew
    hold: Callable[[], None]

    def run(
        self,
        stage: Stage,
        later: float = 0.0,
        between: Callable[[int], None] = lambda spent: None,
    ) -> None:
        """Let trials run until exactly as many as planned have ended by themselves.

        Long fine-tunings that were ordered are carried out meanwhile.

        Args:
            stage: The stage.
            later: What comes after it, in trials of the same length, but for the finals.
            between: Told between two looks how many trials have ended.

        Raises:
            AutocompressError: If one trial after the other fails.
            KeyboardInterrupt: If that was ordered.
        """
        bench, orders = self.bench, self.bench.watch.orders
        own = _Post(bench, stage)
        posts = [own]
        if bench.finals is not None and not stage.ordered:
            posts.insert(0, _Post(bench, finals_stage(bench, bench.finals)))
            # The winner's, with two seeds, counts as the trials that would take as long.
            later += 2 * bench.finetune.final_epochs / max(bench.epochs(stage.name), 0.1)
        self._show(stage, later)
        held = -LOOK
        while True:
            ended = own.attend()
            for other in posts[:-1]:
                other.attend()
            _check_failures(stage, ended)
            if len(ended) >= stage.total:
                return
            if orders.drain:
                self.crew.drain()
                if orders.stop or not self.crew.alive:
                    raise KeyboardInterrupt
            between(len(ended))
            self.crew.tend([post.stage for post in posts])
            if time.monotonic() - held > LOOK:
                held = time.monotonic()
                self.hold()
                for post in posts:
                    post.look_out()

    def fit_long(self, again: bool = False) -> bool:
        """Fine-tune at length what promises to come within delta by it, `ROUND` networks at most,
        and the second seeds without which none of them may win.

        As many at a time as there are workers, with those that were ordered before and are still
        to be done.

        Args:
            again: Whether the best is repeated with a second seed, too.

        Returns:
            Whether there was anything to fine-tune.
        """
        bench, finals, spent = self.bench, self.bench.finals, 0
        if finals is None or not bench.finetune.final_epochs:
            return False
        while True:
            bring_back(finals)
            left = len(counted(finals)) - len(trials_spent(finals))
            room = min(max(1, self.crew.alive), ROUND - spent)
            new: list[Order] = []
            if room > left:
                wanted = Finals.of(bench).wanted(room, again, sure=again and spent >= ROUND - 2)
                new = order(finals, wanted, bench.finetune, most=room - left)
            if again and not left and not new:
                # However much was spent: no winner has had but one seed.
                new = order(finals, Finals.of(bench).unsure(), bench.finetune)
            if not left + len(new):
                return spent > 0
            spent += len({label for label, _ in new})
            self.run(finals_stage(bench, finals))

    def _show(self, stage: Stage, later: float) -> None:
        bench, spent = self.bench, len(trials_spent(stage.study))
        # Of the long fine-tunings only those are counted that are ordered now.
        total, done = (stage.total - spent, 0) if stage.ordered else (stage.total, spent)
        bench.display.stage(
            stage.name,
            total,
            done,
            delta=bench.delta,
            objective=bench.objective,
            best=best_so_far(bench),
            later=later,
            scale=bench.task.scale,
        )


class _Post:
    """What is seen to in one stage.

    Args:
        bench: All that is known.
        stage: The stage.
    """

    def __init__(self, bench: Bench, stage: Stage) -> None:
        self.stage = stage
        self._bench = bench
        self._stale = StaleWatch()
        self._others: dict[str, int] = {}
        self._told = {trial.number for trial in trials_spent(stage.study)}

    def attend(self) -> list[FrozenTrial]:
        """Let trials wait, and tell of those that have ended; gives these in that order."""
        study = self.stage.study
        if self.stage.ordered:
            bring_back(study)
        else:
            top_up(study, self.stage.total)
        ended = sorted(trials_spent(study), key=_end_of)
        for trial in ended:
            if trial.number not in self._told:
                (announce_long if self.stage.ordered else announce)(self._bench, trial)
                _log_failure(trial)
                self._told.add(trial.number)
        return ended

    def look_out(self) -> None:
        """See to what workers on other machines do."""
        self._stale.cut_off_stale(self.stage.study)
        display, shown = self._bench.display, self._others
        now = {str(t.user_attrs.get(WORKER, "")): t for t in running(self.stage.study)}
        now = {k: t for k, t in now.items() if k.rpartition("/")[0] not in ("", host_name())}
        for worker in shown.keys() - now.keys():
            del shown[worker]
            display.step("", 0, 0, worker=worker)
        for worker, trial in now.items():
            if shown.get(worker) != trial.number:
                shown[worker] = trial.number
                if not self.stage.ordered:
                    display.trial_started(trial.number, worker)
            doing = doing_of(trial)
            if doing is not None:
                display.step(*doing, worker=worker)


def _log_failure(trial: FrozenTrial) -> None:
    """Put in the log what a worker on another machine has in its own."""
    host, _, _ = str(trial.user_attrs.get(WORKER, "")).rpartition("/")
    if TRACEBACK in trial.system_attrs and host not in ("", host_name()):
        logger.warning("trial %d on %s:\n%s", trial.number, host, trial.system_attrs[TRACEBACK])


def _end_of(trial: FrozenTrial) -> datetime:
    assert trial.datetime_complete is not None
    return trial.datetime_complete


def _check_failures(stage: Stage, ended: Sequence[FrozenTrial]) -> None:
    """Give up where one trial after the other fails, by a fault that no further one will cure.

    Without long fine-tunings the trials' own weights are left, so those may all fail.

    Raises:
        AutocompressError: If so; these trials don't count.
    """
    failed = list(takewhile(lambda trial: trial.state == TrialState.FAIL, reversed(ended)))
    hopeless = len(failed) == stage.total and stage.name == "exploration"
    if not stage.ordered and (hopeless or len(failed) >= MAX_FAILURES):
        excuse(stage.study, [trial.number for trial in failed])
        reason = str(failed[0].user_attrs.get("reason")).rstrip(".")
        raise AutocompressError(
            f"{len(failed)} trials of the {stage.name} failed one after the other, the last with: "
            f"{reason}. They don't count: mend the cause and run the "
            "same command again."
        )
