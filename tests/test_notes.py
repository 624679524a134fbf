"""What the notes say."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState
from recorded import TRIALS, add_trial, describe

from autocompress.notes import OUTCOME, Board, outcome_facts, study_note, trial_note


@pytest.fixture
def studies() -> dict[str, optuna.Study]:
    found = {}
    for stage in ("exploration", "annealing"):
        found[stage] = study = optuna.create_study(
            study_name=f"demo-{stage}", directions=["minimize", "minimize"]
        )
        describe(study)
        for drop, params, state in TRIALS:
            add_trial(study, stage, drop, params, state)
    return found


def board_of(studies: dict[str, optuna.Study]) -> Board:
    board = Board.read(studies)
    assert board is not None
    return board


def note_of(studies: dict[str, optuna.Study], stage: str, number: int) -> str:
    board = board_of(studies)
    [view] = [t for t in board.trials if (t.stage, t.number) == (stage, number)]
    return trial_note(board, view, board.records[stage][number])


def test_a_trials_note_has_before_and_after(studies: dict[str, optuna.Study]) -> None:
    note = note_of(studies, "annealing", 1)
    assert note.startswith("## annealing/1: 5.40x fewer parameters\n")
    assert "Accuracy drop 0.70 points, at most 0.70 at 97.5 % confidence: **within**" in note
    assert "| parameters | 270 k | 50.0 k | 5.40x |" in note
    assert "| latency, ONNX Runtime 1.32.0, batch 1, 2 threads | 2.50 ms | – |  |" in note
    assert "| `layer1.0\\|x` | svd (rank 12) | 0.125 |" in note
    exploration = studies["exploration"]._study_id
    assert f"[exploration/3](/dashboard/studies/{exploration}/trials?numbers=3)" in note
    assert "export demo --trial annealing/1" in note
    assert "Channels" not in note and "layers.svg" not in note
    assert "**not surely within**" in note_of(studies, "exploration", 3)


def test_a_trials_note_tells_of_channels(studies: dict[str, optuna.Study]) -> None:
    group = {"kept": "0-4,8", "of": 16, "chunks": 1, "members": []}
    plan = {"version": 2, "layers": {}, "channels": {"a": group}}
    trial = add_trial(studies["annealing"], "annealing", 0.0, 1.0, plan=plan)
    assert "| `a` | 6 of 16 |" in note_of(studies, "annealing", trial.number)
    trial = add_trial(studies["annealing"], "annealing", 0.0, 2.0, plan={})
    assert "No layer was changed." in note_of(studies, "annealing", trial.number)


def test_a_stopped_trials_note_says_why(studies: dict[str, optuna.Study]) -> None:
    trial = add_trial(
        studies["annealing"], "annealing", 9.0, 10_000.0, TrialState.PRUNED,
        before_end=lambda trial: trial.set_user_attr("reason", "9 points lost > gate 5"),
    )  # fmt: skip
    note = note_of(studies, "annealing", trial.number)
    assert note.startswith("## annealing/5: 27.0x fewer parameters\n")
    assert "**Stopped early:** 9 points lost > gate 5." in note and "| svd (rank 12) |" in note
    assert "export" not in note
    assert "**Stopped early:** no reason is known." in note_of(studies, "annealing", 4)


def test_a_studys_note_says_how_far_it_is(studies: dict[str, optuna.Study]) -> None:
    note = study_note(board_of({"exploration": studies["exploration"]}), "exploration")
    assert note.startswith("## demo: exploration, stage 1 of 2\n")
    assert "a drop in accuracy of at most 1.00 points on validation data, at 97.5 %" in note
    assert "**Trials:** 5: 3 within delta, 1 not surely within it, 1 stopped early." in note
    assert "**Other stage:** annealing, not begun." in note
    assert "/trials?numbers=1): 5.40x fewer parameters, accuracy drop 0.70 points." in note
    assert "3 input channels &lt;b>" in note
    both = study_note(board_of(studies), "exploration")
    assert f"[annealing](/dashboard/studies/{studies['annealing']._study_id})" in both
    # Of equal trials one is on the front.
    front, _, listed = both.partition("### Trials of the exploration, latest first")
    assert front.count("| 5.40x | 50.0 k | 0.70 | 0.70 |") == 1
    rows = [line for line in listed.splitlines() if "trials?numbers=" in line]
    assert [row.split("numbers=")[1][0] for row in rows] == ["4", "3", "2", "1", "0"]
    assert rows[0].endswith("| stopped early |") and rows[3].endswith("| within delta |")


def test_a_studys_note_without_feasible_trials_and_in_int8() -> None:
    study = optuna.create_study(study_name="x-exploration", directions=["minimize"] * 2)
    assert Board.read({"exploration": study}) is None
    describe(study)
    add_trial(study, "exploration", 2.0, 10.0)
    study.set_user_attr("config", {"search.int8": True, "confidence": 0.9})
    note = study_note(board_of({"exploration": study}), "exploration")
    assert "no trial is surely within delta yet" in note and "Pareto front" not in note
    assert "on validation data of the int8 file, at 90 % confidence" in note


def test_a_finished_studys_note_says_who_won(studies: dict[str, optuna.Study]) -> None:
    profile = {"params": 270_000, "macs": 41_000_000}
    best = {
        "stage": "annealing",
        "trial": 1,
        "profile": {"params": 27_000, "macs": 4_100_000},
        "val_drop": 0.4,
        "val_drop_bound": 0.9,
        "test_drop": 0.5,
        "test_drop_interval": [-0.1, 1.1],
    }
    summary = {"met": True, "objective": "params", "baseline": {"profile": profile}, "best": best}
    studies["exploration"].set_user_attr(OUTCOME, outcome_facts(summary, {"report.html": "a-b"}))
    note = study_note(board_of(studies), "annealing")
    assert "**10.0x fewer parameters** (270 k → 27.0 k)" in note
    assert "validation 0.40 points; test 0.50 points (95 % interval -0.10 to 1.10)" in note
    assert f"[report.html](/artifacts/{studies['exploration']._study_id}/a-b)" in note
    winner = note_of(studies, "annealing", 1)
    assert "**The winner.** Fine-tuned at length, its drop on validation data is 0.40" in winner
    assert "winner" not in note_of(studies, "exploration", 1)
    # It has begun again.
    studies["exploration"].set_user_attr("searching", True)
    assert "Winner" not in study_note(board_of(studies), "annealing")
    studies["exploration"].set_user_attr("searching", False)
    studies["exploration"].set_user_attr(OUTCOME, outcome_facts({"met": False}, {}))
    assert "no network within delta was found" in study_note(board_of(studies), "annealing")
