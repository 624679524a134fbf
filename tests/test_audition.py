"""How far children stray from the baseline, before one of them is fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_objective import make_bench, run, space_of

from autocompress.audition import strays
from autocompress.errors import DamagedArtifact
from autocompress.objective import Bench, find_trial, run_trial
from autocompress.plan import Plan
from autocompress.samplers import KnobSampler
from autocompress.task import Task
from autocompress.transforms import SVD
from autocompress.trials import WEIGHTS

PARENT = "exploration/0"


@pytest.fixture
def bench(task: Task, tmp_path: Path) -> Bench:
    """One that has a finished trial."""
    found = make_bench(task, tmp_path)
    run(found)
    return found


def own_plan(bench: Bench) -> Plan:
    return Plan.from_json(find_trial(bench.studies, PARENT).user_attrs["plan"])


@pytest.mark.parametrize("distilled", [True, False])
def test_deeper_cuts_stray_farther_than_the_parent(bench: Bench, distilled: bool) -> None:
    if not distilled:
        bench.task.distillation = None
    plans = [own_plan(bench), Plan({"conv": SVD(8)}), Plan({"conv": SVD(1)})]
    same, mild, deep = strays(bench, PARENT, plans)
    assert same == pytest.approx(0.0, abs=0.05)
    assert same < deep and mild < deep


def test_no_validation_image_is_looked_at(bench: Bench) -> None:
    bench.task.val = ()  # type: ignore[assignment]
    assert len(strays(bench, PARENT, [Plan({"conv": SVD(1)})])) == 1


def test_all_children_see_the_same_images(bench: Bench) -> None:
    """Also where the loader shuffles anew whenever it is read."""
    one, other = strays(bench, PARENT, [Plan({"conv": SVD(2)})] * 2)
    assert one == other


def test_weights_that_are_gone_are_an_error(bench: Bench, tmp_path: Path) -> None:
    kept = find_trial(bench.studies, PARENT).user_attrs[WEIGHTS]
    (tmp_path / "artifacts" / kept).unlink()
    with pytest.raises(DamagedArtifact):
        strays(bench, PARENT, [Plan()])


def test_its_time_counts_as_a_trials_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens while a plan is proposed, and is no overhead."""
    real = KnobSampler.propose

    def propose(*everything: object, **more: object) -> object:
        strays(bench, PARENT, [Plan({"conv": SVD(2)})])
        return real(*everything, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(KnobSampler, "propose", propose)
    trial = bench.studies["exploration"].ask()
    assert run_trial(bench, "exploration", space_of(bench), trial) is not None
    seconds = find_trial(bench.studies, "exploration/1").user_attrs["seconds"]
    assert seconds["audition"] > 0 and seconds["suggest"] >= 0
    assert bench.auditions == pytest.approx(seconds["audition"], abs=1e-3)
