"""The program that makes the published table anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autocompress.compatible import compatible_profile
from autocompress.zoo import ZOO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import reproduce_table  # noqa: E402
import torch  # noqa: E402

TINY = (
    "model.arguments={num_classes=10,in_channels=1,width=4}",
    "data.augment=none",
    "baseline.epochs=3",
    "finetune.epochs=0.3",
    "finetune.final_epochs=0.6",
    "finetune.learning_rate=0.05",
    "search.trials=2",
    "search.annealing_trials=1",
    "confidence=0.5",
    "run.workers=0",
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce_table.py", *arguments])
    return reproduce_table.main()


def row(monkeypatch: pytest.MonkeyPatch, place: Path, *more: str) -> int:
    places = ("--out", str(place / "runs"), "--results", str(place / "rows"))
    named = ("resnet18", "--data", "digits", "--delta", "60", *places)
    return run(monkeypatch, "run", *named, *more, "--set", *TINY)


# The signal that ends a piece may come while Python calls back for a dead object, where exceptions
# are ignored; the study then ends at its next step.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_row_is_made_in_pieces_and_shown_below_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    assert row(monkeypatch, tmp_path, "--minutes", "0.01") == 130
    assert "run the same command again" in capsys.readouterr().out
    assert not (tmp_path / "rows").exists()
    assert row(monkeypatch, tmp_path) == 0
    (path,) = (tmp_path / "rows").glob("*.json")
    assert path.name == "resnet18-digits-s0.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    base, stage1, final = found["baseline"], found["stage1"], found["final"]
    network = ZOO["resnet18"](num_classes=10, in_channels=1, width=4)
    expected = compatible_profile(network, (torch.zeros(1, 1, 8, 8),))
    assert base["compatible"]["macs_g"] == expected.macs_g
    assert base["params"] == sum(p.numel() for p in network.parameters())
    assert found["input"] == [1, 8, 8] and found["trials"] == {"exploration": 2, "annealing": 1}
    assert final["params"] < base["params"] and stage1["params"] < base["params"]
    assert final["compatible"]["params_m"] == pytest.approx(final["params"] / 1e6)
    assert final["test_drop"] == pytest.approx(base["test_score"] - final["test_score"])
    assert found["command"].startswith("python scripts/reproduce_table.py run resnet18")
    assert found["versions"]["torch"] in torch.__version__
    capsys.readouterr()
    assert run(monkeypatch, "show", "--results", str(tmp_path / "rows")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| resnet18, published (CIFAR-100) | delta 1 | 11.2201 M | 5.69x")
    assert lines[3].startswith(f"| **resnet18, digits** | {base['test_score']:.2f}, ")
    assert f"{base['params'] / final['params']:.2f}x" in lines[3]
    assert "single runs, chosen on the split that is reported" in lines[-1]


def test_bad_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "show", "--results", str(tmp_path)) == 2
    assert "run some first" in capsys.readouterr().err
    assert run(monkeypatch, "run", "vgg19", "--data", "folder:mine") == 2
    assert "give --classes" in capsys.readouterr().err
    assert run(monkeypatch, "run", "vgg19", "--set", "search.trials") == 2
    assert "give key=value, e.g. search.trials=20" in capsys.readouterr().err
    assert run(monkeypatch, "run", "vgg19", "--set", "search.trial=3") == 2
    assert "Did you mean 'trials'" in capsys.readouterr().err


def test_the_published_figures_agree_with_each_other() -> None:
    for name, published in reproduce_table.PUBLISHED.items():
        # Sizes are parameters of 4 bytes, and the zoo's networks are the very ones.
        assert published.params * 4e6 / 2**20 == pytest.approx(published.size, abs=0.006), name
        network = ZOO[name](num_classes=100)
        found = compatible_profile(network, (torch.zeros(1, 3, 32, 32),))
        assert f"{found.params_m:.4f}" == f"{published.params:.4f}"
        assert f"{found.macs_g:.4f}" == f"{published.macs:.4f}"
        assert found.memory_mb - found.size_mb == pytest.approx(published.activations[0], abs=0.006)
