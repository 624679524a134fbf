"""The model card is valid, says what is known, and is left alone once it is somebody's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TinyNet

from autocompress.card import CARD, MARK, Facts, card_text, write_card
from autocompress.export import save, save_model
from autocompress.manifest import CLASSIFICATION
from autocompress.plan import Plan
from autocompress.profiler import profile_model
from autocompress.surgery import apply_plan
from autocompress.transforms import SVD

EXAMPLE = (torch.zeros(1, 1, 8, 8),)
NAME = 'my "study": a\\b'
METRIC = {"name": "accuracy", "unit": "%", "higher_is_better": True}


def result() -> dict[str, Any]:
    profile = profile_model(TinyNet().eval(), EXAMPLE, latency=False).to_dict()
    return {
        "study": NAME,
        "metric": METRIC,
        "delta": 1.0,
        "confidence": 0.95,
        "baseline": {"profile": profile, "val_score": 95.5, "test_score": 95.0},
        "test_reads": 1,
        "config": {"data": {"source": "digits"}},
        "seed": 7,
        "device": "cpu",
        "precision": "float32",
        "versions": {"torch": "2.14"},
    }


def found() -> dict[str, Any]:
    return {
        "stage": "annealing",
        "trial": 3,
        "val_score": 95.25,
        "val_drop": 0.25,
        "test_score": 94.5,
        "test_drop": 0.5,
        "test_drop_interval": [-0.25, 1.25],
        "test_images": 360,
        "layers": [
            {
                "name": f"conv{number}",
                "transform": {"transform": "svd", "rank": 4},
                "channels": "12 of 16 in",
                "params": [2000, 300],
            }
            for number in range(30)
        ],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("card")
    model = apply_plan(TinyNet().eval(), Plan({"fc": SVD(2)}))
    save_model(
        place / "best", model, Plan({"fc": SVD(2)}), None, EXAMPLE,
        profile_model(model, EXAMPLE, latency=False), formats=("onnx",),
        classes=("cat", "dog | wolf", "c", "d"), normalization={"mean": [0.5], "std": [0.25]},
        task={"kind": CLASSIFICATION, "metric": METRIC},
    )  # fmt: skip
    return place / "best"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "best")


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(matter)
    return parsed


def test_front_matter_is_valid_and_has_no_license(folder: Path) -> None:
    text = card_text(folder, Facts(result(), found()))
    matter = front(text)
    assert matter["library_name"] == "autocompress" and "license" not in matter
    assert matter["pipeline_tag"] == "image-classification"
    (entry,) = matter["model-index"]
    assert entry["name"] == NAME
    (measured,) = entry["results"]
    assert measured["dataset"]["name"] == "digits"
    assert measured["metrics"][0]["value"] == 94.5


def test_a_model_hub_reads_it(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(card_text(folder, Facts(result(), found())))
    (entry,) = card.data.eval_results
    assert (entry.dataset_name, entry.metric_value) == ("digits", 94.5)


def test_it_says_what_a_study_measured(folder: Path) -> None:
    text = card_text(folder, Facts(result(), found()))
    for part in (
        "| on validation data | 95.50 % | 95.25 % | 0.25 points |",
        "| on test data | 95.00 % | 94.50 % | 0.50 points |",
        "-0.25 to 1.25, from 360 images",
        "Test data was read once",
        "1.00 points were allowed, at a confidence of 95.0 %",
        "`predict_onnx.py`",
        "mean [0.5] and standard deviation [0.25]",
        "cat, dog | wolf, c, d",
        "| `conv0` | svd (rank 4); 12 of 16 in | 2,000 | 300 |",
        "5 more are in `plan.json`",
        "Seed 7, trial annealing/3, on cpu in float32.",
        "model=YourNet()",
        "fewer MACs",
    ):
        assert part in text, part
    assert "read 3 times by the study: the more often" in card_text(
        folder, Facts({**result(), "test_reads": 3}, found())
    )


def test_an_int8_file_has_figures_of_its_own(folder: Path) -> None:
    int8 = {
        "stage": "annealing", "trial": 3, "val_score": 95.1, "val_drop": 0.4,
        "test_score": 94.4, "test_drop": 0.6,
    }  # fmt: skip
    text = card_text(folder, Facts({**result(), "int8": int8}, found()))
    assert "| int8, on validation data | 95.50 % | 95.10 % | 0.40 points |" in text
    assert "| int8, on test data | 95.00 % | 94.40 % | 0.60 points |" in text
    others = {**result(), "int8": {**int8, "trial": 4}}
    assert "int8, on" not in card_text(folder, Facts(others, found()))


def test_a_card_never_costs_the_network(folder: Path) -> None:
    before = (folder / CARD).read_text()
    reason = write_card(folder, Facts(result(), {"val_score": "high", "val_drop": None}))
    assert reason is not None and "Error" in reason
    assert (folder / CARD).read_text() == before
    assert not (folder / f".{CARD}.partial").exists()


def test_it_says_nothing_that_is_not_known(folder: Path) -> None:
    text = (folder / CARD).read_text()
    matter = front(text)
    assert "model-index" not in matter
    assert "How good it is" not in text and "None" not in text and "Compressed network" in text
    without_test = {name: value for name, value in found().items() if "test" not in name}
    text = card_text(folder, Facts(result(), without_test))
    assert "Test data was not read for this network" in text and "model-index" not in front(text)


def test_a_card_that_somebody_took_over_stays(folder: Path) -> None:
    path = folder / CARD
    lines = [line for line in path.read_text().splitlines() if not line.startswith(MARK)]
    path.write_text("\n".join(["mine", *lines]))
    write_card(folder, Facts(result(), found()))
    assert path.read_text().startswith("mine")
    model = apply_plan(TinyNet().eval(), Plan({"fc": SVD(2)}))
    save(model, folder, like=folder, formats=())
    assert path.read_text().startswith("mine")
    path.unlink()
    write_card(folder, Facts(result(), found()))
    assert "95.25 %" in path.read_text()
    # What was measured before doesn't hold for a network that was trained further.
    save(model, folder, like=folder, formats=())
    assert "95.25 %" not in path.read_text() and "trained further" in path.read_text()
