"""What outlives the process: folder, database, artifacts."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import torch
from conftest import TinyNet
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from autocompress.artifacts import FolderStore, write_text
from autocompress.database import open_storage, write_proposal
from autocompress.errors import ConfigError, StudyMismatch
from autocompress.store import (
    StudyFolder,
    check_same,
    excuse,
    load_study,
    nearest,
    open_study,
    trials_spent,
)
from autocompress.trials import set_constraint
from autocompress.weights import (
    fetch_weights,
    portable_state,
    save_weights,
    state_digest,
    write_weights,
)

BOUND = {"delta": 1.0, "search.transforms": ["svd"]}


def opened(tmp_path: Path, bound: dict[str, object] | None = None) -> optuna.Study:
    return open_study(
        open_storage(f"sqlite:///{tmp_path / 'study.db'}"),
        "one",
        "exploration",
        bound=bound or BOUND,
        drop_name="accuracy drop (points)",
        cost_name="parameters",
    )


def test_a_study_is_bound_to_its_settings(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert study.user_attrs["config"] == BOUND
    study.tell(study.ask(), [1.0, 2.0])
    opened(tmp_path, {"search.transforms": ("svd",), "delta": 1.0})
    with pytest.raises(StudyMismatch, match="delta: 1.0 -> 2.0.*new name"):
        opened(tmp_path, {**BOUND, "delta": 2.0})
    with pytest.raises(StudyMismatch, match="objective: not set -> 'macs'"):
        check_same("one", BOUND, {**BOUND, "objective": "macs"})


def test_a_study_without_trials_binds_nobody(tmp_path: Path) -> None:
    opened(tmp_path).set_user_attr("baseline_digest", "abc")
    assert opened(tmp_path).user_attrs["baseline_digest"] == "abc", "nothing changed"
    changed = opened(tmp_path, {**BOUND, "delta": 2.0})
    assert changed.user_attrs["config"]["delta"] == 2.0
    assert "baseline_digest" not in changed.user_attrs, "what was made fits the old settings"


def test_a_study_and_its_folder_know_each_other(tmp_path: Path) -> None:
    study, folder = opened(tmp_path), StudyFolder(tmp_path / "one")
    folder.create()
    identity = folder.claim(study, None)
    assert folder.claim(opened(tmp_path), None) == identity
    other = StudyFolder(tmp_path / "other")
    other.create()
    with pytest.raises(StudyMismatch, match=f"weights are in {tmp_path / 'one'}"):
        other.claim(study, None)
    new = open_study(
        open_storage(f"sqlite:///{tmp_path / 'new.db'}"),
        "one",
        "exploration",
        bound=BOUND,
        drop_name="accuracy drop (points)",
        cost_name="parameters",
    )
    assert folder.claim(new, None) != identity


def test_no_study_of_another_database_takes_a_folder(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "one")
    folder.create()
    first = folder.claim(opened(tmp_path), None)
    write_text(folder.config, '{"run": {"storage": null}}')
    folder.baseline.touch()
    (tmp_path / "other").mkdir()
    other, url = opened(tmp_path / "other"), "postgresql://me:***@host/studies"
    with pytest.raises(StudyMismatch, match=r"of the database .*study.db, and postgresql://me:\*"):
        folder.claim(other, url)
    assert folder.identity.read_text() == first
    assert folder.claim(other, None) != first, "a database that was removed begins anew"


@pytest.mark.parametrize("name", ["feature%2Fx", "what?", "a b#c"])
def test_the_database_is_in_the_folder_whatever_that_is_called(name: str, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / name)
    folder.create()
    open_storage(folder.storage_url(None))
    assert folder.database.is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_artifacts_are_looked_for_where_they_are(tmp_path: Path) -> None:
    here, place = tmp_path / "one" / "artifacts", tmp_path / "place"
    assert nearest(None, here) is None and nearest("s3://mine", here) == "s3://mine"
    here.mkdir(parents=True)
    assert nearest("/moved/one/artifacts", here) == here
    place.mkdir()
    (place / "weights").touch()
    assert nearest(str(place), here) == place, "run.artifacts leaves the study's own folder empty"
    (here / "weights").touch()
    assert nearest(str(place), here) == here


def test_excused_trials_do_not_count(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for _ in range(3):
        study.tell(study.ask(), state=TrialState.FAIL)
    excuse(study, [0])
    excuse(study, [2])
    assert [trial.number for trial in trials_spent(study)] == [1]


def test_a_study_that_is_not_there_is_none(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    assert load_study(storage, "one", "exploration") is None


class Proposing(optuna.samplers.RandomSampler):
    """Proposes two of the parameters and leaves the others to chance."""

    space: ClassVar[dict[str, BaseDistribution]] = {
        "a": CategoricalDistribution(["svd", "keep"]),
        "b": FloatDistribution(0.0, 1.0),
    }

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {"a": "keep", "b": 0.25}


@pytest.mark.parametrize("sqlite", [True, False])
def test_a_proposal_is_written_at_once_and_suggested_as_ever(tmp_path: Path, sqlite: bool) -> None:
    study = opened(tmp_path) if sqlite else optuna.create_study(directions=["minimize"] * 2)
    study.sampler = Proposing(seed=0)
    trial = study.ask()
    write_proposal(trial)
    assert study.trials[0].params == ({"a": "keep", "b": 0.25} if sqlite else {})
    assert trial.suggest_categorical("a", ["svd", "keep"]) == "keep"
    assert trial.suggest_float("b", 0.0, 1.0) == 0.25
    other = trial.suggest_float("c", 0.0, 1.0)
    assert trial.params == {"a": "keep", "b": 0.25, "c": other}
    study.tell(trial, [1.0, 2.0])
    assert (opened(tmp_path) if sqlite else study).trials[0].params == trial.params
    with pytest.raises(ValueError, match="does not support dynamic value space"):
        study.ask().suggest_categorical("a", ["svd", "cp"])


def test_queued_parameters_go_before_proposed_ones(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.sampler = Proposing(seed=0)
    study.enqueue_trial({"b": 0.75})
    trial = study.ask()
    write_proposal(trial)
    assert trial.suggest_float("b", 0.0, 1.0) == 0.75
    assert trial.suggest_categorical("a", ["svd", "keep"]) == "keep"


def test_sqlite_lets_readers_in_while_it_writes(tmp_path: Path) -> None:

    opened(tmp_path)
    connection = sqlite3.connect(tmp_path / "study.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_constraint_is_read_by_optuna_and_by_the_dashboard(tmp_path: Path) -> None:
    study = opened(tmp_path)
    trial = study.ask()
    set_constraint(trial, 0.25)
    frozen = study.tell(trial, [1.25, 2.0])
    # What the samplers read, and the key that optuna-dashboard 0.21 looks for.
    assert list(frozen.constraints.values()) == [0.25]
    assert frozen.system_attrs["constraints"] == [0.25]
    assert study.best_trials == []


def test_weights_go_to_the_artifact_store_and_back(tmp_path: Path) -> None:
    study, model = opened(tmp_path), TinyNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    folder = StudyFolder(tmp_path)
    trial = study.ask()
    artifact = save_weights(model, trial, FolderStore(folder.artifacts))
    state = fetch_weights(artifact, FolderStore(folder.artifacts))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_digest_follows_the_weights() -> None:
    state = portable_state(TinyNet())
    other = {**state, "fc.bias": state["fc.bias"] + 1e-3}
    half = {key: value.to(torch.bfloat16) for key, value in state.items()}
    assert state_digest(state) == state_digest(dict(reversed(state.items())))
    assert len({state_digest(one) for one in (state, other, half)}) == 3


def test_half_a_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "result.json"
    write_text(path, "old")

    def cut_off(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_weights_are_written_in_one_step(tmp_path: Path) -> None:
    state = portable_state(TinyNet())
    write_weights(tmp_path / "b" / "w.safetensors", state)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["w.safetensors"]


def test_the_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "one")
    folder.create()
    code = (
        "import os, signal; from pathlib import Path; from autocompress.store import StudyFolder;"
        f"lock = StudyFolder(Path({str(folder.path)!r})).lock(); print('held', flush=True);"
        "signal.pause()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="being run by another process"):
            folder.lock()
        holder.kill()
    with folder.lock():
        pass


def test_a_folder_that_can_not_be_made_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run.out: can't make the folder /proc/x"):
        StudyFolder(Path("/proc/x")).create()
