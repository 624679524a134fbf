"""Long fine-tunings: ordered once, carried out by any worker, and gone on with when cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from test_objective import Ends, make_bench, run

from autocompress import runner
from autocompress.crew import Solo
from autocompress.evaluation import evaluate
from autocompress.longfits import LOST, order, withdraw_others
from autocompress.longtrial import announce_long
from autocompress.objective import Bench, load_elder, load_trial_model
from autocompress.runner import Runner
from autocompress.slots import bring_back, cut_off, take
from autocompress.stages import Stage, finals_stage
from autocompress.store import open_study
from autocompress.task import Task
from autocompress.training import Recipe
from autocompress.trials import LENGTH, PARENT, SEED, counted
from autocompress.watch import Watch
from autocompress.worker import perform

LABEL = "exploration/0"


class Told(Ends):
    """Keeps what was said, and how far fine-tunings were."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.done: list[float] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def step(self, phase: str, done: float, *_: object, **__: object) -> None:
        self.done += [done] if "at length" in phase else []


@pytest.fixture
def bench(task: Task, tmp_path: Path) -> Bench:
    """One of a study with a trial, and with finals."""
    bench = make_bench(task, tmp_path)
    bench.finetune = Recipe(1.0, 2.0, 0.05, 0.05, 0.5, 50.0)
    run(bench)
    bench.display = Told()
    storage = bench.studies["exploration"]._storage
    finals = open_study(storage, "tiny", "finals", bound={}, cost_name="parameters")  # type: ignore[arg-type]
    finals_stage(bench, finals)
    return bench


def finals_of(bench: Bench) -> Study:
    assert bench.finals is not None
    return bench.finals


def work(bench: Bench) -> FrozenTrial | None:
    """Take what waits, as a worker does."""
    stage = finals_stage(bench, finals_of(bench))
    trial = take(stage.study)
    assert trial is not None
    return perform(bench, stage, trial)


def told(bench: Bench) -> Told:
    assert isinstance(bench.display, Told)
    return bench.display


def test_it_is_ordered_once_and_its_network_can_be_had(bench: Bench) -> None:
    finals = finals_of(bench)
    for _ in range(2):
        order(finals, [(LABEL, 0)], bench.finetune)
    assert len(finals.trials) == 1 and not bench.long_fits
    ended = work(bench)
    assert ended is not None and ended.state == TrialState.COMPLETE
    order(finals, [(LABEL, 0), (LABEL, 1)], bench.finetune)
    assert [trial.state.name for trial in finals.trials] == ["COMPLETE", "WAITING"]
    [fit] = bench.long_fits
    assert (fit.trial, fit.seed, fit.epochs) == (LABEL, 0, 2.0) and fit.seconds > 0
    assert fit.before == bench.studies["exploration"].trials[0].values[0]
    assert fit.bound == pytest.approx(fit.after), "with confidence 0.5"
    model, _ = load_trial_model(bench, LABEL, fit.weights)
    found = evaluate(model, bench.task, bench.task.val)
    assert bench.baseline.val.score - found.score == pytest.approx(fit.after)
    announce_long(bench, ended)
    assert told(bench).lines[-1].startswith(f"Fine-tuned {LABEL} for 2 epochs, seed 0: ")


def test_another_length_is_another_order(bench: Bench) -> None:
    for epochs in (2.0, 3.0):
        order(finals_of(bench), [(LABEL, 0)], replace(bench.finetune, final_epochs=epochs))
    assert len(finals_of(bench).trials) == 2


def test_what_waits_with_another_length_is_withdrawn(bench: Bench) -> None:
    finals = finals_of(bench)
    order(finals, [(LABEL, 0), (LABEL, 1), (LABEL, 2)], bench.finetune)
    assert work(bench) is not None
    taken = take(finals)
    assert taken is not None and cut_off(finals, finals.trials[taken.number])
    assert withdraw_others(finals, bench.finetune) == [], "these are wanted"
    shorter = replace(bench.finetune, final_epochs=1.0)
    order(finals, [(LABEL, 0)], shorter)
    gone = withdraw_others(finals, shorter)
    assert {trial.user_attrs[LENGTH] for trial in gone} == {2.0} and len(gone) == 2
    assert withdraw_others(finals, shorter) == [] and bring_back(finals) == 0
    assert len(bench.long_fits) == 1, "what has ended is kept"
    assert work(bench) is not None and take(finals) is None
    assert [fit.epochs for fit in bench.long_fits] == [2.0, 1.0]


def test_one_that_was_cut_off_goes_on_and_is_not_ordered_twice(bench: Bench) -> None:
    finals, display = finals_of(bench), told(bench)

    class Ordered(Watch):
        def step(self) -> None:
            if display.done:
                self.orders.ask_to_stop()
            super().step()

    order(finals, [(LABEL, 0)], bench.finetune)
    bench.watch = Ordered()
    with pytest.raises(KeyboardInterrupt):
        work(bench)
    [first] = display.done
    bench.watch = Watch()
    bring_back(finals)
    order(finals, [(LABEL, 0)], bench.finetune)
    assert len(counted(finals)) == 1
    assert work(bench) is not None
    assert display.done[1] > first > 0, "it didn't begin anew"
    assert len(bench.long_fits) == 1


def test_who_would_be_idle_while_one_goes_on_begins_with_the_second_seed(bench: Bench) -> None:
    finals, waited = finals_of(bench), []

    class Two(Solo):
        alive = 2

        def tend(self, stages: Sequence[Stage]) -> None:
            waiting = finals.get_trials(states=(TrialState.WAITING,))
            waited.append([(t.user_attrs[PARENT], t.user_attrs[SEED]) for t in waiting])
            super().tend(stages)

    order(finals, [(LABEL, 0)], bench.finetune)
    taken = take(finals)
    assert taken is not None and cut_off(finals, finals.trials[taken.number])
    assert Runner(bench, Two(bench), lambda: None).fit_long(again=True)
    assert waited[0] == [(LABEL, 0), (LABEL, 1)]
    assert [(fit.trial, fit.seed) for fit in bench.long_fits] == waited[0]


def test_however_many_there_were_the_best_gets_its_second_seed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROUND", 1)
    bench.delta = 90.0
    one = Runner(bench, Solo(bench), lambda: None)
    assert one.fit_long(again=True) and [fit.seed for fit in bench.long_fits] == [0, 1]
    assert not one.fit_long(again=True)


def test_one_whose_worker_died_at_once_comes_again(bench: Bench) -> None:
    finals = finals_of(bench)
    order(finals, [(LABEL, 1)], bench.finetune)
    taken = take(finals)
    assert taken is not None
    assert cut_off(finals, finals.trials[0], "exit code 9")
    assert bring_back(finals) == 1 and bring_back(finals) == 0
    assert work(bench) is not None
    assert bench.long_fits[0].seed == 1


def test_one_that_diverges_has_lost_much_and_no_child_begins_with_it(bench: Bench) -> None:
    bench.task.loss = lambda output, batch: output.sum() * float("nan")
    order(finals_of(bench), [(LABEL, 0)], bench.finetune)
    ended = work(bench)
    assert ended is not None and ended.state == TrialState.FAIL
    [fit] = bench.long_fits
    assert fit.weights is None and fit.after == fit.bound == LOST * 50.0
    announce_long(bench, ended)
    assert f"of {LABEL} failed: TrainingDiverged" in told(bench).lines[-1]
    elder = load_elder(bench, LABEL)
    kept, _ = load_trial_model(bench, LABEL)
    torch.testing.assert_close(elder.model.state_dict(), kept.state_dict())
