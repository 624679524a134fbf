"""The report on synthetic studies that look like those the conductor makes."""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from dataclasses import asdict, replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.config import flatten, parse_config
from autocompress.figures import history_figure
from autocompress.layermap import REST, kind_of, layer_rows, segments
from autocompress.longfits import LongFit
from autocompress.report import study_file, write_report
from autocompress.scale import Scale
from autocompress.view import View, history, importances, outcome, pareto_trials, search_facts
from autocompress.wording import cell, plan_summary, quantity, transform_text

DELTA = 1.0
WIDTHS = [(3, 16, 32), (16, 16, 32), (16, 32, 16), (32, 64, 8), (64, 64, 8)]


def layer_specs() -> list[dict[str, Any]]:
    """Five convolutions and a classifier, as the study stores them."""
    specs = [
        {
            "name": f"layer{i}.conv",
            "kind": "conv2d",
            "in_channels": a,
            "out_channels": b,
            "kernel_size": [3, 3],
            "stride": [2, 2] if a != b and i else [1, 1],
            "groups": 1,
            "out_size": [side, side],
        }
        for i, (a, b, side) in enumerate(WIDTHS)
    ]
    fc = {"name": "fc", "kind": "linear", "in_channels": 64, "out_channels": 10, "groups": 1}
    return [*specs, {**fc, "kernel_size": [1, 1], "stride": [1, 1], "out_size": [1, 1]}]


def profile(shrink: float = 1.0) -> dict[str, Any]:
    """A profile whose layers 1 to 4 are cut in two parts when `shrink` > 1."""
    layers = []
    for spec in layer_specs():
        weights = spec["in_channels"] * spec["out_channels"] * math.prod(spec["kernel_size"])
        macs = weights * math.prod(spec["out_size"])
        cut = shrink > 1 and spec["name"] not in ("layer0.conv", "fc")
        parts = [f"{spec['name']}.{i}" for i in (0, 1)] if cut else [spec["name"]]
        factor = 2 * shrink if cut else 1
        for part in parts:
            layers.append(
                {
                    "name": part,
                    "kind": spec["kind"],
                    "params": int(weights / factor),
                    "macs": int(macs / factor),
                    "activation_bytes": 4096,
                }
            )
    params = sum(int(layer["params"]) for layer in layers)
    return {
        "params": params,
        "macs": sum(int(layer["macs"]) for layer in layers),
        "size_bytes": 4 * params,
        "memory_bytes": 4 * params + 500_000,
        "score": 92.3,
        "latency": {
            "median_ms": 2.41 / math.sqrt(shrink),
            "iqr_ms": 0.1,
            "batch_size": 1,
            "runs": 50,
            "device": "cpu",
            "threads": 2,
            "runtime": "torch",
        },
        "layers": layers,
        "uncounted": {},
    }


def plan(rank: int) -> dict[str, Any]:
    return {
        "version": 1,
        "layers": {
            "layer1.conv": {"transform": "svd", "rank": rank},
            "layer2.conv": {"transform": "tucker2", "rank_in": 8, "rank_out": rank},
            "layer3.conv": {"transform": "tucker2", "rank_in": 16, "rank_out": 24},
            "layer4.conv": {"transform": "tt", "ranks": [8, 16]},
        },
    }


def trial(
    drop: float,
    cost: float,
    state: TrialState = TrialState.COMPLETE,
    reason: str = "",
    parent: str | None = None,
) -> FrozenTrial:
    attributes: dict[str, Any] = {
        "plan": json.dumps(plan(8)),
        "metrics": {"score": 92.3 - drop, "drop": drop, "params": cost},
        "seconds": {"build": 0.2, "recalibrate": 1.1, "finetune": 14.0, "evaluate": 0.9},
        "parent": parent,
        "layer_errors": {"layer1.conv": 0.08, "layer2.conv": 0.21, "layer3.conv": 0.17},
    }
    if reason:
        attributes["reason"] = reason
    if state == TrialState.FAIL:
        attributes["metrics"] = {}
    return create_trial(
        state=state,
        values=[drop, cost] if state == TrialState.COMPLETE else None,
        user_attrs=attributes,
        system_attrs={"constraints": [drop - DELTA]},
    )


