"""The sweep over published networks: every end of it is a row that a person understands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import sweep_models  # noqa: E402


def row_of(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, channels: bool = True
) -> dict[str, Any]:
    monkeypatch.setattr(sweep_models, "build_model", lambda *_: model)
    monkeypatch.setattr(sweep_models, "SIZES", (8, 16, 32))
    return sweep_models.attempt("torchvision:it", ("svd",), channels)


class Small(nn.Module):
    """Three convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def test_a_network_goes_through_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.export.build_model", lambda *_: Small())
    row = row_of(Small(), monkeypatch)
    assert (row["outcome"], row["reason"]) == ("ok", ""), row.get("trace")
    assert 1.9 < row["macs"] < 2.5 and 0 <= row["difference"] < 1e-3
    assert list(row["steps"]) == [
        "build",
        "find its input size",
        "analyse",
        "channel groups",
        "layer table",
        "plan",
        "apply",
        "forward and backward",
        "save and build again",
        "export",
    ]
    assert json.loads(json.dumps(row)) == row
    assert sweep_models.line("torchvision:it", row).endswith("| ok |")


def test_networks_that_can_not_be_halved_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(4))
    ends(torch.zeros(1, 3, 8, 8))
    row = row_of(ends, monkeypatch)
    assert row["outcome"] == "refused" and "no layer may change: excluded by" in row["reason"]
    depthwise = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    row = row_of(depthwise, monkeypatch)
    assert row["outcome"] == "refused" and "still has 100 % of the MACs" in row["reason"]
    assert "one output channel" in row["reason"]


def test_a_failure_names_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    row = sweep_models.attempt("torchvision:resnet180", ("svd",))
    assert row["outcome"] == "failed" and row["reason"].startswith("build: ConfigError: model.so")

    class Greedy(nn.Module):
        """Asks a layer for what no replacement has."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 32), nn.Linear(32, 32), nn.Linear(32, 4)])
            for layer in self.layers:
                layer.width = layer.out_features

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            for layer in self.layers:
                x = layer(x)[:, : layer.width]
            return x

    row = row_of(Greedy(), monkeypatch, channels=False)
    assert row["outcome"] == "failed" and row["reason"].startswith("apply: AttributeError")
    assert "Greedy" not in row["reason"] and "Traceback" in row["trace"]


def test_the_smallest_size_that_trains_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 9)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).mean((2, 3))

    monkeypatch.setattr(sweep_models, "SIZES", (8, 16, 32))
    assert sweep_models.fitting_images("torchvision:it", Deep()).shape[-1] == 16
    fixed = Deep()
    fixed.pretrained_cfg = {"input_size": (3, 12, 12), "fixed_input_size": True}
    assert sweep_models.fitting_images("timm:it", fixed).shape[-1] == 12


def test_one_network_can_not_take_all_down() -> None:
    row = sweep_models.in_a_process("torchvision:resnet18", 0.01, ("svd",))
    assert row["outcome"] == "failed" and "not done in 0.01 s" in row["reason"]


def test_finished_rows_are_kept_and_failures_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def process(source: str, *_: Any) -> dict[str, Any]:
        done.append(source)
        outcome = "failed" if source.endswith("b") and len(done) < 3 else "ok"
        reason = "apply: | broken" if outcome == "failed" else ""
        return {"outcome": outcome, "reason": reason, "seconds": 1.0, "steps": {"build": 1.0}}

    monkeypatch.setattr(sweep_models, "in_a_process", process)
    monkeypatch.setattr(sweep_models, "known_sources", lambda: ["timm:a", "timm:b", "other:c"])
    arguments = ["sweep", "--out", str(tmp_path / "rows.json"), "--models", "timm:*"]
    monkeypatch.setattr(sys, "argv", arguments)
    sweep_models.main()
    sweep_models.main()
    assert done == ["timm:a", "timm:b"]
    said = capsys.readouterr().out
    assert "| failed: apply: / broken |" in said
    assert "timm: 2 networks, 1 ok, 0 refused with a reason, 1 failed." in said
    monkeypatch.setattr(sys, "argv", [*arguments, "--again"])
    sweep_models.main()
    assert done == ["timm:a", "timm:b", "timm:b"]
    assert "2 ok" in capsys.readouterr().out
    rows = sweep_models.finished(tmp_path / "rows.json")
    assert list(rows) == ["timm:a", "timm:b"] and "steps" not in rows["timm:a"]


def test_the_page_is_that_of_what_is_finished() -> None:
    """`python scripts/sweep_models.py --page` writes it anew."""
    rows = sweep_models.finished(sweep_models.FINISHED)
    assert rows and sweep_models.PAGE.read_text(encoding="utf-8") == sweep_models.page(rows)
