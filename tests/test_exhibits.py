"""Files and names for people who look at trials."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import optuna
from optuna.artifacts import FileSystemArtifactStore

from autocompress import exhibits
from autocompress.exhibits import (
    COLOURS,
    MOST_BARS,
    artifact_ids,
    layer_picture,
    publish,
    trial_files,
    trial_name,
)
from autocompress.scale import ACCURACY
from autocompress.transforms import TRANSFORMS

SPEC = {"kind": "conv", "in_channels": 3, "out_channels": 8, "kernel_size": [3, 3]}
FACTS = {
    "baseline": {
        "params": 1000,
        "macs": 9000,
        "layers": [
            {"name": "a<b", "params": 600, "macs": 8000},
            {"name": "fc", "params": 400, "macs": 1000},
        ],
    },
    "layers": [{"name": "a<b", **SPEC}],
    "left_alone": {"fc": "the classifier"},
}
PLAN = json.dumps({"version": 2, "layers": {"a<b": {"transform": "svd", "rank": 2}}})
AFTER = {
    "params": 550,
    "macs": 3000,
    "layers": [
        {"name": "a<b.0", "params": 100, "macs": 1500},
        {"name": "a<b.1", "params": 50, "macs": 500},
        {"name": "fc", "params": 400, "macs": 1000},
    ],
}


def test_a_trials_files() -> None:
    files = trial_files(PLAN, AFTER, FACTS, {"a<b": 0.25}, "params")
    assert files["plan.json"] == PLAN and json.loads(files["profile.json"]) == AFTER
    rows = list(csv.DictReader(io.StringIO(files["layers.csv"])))
    assert rows[0]["layer"] == "a<b" and rows[0]["transform"] == "svd (rank 2)"
    assert (rows[0]["params before"], rows[0]["params after"]) == ("600", "150")
    assert rows[0]["error"] == "0.2500" and rows[1]["transform"] == ""
    assert "the classifier" in rows[1].values()
    texts = [e.text or "" for e in ElementTree.fromstring(files["layers.svg"]).iter()]
    assert "Parameters of each layer: 1.00 k → 550 (1.82x)" in texts
    assert "a<b" in texts and "600 → 150 (4.00x)" in texts
    assert (
        "MACs of each layer: 9.00 k → 3.00 k (3.00x)"
        in trial_files(PLAN, AFTER, FACTS, {}, "latency")["layers.svg"]
    )


def test_a_picture_of_many_layers_draws_the_small_ones_as_one() -> None:
    rows = [
        {"name": f"l{i}", "transform": None, "channels": "", "why": "kept", "params": [i, i]}
        for i in range(100)
    ]
    texts = [
        e.text for e in ElementTree.fromstring(layer_picture(rows, "params", (4950, 4950))).iter()
    ]
    assert "l99" in texts and "l5" not in texts
    assert f"{100 - MOST_BARS + 1} smaller layers" in texts
    assert str(sum(range(100 - MOST_BARS + 1))).startswith("1") and "1.83 k" in texts
    ElementTree.fromstring(layer_picture([], "params", (0, 0)))


def test_a_change_has_one_colour_in_pictures_and_in_reports() -> None:
    template = Path(exhibits.__file__).parent / "templates" / "report.html.j2"
    style = template.read_text(encoding="utf-8")
    values = dict(re.findall(r"--(\w+): (#\w{6})", style.partition("@media")[0]))
    classes = dict(re.findall(r"\.k-(\w+) { background: var\(--(\w+)\)", style))
    assert {name: values[variable] for name, variable in classes.items()} == COLOURS
    assert {*TRANSFORMS, "channels", "kept"} == COLOURS.keys()


def test_names_of_trials() -> None:
    name = trial_name("annealing/7", "params", 12.34, 0.41, ACCURACY)
    assert name == "annealing/7: 12.3x fewer parameters, accuracy drop 0.41 points"
    assert trial_name("annealing/7", "params", None, None, ACCURACY) == "annealing/7"


def test_files_of_a_study_are_on_all_its_stages_and_replaced(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(tmp_path)
    studies = [optuna.create_study(directions=["minimize"] * 2) for _ in range(2)]
    studies[1]._storage = studies[0]._storage
    second = studies[0]._storage.create_new_study(studies[0].directions, "second")
    studies[1]._study_id = second
    report = tmp_path / "report.html"
    report.write_text("first")
    old = publish([report], studies, store)
    report.write_text("second")
    new = publish([report], studies, store)
    assert old.keys() == new.keys() == {"report.html"} and old != new
    for study in studies:
        assert artifact_ids(study._storage.get_study_system_attrs(study._study_id)) == new
    assert (tmp_path / new["report.html"]).read_text() == "second"
    assert not (tmp_path / old["report.html"]).exists()