def make_study(name: str, trials: list[FrozenTrial]) -> optuna.Study:
    study = optuna.create_study(study_name=name, directions=["minimize", "minimize"])
    study.add_trials(trials)
    study.set_user_attr("layers", layer_specs())
    study.set_user_attr(
        "left_alone", {"layer0.conv": "3 input channels: no rank saves anything <here>"}
    )
    return study


def studies() -> tuple[optuna.Study, optuna.Study]:
    """Thirty and fifteen trials of all outcomes; the winner is annealing 7."""
    rng = random.Random(3)
    base = float(profile()["params"])
    first = []
    for i in range(30):
        ratio = 1.5 + 6.5 * rng.random()
        drop = 0.06 * ratio**1.8 + rng.gauss(0, 0.25)
        if i == 11:
            first.append(trial(0, 0, TrialState.FAIL, "the loss became NaN in epoch 1 <script>"))
        elif drop > 0.9 and i % 2:
            reason = f"drop of {5 * drop:.1f} points after recalibration is over the gate of 20"
            first.append(trial(5 * drop, base / ratio, TrialState.PRUNED, reason))
        else:
            first.append(trial(drop, base / ratio))
    second = []
    for i in range(15):
        ratio = 4.0 + 1.8 * rng.random()
        drop = 0.035 * ratio**1.8 + rng.gauss(0, 0.2)
        second.append(trial(drop, base / ratio, parent=f"exploration/{i}"))
    second[7] = trial(0.7, base / 6.1, parent="exploration/12")
    return make_study("demo-exploration", first), make_study("demo-annealing", second)


def result(met: bool = True) -> dict[str, Any]:
    base, small = profile(), profile(7.0)
    chosen = {
        "stage": "annealing",
        "trial": 7,
        "plan": plan(8),
        "profile": small,
        "val_score": 91.6,
        "val_drop_bound": 0.93,
        "val_drop_expected": 0.75,
        "val_drop": 0.7,
        "test_score": 91.4,
        "test_drop": 0.7,
        "test_drop_interval": [-0.05, 1.45],
    }
    metrics = {
        "score": 91.5,
        "drop": 0.8,
        "params": base["params"] / 4.1,
        "macs": base["macs"] / 3.2,
        "size_bytes": base["size_bytes"] / 4.1,
        "memory_bytes": 700_000,
        "latency_ms": None,
    }
    return {
        "study": "demo",
        "delta": DELTA,
        "confidence": 0.95,
        "objective": "params",
        "met": met,
        "stage_best": {"exploration": {"trial": 12, "metrics": metrics}, "annealing": None},
        "baseline": {"profile": base, "val_score": 92.3, "test_score": 92.1},
        "best": chosen if met else None,
        "second": {**chosen, "trial": 5, "profile": profile(5.0), "val_drop": 0.9} if met else None,
        "nearest": None
        if met
        else {
            "stage": "annealing",
            "trial": 7,
            "plan": plan(8),
            "val_score": 90.9,
            "val_drop": 1.4,
            "val_drop_bound": 1.7,
            "metrics": {**metrics, "drop": 1.4},
        },
        "seconds": {"baseline": 0.0, "table": 12.5, "exploration": 610.0, "annealing": 342.0},
        "versions": {"autocompress": "0.1.0", "torch": "2.11.0", "optuna": "5.0.0"},
        "seed": 0,
        "config": {"delta": 1.0, "search": {"transforms": ["svd", "tucker2"], "trials": 30}},
        "command": "autocompress run demo.toml",
    }


class Outline(HTMLParser):
    """Collects what a test asks about: tags, addresses that a browser would fetch, text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.hidden += tag in ("script", "style")
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "action", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data


def read(path: Path) -> tuple[str, Outline]:
    page = path.read_text("utf-8")
    outline = Outline()
    outline.feed(page)
    outline.text = re.sub(r"\s+", " ", outline.text)
    return page, outline


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outline]:
    path = tmp_path_factory.mktemp("run") / "demo" / "report.html"
    assert write_report(result(), *studies(), path) == path
    assert {file.name for file in path.parent.iterdir()} == {"report.html", "report.md"}
    return read(path)


def test_headline_says_ratio_drop_and_interval(met: tuple[str, Outline]) -> None:
    _, outline = met
    ratio = profile()["params"] / profile(7.0)["params"]
    assert f"{ratio:.2f}x fewer parameters" in outline.text
    assert "worse by 0.70 of the allowed 1.00 points (annealing trial 7)" in outline.text
    expected = "of 95 % the drop on new images is at most 0.93 points; 0.75 is to be expected."
    assert expected in outline.text
    assert "92.10 % → 91.40 %, a drop of 0.70 points" in outline.text
    assert "(95 % interval −0.05 to 1.45, paired on the same images)" in outline.text
    assert "The interval reaches beyond the allowed 1.00." in outline.text


def test_a_rise_is_no_negative_drop(tmp_path: Path) -> None:
    better = result()
    better["best"]["val_drop"] = -0.2
    better["test_reads"] = 2
    _, outline = read(write_report(better, *studies(), tmp_path / "report.html"))
    assert "better by 0.20 points; a drop of 1.00 was allowed" in outline.text
    assert "On test data, read 2 times as trials were added" in outline.text


def test_page_fetches_nothing(met: tuple[str, Outline]) -> None:
    page, outline = met
    assert all(address.startswith("#") for address in outline.fetched)
    assert {f'id="{address[1:]}"' in page for address in outline.fetched} == {True}
    assert "default-src 'none'" in page
    assert "Plotly.newPlot" in page and len(page) > 1_000_000


def test_sections_and_tables(met: tuple[str, Outline]) -> None:
    page, outline = met
    for heading in ("Before and after", "What happened to each layer", "Where the time went"):
        assert heading in outline.text
    assert "best of exploration (trial 12)" in outline.text
    assert "final (annealing trial 7)" in outline.text
    assert "Latency, torch, batch 1, 2 threads" in outline.text
    assert "Second best: annealing trial 5" in outline.text
    assert "autocompress.load(" in page and "best" in page
    assert 'search.transforms = ["svd", "tucker2"]' in outline.text
    assert outline.tags.count("details") == 2
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_layers_show_ranks_costs_errors_and_reasons(met: tuple[str, Outline]) -> None:
    _, outline = met
    assert "conv 16→32, 3×3, stride 2" in outline.text
    assert "tucker2 (rank_in 8, rank_out 8)" in outline.text
    assert "tt (ranks 8, 16)" in outline.text
    assert "0.210" in outline.text
    assert "4,608 → 658" in outline.text
    assert "the search kept it" in outline.text  # fc
    assert "no rank saves anything <here>" in outline.text


CHANNELS = {
    "layer1.conv": {
        "kept": "0-3,7",
        "of": 8,
        "chunks": 1,
        "members": [
            ["layer1.conv", "out", 0, 1],
            ["layer2.conv", "in", 0, 1],
            ["fc", "in", 0, 2],
        ],
    }
}


def test_channels_are_told_of_every_layer_that_lost_some(tmp_path: Path) -> None:
    found = result()
    found["best"]["plan"] = {**plan(8), "channels": CHANNELS}
    rows = {
        r["name"]: r for r in layer_rows({"layers": layer_specs()}, profile(), found["best"], {})
    }
    specs = {spec["name"]: spec for spec in layer_specs()}
    outs, ins = specs["layer1.conv"]["out_channels"], specs["fc"]["in_channels"]
    assert rows["layer1.conv"]["channels"] == f"{outs - 3} of {outs} out"
    assert rows["fc"]["channels"] == f"{ins - 6} of {ins} in"
    assert rows["fc"]["why"] == "only its channels became fewer"
    assert rows["layer3.conv"]["channels"] == ""
    first, second = studies()
    first.set_user_attr("left_groups", {"head": "its channels are outputs of the network"})
    _, outline = read(write_report(found, first, second, tmp_path / "report.html"))
    assert f"left: {outs - 3} of {outs} out" in outline.text
    assert "Channels that can't be removed: 1 group" in outline.text
    assert "its channels are outputs of the network" in outline.text
    assert plan_summary(found["best"]["plan"]).endswith("; 1 channel group: 5 of 8 channels")
    assert plan_summary({"channels": CHANNELS, "layers": {}}) == "1 channel group: 5 of 8 channels"


def test_without_removed_channels_no_column_is_shown(met: tuple[str, Outline]) -> None:
    assert "left: " not in met[1].text


def test_layer_rows_say_what_was_done_or_why_not() -> None:
    facts = {
        "layers": layer_specs(),
        "left_alone": {"layer0.conv": "excluded by default: the first layer", "up": "no Conv2d"},
        "bounds": {"layer1.conv": "compression <= 8x", "fc": "error <= 0.1"},
    }
    entry = {"plan": plan(8), "profile": profile(7.0)}
    rows = {r["name"]: r for r in layer_rows(facts, profile(), entry, {"layer1.conv": 0.21})}
    assert list(rows) == ["layer0.conv", *(f"layer{i}.conv" for i in range(1, 5)), "fc", "up"]
    changed, kept = rows["layer1.conv"], rows["fc"]
    assert changed["transform"] == plan(8)["layers"]["layer1.conv"] and changed["why"] is None
    assert (changed["error"], changed["bound"]) == (0.21, "compression <= 8x")
    assert changed["params"][0] == 2304 > changed["params"][1]
    assert changed["macs"][0] == 2304 * 32 * 32 > changed["macs"][1]
    assert (kept["transform"], kept["why"]) == (None, "the search kept it")
    assert kept["params"] == [640, 640] and kept["error"] is None
    assert rows["layer0.conv"]["why"] == "excluded by default: the first layer"
    assert rows["up"]["params"] == [None, None] and rows["up"]["why"] == "no Conv2d"


def test_bounds_are_shown_beside_what_was_done(tmp_path: Path) -> None:
    first, second = studies()
    first.set_user_attr("bounds", {"layer1.conv": "compression <= 8x", "fc": "error <= 0.1"})
    _, outline = read(write_report(result(), first, second, tmp_path / "report.html"))
    assert "; bound: compression <= 8x" in outline.text
    assert "the search kept it; bound: error <= 0.1" in outline.text


def test_everything_from_outside_is_escaped(met: tuple[str, Outline]) -> None:
    page, outline = met
    assert "saves anything &lt;here&gt;" in page
    assert "epoch 1 <script>" in outline.text
    assert "epoch 1 <script>" not in page


def test_plot_tells_outcomes_apart_by_shape_and_name(met: tuple[str, Outline]) -> None:
    page, _ = met
    call = page[page.index("Plotly.newPlot(") :]
    for name in (
        "exploration: within the allowed drop",
        "annealing: not surely within it",
        "exploration: stopped early",
        "Pareto front",
        "baseline",
        "allowed drop 1.00",
    ):
        assert f'"{name}"' in call
    for symbol in ("circle", "diamond", "circle-open", "diamond-open", "x-thin", "star"):
        assert f'"symbol":"{symbol}"' in call


def test_the_published_profilers_figures_stand_aside(tmp_path: Path) -> None:
    def compatible(scale: int) -> dict[str, float]:
        return {"params_m": 1 / scale, "size_mb": 4 / scale, "macs_g": 0.5, "memory_mb": 9.0}

    found = result()
    _, outline = read(write_report(found, *studies(), tmp_path / "plain.html"))
    assert "deeplite-profiler" not in outline.text
    found["baseline"]["compatible"], found["best"]["compatible"] = compatible(1), compatible(4)
    _, outline = read(write_report(found, *studies(), tmp_path / "both.html"))
    assert "Total Parameters, M1.00000.25004.00x" in outline.text
    assert "Memory Footprint, MB9.00009.00001.00x" in outline.text


def test_another_metric_is_named_with_its_unit(tmp_path: Path) -> None:
    found = {**result(), "metric": Scale("RMSE", "px", higher_is_better=False).to_dict()}
    _, outline = read(write_report(found, *studies(), tmp_path / "report.html"))
    assert "RMSE on validation data is worse by 0.7 of the allowed 1 px" in outline.text
    assert "92.1 px → 91.4 px, a drop of 0.7 px" in outline.text
    # The reasons of the trials below are made up here.
    assert "points" not in outline.text[: outline.text.index("All trials")]


def test_unmet_names_the_nearest(tmp_path: Path) -> None:
    _, outline = read(write_report(result(met=False), *studies(), tmp_path / "report.html"))
    assert "No plan kept the drop in accuracy within 1.00 points" in outline.text
    assert "The nearest is annealing trial 7 with 1.40 points" in outline.text
    assert "nearest (annealing trial 7)" in outline.text
    assert "4,608 → not profiled" in outline.text
    assert "4.10x" in outline.text
    assert "On test data" not in outline.text
    assert "Use it" not in outline.text


def test_macs_and_speed_stand_side_by_side(tmp_path: Path) -> None:
    found = result()
    times = {"batch_size": 1, "threads": 1, "runtime": "ONNX Runtime 1.32.0"}
    found["baseline"]["profile"]["latency"] |= times | {"median_ms": 5.0}
    found["best"]["profile"]["latency"] |= times | {"median_ms": 2.5}
    found["best"]["test_images"] = 10_000
    _, outline = read(write_report(found, *studies(), tmp_path / "report.html"))
    headline, _, table = outline.text.split("Before and after")  # the second is a link
    where = "ONNX Runtime 1.32.0, batch 1, 1 thread"
    for part, label in ((headline, "latency"), (table, f"Latency, {where}")):
        assert part.index("MACs") < part.index(label) < part.index("emory")
        assert "2.00x" in part
    assert f"5.00 ms → 2.50 ms{where}" in headline
    assert "paired on the same 10,000 images" in outline.text


INT8 = {
    "met": True,
    "reason": None,
    "stage": "annealing",
    "trial": 7,
    "file": "best/model.int8.onnx",
    "calibration": "minmax",
    "rounded_epochs": 2.0,
    "val_drop": 0.41,
    "val_drop_bound": 0.87,
    "test_drop": -0.1,
    "test_drop_interval": [-0.5, 0.3],
    "size_bytes": {"baseline": 4_000_000, "float32": 1_000_000, "int8": 250_000},
    "onnx_latency": {
        name: {"median_ms": ms, "runtime": "ONNX Runtime", "batch_size": 1, "threads": 2}
        for name, ms in (("baseline", 3.0), ("float32", 1.5), ("int8", 1.0))
    },
}


def test_the_int8_file_is_shown_beside_the_float32_files(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(result() | {"int8": INT8}, *studies(), path)
    text = " ".join(re.sub("<[^>]+>", " ", path.read_text()).split())
    assert (
        "best/model.int8.onnx holds annealing trial 7 in int8 (minmax, 2 epochs of "
        "quantization-aware fine-tuning)" in text
    )
    assert "worse by 0.41 points, at most 0.87" in text and "on test data by −0.10" in text
    assert "ONNX file 4.00 MB 1.00 MB 250 kB 16.0x 4.00x" in text
    assert "Latency, ONNX Runtime, batch 1, 2 threads 3.00 ms 1.50 ms 1.00 ms 3.00x 1.50x" in text
    missed = {"met": False, "reason": "annealing/7 lost at most 1.20 points."}
    write_report(result() | {"int8": missed}, *studies(), path)
    assert "There is no int8 file within delta: annealing/7 lost" in path.read_text()
    write_report(
        result() | {"int8": INT8 | {"size_bytes": None, "onnx_latency": None}}, None, None, path
    )
    assert "model.int8.onnx holds" in path.read_text()


def test_drops_that_are_those_of_int8_files_say_so(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    found = result() | {"confidence": 0.95}
    write_report(found, *studies(), path)
    assert "in int8" not in path.read_text()
    write_report(found | {"config": {"search": {"int8": True}}}, *studies(), path)
    text = path.read_text()
    assert (
        "points, in int8; 0.75 is to be" in text and "measured on validation data, in int8." in text
    )


def test_one_stage_and_nothing_finished(tmp_path: Path) -> None:
    """A study of exploration alone, and one in which no trial has ended."""
    bare = {"study": "new", "delta": 0.5, "objective": "latency", "met": False, "baseline": {}}
    _, outline = read(write_report(bare, None, None, tmp_path / "bare.html"))
    assert "No compressed model" in outline.text
    only = {**result(), "stage_best": {}, "objective": "macs"}
    _, outline = read(write_report(only, studies()[0], None, tmp_path / "one.html"))
    assert "fewer MACs" in outline.text


def test_parameters_and_macs_together_have_one_ratio(tmp_path: Path) -> None:
    found = {**result(), "objective": "params+macs"}
    before, after = found["baseline"]["profile"], found["best"]["profile"]
    share = (after["params"] / before["params"] + after["macs"] / before["macs"]) / 2
    _, outline = read(write_report(found, *studies(), tmp_path / "report.html"))
    assert f"{1 / share:.2f}x fewer parameters and MACs" in outline.text


def test_pareto_trials_are_feasible_and_not_beaten() -> None:
    trials = [
        trial(0.2, 100.0),
        trial(0.5, 50.0),
        trial(0.6, 60.0),  # beaten by the one before
        trial(0.5, 50.0),  # a twin
        trial(1.0, 40.0),  # exactly at delta
        trial(1.1, 10.0),  # infeasible
        trial(0.1, 5.0, TrialState.PRUNED, "gate"),
        trial(0.1, 5.0, TrialState.FAIL, "NaN"),
    ]
    assert [t.values for t in pareto_trials(trials)] == [
        [0.2, 100.0],
        [0.5, 50.0],
        [1.0, 40.0],
    ]
    found = [outcome(t) for t in trials[4:]]
    assert found == ["feasible", "infeasible", "stopped", "failed"]
    assert pareto_trials([]) == []


def view() -> View:
    first, second = studies()
    return View.read(result(), {"exploration": first, "annealing": second})


def test_the_best_so_far_only_rises_and_is_within_delta() -> None:
    trials = view().trials
    moments = history(trials)
    assert [m.count for m in moments] == list(range(1, len(trials) + 1))
    known = [m.best for m in moments if m.best is not None]
    assert known == sorted(known)
    assert known[-1] == max(t.ratio for t in trials if t.outcome == "feasible" and t.ratio)
    figure = history_figure(trials, "params")
    assert figure is not None
    lines = [t for t in figure.data if t.mode == "lines"]
    assert [list(line.y) for line in lines] == [known, known]
    assert history([]) == [] and history_figure([], "params") is None


def test_pauses_are_no_time_of_trials() -> None:
    def at(hour: int, minute: int) -> datetime:
        return datetime(2026, 1, 1, hour, minute)

    first, second, third = (view().trials[index] for index in range(3))
    overlapping = [
        replace(first, started=at(1, 0), ended=at(1, 10)),
        replace(second, started=at(1, 5), ended=at(1, 15)),
        replace(third, started=at(9, 0), ended=at(9, 1)),
    ]
    assert [m.minutes for m in history(overlapping)] == [10, 15, 16]


def test_importance_finds_the_layer_that_matters() -> None:
    rng = random.Random(0)
    names = ("a.rank_fraction", "a.transform", "b.rank_fraction")
    spaces = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    study = optuna.create_study(directions=["minimize", "minimize"])
    for _ in range(40):
        params = {name: rng.random() for name in names}
        study.add_trial(
            create_trial(
                values=[params["a.rank_fraction"], params["b.rank_fraction"]],
                params=params,
                distributions=spaces,
            )
        )
    found = importances({"exploration": study})
    assert next(iter(found["drop"])) == "a" and next(iter(found["cost"])) == "b"
    assert sum(found["drop"].values()) == pytest.approx(1)
    assert found["drop"]["a"] > 0.8
    few = optuna.create_study(directions=["minimize", "minimize"])
    few.add_trials(study.trials[:9])
    assert importances({"exploration": few}) == {} == importances({})


def test_what_the_search_found_is_in_the_result_too() -> None:
    facts = json.loads(json.dumps(search_facts(view())))
    assert len(facts["history"]) == 45
    assert facts["front"] == sorted(facts["front"], key=lambda row: row["drop"])
    assert facts["front"][-1]["ratio"] == facts["history"][-1]["best"]


def test_bars_have_one_scale_and_hold_everything() -> None:
    entry = {"plan": plan(8), "profile": profile(7.0)}
    rows = layer_rows({"layers": layer_specs()}, profile(), entry, {})
    params = profile()["params"]
    left = profile(7.0)["params"] + 500
    before, after = segments(rows, params + 1000, left, "params")
    assert sum(part.share for part in before) == pytest.approx(100)
    assert sum(part.share for part in after) == pytest.approx(100 * left / (params + 1000))
    assert before[-1].name == REST and before[-1].text == "everything else: 1,000 params"
    kinds = {part.name: part.kind for part in before}
    assert kinds["layer1.conv"] == "svd" and kinds["layer2.conv"] == "tucker2"
    assert kinds["fc"] == "kept"
    assert kind_of({"transform": None, "channels": "3 of 4 in"}) == "channels"


def test_the_layers_are_drawn(met: tuple[str, Outline]) -> None:
    page, outline = met
    assert page.count('class="strip') >= 4 and 'class="k k-tucker2"' in page
    assert "Tucker-2" in outline.text and "tensor train" in outline.text
    assert 'title="layer1.conv: 2,304 params"' in page


CLASSES = [
    {"name": "cat|<b>", "images": 100, "before": 90.0, "after": 84.0, "lost": 8, "won": 2},
    {"name": "dog", "images": 100, "before": 90.0, "after": 90.0, "lost": 0, "won": 0},
]


def test_classes_and_lost_images_are_shown(tmp_path: Path) -> None:
    found = result()
    (tmp_path / "lost_images").mkdir()
    (tmp_path / "lost_images/00.png").write_bytes(b"picture")
    row = {"index": 3, "label": "cat", "guess": "dog", "sure_before": 0.91, "sure_after": 0.6}
    found["best"] |= {
        "classes": CLASSES * 10,
        "lost_images": [
            {**row, "file": "lost_images/00.png"},
            {**row, "file": "lost_images/gone.png"},
        ],
    }
    page, outline = read(write_report(found, *studies(), tmp_path / "report.html"))
    assert "What the smaller network got worse at" in outline.text
    assert "cat|<b>10090.0 %84.0 %−6.082" in outline.text
    assert "dog10090.0 %90.0 %0.000" in outline.text
    assert "The other 8 classes" in outline.text
    assert page.count("data:image/png;base64,cGljdHVyZQ==") == 1 == page.count("<img ")
    assert "cat (91 %) → dog (60 %)" in outline.text
    markdown = (tmp_path / "report.md").read_text()
    assert "| cat\\|&lt;b> | 100 | 90.0 % | 84.0 % | −6.0 | 8 | 2 |" in markdown


def test_markdown_says_the_same(tmp_path: Path) -> None:
    found = result() | {"int8": INT8, "pace": {"images_per_second": 1234.5, "overhead": 0.125}}
    found["best"]["files"] = {"model.onnx": 39_100, "plan.json": 10}
    found["best"] |= {"final_epochs": 20.0, "final_bounds": {"0": -0.2, "1": 0.93}}
    write_report(found, *studies(), tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    ratio = profile()["params"] / profile(7.0)["params"]
    assert text.startswith(f"# demo: {ratio:.2f}x fewer parameters\n")
    for heading in (
        "## Before and after",
        "## In int8",
        "## Trials",
        "## What happened to each layer",
        "## Use it",
        "## Where the time went",
        "## How to make it again",
    ):
        assert f"\n{heading}\n\n" in text
    assert "| layer2.conv | conv 16→32, 3×3, stride 2 | tucker2 (rank_in 8, rank_out 8) |" in text
    assert "1,234 images a second were learned from; 12.5 % of a trial" in text
    program = "`python best/predict_onnx.py IMAGE`"
    assert f"| best/model.onnx | 39.1 kB | ONNX Runtime and others | {program} |" in text
    assert "| 20 epochs; drop at most −0.20 (seed 0), 0.93 (seed 1) |" in text
    assert "the weights of the trial itself" not in text
    assert "\n\n\n" not in text
    # Each table has as many cells in every row as in its heading.
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    write_report(result(met=False), None, None, tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "Use it" not in text and "No plan kept the drop" in text


def test_a_winner_with_the_weights_of_its_trial_says_so(tmp_path: Path) -> None:
    found = result() | {"final_epochs": 20.0}
    found["best"] |= {"final_epochs": 0.0, "final_bounds": {"0": 2.39}}
    write_report(found, *studies(), tmp_path / "report.html")
    expected = "20 epochs; drop at most 2.39 (seed 0); the weights of the trial itself are better"
    assert expected in (tmp_path / "report.md").read_text()


def test_long_fine_tunings_are_listed(tmp_path: Path) -> None:
    one = LongFit("annealing/7", 0, 20.0, 0.1, 1.4, 0.35, 0.9, "w", 75.0)
    fits = [one, replace(one, seed=1, bound=9.0), replace(one, seed=2, weights=None)]
    found = result() | {"long_fits": [asdict(fit) for fit in fits]}
    _, outline = read(write_report(found, *studies(), tmp_path / "report.html"))
    text = (tmp_path / "report.md").read_text()
    for cells in (
        ["annealing 7", "6.10x", "0", "20", "1.40", "0.35", "0.90", "within", "1 min 15 s"],
        [
            "annealing 7",
            "6.10x",
            "1",
            "20",
            "1.40",
            "0.35",
            "9.00",
            "too large a drop",
            "1 min 15 s",
        ],
        ["annealing 7", "6.10x", "2", "20", "1.40", "–", "–", "failed", "1 min 15 s"],
    ):
        assert f"| {' | '.join(cells)} |" in text and "".join(cells) in outline.text


def test_the_study_file_in_the_report_is_one() -> None:
    given = {
        "name": "mine",
        "model.source": "zoo:resnet20",
        "model.arguments": {"num_classes": 10},
        "data.source": "digits",
        "search.bounds": [{"layers": "a.*", "compression": 4.0}],
        "search.exclude": ["fc", 'odd "name"'],
    }
    config = parse_config(given)
    text = study_file(config.model_dump(mode="json"))
    assert parse_config(flatten(tomllib.loads(text))) == config


def test_cells_of_markdown_can_not_be_left() -> None:
    assert cell("a|b\n<i>[x](y)") == "a\\|b &lt;i>\\[x](y)"


def test_plan_texts() -> None:
    assert plan_summary(plan(8)) == "4 layers: 2 tucker2, 1 svd, 1 tt"
    assert plan_summary(json.dumps(plan(8))) == plan_summary(plan(8))
    assert plan_summary({"version": 1, "layers": {}}) == "no layer changed"
    assert transform_text({"transform": "svd", "rank": 12}) == "svd (rank 12)"


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (272_474, "params", "272 k"),
        (40_551_424, "macs", "40.6 M"),
        (4.09e9, "macs", "4.09 G"),
        (1_100_000, "size_bytes", "1.10 MB"),
        (640, "params", "640"),
        (39_800, "size_bytes", "39.8 kB"),
        (2.414, "latency_ms", "2.41 ms"),
        (91.6, "score", "91.60 %"),
        (None, "macs", "–"),
        (math.nan, "macs", "–"),
    ],
)
def test_quantity(value: float | None, metric: str, text: str) -> None:
    assert quantity(value, metric) == text
